"""What a run would take, for `train.py --explain` and `--dry-run`, and the memory that one did take.

No weights are read: tensors without contents show who gets h0, parameters, bytes and FLOPs. The official code has none.
"""

import ctypes
import resource
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import model
import sibo
from sibo_lab import fast
from sibo_lab.backbone import quantized
from sibo_lab.backbone.generate import to_float32
from sibo_lab.data import tasks
from sibo_lab.evaluation import scoring
from sibo_lab.placement import place
from sibo_lab.training import options
from sibo_lab.training.recipes import Run


def reset_peak(device: str) -> None:
    """Makes `peak_memory` start over (on CPUs: Linux only)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(AttributeError, OSError):  # another libc, no /proc, or one to read only
            ctypes.CDLL(None).malloc_trim(0)  # returns what the last run freed
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes of the GPU's allocator or, on a CPU, of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def explain(run: Run, m: nn.Module) -> str:
    """Injects `m` and draws it as a tree, a line per module: where h0 comes from and goes."""
    if not run.settings:
        raise ValueError("--explain: expected an adapter or LoRA method, got --method full, which adapts no module")
    with model.SkipInit():
        placed = place(m, run.settings)
        sibo.wrap(m, placed)
    h0 = "".join(f", h0 = what {name} reads" for name in sorted({stack.sources[0] for stack in placed.mixed.values()}))
    return "\n".join([f"{type(m).__name__}, {m.config.num_hidden_layers} blocks, d = {m.config.hidden_size}{h0}",
                      *branches(m)])


def branches(x: nn.Module, rail: str = "") -> Iterator[str]:
    """The lines below a module; neighbouring blocks that are alike are drawn once."""
    children = []
    for name, child in getattr(x, "base", x).named_children():
        if isinstance(child, nn.ModuleList):
            for _, alike in groupby(child.named_children(), lambda block: [*map(described, block[1].modules())]):
                (first, block), *others = alike
                children.append((f"{name}.{first}{f' … {others[-1][0]}' if others else ''}", block))
        elif not isinstance(child, nn.Identity | nn.Dropout):
            children.append((name, child))
    for i, (name, child) in enumerate(children, 1):
        corner, below = ("├─ ", "│  ") if i < len(children) else ("└─ ", "   ")
        yield f"{rail + corner + name:26} {described(child)}".rstrip()
        yield from branches(child, rail + below)


def described(x: nn.Module) -> str:
    """A linear module's shape, an adapter's or LoRA's formula, whether h0 enters here."""
    base = getattr(x, "base", x)
    shape = f"{base.in_features} → {base.out_features}" if isinstance(base, nn.Linear) else ""
    if not isinstance(x, sibo.SIBOLayer):
        return shape
    s, lam, mixed = x.settings, x.lam_start, "h̃" if x.lam_start else "h"
    if isinstance(x, sibo.LoRA):
        formula = f"{mixed if s.frozen_too else 'h'}W + s·{mixed}AB, rank {s.rank}, Eq. ({5 if lam else 2})"
    else:
        where = {"out": "output", "in": "input", "parallel": "beside it"}[s.side]
        skip = "sub-layer" if s.side == "parallel" else mixed if s.skip == "mixed" else "h"
        formula = f"{where}: {skip} + f({mixed}A)B, bottleneck {s.bottleneck}, Eq. ({4 if lam else 1})"
    entry = f"   ◄══ h0, λ = {lam:g}{', learned' * s.learn_lam}" if lam else ""
    return f"{shape:14} {formula}{entry}"


def dry_run(run: Run, spec: dict, task: tasks.Task, unknown: str = "") -> str:
    """The tree, parameters, memory, FLOPs (from config.json alone) and recipe, but what is `unknown` ("steps")."""
    m = tied(model.build(spec, run.backbone, task.num_labels))
    tree = explain(run, m) if run.settings else f"{type(m).__name__}: everything is trained, nothing gets h0"
    total, trained = quantized.parameters(m), sum(p.numel() for p in m.parameters() if p.requires_grad)
    # per weight two forward, which checkpointing repeats, two backward, and two more if it is trained
    flops = (6 if run.grad_checkpoint else 4) * total + 2 * trained
    python, parts = peak_memory("cpu"), memory(spec, run, task.num_labels)
    listed = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in parts.items())
    names = ("steps epochs lr warmup batch_size micro_batch_size cutoff train_on_inputs validate validate_every lam "
             "rank alpha dropout bottleneck dtype").split()
    recipe = [f"{name} {run.config()[name]}" for name in names if name != unknown and options.uses(run.method, name)]
    if not task.num_labels:
        recipe.append(f"protocol {run.protocol}: {scoring.BEAMS[run.protocol]} beams")
    return "\n".join([f"{run.backbone}: {tree}",
                      f"trainable parameters {trained:,} of {total:,} ({trained / total:.2%})",
                      f"memory, estimated: {sum(parts.values()) / 1e9:.2f} GB ({listed}), in {run.dtype}, "
                      f"{run.micro_batch_size} examples of {run.cutoff} tokens at a time; Python and its libraries "
                      f"add {python / 1e9:.2f} GB here",
                      f"FLOPs per token, estimated: {flops / 1e9:.2f} G to train, {2 * total / 1e9:.2f} G to run",
                      f"recipe: {', '.join(recipe)}"])


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on and alive `now`, and at the `peak`."""

    def __init__(self, before: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary({t.untyped_storage(): True for t in before})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage not in self.seen:  # views share one
                self.seen[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def memory(spec: dict, run: Run, num_labels: int = 0) -> dict[str, int]:
    """Bytes that a training step holds at most: "frozen" weights; what is "trained", with AdamW's two moments; and the
    "step": gradients, activations and whatever else a micro-batch of full length makes, each counted while it is alive.
    What the allocator wastes is left out."""
    with FakeTensorMode():
        m = fake_model(spec, run, num_labels).train()
        if run.settings:
            sibo.inject(m, **vars(run.settings))
        share = sum(p.nbytes for p in m.parameters() if p.requires_grad)
        frozen = sum(t.nbytes for t in (*m.parameters(), *m.buffers())) - share
        earlier = share if run.batch_size > run.micro_batch_size else 0  # gradients of micro-batches before this one
        return {"frozen": frozen, "trained": 3 * share, "step": peak(m, run, bool(earlier)) + earlier}


def peak(m: nn.Module, run: Run, earlier: bool) -> int:
    """Of what a step makes. Where all blocks are alike, two and three of them tell what each further one adds: in the
    forward pass always the same; after it what the pass keeps of the block or, at the backward's end, gradients."""
    blocks, few = m.blocks, []
    if len(blocks) > 3 and len({kind(block) for block in blocks}) == 1:
        for n in 2, 3:
            m.blocks = blocks[:n]
            few.append(one_step(m, run, earlier))
        m.blocks, added = blocks, [b - a for a, b in zip(*few, strict=True)]
        gradients = 0 if earlier else sum(p.nbytes for p in blocks[0].parameters() if p.requires_grad)
        if added[1] == max(added[2], gradients):  # else the larger of the two takes over later
            return max(x + (len(blocks) - 3) * more for x, more in zip(few[1][:2], added, strict=False))
    return max(one_step(m, run, earlier)[:2])


def kind(block: nn.Module) -> tuple:
    """What makes a block's step another one's."""
    return block.attn.rotate is None, block.attn.slides, *map(described, block.modules())


def one_step(m: nn.Module, run: Run, earlier: bool) -> tuple[int, int, int]:
    """The most bytes that are alive until the model returns, and after that; those that it keeps. `earlier`: there are
    gradients."""
    for p in (trained := [p for p in m.parameters() if p.requires_grad]):
        p.grad = torch.empty_like(p) if earlier else None
    ids = torch.zeros(run.micro_batch_size, run.cutoff, dtype=torch.int64, device=run.device)
    with Alive([*m.parameters(), *m.buffers(), *(p.grad for p in trained if earlier)]) as alive:
        out = model.loss(m, ids, ids[:, 0]) if isinstance(m, model.Bert) else m(ids, return_hidden=True)[-1]
        forward, kept, alive.peak = alive.peak, alive.now, alive.now
        if not isinstance(m, model.Bert):
            h, labels = out.flatten(0, 1), ids.flatten()
            if type(m.head) is nn.Linear:
                out = fast.cross_entropy(h, m.head.weight, m.head.bias, labels, torch.ones_like(labels))
            else:  # a head with LoRA on it
                out = nn.functional.cross_entropy(to_float32(m.head(h)), labels)
        out.backward()
    return forward, alive.peak, kept


def fake_model(spec: dict, run: Run, num_labels: int) -> nn.Module:
    m = model.build(spec, run.backbone, num_labels)
    for name, p in list(m.named_parameters()):
        dtype = model.stored_as(getattr(torch, run.dtype), name)
        model.put(m, name, torch.empty(p.shape, dtype=dtype, device=run.device))
    for name, x in list(m.blocks.named_modules()) if run.base_bits else ():
        if isinstance(x, nn.Linear):
            m.blocks.set_submodule(name, quantized.QuantizedLinear(x, x.weight.detach(), run.base_bits))
    m.grad_checkpoint = run.grad_checkpoint
    return tied(m)


def tied(m: nn.Module) -> nn.Module:
    if m.config.tie_word_embeddings:
        m.head.weight = m.embed.weight
    return m
