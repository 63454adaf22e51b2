"""Speed and memory, measured side by side with transformers + peft: same weights, dtype, batches, tokens and LoRA.

`python bench.py` prints the table and writes results/bench.json. Two sides that are compared run in one process on one
machine, in turn, and the ratio is the median of the pairs' ratios; memory and loading are measured in fresh processes.
LoRA stands where the paper puts it on LLaMA (r 32 on q, k, v, up, down; dropout 0.05), on SmolLM2-135M in bfloat16.
Needs tests/requirements.txt (transformers, peft). Quote the ratios: seconds change with the machine and its load."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import checkpoint
import cli
import data
import estimate
import export
import loop
import model
import sibo
import tokenizer
import train

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


# ------------------------------------------------------------------------------------------------------ the two sides


def folder() -> Path:
    """SmolLM2 as a Hugging Face folder with bfloat16 weights, which both sides open."""
    path = checkpoint.cache() / "bench" / "smollm2-135m"
    if not (path / "config.json").is_file():
        gguf = checkpoint.locate("smollm2-135m")
        weights = {name: w.bfloat16() for name, w in checkpoint.tensors(gguf)}
        checkpoint.write_tensors(path / "model.safetensors", weights, {"format": "pt"})
        checkpoint.write(path / "config.json", json.dumps(checkpoint.config(gguf)))
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


def batches(n: int, size: int, on_inputs: bool) -> list[list[data.Row]]:
    """Word problems as train.py makes and batches them."""
    t = tokenizer.from_pretrained("smollm2-135m")
    rows = [data.encode(e, t, 256, on_inputs) for e in data.load(data.task(TASK), "train", Path(), n * size)]
    order = data.batches([len(r.ids) for r in rows], size, seed=0)
    return [[rows[i] for i in next(order)] for _ in range(n)]


class Trainer:
    """One side's training step, with the same optimizer and clipping on both."""

    def __init__(self, m: nn.Module):
        self.m, self.trained = m.train(), [p for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 3e-4, weight_decay=0.0, fused=True)

    def step(self, rows: list[data.Row]) -> None:
        if isinstance(self.m, model.Transformer):
            loop.train_step(self.m, rows, len(rows), pad_id=2)
        else:
            self.m(**data.to_device(data.batch(rows, 2), self.m)).loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# -------------------------------------------------------------------------------------------------------- measurements


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
            new = model.generate(m, **b, max_new_tokens=most, eos_token_id=t.eos_id)[:, width:]
        else:
            with torch.no_grad():
                new = m.generate(**b, max_new_tokens=most, do_sample=False, eos_token_id=t.eos_id,
                                 pad_token_id=t.eos_id)[:, width:]
        count = sum(row.index(t.eos_id) + 1 if t.eos_id in row else len(row) for row in new.tolist())
        return count / (time.perf_counter() - began)

    questions = data.load(data.task(TASK), "test", Path(), 192)
    for size, goal in ((8, 2.0), (64, 4.0)):
        some = [data.batch([data.Row(t.encode(data.prompt(e.instruction))) for e in questions[i:i + size]], t.eos_id,
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
    steps = [seconds(lambda n=n: model.generate(m, **rows, max_new_tokens=n)) for n in (8, 40)]
    weights = sum(p.numel() * 2 for p in m.parameters())  # LoRA's are read in bfloat16 as well, the tied head once
    yield Row("decoding, 8 rows: seconds a token against reading the weights once", "s", (steps[1] - steps[0]) / 32,
              weights / speed, (steps[1] - steps[0]) / 32 * speed / weights)


def overhead() -> Iterator[Row]:
    """SIBO against the plain method, and folded LoRA-SIBO against the frozen model: 30 pairs each."""
    prompt = {"input_ids": torch.arange(100, 108).repeat(8, 1)}
    some = batches(30, 4, False)

    def decode(m: nn.Module) -> float:
        return seconds(lambda: model.generate(m, **prompt, max_new_tokens=12))

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
    estimate.peak_begins("cpu")
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
            trainer.step([data.Row(row, row) for row in torch.randint(3, 1000, (8, int(side))).tolist()])
    return {"seconds": time.perf_counter() - began, "bytes": resident(peak=True) - start}


def estimated(method: str, length: int) -> train.Run:
    return train.Run(backbone="smollm2-135m", method=method, batch_size=8, micro_batch_size=8, cutoff=length)


def estimates() -> Iterator[Row]:
    """What `train.py --dry-run` estimates against the measured peak, with glibc told to give freed memory back."""
    said = checkpoint.config(folder())
    for method, length in (("adapter-sibo", 64), ("adapter-sibo", 128), ("lora-sibo", 64), ("lora-sibo", 128)):
        guess = sum(estimate.memory(said, estimated(method, length)).values())
        command = [sys.executable, __file__, "--child", f"{method} {length}"]
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
            command = [sys.executable, __file__, "--child", f"{what} {side}"]
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


# ------------------------------------------------------------------------------------------ billions of parameters


def write_shape(said: dict, folder: Path, shards: int = 2) -> None:
    """Writes an HF folder with random bfloat16 weights of standard deviation 0.02 (norms: 1, biases: 0), shard by
    shard; nothing where it is already there. All matrices begin somewhere in the same random numbers: quick to make,
    and no two alike."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    m = model.build(said)
    tensors = {export.their_name(m, name): p.shape for name, p in m.named_parameters()}
    total, files, weight_map = sum(s.numel() for s in tensors.values()), [[] for _ in range(shards)], {}
    noise = torch.randn(min(total, 1 << 26), generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    done = 0
    for name, shape in tensors.items():
        files[min(shards - 1, done * shards // total)].append(name)
        done += shape.numel()
    for i, some in enumerate(files):
        file, stored = f"model-{i + 1:05}-of-{shards:05}.safetensors", {}
        for name in some:
            shape, start = tensors[name], len(weight_map) * 4097 % (1 << 20)
            n = shape.numel()
            if len(shape) == 1:
                stored[name] = torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
            else:
                stored[name] = noise.roll(-start).repeat(-(-n // len(noise)))[:n].view(shape)
            weight_map[name] = file
        checkpoint.write_tensors(folder / file, stored, {"format": "pt"})
        del stored
    checkpoint.write(folder / "config.json", json.dumps(said, indent=2))
    checkpoint.write(index, json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map}, indent=2))


def watched() -> dict[str, int]:
    """Bytes of this process: resident, of which its own (anonymous) and mapped from files, and the peak so far."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("VmHWM", "Rss")))
    kib = {k: int(v.split()[0]) * 1024 for k, v in lines.items()}
    return {"anonymous": kib["RssAnon"], "files": kib["RssFile"], "peak": kib["VmHWM"]}


def train_shape(folder: str, run: train.Run, out) -> None:
    """In a fresh process: loads, injects and trains run.steps steps; sends what was seen to the pipe `out`."""
    start, highest, stop = watched(), {"anonymous": 0, "files": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            now = watched()
            highest.update({k: max(v, now[k]) for k, v in highest.items()})

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    m = model.from_pretrained(folder, getattr(torch, run.dtype), run.device, base_bits=run.base_bits)
    seen = {"python": start, "load_seconds": time.perf_counter() - began, "loaded": watched()}
    sibo.inject(m, **run.settings())
    m.grad_checkpoint = run.grad_checkpoint
    trained = [p for p in m.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, run.lr, weight_decay=0.0, fused=True)
    ids = np.random.default_rng(run.seed).integers(3, m.config.vocab_size, (run.steps, run.cutoff)).tolist()
    seen |= {"trained": sum(p.numel() for p in trained), "losses": [], "step_seconds": []}
    for row in ids:
        began = time.perf_counter()
        loss = loop.train_step(m, [data.Row(row, row)], 1, 0)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen["losses"].append(loss)
        seen["step_seconds"].append(time.perf_counter() - began)
    stop.set()
    out.send(seen | {"highest": highest, "peak": watched()["peak"]})


def big(shape: str, method: str, folder: Path, steps: int = 3, base_bits: int | None = None) -> dict:
    """Trains `shape` by `method` with the paper's recipe at micro-batch 1 × 256 tokens, gradient checkpointing on,
    bfloat16, in a process of its own; its losses, seconds and memory."""
    write_shape(checkpoint.SHAPES[shape], folder)
    r = train.recipe(checkpoint.SHAPES[shape]["model_type"], "arithmetic", method)
    run = train.Run(**asdict(r) | {
        "backbone": str(folder), "method": method, "steps": steps, "batch_size": 1, "micro_batch_size": 1,
        "dtype": "bfloat16", "grad_checkpoint": True, "base_bits": base_bits,
        "lam": r.lam if "sibo" in method else 0.0})
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(False)
    child = context.Process(target=train_shape, args=(str(folder), run, send))
    child.start()
    send.close()
    try:
        seen = receive.recv()
    except EOFError:
        child.join()
        raise OSError(f"{shape}, {method}: the process ended with code {child.exitcode} (-9: out of memory)") from None
    child.join()
    return {"shape": shape, "method": method, "base_bits": base_bits} | seen


def cuda(folder: Path | None = None, device: str = "cuda", sizes: tuple = ((4, 256), (8, 1024))) -> Iterator[Row]:
    """LLaMA-7B's shape with LoRA on a GPU against transformers + peft: tokens/s, share of the matrix rate, memory."""
    there = device != "cuda" or torch.cuda.is_available()
    sides = {}
    if there:
        folder = folder or checkpoint.cache() / "bench" / "llama7b"
        write_shape(checkpoint.SHAPES["llama7b"], folder)  # where it is not there yet
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
        rows, speed, peak = [data.Row(row, row) for row in ids], {}, {}
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


# -------------------------------------------------------------------------------------------------------- command line


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
    return cli.aligned(lines, left=(0, 3))


def parser() -> cli.Parser:
    p = cli.Parser("bench.py", description="Speed and memory against transformers + peft, and SIBO against plain.")
    p.add_argument("--only", metavar="GROUPS", help=f"of {','.join(GROUPS)} (default: all)")
    p.add_argument("--big", choices=("llama7b", "gptj6b"), help="instead: train this shape, random weights, "
                   "watching memory")
    p.add_argument("--method", default="adapter-sibo", choices=train.METHODS[1:], help="of --big (%(default)s)")
    p.add_argument("--base-bits", type=int, choices=[8, 4], help="of --big (default: 16)")
    p.add_argument("--folder", type=Path, help="of --big: where its 13 GB of weights are, or are written to")
    p.add_argument("--out", type=Path, default=Path("results/bench.json"), help="(default: %(default)s)")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p


def main(args: argparse.Namespace) -> None:
    if args.child:
        print(json.dumps(child(*args.child.split())))
        return
    if args.big:
        print(json.dumps(big(args.big, args.method, args.folder or checkpoint.cache() / "bench" / args.big,
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
    checkpoint.write(args.out, json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, parser())
