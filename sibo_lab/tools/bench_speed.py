"""Speed beside transformers + peft: same weights, batches, tokens and LoRA, each side in its faster dtype; and of SIBO
beside the plain method."""

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import model
import sibo
from sibo_lab import fast, files
from sibo_lab.backbone import config, locate, tokenizer
from sibo_lab.backbone.generate import generate, prefill
from sibo_lab.data import batch, readers, tasks
from sibo_lab.publish import folder
from sibo_lab.tools.bench_large import Batch, random_batches, trainer, write_shape
from sibo_lab.tools.bench_rows import DTYPE, Row, Rows, clocked, in_turn, named, paired, seconds
from sibo_lab.training import estimate, recipes

EOS = 2  # LLaMA's and SmolLM2's
Prompts = dict[str, Tensor]
SIZES = {8: 64, 64: 32}  # prompts at a time: tokens of an answer, at most
STEPS = "decoding", "compiled decoding"
GOALS = {  # what `training`, `generation` and `overhead` measure: its unit and goal
    "training: peak memory": ("GB", 0.7),
    "compiled training: ready after": ("s", 30.0),
    "training, answers labelled, eager": ("tokens/s", 2.2), "training, answers labelled, compiled": ("tokens/s", 3.0),
    "training, all labelled, eager": ("tokens/s", 1.5), "training, all labelled, compiled": ("tokens/s", 2.2),
    "compiled step: share of matrix products at the measured peak": ("FLOP/s", 0.85),
    "generation: first token ready after": ("s", 20.0),
    **{f"generation, {size} prompts, beside generate's {way}": ("tokens/s", 3.0)
       for size in SIZES for way in ("default", "fastest way")},
    **{f"decoding, {size} rows: a token against reading the weights once": ("s", None) for size in SIZES},
    **{f"{method}-sibo{learned} against {method}: {work}": ("s", 1.02) for method in ("adapter", "lora")
       for learned in ("", ", λ learned") for work in ("training step", *STEPS)},
    **{f"lora-sibo, {how}, against the frozen model: {work}": ("s", goal) for work in STEPS
       for how, goal in (("folded", 1.02), ("unfolded", None))}}
PAIRS = {"training": 4, "generation": 2, "overhead": 30}


@dataclass(frozen=True)
class Case:
    """What both sides run: weights in a Hugging Face folder, on a device, ours in a dtype, the peer in its fastest."""

    path: Path
    device: str = "cpu"
    dtype: torch.dtype = DTYPE

    @property
    def peer_dtypes(self) -> tuple[torch.dtype, ...]:
        if self.device != "cpu":
            return (torch.bfloat16,)
        slow = not fast.packs(torch.bfloat16)  # without AVX512 a product takes four to eight times as long
        return (torch.float32,) if slow else (torch.bfloat16, torch.float32)

    def row(self, name: str, ours: Sequence[float] = (), peer: Sequence[float] = (), peer_as: str = "") -> Row:
        unit, goal = GOALS[name]
        return paired(name, unit, ours, peer, goal, dtype=named(self.dtype), peer_as=peer_as)


def smollm2(**case) -> Case:
    """SmolLM2-135M in bfloat16, as a Hugging Face folder that both sides open."""
    path = files.cache() / "bench" / "smollm2-135m"
    if not (path / "config.json").is_file():
        gguf = locate.locate("smollm2-135m")
        folder.write(model.from_pretrained(gguf, torch.bfloat16), path, gguf)
    return Case(path, **case)


@lru_cache(1)
def frozen(case: Case) -> nn.Module:
    return model.from_pretrained(case.path, case.dtype, case.device)


def ours(case: Case, method: str = "lora", **settings) -> nn.Module:
    """Adapted by a method of train.py; "full": as it is. All share one copy of the frozen weights."""
    m, s = frozen(case), recipes.run_of(method, **settings).settings
    m = copy.deepcopy(m, {id(p): p for p in m.parameters()})
    return sibo.inject(m, **vars(s)) if s else m


def theirs(case: Case, method: str = "lora") -> nn.Module:
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    m = transformers.LlamaForCausalLM.from_pretrained(case.path, dtype=case.dtype).to(case.device)
    if method == "full":
        return m
    s, targets = recipes.run_of("lora").settings, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's
    return peft.get_peft_model(m, peft.LoraConfig(r=s.rank, lora_alpha=s.alpha, lora_dropout=s.dropout,
                                                  target_modules=targets))


def fastest(case: Case, how_fast: Callable[[nn.Module], float]) -> tuple[Case, nn.Module]:
    """The peer in whichever dtype is faster."""
    peers = [(one, theirs(one)) for one in (replace(case, dtype=dtype) for dtype in case.peer_dtypes)]
    return max(peers, key=lambda peer: how_fast(peer[1])) if len(peers) > 1 else peers[0]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Inside, PyTorch has `n` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Inside, the compiler finds no code of its own, of this process or of an earlier one."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    torch.compiler.reset()
    with TemporaryDirectory() as os.environ[name]:
        try:
            yield
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


def at_threads(measure: Callable[[Case], Rows]) -> Rows:
    """The rows of a group on all cores, then on one."""
    for n in sorted({torch.get_num_threads(), 1}, reverse=True):
        with threads(n), nothing_compiled():
            yield from measure(smollm2())


def speed(step: Callable, rows: Batch) -> float:
    """Tokens per second."""
    return sum(len(r.ids) for r in rows) / seconds(step, rows)


def problems(n: int, on_inputs: bool = False) -> Batch:
    """Word problems, as train.py encodes them."""
    t = tokenizer.from_pretrained("smollm2-135m")
    return [batch.encode(e, t, 256, on_inputs) for e in readers.load(tasks.task("word-problems"), "train", Path(), n)]


def batches(case: Case, n: int, size: int, on_inputs: bool = False) -> list[Batch]:
    """Word problems, batched as train.py does, in ids that the vocabulary has."""
    vocab = config.read_spec(case.path)["vocab_size"]
    rows = [replace(r, ids=[i % vocab for i in r.ids], labels=[i if i < 0 else i % vocab for i in r.labels])
            for r in problems(n * size, on_inputs)]
    order = batch.batches([len(r.ids) for r in rows], size, seed=0)
    return [[rows[i] for i in next(order)] for _ in range(n)]


def prompts(case: Case, n: int, size: int) -> list[Prompts]:
    """n times `size` word problems without answers, all of one width: what compiled for one fits the others."""
    rows = [batch.Row(r.ids[:r.labels.count(-100)]) for some in batches(case, n, size) for r in some]
    b = batch.to_device(batch.collate(rows, EOS, "left"), frozen(case))
    return [{key: value[i:i + size] for key, value in b.items()} for i in range(0, n * size, size)]


def matmul_rate(case: Case) -> float:
    """FLOP/s of a large square product."""
    n = 2048 if case.device == "cpu" else 8192
    a = torch.randn(n, n, device=case.device, dtype=case.dtype)
    return 2 * n**3 / min(seconds(torch.matmul, a, a) for _ in range(6))


def training(case: Case) -> Rows:
    """Steps of 8 examples, eager and compiled, how long the compiler takes at first, and what bounds a step."""
    n = PAIRS["training"]
    some = batches(case, n, 8)
    peer, m = fastest(case, lambda m: [speed(trainer(m), rows) for rows in some[:2]][1])
    steps = [trainer(m), trainer(ours(case)), trainer(fast.compiled(ours(case)))]
    yield case.row("compiled training: ready after", [sum(seconds(steps[2], rows) for rows in some[:2])])
    for what in ("answers labelled", "all labelled"):
        some = batches(case, n, 8, what == "all labelled")
        in_turn(steps, some[:1])
        theirs, eager, compiled = clocked(steps, some)
        tokens = [sum(len(r.ids) for r in rows) for rows in some]
        theirs, *speeds = ([n / s for n, s in zip(tokens, found, strict=True)] for found in (theirs, eager, compiled))
        for mode, mine in zip(("eager", "compiled"), speeds, strict=True):
            yield case.row(f"training, {what}, {mode}", mine, theirs, named(peer.dtype))
        if what == "answers labelled":
            yield share(case, some, steps[1], compiled)


def share(case: Case, some: Sequence[Batch], step: Callable, taken: Sequence[float]) -> Row:
    """FLOP/s of a step's matrix products, as PyTorch counts them (on CPUs without those of fused attention)."""
    flops = []
    for rows in some:
        with FlopCounterMode(display=False) as counter:
            step(rows)
        flops.append(counter.get_total_flops())
    rates = [n / s for n, s in zip(flops, taken, strict=True)]
    return case.row("compiled step: share of matrix products at the measured peak", rates,
                    [matmul_rate(case)] * len(rates))


def answer(m: nn.Module, most: int, prompts: Prompts, **how) -> float:
    """Tokens per second of greedy answers, each until EOS or `most` tokens."""
    f = partial(generate, m) if isinstance(m, model.Transformer) else partial(m.generate, do_sample=False, **how)
    out, width = [], prompts["input_ids"].shape[1]
    s = seconds(lambda: out.extend(f(**prompts, max_new_tokens=most, eos_token_id=EOS, pad_token_id=EOS).tolist()))
    return sum(row.index(EOS) + 1 if EOS in row else len(row) for row in (row[width:] for row in out)) / s


def ways(peer: Case, m: nn.Module) -> dict[str, Callable]:
    """How transformers generates: with peft as it is; with LoRA merged; then also compiled, with a static cache."""
    from transformers import CompileConfig

    merged, compiled = theirs(peer).merge_and_unload().eval(), CompileConfig(dynamic=False)
    compiled._compile_all_devices = True  # CPUs as well
    return {"default": partial(answer, m), "merged": partial(answer, merged), "merged, static cache, compiled":
            partial(answer, merged, cache_implementation="static", compile_config=compiled)}


def generation(case: Case) -> Rows:
    """Batches of prompts of each size, beside each way of transformers, and a token beside the memory's speed."""
    mine, (eight, *_) = ours(case).eval(), prompts(case, 1, 8)
    folded = fast.compiled(sibo.merge(ours(case).eval()))
    cold, warm, first = (seconds(answer, folded, most, eight) for most in (SIZES[8], SIZES[8], 1))
    yield case.row("generation: first token ready after", [cold - warm + first])  # all that was made on the way
    peer, m = fastest(case, lambda m: [answer(m.eval(), 8, eight) for _ in range(2)][1])
    peers = ways(peer, m.eval())
    for size, most in SIZES.items():
        some = prompts(case, PAIRS["generation"], size)
        sides = [partial(side, most) for side in (partial(answer, mine), partial(answer, folded), *peers.values())]
        with fast.packed_weights(mine), fast.packed_weights(folded):  # once for all batches, as eval.py does
            in_turn(sides, some[:1])
            *found, default, merged, static = in_turn(sides, some)
        speeds = dict(zip(peers, (default, merged, static), strict=True))
        for beside, mine_so, way in zip(("default", "fastest way"), found, ("default", max(
                peers, key=lambda way: median(speeds[way]))), strict=True):
            yield case.row(f"generation, {size} prompts, beside generate's {beside}", mine_so, speeds[way],
                           f"{named(peer.dtype)}, {way}")
    nbytes = sum(p.numel() for p in folded.parameters()) * case.dtype.itemsize  # the tied head once
    x = torch.ones(2**26, dtype=torch.int64, device=case.device)
    bound = nbytes * min(seconds(x.sum) for _ in range(6)) / x.nbytes
    for size in SIZES:
        with ExitStack() as packed:
            step = decoding(folded, some[0]["input_ids"][:size], packed)
            step()
            found = [seconds(step) for _ in range(12)]
        yield case.row(f"decoding, {size} rows: a token against reading the weights once", found, [bound] * 12)


def decoding(m: nn.Module, ids: Tensor, packed: ExitStack) -> Callable:
    """A function that computes the next token of each of `ids` (B, T), as generate does, once its weights are packed
    and its prompts read; `packed` unpacks them."""
    packed.enter_context(fast.packed_weights(m.eval()))
    B, T = ids.shape
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        _, mask, cache = prefill(m, ids, torch.ones_like(ids), T + 1)
    mask = F.pad(mask, (0, 1), value=1)

    @torch.no_grad()
    def step(*_) -> None:
        for kv in cache:
            kv.length = T
        m(ids[:, -1:], mask, cache=cache).max(-1)

    return step


def overhead(case: Case) -> Rows:
    """SIBO against the plain method, and folded LoRA-SIBO against the frozen model: many short pairs."""
    n = PAIRS["overhead"]
    some, ids = random_batches(n, 1, 48), torch.arange(100, 132, device=case.device).repeat(8, 1)  # (8, 32)

    def steps(sides: Sequence[nn.Module]) -> Iterator[tuple[str, list[list[float]]]]:
        for how in STEPS:
            torch.compiler.reset()  # or more kinds of blocks than it keeps
            with ExitStack() as packed:
                found = [decoding(m if how == "decoding" else fast.compiled(m), ids, packed) for m in sides]
                in_turn(found, range(2))
                yield how, clocked(found, range(n))

    for method in ("adapter", "lora"):
        sides = [ours(case, method), ours(case, f"{method}-sibo"), ours(case, f"{method}-sibo", learn_lam=True)]
        for work, (plain, *found) in chain([("training step", clocked([trainer(m) for m in sides], some))],
                                           steps(sides)):
            for learned, mine in zip(("", ", λ learned"), found, strict=True):
                yield case.row(f"{method}-sibo{learned} against {method}: {work}", mine, plain)
    sides = [ours(case, "full"), sibo.merge(ours(case, "lora-sibo")), ours(case, "lora-sibo")]
    for work, (base, *found) in steps(sides):
        for how, mine in zip(("folded", "unfolded"), found, strict=True):
            yield case.row(f"lora-sibo, {how}, against the frozen model: {work}", mine, base)


def peak(case: Case, side: Callable, rows: Batch) -> float:
    """GB at the peak of training steps, alone on the device."""
    estimate.reset_peak(case.device)
    step = trainer(side(case))
    for _ in range(2):
        step(rows)
    return estimate.peak_memory(case.device) / 1e9


def measures(case: Case) -> Rows:
    """All that a GPU is asked, in one process."""
    frozen.cache_clear()
    gc.collect()
    rows = batches(case, 1, 8, on_inputs=True)[0]
    peer, mine = (peak(case, side, rows) for side in (theirs, ours))
    yield case.row("training: peak memory", [mine], [peer])
    with nothing_compiled():
        yield from chain(training(case), generation(case), overhead(case))


def shape(name: str, device: str = "cuda") -> Case:
    path = files.cache() / "bench" / name
    write_shape(locate.SHAPES[name], path)
    return Case(path, device, torch.bfloat16)


ON_GPU = {"SmolLM2-135M": partial(smollm2, device="cuda", dtype=torch.bfloat16),
          "LLaMA-7B's shape": partial(shape, "llama7b")}


def cuda(cases: dict[str, Callable[[], Case]] | None = None) -> Rows:
    """SmolLM2 and LLaMA-7B's shape on a GPU; rows without figures where there is none, or too little memory on it."""
    for name, case in (cases or ON_GPU).items():
        rows, done = measures(case()) if cases or torch.cuda.is_available() else (), set()
        try:
            for row in rows:
                done.add(row.name)
                yield replace(row, name=f"{name}: {row.name}")
        except torch.OutOfMemoryError as e:
            print(f"{name}: {str(e).splitlines()[0]}", file=sys.stderr)
        for left, (unit, goal) in GOALS.items():
            if left not in done:
                yield paired(f"{name}: {left}", unit, goal=goal, dtype="bfloat16")
