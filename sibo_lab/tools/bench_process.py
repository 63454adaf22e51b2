"""What is measured in fresh processes: memory, loading, the commands' start, and train.py beside a busy process."""

import ctypes
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import linear_regression
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

import model
from sibo_lab.backbone import config
from sibo_lab.tools.bench_large import process_memory, random_batches, trainer
from sibo_lab.tools.bench_rows import Rows, in_turn, named, paired, seconds
from sibo_lab.tools.bench_scaling import LENGTHS
from sibo_lab.tools.bench_speed import Case, batches, frozen, ours, smollm2, theirs
from sibo_lab.training import estimate, recipes


def in_fresh_process(work: Callable, *args) -> dict:
    """OSError where the process dies."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(work, *args).result()
        except BrokenProcessPool:
            raise OSError(f"{args}: expected figures, got a process that died (out of memory?)") from None


def child(build: Callable, case: Case, method: str, size: int = 8, length: int = 0) -> dict[str, float]:
    """Seconds and GB, beyond the imports, of loading ("full") or of three steps of another method on word problems or
    on random rows of `length` tokens, then with freed memory given back at once."""
    if build is theirs:
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    if length:
        ctypes.CDLL(None).mallopt(-3, 1 << 17)  # glibc's M_MMAP_THRESHOLD
    gc.collect()  # what the imports left, or it falls into the seconds
    estimate.reset_peak("cpu")
    start, began = process_memory(), perf_counter()
    m = build(case, method)
    if method == "full":
        with torch.no_grad():
            m(torch.arange(16)[None])
    else:
        in_turn([trainer(m)], random_batches(3, size, length) if length else batches(case, 3, size))
    nbytes = process_memory()["peak"] - start["anonymous"] - start["files"]
    return {"seconds": perf_counter() - began, "GB": nbytes / 1e9}


def children(case: Case, method: str, times: int) -> dict[str, list[list[float]]]:
    found = in_turn([partial(in_fresh_process, child, side, case) for side in (ours, theirs)], [method] * times)
    return {key: [[x[key] for x in side] for side in found] for key in ("seconds", "GB")}


def weights_gb(case: Case) -> float:
    return sum(p.nbytes for p in frozen(case).parameters()) / 1e9


def memory() -> Rows:
    """Of training, and how it grows with the length of one row."""
    case = smollm2()
    yield case.row("training: peak memory", *children(case, "lora", 3)["GB"], named(case.dtype))
    weights, beyond = weights_gb(case), {}
    for length in LENGTHS:
        found = in_fresh_process(child, ours, case, "lora", 1, length)["GB"]
        yield paired(f"training: peak memory, 1 × {length}", "GB", [found])
        beyond[length] = found - weights
    long = [length for length in LENGTHS if length >= 512]
    slope = linear_regression([math.log(x) for x in long], [math.log(beyond[x]) for x in long]).slope
    yield paired("memory beyond the weights grows with the length to the power of (512 to 2,048)", "", [slope],
                 goal=1.15)


def estimates() -> Rows:
    """--dry-run's, beside what is measured."""
    case = smollm2()
    spec = config.read_spec(case.path)
    for method, length in product(("adapter-sibo", "lora-sibo"), (64, 128)):
        run = recipes.run_of(method, batch_size=8, micro_batch_size=8, cutoff=length, dtype=named(case.dtype))
        estimated = sum(estimate.memory(spec, run).values()) / 1e9
        measured = in_fresh_process(child, ours, case, method, 8, length)["GB"]
        row = paired(f"peak memory against --dry-run's estimate: {method}, 8 × {length}", "GB", [measured], [estimated])
        row.goal, row.met = 1.15, abs(row.ratio - 1) <= 0.15
        yield row


def loading() -> Rows:
    """From safetensors in the page cache, in the file's dtype."""
    case = smollm2(dtype=torch.bfloat16)
    found, more = children(case, "full", 5), {"dtype": "bfloat16", "peer_as": "bfloat16"}
    yield paired("load to first logits", "s", *found["seconds"], 0.7, **more)
    least = (case.path / "model.safetensors").stat().st_size + 49152 * 576 * 2  # the largest tensor is the embedding
    yield paired("load to first logits: peak memory against weights + largest tensor", "GB", found["GB"][0],
                 [least / 1e9] * 5, 1.0, dtype="bfloat16")


def train_py(*options: str) -> None:
    """`python train.py` as a process of its own. OSError ends with what it said last."""
    done = subprocess.run([sys.executable, "train.py", "--offline", *options], cwd=Path(model.__file__).parent,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"train.py {' '.join(options)}: expected exit code 0, got {done.returncode}: "
                      f"{(done.stderr.strip() or '-').splitlines()[-1]}")


def start() -> Rows:
    """Five times each."""
    smollm2()
    for option, goal in (("--help", 1.5), ("--dry-run", 4.0)):
        yield paired(f"train.py {option}", "s", [seconds(train_py, option) for _ in range(5)], goal=goal)


@contextmanager
def busy(pinned: bool) -> Iterator[None]:
    """Inside, a process of the lowest priority spins, on one core if pinned, in a session of its own, as from another
    terminal: Linux shares the cores out among sessions first, and nice counts within each."""
    core = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{core}}})\n" if pinned else ""
    process = subprocess.Popen(["nice", "-n", "19", sys.executable, "-c", f"{pin}while True: pass"],
                               start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def beside_busy(steps: int = 40) -> Rows:
    """train.py, quiet and beside a busy process: what a user waits for."""
    smollm2()

    def train(pinned: bool | None) -> float:
        with TemporaryDirectory() as folder:
            options = ("--steps", str(steps), "--limit", "8", "--out", str(Path(folder, "run")))
            if pinned is None:
                return seconds(train_py, *options)
            with busy(pinned):
                return seconds(train_py, *options)

    quiet = train(None)
    for pinned in (True, False):
        yield paired(f"train.py, {steps} steps, beside a busy process, {'pinned' if pinned else 'not pinned'}", "s",
                     [train(pinned)], [quiet], 1.8, peer_as="quiet")
