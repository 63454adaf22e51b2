"""Speed and memory, measured side by side with transformers + peft: same weights, dtype, batches, tokens and LoRA.

`python -m sibo_lab bench` prints the table and writes docs/results/bench.json. Two sides that are compared run in one process on one
machine, in turn, and the ratio is the median of the pairs' ratios; memory and loading are measured in fresh processes.
LoRA stands where the paper puts it on LLaMA (r 32 on q, k, v, up, down; dropout 0.05), on SmolLM2-135M in bfloat16.
Needs tests/requirements.txt (transformers, peft). Quote the ratios: seconds change with the machine and its load."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import model
import sibo
from sibo_lab import cli, files
from sibo_lab.backbone import config, generate, locate, tokenizer, weights
from sibo_lab.data import batch, readers, tasks
from sibo_lab.tools import bench_large
from sibo_lab.training import estimate, loop, recipes

LORA = {"rank": 32, "alpha": 64.0, "dropout": 0.05}
TASK = "word-problems"


@dataclass
class Row:
    """A line of the table. `goal` bounds the ratio ours / peer: from below where it is "faster", else from above."""

    name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    goal: float | None = None
    faster: bool = False
    met: bool | None = None
    interval: tuple[float, float] | None = None  # 95 %, of the ratio

    def __post_init__(self):
        if self.met is None and self.ratio is not None and self.goal is not None:
            self.met = self.ratio >= self.goal if self.faster else self.ratio <= self.goal


def compare(name: str, unit: str, ours: list[float], peer: list[float], goal: float | None, faster: bool = False,
            interval: bool = False) -> Row:
    """The row of paired measurements: medians, and the interval of the ratios' median, by its order statistics."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    row = Row(name, unit, statistics.median(ours), statistics.median(peer), statistics.median(ratios), goal, faster)
    if interval:
        k, ordered = int(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))), sorted(ratios)
        row.interval = ordered[k], ordered[-1 - k]
    return row


def seconds(f: Callable[[], object]) -> float:
    began = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def folder() -> Path:
    """SmolLM2 as a Hugging Face folder with bfloat16 weights, which both sides open."""
    path = files.cache() / "bench" / "smollm2-135m"
    if not (path / "config.json").is_file():
        gguf = locate.locate("smollm2-135m")
        stored = {name: w.bfloat16() for name, w in weights.tensors(gguf)}
        files.write_tensors(path / "model.safetensors", stored, {"format": "pt"})
        files.write(path / "config.json", json.dumps(config.read_spec(gguf)))
    return path


def ours(method: str = "lora", lam: float = 0.0, path: Path | None = None, device: str = "cpu",
         **settings) -> nn.Module:
    m = model.from_pretrained(path or folder(), torch.bfloat16, device)
    return sibo.inject(m, method, lam, **(LORA if method == "lora" else {}) | settings)


def theirs(dtype: torch.dtype = torch.bfloat16, path: Path | None = None, device: str = "cpu") -> nn.Module:
    import peft
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    m = transformers.LlamaForCausalLM.from_pretrained(path or folder(), dtype=dtype).to(device)
    return peft.get_peft_model(m, peft.LoraConfig(
        r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=targets))


def batches(n: int, size: int, on_inputs: bool) -> list[list[batch.Row]]:
    """Word problems as train.py makes and batches them."""
    t = tokenizer.from_pretrained("smollm2-135m")
    rows = [batch.encode(e, t, 256, on_inputs) for e in readers.load(tasks.task(TASK), "train", Path(), n * size)]
    order = batch.batches([len(r.ids) for r in rows], size, seed=0)
    return [[rows[i] for i in next(order)] for _ in range(n)]


class Trainer:
    """One side's training step, with the same optimizer and clipping on both."""

    def __init__(self, m: nn.Module):
        self.m, self.trained = m.train(), [p for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 3e-4, weight_decay=0.0, fused=True)

    def step(self, rows: list[batch.Row]) -> None:
        if isinstance(self.m, model.Transformer):
            loop.train_step(self.m, rows, len(rows), pad_id=2)
        else:
            self.m(**batch.to_device(batch.collate(rows, 2), self.m)).loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def training() -> Iterator[Row]:
    """Tokens a second of eager and compiled steps of 8 examples, and how long the compiler takes at first."""
    with tempfile.TemporaryDirectory() as cold:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cold  # what an earlier run compiled must not be found
        peer, eager, compiled = Trainer(theirs()), Trainer(ours()), Trainer(loop.compiled(ours()))
        some = batches(8, 8, False)
        ready = seconds(lambda: [compiled.step(rows) for rows in some[:2]])
        yield Row("compiled training: ready after", "s", ready, goal=60.0, ratio=None, met=ready < 60)
        for what, on_inputs, goals in (("answers labelled", False, (2.0, 3.0)), ("all labelled", True, (1.5, 2.2))):
            some, speed = batches(8, 8, on_inputs), ([], [], [])
            for side in (peer, eager, compiled):
                side.step(some[0])
            for rows in some:
                tokens = sum(len(r.ids) for r in rows)
                for side, found in zip((peer, eager, compiled), speed, strict=True):
                    found.append(tokens / seconds(lambda side=side, rows=rows: side.step(rows)))
            for mode, found, goal in zip(("eager", "compiled"), speed[1:], goals, strict=True):
                yield compare(f"training, {what}, {mode}", "tokens/s", found, speed[0], goal, faster=True)


def generation() -> Iterator[Row]:
    """Greedy answers to word problems until EOS or 96 tokens, in tokens a second; the peer in its faster dtype."""
    t = tokenizer.from_pretrained("smollm2-135m")
    mine, peers = ours().eval(), [theirs(torch.bfloat16).eval(), theirs(torch.float32).eval()]

    def run(m: nn.Module, b: dict, most: int = 96) -> float:
        """Tokens a second."""
        began, width = time.perf_counter(), b["input_ids"].shape[1]
        if isinstance(m, model.Transformer):
            new = generate.generate(m, **b, max_new_tokens=most, eos_token_id=t.eos_id)[:, width:]
        else:
            with torch.no_grad():
                new = m.generate(**b, max_new_tokens=most, do_sample=False, eos_token_id=t.eos_id,
                                 pad_token_id=t.eos_id)[:, width:]
        count = sum(row.index(t.eos_id) + 1 if t.eos_id in row else len(row) for row in new.tolist())
        return count / (time.perf_counter() - began)

    questions = readers.load(tasks.task(TASK), "test", Path(), 192)
    for size, goal in ((8, 2.0), (64, 4.0)):
        some = [batch.collate([batch.Row(t.encode(batch.prompt(e.instruction))) for e in questions[i:i + size]], t.eos_id,
                           "left") for i in range(0, 3 * size, size)]
        run(mine, some[0], 4)
        peer = max(peers, key=lambda p, b=some[0]: run(p, b, 4) and run(p, b, 16))
        speeds = [(run(mine, b), run(peer, b)) for b in some]
        yield compare(f"generation, {size} prompts", "tokens/s", *map(list, zip(*speeds, strict=True)), goal, True)
    yield from bandwidth(mine, some[0])


def bandwidth(m: nn.Module, b: dict) -> Iterator[Row]:
    """Decoding 8 rows against the time that reading each weight once takes at this machine's reading speed."""
    x = torch.ones(2**28, dtype=torch.bfloat16)
    x.sum()
    speed = x.nbytes / min(seconds(lambda: x.view(torch.int64).sum()) for _ in range(5))
    rows = {k: v[:8] for k, v in b.items()}
    steps = [seconds(lambda n=n: generate.generate(m, **rows, max_new_tokens=n)) for n in (8, 40)]
    weights = sum(p.numel() * 2 for p in m.parameters())  # LoRA's are read in bfloat16 as well, the tied head once
    yield Row("decoding, 8 rows: seconds a token against reading the weights once", "s", (steps[1] - steps[0]) / 32,
              weights / speed, (steps[1] - steps[0]) / 32 * speed / weights)


def overhead() -> Iterator[Row]:
    """SIBO against the plain method, and folded LoRA-SIBO against the frozen model: 30 pairs each."""
    prompt = {"input_ids": torch.arange(100, 108).repeat(8, 1)}
    some = batches(30, 4, False)

    def decode(m: nn.Module) -> float:
        return seconds(lambda: generate.generate(m, **prompt, max_new_tokens=12))

    def pairs(name: str, a: Callable, b: Callable, goal: float | None, unit: str = "s") -> Row:
        a(some[0]), b(some[0])
        times = [(a(rows), b(rows)) if i % 2 else (b(rows), a(rows))[::-1] for i, rows in enumerate(some)]
        return compare(name, unit, *map(list, zip(*times, strict=True)), goal, interval=True)

    for method in ("adapter", "lora"):
        plain, fixed, learned = ours(method), ours(method, 0.1), ours(method, 0.1, learn_lam=True)
        sides = [Trainer(m) for m in (plain, fixed, learned)]
        for kind, side in (("", sides[1]), (", λ learned", sides[2])):
            yield pairs(f"{method}-sibo{kind} against {method}: training step",
                        lambda rows, side=side: seconds(lambda: side.step(rows)),
                        lambda rows, side=sides[0]: seconds(lambda: side.step(rows)), 1.02)
        for m in (plain, fixed, learned):
            m.eval()
        for kind, m in (("", fixed), (", λ learned", learned)):
            yield pairs(f"{method}-sibo{kind} against {method}: decoding", lambda _, m=m: decode(m),
                        lambda _, m=plain: decode(m), 1.02)
    frozen, folded = model.from_pretrained(folder(), torch.bfloat16), sibo.merge(ours("lora", 0.1).eval())
    yield pairs("lora-sibo, folded, against the frozen model: decoding", lambda _: decode(folded),
                lambda _: decode(frozen), 1.03)
    yield pairs("lora-sibo, unfolded, against the frozen model: decoding", lambda _: decode(fixed),
                lambda _: decode(frozen), None)


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most so far (Linux)."""
    key = "VmHWM" if peak else "VmRSS"
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))


def child(what: str, side: str) -> dict[str, float]:
    """In a fresh process: what loading (`what` "load") or three training steps ("train") take beyond the imports."""
    if side == "theirs":
        import peft  # noqa: F401  (what the imports take is not counted)
        import transformers.models.llama.modeling_llama  # noqa: F401
    estimate.reset_peak("cpu")
    start = resident()
    began = time.perf_counter()
    if what == "load":
        if side == "ours":
            m = model.from_pretrained(folder(), torch.bfloat16)
        else:
            import transformers

            m = transformers.LlamaForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16)
        with torch.no_grad():
            m(torch.arange(16)[None])
    elif what == "train":
        trainer = Trainer(ours() if side == "ours" else theirs())
        for rows in batches(3, 8, False):
            trainer.step(rows)
    else:  # a method, `side` being the tokens of each of 8 rows, which begin differently
        settings = estimated(what, int(side)).settings()
        trainer = Trainer(ours(settings.pop("method"), settings.pop("lam"), **settings))
        for _ in range(3):
            trainer.step([batch.Row(row, row) for row in torch.randint(3, 1000, (8, int(side))).tolist()])
    return {"seconds": time.perf_counter() - began, "bytes": resident(peak=True) - start}


def estimated(method: str, length: int) -> recipes.Run:
    return recipes.Run(backbone="smollm2-135m", method=method, batch_size=8, micro_batch_size=8, cutoff=length)


def estimates() -> Iterator[Row]:
    """What `train.py --dry-run` estimates against the measured peak, with glibc told to give freed memory back."""
    said = config.read_spec(folder())
    for method, length in (("adapter-sibo", 64), ("adapter-sibo", 128), ("lora-sibo", 64), ("lora-sibo", 128)):
        guess = sum(estimate.memory(said, estimated(method, length)).values())
        command = [sys.executable, "-m", "sibo_lab", "bench", "--child", f"{method} {length}"]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
        ratio = seen["bytes"] / guess
        yield Row(f"peak memory against --dry-run's estimate: {method}, 8 × {length}", "GB", seen["bytes"] / 1e9,
                  guess / 1e9, ratio, goal=1.15, met=abs(ratio - 1) <= 0.15)


def processes(what: str, times: int) -> dict[str, list[dict]]:
    """`child` of both sides in turn."""
    folder()
    found = {"ours": [], "theirs": []}
    for _ in range(times):
        for side, seen in found.items():
            command = [sys.executable, "-m", "sibo_lab", "bench", "--child", f"{what} {side}"]
            seen.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return found


def memory() -> Iterator[Row]:
    """Peak memory of training steps of 8 word problems, beyond what the imports take."""
    found = processes("train", 3)
    yield compare("training: peak memory", "GB", *([x["bytes"] / 1e9 for x in seen] for seen in found.values()), 0.7)


def loading() -> Iterator[Row]:
    """From safetensors on disk (in the page cache) to the first logits."""
    found = processes("load", 5)
    yield compare("load to first logits", "s", *([x["seconds"] for x in seen] for seen in found.values()), 0.7)
    weights = (folder() / "model.safetensors").stat().st_size
    peak = statistics.median(x["bytes"] for x in found["ours"])
    yield Row("load to first logits: peak memory against weights + largest tensor", "GB", peak / 1e9,
              (weights + 49152 * 576 * 2) / 1e9, peak / (weights + 49152 * 576 * 2), 1.0)


def cuda(folder: Path | None = None, device: str = "cuda", sizes: tuple = ((4, 256), (8, 1024))) -> Iterator[Row]:
    """LLaMA-7B's shape with LoRA on a GPU against transformers + peft: tokens/s, share of the matrix rate, memory."""
    there = device != "cuda" or torch.cuda.is_available()
    sides = {}
    if there:
        folder = folder or files.cache() / "bench" / "llama7b"
        bench_large.write_shape(locate.SHAPES["llama7b"], folder)  # where it is not there yet
        sides = {"ours": Trainer(loop.compiled(ours(path=folder, device=device))),
                 "theirs": Trainer(theirs(path=folder, device=device))}
    for size, length in sizes:
        name = f"LLaMA-7B's shape on {device}, {size} × {length}"
        if not there:
            yield Row(f"{name}: training", "tokens/s", goal=1.3, faster=True)
            yield Row(f"{name}: share of the matrix rate", "FLOP/s", goal=0.5, faster=True)
            yield Row(f"{name}: peak memory", "GB")
            continue
        ids = torch.randint(3, 1000, (size, length)).tolist()
        rows, speed, peak = [batch.Row(row, row) for row in ids], {}, {}
        for trainer in sides.values():
            trainer.step(rows)
            trainer.step(rows)
        for _ in range(5):
            for side, trainer in sides.items():
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                speed.setdefault(side, []).append(size * length / seconds(lambda t=trainer, rows=rows: t.step(rows)))
                peak[side] = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else math.nan
        yield compare(f"{name}: training", "tokens/s", speed["ours"], speed["theirs"], 1.3, faster=True)
        m = sides["ours"].m
        trained = sum(p.numel() for p in sides["ours"].trained)
        flops = 4 * (sum(p.numel() for p in m.parameters()) - m.embed.weight.numel()) + 2 * trained  # a token
        rate, done = matrix_rate(device), statistics.median(speed["ours"]) * flops
        yield Row(f"{name}: share of the matrix rate", "FLOP/s", done, rate, done / rate, 0.5, True)
        yield Row(f"{name}: peak memory", "GB", peak["ours"], peak["theirs"], peak["ours"] / peak["theirs"])


def matrix_rate(device: str, n: int = 4096) -> float:
    """FLOP/s of a bfloat16 product of n × n matrices."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    a @ a
    return 2 * n**3 / min(seconds(lambda: a @ a) for _ in range(5))


GROUPS = {f.__name__: f for f in (training, generation, overhead, memory, estimates, loading, cuda)}


def table(rows: list[Row]) -> str:
    def show(x: float | None) -> str:
        return "not measured" if x is None else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"

    lines = [["", "ours", "peer", "unit", "ratio", "goal", "met"]]
    for r in rows:
        ratio = "" if r.ratio is None else f"{r.ratio:.3f}"
        if r.interval:
            ratio += f" ({r.interval[0]:.3f}–{r.interval[1]:.3f})"
        goal = "" if r.goal is None else f"{'≥' if r.faster else '≤'} {r.goal:g}"
        lines.append([r.name, show(r.ours), show(r.peer) if r.peer or r.ours is None else "", r.unit, ratio, goal,
                      {None: "", True: "yes", False: "no"}[r.met]])
    return cli.format_table(lines, left=(0, 3))


def parser() -> cli.Parser:
    p = cli.Parser("-m sibo_lab bench", description="Speed and memory against transformers + peft, and SIBO against plain.")
    p.add_argument("--only", metavar="GROUPS", help=f"of {','.join(GROUPS)} (default: all)")
    p.add_argument("--big", choices=("llama7b", "gptj6b"), help="instead: train this shape, random weights, "
                   "watching memory")
    p.add_argument("--method", default="adapter-sibo", choices=recipes.METHODS[1:], help="of --big (%(default)s)")
    p.add_argument("--base-bits", type=int, choices=[8, 4], help="of --big (default: 16)")
    p.add_argument("--folder", type=Path, help="of --big: where its 13 GB of weights are, or are written to")
    p.add_argument("--out", type=Path, default=Path("docs/results/bench.json"), help="(default: %(default)s)")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p


def main(args: argparse.Namespace) -> None:
    if args.child:
        print(json.dumps(child(*args.child.split())))
        return
    if args.big:
        print(json.dumps(bench_large.big(args.big, args.method, args.folder or files.cache() / "bench" / args.big,
                             base_bits=args.base_bits), indent=1))
        return
    names = args.only.split(",") if args.only else list(GROUPS)
    if unknown := [n for n in names if n not in GROUPS]:
        raise ValueError(f"--only: found {unknown[0]!r}, expected some of {', '.join(GROUPS)}")
    rows = []
    for name in names:
        for row in GROUPS[name]():
            rows.append(row)
            print(table([row]).splitlines()[1], flush=True)
    print(table(rows))
    files.write(args.out, json.dumps([asdict(r) for r in rows], indent=1) + "\n")
