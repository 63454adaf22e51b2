"""Shapes of billions of parameters, with random weights: memory and seconds of a training step."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import torch
from torch import nn

import model
import sibo
from sibo_lab import export, files
from sibo_lab.backbone import locate
from sibo_lab.data import batch
from sibo_lab.training import loop, recipes
from sibo_lab.training.optimizer import adamw

Batch = list[batch.Row]


def write_shape(spec: dict, folder: Path) -> None:
    """Writes, unless it is there, a Hugging Face folder of random bfloat16 weights with standard deviation 0.02 (norms
    1, biases 0), one file per tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    m, nbytes, weight_map, random = model.build(spec), 0, {}, torch.Generator().manual_seed(0)
    for ours, p in m.named_parameters():
        name, w = export.their_name(m, ours), torch.empty(p.shape, dtype=torch.bfloat16)
        w.fill_(ours.endswith("weight")) if p.dim() == 1 else w.normal_(0, 0.02, generator=random)
        nbytes, weight_map[name] = nbytes + w.nbytes, f"{name}.safetensors"
        files.write_tensors(folder / weight_map[name], {name: w}, {"format": "pt"})
    files.write(folder / "config.json", json.dumps(spec, indent=2))
    files.write(index, json.dumps({"metadata": {"total_size": nbytes}, "weight_map": weight_map}, indent=2))


def process_memory() -> dict[str, int]:
    """Bytes of this process in memory now, its own ("anonymous") and mapped from files, and at their peak (Linux)."""
    kib = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    keys = {"anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    return {name: int(kib[key]) << 10 for name, key in keys.items()}


def random_batches(n: int, size: int, length: int) -> list[Batch]:
    return [[batch.Row(ids, ids) for ids in some] for some in torch.randint(3, 1000, (n, size, length)).tolist()]


def trainer(m: nn.Module, lr: float = 3e-4) -> Callable[[Batch], float | None]:
    """The training step of either side; ours returns the loss. Optimizer and clipping are the same on both."""
    trained, optimizer = [p for p in m.train().parameters() if p.requires_grad], adamw(m, lr)

    def step(rows: Batch) -> float | None:
        loss = None
        if isinstance(m, model.Transformer):
            loss = loop.train_step(m, rows, len(rows), pad_id=2)
        else:
            m(**batch.to_device(batch.collate(rows, 2), m)).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def train_shape(shape: str, method: str, folder: str, base_bits: int | None = None, steps: int = 3) -> dict:
    """Losses, seconds and bytes of training a shape of locate.SHAPES that `folder` holds, by the paper's recipe on 1 ×
    256 tokens in bfloat16, with gradient checkpointing. For a fresh process."""
    start, stop = process_memory(), Event()
    highest = {key: start[key] for key in ("anonymous", "files")}

    def watch() -> None:
        while not stop.wait(0.05):
            now = process_memory()
            highest.update({key: max(value, now[key]) for key, value in highest.items()})

    Thread(target=watch, daemon=True).start()
    began = perf_counter()
    m = model.from_pretrained(folder, torch.bfloat16, base_bits=base_bits)
    found = {"shape": shape, "method": method, "base_bits": base_bits, "python": start,
             "load_seconds": perf_counter() - began, "loaded": process_memory()}
    run = recipes.run_of(method, **recipes.recipe(locate.SHAPES[shape]["model_type"], "arithmetic", method))
    sibo.inject(m, **vars(run.settings)).grad_checkpoint = True
    found |= {"trained": sum(p.numel() for p in m.parameters() if p.requires_grad), "losses": [], "step_seconds": []}
    step = trainer(m, run.lr)
    for rows in random_batches(steps, 1, run.cutoff):
        began = perf_counter()
        found["losses"].append(step(rows))
        found["step_seconds"].append(perf_counter() - began)
    stop.set()
    return found | {"highest": highest, "peak": process_memory()["peak"]}
