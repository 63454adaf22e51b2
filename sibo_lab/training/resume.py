"""A run's state on disk: saved whole or not at all, found again after any stop, one writer at a time.

After step 120, checkpoints/00000120 holds state.safetensors (trained weights, AdamW's moments, random generators),
state.json (the rest) and manifest.json (size and sha256 of both). The official code pickles instead."""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sibo_lab import files, parallel

KEPT = 2  # the last states, besides the best by validation


@dataclass(frozen=True)
class SaveEvery:
    """How often a state is saved: in steps or seconds."""

    steps: int | None = None
    seconds: float | None = 600.0

    @staticmethod
    def read(text: str) -> "SaveEvery":
        """From "200" (steps) or "10m" (minutes)."""
        number = text.removesuffix("m")
        if not number.isdecimal() or not int(number):
            raise argparse.ArgumentTypeError(f"expected steps, such as 200, or minutes, such as 10m, got {text!r}")
        return SaveEvery(int(number), None) if number == text else SaveEvery(None, 60.0 * int(number))

    def due(self, step: int, seconds: float) -> bool:
        return step % self.steps == 0 if self.steps else seconds >= self.seconds


@dataclass
class Progress:
    """How far a run is, apart from its tensors."""

    data: str  # sha256 of the training rows
    micro_batch_size: int  # halved when memory ran out
    step: int = 0  # also the position in the data, whose order the seed fixes
    seconds: float = 0.0
    tokens: int = 0
    best: dict | None = None  # {"step", "validation"}
    skipped: int = 0  # steps without a finite loss or gradient
    skipped_in_a_row: int = 0
    spikes: int = 0
    recent: list[float] = field(default_factory=list)  # the last 50 finite losses
    backbone: str = ""  # sha256 of its files, as weights.digest takes it; older states do not tell

    def summary(self) -> dict:
        return {"train_seconds": round(self.seconds, 1), "tokens_per_second": round(self.tokens / self.seconds, 1),
                "best": self.best, "steps_skipped": self.skipped, "loss_spikes": self.spikes,
                "micro_batch_size": self.micro_batch_size}


def state_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"{step:08}"


def states(folder: Path) -> list[Path]:
    """The states in a run folder, whole or not, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]" * 8))


def _manifest(state: Path) -> dict:
    manifest = {}
    for name in ("state.safetensors", "state.json"):
        with open(state / name, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
            manifest[name] = {"size": f.tell(), "sha256": digest}
    return manifest


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """A run folder's newest whole state, and what is wrong with each newer one."""
    corrupted = {}
    for state in reversed(states(folder)):
        try:
            expected = files.read_json(state / "manifest.json")
            for name, got in _manifest(state).items():
                if got != expected.get(name):
                    raise ValueError(f"{state / name}: expected {expected.get(name)}, got {got}")
            return state, corrupted
        except (OSError, ValueError) as e:
            corrupted[state] = str(e)
    return None, corrupted


def save(folder: Path, progress: Progress, trained: Mapping[str, nn.Parameter], optimizer: Optimizer,
         device: str) -> None:
    """Saves the state after progress.step, then removes all but the last KEPT and the best; every process must call.
    OSError if it cannot be written, and no older state is lost."""
    random = {f"random.cpu.{parallel.rank()}": torch.get_rng_state()}
    if device != "cpu":
        random[f"random.{device}.{parallel.rank()}"] = torch.cuda.get_rng_state(device)
    tensors = parallel.all_gather_dicts(random) | {
        f"{key}.{name}": parallel.full_tensor(value.detach()).cpu() for name, p in trained.items()
        for key, value in ({"weight": p} | optimizer.state[p]).items()}

    def write() -> None:
        files.flush(folder / "metrics.jsonl")  # must not lack a step of the state
        target = state_folder(folder, progress.step)
        draft = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            files.write_tensors(draft / "state.safetensors", tensors, {})
            files.write(draft / "state.json", json.dumps(asdict(progress)))
            files.write(draft / "manifest.json", json.dumps(_manifest(draft)))
            remove(target)  # a corrupted one
            os.replace(draft, target)
            files.flush(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        last = states(folder)[-KEPT:]
        bests = [files.read_json(state / "state.json")["best"] for state in last]
        kept = {*last, *(state_folder(folder, best["step"]) for best in bests if best)}
        for state in {*states(folder)} - kept:
            remove(state)

    parallel.one_rank_at_a_time(write, ranks=1)


def remove(state: Path) -> None:
    """Renames before it deletes, so that no half of a state keeps its name."""
    if state.exists():
        gone = state.with_name(f".{os.getpid()}.{state.name}.old")
        os.replace(state, gone)
        shutil.rmtree(gone)


def restore(state: Path, trained: Mapping[str, nn.Parameter], optimizer: Optimizer, device: str) -> Progress:
    """Restores weights, optimizer and random generators. Raises what restore_weights raises."""
    tensors = restore_weights(state, trained)
    for name, p in trained.items():
        optimizer.state[p] = {key: parallel.local_shard(tensors[f"{key}.{name}"].to(p.device), p)
                              for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
    torch.set_rng_state(tensors[f"random.cpu.{parallel.rank()}"])
    if device != "cpu":
        torch.cuda.set_rng_state(tensors[f"random.{device}.{parallel.rank()}"], device)
    return Progress(**files.read_json(state / "state.json"))


def restore_weights(state: Path, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Restores the weights only, and returns all of the state's tensors. ValueError for other names, shapes or number
    of processes."""
    file = state / "state.safetensors"
    tensors, _ = files.read_tensors(file)
    processes = sum(name.startswith("random.cpu.") for name in tensors)
    if processes != parallel.world():
        raise ValueError(f"{file}: expected the state of {parallel.world()} processes, got {processes}; resume with as "
                         "many")
    files.assign(trained, {n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")}, file)
    return tensors


def lock(folder: Path) -> IO:
    """Reserves `folder` until the returned file is closed or this process ends, and removes a killed one's drafts.
    ValueError if another process holds it."""
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
