"""A training run's state on disk: saved whole or not at all, found again after any stop, one writer at a time.

The state of step 120 is a folder, checkpoints/00000120: state.safetensors (trained weights, AdamW's moments, random
generators), state.json (the rest) and manifest.json (size and sha256 of both). It is written under another name,
flushed to disk, and renamed; where the manifest does not hold, the state before it is taken. The official code leaves
this to transformers.Trainer, whose optimizer and generator states are pickles; here nothing is."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch
from torch import nn
from torch.optim import Optimizer

from sibo_lab import files, parallel

KEPT = 2  # the last states; the best by validation stays too


@dataclass(frozen=True)
class SaveEvery:
    """How often a state is saved: each so many steps, or after so many seconds."""

    steps: int | None = None
    seconds: float | None = 600.0

    @staticmethod
    def read(text: str) -> SaveEvery:
        """From "200" (steps) or "10m" (minutes)."""
        number = text.removesuffix("m")
        if not number.isdecimal() or not int(number):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected steps, such as 200, or minutes, such as 10m")
        return SaveEvery(None, 60.0 * int(number)) if number != text else SaveEvery(int(number), None)

    def due(self, step: int, seconds: float) -> bool:
        return step % self.steps == 0 if self.steps else seconds >= self.seconds


@dataclass
class Progress:
    """Where a run stands behind `step` steps, besides its tensors. The data's order is the seed's: `step` is the
    position in it."""

    data: str  # sha256 of the training rows
    micro_batch_size: int  # halved where memory was too small
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best: dict | None = None  # {"step", "validation"}
    skipped: int = 0  # steps without a finite loss or gradient
    skipped_in_a_row: int = 0
    spikes: int = 0


def _digest(file: Path) -> dict:
    with open(file, "rb") as f:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def state_folder(folder: Path, step: int) -> Path:
    """The folder of the state behind a step."""
    return folder / "checkpoints" / f"{step:08}"


def states(folder: Path) -> list[Path]:
    """The states below a run folder, whole or not, the oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("[0-9]*") if p.name.isdecimal())


def corruption(state: Path) -> str | None:
    """What is wrong with a saved state, or None."""
    try:
        manifest = files.read_json(state / "manifest.json")
        for name in ("state.safetensors", "state.json"):
            if (found := _digest(state / name)) != manifest.get(name):
                return f"{state / name}: found {found}, expected {manifest.get(name)}"
    except (OSError, ValueError) as e:
        return str(e)
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole state of a run folder, and what is wrong with those that are newer."""
    flaws = []
    for state in reversed(states(folder)):
        if found := corruption(state):
            flaws.append(found)
        else:
            return state, flaws
    return None, flaws


def save(folder: Path, progress: Progress, trained: Mapping[str, nn.Parameter], optimizer: Optimizer,
         device: str) -> None:
    """Saves the state behind progress.step, then removes those that are neither among the last KEPT nor the best of
    one of these. All processes must call; the first writes. OSError where it cannot: older states are left."""
    tensors = {f"weight.{name}": parallel.full_tensor(p.detach()).cpu() for name, p in trained.items()}
    tensors |= {f"{key}.{name}": parallel.full_tensor(value).cpu() for name, p in trained.items()
                for key, value in optimizer.state[p].items()}
    random = {f"random.cpu.{parallel.rank()}": torch.get_rng_state()}
    if device != "cpu":
        random[f"random.{device}.{parallel.rank()}"] = torch.cuda.get_rng_state(device)
    tensors |= parallel.all_gather_dicts(random)

    def write() -> None:
        target = state_folder(folder, progress.step)
        draft = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            files.write_tensors(draft / "state.safetensors", tensors, {})
            files.write(draft / "state.json", json.dumps(asdict(progress)))
            files.write(draft / "manifest.json", json.dumps(
                {name: _digest(draft / name) for name in ("state.safetensors", "state.json")}))
            _remove(target)  # a torn one may stand there
            os.replace(draft, target)
            files.flush(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        _prune(folder)

    parallel.one_rank_at_a_time(write, ranks=1)


def _remove(state: Path) -> None:
    """Away with it at once, so that no half of it is left under its name."""
    if state.exists():
        gone = state.with_name(f".{os.getpid()}.{state.name}.old")
        os.replace(state, gone)
        shutil.rmtree(gone)


def _prune(folder: Path) -> None:
    last = states(folder)[-KEPT:]
    bests = [files.read_json(p / "state.json")["best"] for p in last]
    kept = {*last, *(state_folder(folder, best["step"]) for best in bests if best)}
    for p in states(folder):
        if p not in kept:
            _remove(p)


def forget(folder: Path, step: int) -> None:
    """Away with the states behind a later step than `step`: what is gone on from is the newest whole one."""
    for p in states(folder):
        if int(p.name) > step:
            _remove(p)


def restore(state: Path, trained: Mapping[str, nn.Parameter], optimizer: Optimizer, device: str) -> Progress:
    """Puts a saved state back into the trained weights, the optimizer and the random generators, in place.

    ValueError for tensors of other names or shapes, and for another number of processes than saved it."""
    file = state / "state.safetensors"
    tensors, _ = files.read_tensors(file)
    processes = sum(name.startswith("random.cpu.") for name in tensors)
    if processes != parallel.world():
        raise ValueError(f"{file}: found the state of {processes} processes, expected {parallel.world()}; go on with "
                         "as many as began")
    restore_weights(state, trained, tensors)
    for name, p in trained.items():
        optimizer.state[p] = {key: parallel.local_shard(tensors[f"{key}.{name}"], p)
                              for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
    torch.set_rng_state(tensors[f"random.cpu.{parallel.rank()}"])
    if device != "cpu":
        torch.cuda.set_rng_state(tensors[f"random.{device}.{parallel.rank()}"], device)
    return Progress(**files.read_json(state / "state.json"))


def restore_weights(state: Path, trained: Mapping[str, nn.Parameter],
            tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Puts a state's trained weights back, in place, and nothing else."""
    tensors = tensors or files.read_tensors(state / "state.safetensors")[0]
    stored = {n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}
    files.assign(trained, stored, state / "state.safetensors")


def lock(folder: Path) -> IO:
    """Makes this process the only one that trains in `folder`, until the returned file is closed or the process ends,
    however it ends. Drafts that a killed one left are removed. ValueError where another holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = open(folder / ".lock", "w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise ValueError(f"{folder}: another process trains in it; wait for it, or name another --out") from None
    for draft in [*folder.glob(".[0-9]*.*"), *folder.glob("checkpoints/.[0-9]*.*")]:
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
    return held
