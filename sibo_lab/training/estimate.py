"""What a run would take, before it is one: `python train.py … --dry-run`, and the memory that a run did take.

No weights are read: modules on meta and tensors without contents tell who gets h0, parameters, bytes and FLOPs. The
official code has nothing of the kind; its users find out from an out-of-memory error."""

from __future__ import annotations

import copy
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
from sibo_lab.data import tasks
from sibo_lab.evaluation import scoring
from sibo_lab.training import options, recipes


def reset_peak(device: str) -> None:
    """From here on `peak_memory` counts anew, also of the second run of a process (on CPUs: under Linux)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(AttributeError, OSError):  # a libc without it, a /proc that may not be written
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier run freed goes back to the system first
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator there, of the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def explain(m: nn.Module) -> str:
    """An injected model as a tree, a line a module: where h0 comes from and where it goes. Neighbouring blocks that are
    alike stand there once."""
    def told(name: str, x: nn.Module) -> str:
        base = x.base if isinstance(x, sibo.SIBOLayer) else x
        shape = f"{base.in_features} → {base.out_features}" if isinstance(base, nn.Linear) else ""
        if name == m.sibo.h0 and m.sibo.lam:
            return f"{shape:14} ══► h0"
        if not isinstance(x, sibo.SIBOLayer):
            return shape
        mixed = "h̃" if x.lam_start else "h"
        if isinstance(x, sibo.LoRA):
            seen = mixed if x.settings.frozen_too else "h"
            formula = f"{seen}W + s·{mixed}AB, rank {x.settings.rank}, Eq. ({5 if x.lam_start else 2})"
        else:
            skip = "sub-layer" if x.settings.side == "parallel" else mixed if x.settings.skip == "mixed" else "h"
            where = {"out": "output", "in": "input", "parallel": "beside it"}[x.settings.side]
            formula = f"{where}: {skip} + f({mixed}A)B, bottleneck {x.settings.bottleneck}, Eq. ({4 if x.lam_start else 1})"
        lam = f"   ◄══ h0, λ = {x.lam_start}{', learned' if x.lam_logit is not None else ''}" if x.lam_start else ""
        return f"{shape:14} {formula}{lam}"

    def shown(x: nn.Module, path: str) -> Iterator[tuple[str, str, nn.Module]]:
        for name, child in (x.base if isinstance(x, sibo.SIBOLayer) else x).named_children():
            if isinstance(child, nn.ModuleList):
                for _, same in groupby(child.named_children(), lambda b, blocks=f"{path}{name}.": (
                        told(blocks + b[0], b[1]), walk(b[1], f"{blocks}{b[0]}."))):
                    (first, block), *others = same
                    yield f"{name}.{first}{f' … {others[-1][0]}' if others else ''}", f"{path}{name}.{first}", block
            elif not isinstance(child, (nn.Identity, nn.Dropout)):
                yield name, f"{path}{name}", child

    def walk(x: nn.Module, path: str) -> list[str]:
        lines, children = [], list(shown(x, path))
        for i, (label, name, child) in enumerate(children):
            corner, rail = ("└─ ", "   ") if i == len(children) - 1 else ("├─ ", "│  ")
            lines += [f"{corner}{label}\t{told(name, child)}", *(rail + line for line in walk(child, f"{name}."))]
        return lines

    drawn = [line.split("\t") for line in walk(m, "")]
    return "\n".join([f"{type(m).__name__}, {m.config.num_hidden_layers} blocks, d = {m.config.hidden_size}",
                      *(f"{name:26} {said}".rstrip() for name, said in drawn)])


def explain_run(run: recipes.Run, skeleton: nn.Module) -> str:
    """Where h0 enters a backbone, of which `skeleton` has no weights: see `explain`."""
    if not run.settings:
        raise ValueError("--explain: expected an adapter or LoRA method, got --method full, which adapts no module")
    return explain(sibo.inject(copy.deepcopy(skeleton), run.settings))


def dry_run(run: recipes.Run, said: dict, task: tasks.Task, unknown: str = "") -> str:
    """What would be adapted and who would get h0; parameters, memory and FLOPs, from config.json alone; and the recipe,
    but for a number of it that is not known yet ("steps", where the data are not there)."""
    m = model.build(said, run.backbone, task.num_labels or None)
    trained = frozen = sum(p.numel() for p in m.parameters()) - (
        m.head.weight.numel() if getattr(m.config, "tie_word_embeddings", False) else 0)
    tree = f"{type(m).__name__}: everything is trained, nobody gets h0"
    if run.method != "full":
        tree = explain(sibo.inject(m, run.settings))
        trained = sum(p.numel() for p in m.parameters() if p.requires_grad)
    total = frozen + (0 if run.method == "full" else sum(x.numel() for n, x in m.named_parameters()
                                                         if x.requires_grad and not n.startswith("classifier.")))
    python, taken = peak_memory("cpu"), memory(said, run, task.num_labels or None)
    parts = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in taken.items())
    names = (*options.GROUPS["training"][:-1], "lam", "rank", "alpha", "dropout", "bottleneck", "dtype")
    recipe = [f"{name} {run.config()[name]}" for name in names if name != unknown and options.uses(run.method, name)]
    recipe += [] if task.num_labels else [f"protocol {run.protocol}: {scoring.BEAMS[run.protocol]} beams"]
    flops = 4 * total + 2 * trained  # two a weight forward, two backward, two more where it is trained
    return "\n".join([f"{run.backbone}: {tree}",
                      f"trainable parameters {trained:,} of {total:,} ({trained / total:.2%})",
                      f"memory, estimated: {sum(taken.values()) / 1e9:.2f} GB ({parts}), in {run.dtype}, "
                      f"{run.micro_batch_size} examples of {run.cutoff} tokens at a time; Python and its libraries "
                      f"beside that: {python / 1e9:.2f} GB here",
                      f"FLOPs a token, estimated: {flops / 1e9:.2f} G to train, {2 * total / 1e9:.2f} G to run",
                      f"recipe: {', '.join(recipe)}"])


class Alive(TorchDispatchMode):
    """Adds up the bytes of all tensors that were made while it is on and are alive: now, and at most so far."""

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


def memory(said: dict, run: recipes.Run, num_labels: int | None = None) -> dict[str, int]:
    """Bytes that a training step holds at most: "frozen" weights, what is "trained" with AdamW's two moments, and
    "step": gradients, activations and whatever else a micro-batch of full length makes.

    Nothing is fitted: forward and backward run on fake tensors, which have shapes and no memory, and every storage is
    counted from its birth to its death. So the backward keeps here what it keeps there: of a frozen linear nothing, of
    a norm its input and statistics, of attention q, k, v, the output (or the T × T weights), of the feed-forward what
    its activation and product multiply, of a low-rank path its input, mask and W in the activations' precision; with
    gradient checkpointing a block's input, and one block's worth of all that. The allocator's loss is not in it."""
    with FakeTensorMode():
        m = model.build(said, run.backbone, num_labels)
        for name, p in list(m.named_parameters()):
            model.put(m, name, torch.empty(p.shape, dtype=getattr(torch, run.dtype), device=run.device))
        if getattr(m.config, "tie_word_embeddings", False):
            m.head.weight = m.embed.weight
        for name, x in list(m.blocks.named_modules()) if run.base_bits else ():
            if isinstance(x, nn.Linear):
                m.blocks.set_submodule(name, quantized.QuantizedLinear(x, x.weight.detach(), run.base_bits))
        m = m.requires_grad_(True) if run.method == "full" else sibo.inject(m, run.settings)
        trained, weights = [p for p in m.parameters() if p.requires_grad], [*m.parameters(), *m.buffers()]
        earlier = trained if run.batch_size > run.micro_batch_size else []
        for p in earlier:  # an earlier micro-batch left its gradients
            p.grad = torch.empty_like(p)
        m.train().grad_checkpoint = run.grad_checkpoint
        ids = torch.zeros(run.micro_batch_size, run.cutoff, dtype=torch.int64, device=run.device)
        with Alive([*weights, *(p.grad for p in earlier)]) as alive:
            if num_labels:
                model.loss(m, ids, ids[:, 0]).backward()
            else:
                h, asked = m(ids, return_hidden=True)[-1].flatten(0, 1), ids.flatten()
                fast.cross_entropy(h, m.head.weight, m.head.bias, asked, torch.ones_like(asked)).backward()
    share = sum(p.nbytes for p in trained)
    return {"frozen": sum(t.nbytes for t in weights) - share, "trained": 3 * share,
            "step": alive.peak + sum(p.nbytes for p in earlier)}
