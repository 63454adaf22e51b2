"""Speed and memory beside transformers + peft: same weights, dtype, batches, tokens and LoRA (docs/performance.md).

Sides take turns. Quote the ratio, the median of the pairs' ratios: seconds change with the machine and its load."""

import ctypes
import gc
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor, nn

import model
import sibo
from sibo_lab import cli, export, files
from sibo_lab.backbone import config, locate, tokenizer
from sibo_lab.backbone.generate import generate
from sibo_lab.data import batch, readers, tasks
from sibo_lab.tools.bench_large import Batch, process_memory, random_batches, train_shape, trainer, write_shape
from sibo_lab.training import estimate, loop, recipes

TASK = tasks.task("word-problems")


@dataclass
class Row:
    """A line of the table. `goal` bounds the ratio ours / peer: from below if `faster`, else from above."""

    name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    goal: float | None = None
    faster: bool = False
    met: bool | None = None
    interval: tuple[float, float] | None = None  # 95 %, of the ratio


Rows = Iterator[Row]


def paired(name: str, unit: str, ours: Sequence[float], peer: Sequence[float], goal: float | None = None) -> Row:
    """Medians of paired measurements, or of none; from 30 pairs on, the ratio's interval by order statistics."""
    row = Row(name, unit, goal=goal, faster=unit.endswith("/s"))
    ratios = sorted(x / y for x, y in zip(ours, peer, strict=True))
    if ratios:
        row.ours, row.peer, row.ratio = median(ours), median(peer), median(ratios)
        row.met = goal and (row.ratio >= goal if row.faster else row.ratio <= goal)
    if len(ratios) >= 30:
        k = int(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5)
        row.interval = ratios[k], ratios[-1 - k]
    return row


def in_turn(sides: Sequence[Callable], inputs: Sequence) -> list[list]:
    """What each side returns for each input. All take one before the next, in alternating order: a machine that slows
    down slows all alike."""
    found = [[] for _ in sides]
    for i, x in enumerate(inputs):
        for side in range(len(sides))[::1 if i % 2 else -1]:
            found[side].append(sides[side](x))
    return found


def seconds(f: Callable, *args, **kwargs) -> float:
    began = perf_counter()
    f(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - began


def timed(name: str, ours: Callable, peer: Callable, inputs: Sequence, goal: float | None = None) -> Row:
    """The seconds that two functions take on the same inputs, after one to warm up."""
    sides = [partial(seconds, ours), partial(seconds, peer)]
    in_turn(sides, inputs[:1])
    return paired(name, "s", *in_turn(sides, inputs), goal)


def folder() -> Path:
    """SmolLM2 in bfloat16, as a Hugging Face folder that both sides open."""
    path = files.cache() / "bench" / "smollm2-135m"
    if not (path / "config.json").is_file():
        gguf = locate.locate("smollm2-135m")
        export.to_hugging_face(model.from_pretrained(gguf, torch.bfloat16), path, gguf)
    return path


def ours(method: str = "lora", path: Path | None = None, device: str = "cpu", **settings) -> nn.Module:
    """Adapted by a method of train.py; "full": as it is."""
    m, s = model.from_pretrained(path or folder(), torch.bfloat16, device), recipes.run_of(method, **settings).settings
    return sibo.inject(m, **vars(s)) if s else m


def theirs(method: str = "lora", path: Path | None = None, device: str = "cpu",
           dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    m = transformers.LlamaForCausalLM.from_pretrained(path or folder(), dtype=dtype).to(device)
    if method == "full":
        return m
    s, targets = recipes.run_of("lora").settings, ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's
    return peft.get_peft_model(m, peft.LoraConfig(r=s.rank, lora_alpha=s.alpha, lora_dropout=s.dropout,
                                                  target_modules=targets))


def speed(step: Callable, rows: Batch) -> float:
    """Tokens per second."""
    return sum(len(r.ids) for r in rows) / seconds(step, rows)


def batches(n: int, size: int, on_inputs: bool = False) -> list[Batch]:
    """Word problems, as train.py makes and batches them."""
    t = tokenizer.from_pretrained("smollm2-135m")
    rows = [batch.encode(e, t, 256, on_inputs) for e in readers.load(TASK, "train", Path(), n * size)]
    order = batch.batches([len(r.ids) for r in rows], size, seed=0)
    return [[rows[i] for i in next(order)] for _ in range(n)]


def training() -> Rows:
    """Steps of 8 examples, eager and compiled, and how long the compiler takes at first."""
    with TemporaryDirectory() as cold:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cold  # without the code that an earlier run compiled
        steps = [trainer(theirs()), trainer(ours()), trainer(loop.compiled(ours()))]
        ready = sum(seconds(steps[2], rows) for rows in batches(8, 8)[:2])
        yield Row("compiled training: ready after", "s", ready, goal=60.0, met=ready < 60)
        for what, on_inputs, goals in (("answers labelled", False, (2.0, 3.0)), ("all labelled", True, (1.5, 2.2))):
            some = batches(8, 8, on_inputs)
            in_turn(steps, some[:1])
            peer, *speeds = in_turn([partial(speed, step) for step in steps], some)
            for mode, mine, goal in zip(("eager", "compiled"), speeds, goals, strict=True):
                yield paired(f"training, {what}, {mode}", "tokens/s", mine, peer, goal)


def answer_speed(m: nn.Module, eos: int, most: int, prompts: dict[str, Tensor]) -> float:
    """Tokens per second of greedy answers, each until EOS or `most` tokens."""
    answer = partial(generate, m) if isinstance(m, model.Transformer) else partial(m.generate, do_sample=False)
    began, width = perf_counter(), prompts["input_ids"].shape[1]
    out = answer(**prompts, max_new_tokens=most, eos_token_id=eos, pad_token_id=eos)[:, width:].tolist()
    return sum(row.index(eos) + 1 if eos in row else len(row) for row in out) / (perf_counter() - began)


def generation() -> Rows:
    """Answers of at most 96 tokens; the peer in whichever dtype is faster."""
    t, mine = tokenizer.from_pretrained("smollm2-135m"), ours().eval()
    peers = [theirs(dtype=dtype).eval() for dtype in (torch.bfloat16, torch.float32)]
    rows = [batch.Row(t.encode(batch.prompt(e.instruction))) for e in readers.load(TASK, "test", Path(), 192)]
    for size, goal in ((8, 2.0), (64, 4.0)):
        some = [batch.collate(rows[i:i + size], t.eos_id, "left") for i in range(0, 3 * size, size)]
        for m in (mine, *peers):
            answer_speed(m, t.eos_id, 4, some[0])
        peer = max(peers, key=partial(answer_speed, eos=t.eos_id, most=16, prompts=some[0]))
        speeds = in_turn([partial(answer_speed, m, t.eos_id, 96) for m in (mine, peer)], some)
        yield paired(f"generation, {size} prompts", "tokens/s", *speeds, goal)
    x, eight = torch.ones(2**26, dtype=torch.int64), {key: value[:8] for key, value in some[0].items()}
    reading_speed = x.nbytes / min(seconds(x.sum) for _ in range(6))
    short, long = (seconds(generate, mine, **eight, max_new_tokens=n) for n in (8, 40))
    nbytes = sum(p.numel() * 2 for p in mine.parameters())  # LoRA is read in bfloat16 too, the tied head once
    yield paired("decoding, 8 rows: seconds a token against reading the weights once", "s", [(long - short) / 32],
                 [nbytes / reading_speed])


def overhead() -> Rows:
    """SIBO against the plain method, and folded LoRA-SIBO against the frozen model: 30 pairs each."""
    some, prompts = batches(30, 4), [torch.arange(100, 108).repeat(8, 1)] * 30  # (8, 8)

    def decoding(m: nn.Module) -> Callable:
        return partial(generate, m.eval(), max_new_tokens=12)

    for method in ("adapter", "lora"):
        plain, fixed, learned = ours(method), ours(f"{method}-sibo"), ours(f"{method}-sibo", learn_lam=True)
        for name, m in (("", fixed), (", λ learned", learned)):
            name = f"{method}-sibo{name} against {method}"
            yield timed(f"{name}: training step", trainer(m), trainer(plain), some, 1.02)
            yield timed(f"{name}: decoding", decoding(m), decoding(plain), prompts, 1.02)
    name, base = "lora-sibo, {}, against the frozen model: decoding", decoding(ours("full"))
    yield timed(name.format("folded"), decoding(sibo.merge(ours("lora-sibo"))), base, prompts, 1.03)
    yield timed(name.format("unfolded"), decoding(fixed), base, prompts)


def in_fresh_process(work: Callable, *args) -> dict:
    """OSError where the process dies."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(work, *args).result()
        except BrokenProcessPool:
            raise OSError(f"{args}: expected figures, got a process that died (out of memory?)") from None


def child(build: Callable, method: str, length: int = 0) -> dict[str, float]:
    """Seconds and GB, beyond the imports, of loading ("full") or of three steps of another method on 8 word problems or
    on random rows of `length` tokens, then with freed memory given back at once."""
    if build is theirs:
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    if length:
        ctypes.CDLL(None).mallopt(-3, 1 << 17)  # glibc's M_MMAP_THRESHOLD
    gc.collect()  # what the imports left, or it falls into the seconds
    estimate.reset_peak("cpu")
    start, began = process_memory(), perf_counter()
    m = build(method)
    if method == "full":
        with torch.no_grad():
            m(torch.arange(16)[None])
    else:
        in_turn([trainer(m)], random_batches(3, 8, length) if length else batches(3, 8))
    nbytes = process_memory()["peak"] - start["anonymous"] - start["files"]
    return {"seconds": perf_counter() - began, "GB": nbytes / 1e9}


def children(method: str, times: int) -> dict[str, list[list[float]]]:
    folder()  # written here, not where memory is measured
    found = in_turn([partial(in_fresh_process, child, side) for side in (ours, theirs)], [method] * times)
    return {key: [[x[key] for x in side] for side in found] for key in ("seconds", "GB")}


def memory() -> Rows:
    yield paired("training: peak memory", "GB", *children("lora", 3)["GB"], 0.7)


def estimates() -> Rows:
    spec = config.read_spec(folder())
    for method, length in product(("adapter-sibo", "lora-sibo"), (64, 128)):
        run = recipes.run_of(method, batch_size=8, micro_batch_size=8, cutoff=length)
        estimated = sum(estimate.memory(spec, run).values()) / 1e9
        measured = in_fresh_process(child, ours, method, length)["GB"]
        row = paired(f"peak memory against --dry-run's estimate: {method}, 8 × {length}", "GB", [measured], [estimated])
        row.goal, row.met = 1.15, abs(row.ratio - 1) <= 0.15
        yield row


def loading() -> Rows:
    """From safetensors in the page cache."""
    found = children("full", 5)
    yield paired("load to first logits", "s", *found["seconds"], 0.7)
    least = (folder() / "model.safetensors").stat().st_size + 49152 * 576 * 2  # the largest tensor is the embedding
    yield paired("load to first logits: peak memory against weights + largest tensor", "GB", found["GB"][0],
                 [least / 1e9] * 5, 1.0)


def cuda(path: Path | None = None, device: str = "cuda", sizes: Sequence = ((4, 256), (8, 1024))) -> Rows:
    """LLaMA-7B's shape with LoRA on a GPU; rows without figures where there is none."""
    steps = []
    if device != "cuda" or torch.cuda.is_available():
        path = path or files.cache() / "bench" / "llama7b"
        write_shape(locate.SHAPES["llama7b"], path)
        m = loop.compiled(ours(path=path, device=device))
        steps = [trainer(m), trainer(theirs(path=path, device=device))]
        flops = sum((6 if p.requires_grad else 4) * p.numel() for n, p in m.named_parameters() if n != "embed.weight")
        a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        rate = 2 * 4096**3 / min(seconds(torch.matmul, a, a) for _ in range(6))  # FLOP/s

    def peak(step: Callable, rows: Batch) -> float:
        estimate.reset_peak(device)
        step(rows)
        return estimate.peak_memory(device) / 1e9

    for size, length in sizes:
        name, some = f"LLaMA-7B's shape on {device}, {size} × {length}", random_batches(1, size, length)
        peaks = in_turn([partial(peak, step) for step in steps], some * 2) or [(), ()]  # this warms up, too
        speeds = in_turn([partial(speed, step) for step in steps], some * 5) or [(), ()]
        yield paired(f"{name}: training", "tokens/s", *speeds, 1.3)
        yield paired(f"{name}: share of the matrix rate", "FLOP/s", [x * flops for x in speeds[0]],
                     [rate for _ in speeds[0]], 0.5)
        yield paired(f"{name}: peak memory", "GB", *peaks)


GROUPS = {f.__name__: f for f in (training, generation, overhead, memory, estimates, loading, cuda)}


def table(rows: Sequence[Row]) -> str:
    def show(x: float | None) -> str:
        return "not measured" if x is None else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"

    lines = [["", "ours", "peer", "unit", "ratio", "goal", "met"]]
    for r in rows:
        interval = " ({:.3f}–{:.3f})".format(*r.interval) if r.interval else ""
        lines.append([r.name, show(r.ours), show(r.peer) if r.peer or r.ours is None else "", r.unit,
                      f"{r.ratio:.3f}{interval}" if r.ratio else "",
                      f"{'≥' if r.faster else '≤'} {r.goal:g}" if r.goal else "",
                      {None: "", True: "yes", False: "no"}[r.met]])
    return cli.format_table(lines, left=(0, 3))


def parser() -> cli.Parser:
    p = cli.Parser("-m sibo_lab bench", description="Speed and memory against transformers + peft, and of SIBO against "
                   "the plain method.")
    p.add_argument("--only", metavar="GROUPS", default=",".join(GROUPS), help="some of %(default)s (default: all)")
    p.add_argument("--out", type=Path, default=Path("docs/results/bench.json"), help="(default: %(default)s)")
    p.add_argument("--big", choices=("llama7b", "gptj6b"), help="instead: train this shape, and watch memory")
    p.add_argument("--method", default="adapter-sibo", choices=recipes.METHODS[1:], help="of --big (%(default)s)")
    p.add_argument("--base-bits", type=int, choices=[8, 4], help="of --big (default: 16)")
    p.add_argument("--folder", type=Path, help="of --big: its 13 GB of random weights, written if missing")
    return p


def main(args: Namespace) -> None:
    if args.big:
        path = args.folder or files.cache() / "bench" / args.big
        write_shape(locate.SHAPES[args.big], path)
        print(json.dumps(in_fresh_process(train_shape, args.big, args.method, path, args.base_bits), indent=1))
        return
    names = args.only.split(",")
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"--only: expected some of {', '.join(GROUPS)}, got {name!r}")
    rows = []
    for row in chain(*(GROUPS[name]() for name in names)):
        rows.append(row)
        print(table([row]).splitlines()[1], flush=True)
    print(table(rows))
    files.write(args.out, json.dumps([asdict(r) for r in rows], indent=1) + "\n")
