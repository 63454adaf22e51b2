"""Kills a training run at random moments, over and over: `python tests/training/kill.py [TIMES]` (default: 100).

Each time a child process continues from the newest state, saves every 3 steps, and dies by SIGKILL. After each death
the newest whole state must be at most 3 steps behind the log, and no draft may look like a state. A last, undisturbed
child finishes the run: its adapter must equal that of an uninterrupted run, bit for bit."""

import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a command: the modules are in the root

import torch
from tqdm import tqdm

import model
import sibo
from sibo_lab.data import batch
from sibo_lab.training import loop, recipes, resume

EVERY = 3
CONFIG = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2}


def train(folder: Path, steps: int, resuming: bool) -> None:
    """A whole small run: LoRA-SIBO with dropout, learned λ, two micro-batches per step."""
    held = resume.lock(folder)
    run = recipes.run_of("lora-sibo", lam=0.2, learn_lam=True, steps=steps, batch_size=4, micro_batch_size=2, rank=4,
                         dropout=0.1, warmup=2, lr=1e-2, validate_every=7, out=str(folder))
    torch.manual_seed(0)
    m = model.build(CONFIG).to_empty(device="cpu")
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3)
    sibo.inject(m, **vars(run.settings))
    rows = [batch.Row(ids, ids) for ids in ([1 + i, *range(3 + i % 7, 9 + i)] for i in range(9))]
    ids = torch.tensor([[1, 2, 3, 4]])
    loop.fit(m, rows, 0, run, lambda m: -float(model.loss(m, ids, ids).detach()), resume.SaveEvery(EVERY, None),
             resuming)
    sibo.save(m, folder)
    held.close()


def child(work, *args) -> int:
    """Starts `work` in a fork of this process, which has imported everything; returns its process id."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            sys.stderr = open(os.devnull, "w")
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # the inherited one may be locked
            work(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def reached(folder: Path) -> int:
    """The last step in the log."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    while lines:
        try:
            return json.loads(lines.pop())["step"]
        except ValueError:  # the last line may be torn
            continue
    return 0


def killed(folder: Path, times: int, rng: random.Random) -> list[int]:
    """The step of the newest whole state after each death. AssertionError where a promise is broken."""
    steps = 15 * times
    whole = folder / "whole"
    with contextlib.redirect_stderr(io.StringIO()):
        train(whole, steps, False)  # in this process, so that the forks have what PyTorch imports late
    found = [0]
    for i in range(times):
        goal, pid = found[-1] + rng.randrange(12), child(train, folder / "run", steps, True)
        while reached(folder / "run") < min(goal, steps - 1) and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG
                                                                               | os.WNOWAIT):
            time.sleep(0.001)
        time.sleep(rng.random() / 20)  # into a step, a write, a validation, or before the first
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (-signal.SIGKILL, 0)
        state, corrupted = resume.newest(folder / "run")
        assert not corrupted, corrupted
        found.append(int(state.name) if state else 0)
        assert found[-1] >= reached(folder / "run") - EVERY, f"death {i}: {found[-1]}, {reached(folder / 'run')}"
        assert found[-1] >= found[-2]
    assert ended(child(train, folder / "run", steps, True)) == 0
    assert (folder / "run" / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").open()] for f in (whole, folder / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == steps
    return found[1:]


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as place:
        seen = killed(Path(place), n, random.Random(0))
    print(f"killed {n} times: found {len(set(seen))} different states whole, up to step {max(seen)}, none more than "
          f"{EVERY} steps behind; the adapter equals an undisturbed run's bit for bit")
