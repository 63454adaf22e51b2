"""Shapes of billions of parameters, with random weights: memory and seconds of a training step."""

import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import torch

import model
import sibo
from sibo_lab import export, files
from sibo_lab.backbone import locate
from sibo_lab.data import batch
from sibo_lab.training import loop, recipes


def write_shape(spec: dict, folder: Path) -> None:
    """Writes a Hugging Face folder of random bfloat16 weights with standard deviation 0.02 (norms 1, biases 0), one
    file per tensor, unless it is there. Matrices start at different places of one noise: quick, yet no two alike."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    m = model.build(spec)
    shapes = {export.their_name(m, name): p.shape for name, p in m.named_parameters()}
    total, weight_map = sum(shape.numel() for shape in shapes.values()), {}
    noise = torch.randn(min(total, 1 << 26), generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for i, (name, shape) in enumerate(shapes.items()):
        n, start = shape.numel(), i * 4097 % (1 << 20)
        w = noise.roll(-start)[:n].repeat(-(-n // len(noise)))[:n].view(shape)
        if len(shape) == 1:
            w.fill_(name.endswith("weight"))
        weight_map[name] = f"model-{i + 1:05}-of-{len(shapes):05}.safetensors"
        files.write_tensors(folder / weight_map[name], {name: w}, {"format": "pt"})
    files.write(folder / "config.json", json.dumps(spec, indent=2))
    files.write(index, json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map}, indent=2))


def process_memory() -> dict[str, int]:
    """Bytes of this process in memory now, its own ("anonymous") and mapped from files, and at their peak (Linux)."""
    kib = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    keys = {"anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    return {name: int(kib[key]) << 10 for name, key in keys.items()}


def train_shape(shape: str, method: str, folder: str, base_bits: int | None = None, steps: int = 3) -> dict:
    """Trains a shape of locate.SHAPES, written to `folder`, by the paper's recipe on 1 × 256 tokens in bfloat16, with
    gradient checkpointing; returns losses, seconds and bytes. For a fresh process."""
    start, stop = process_memory(), threading.Event()
    highest = {key: start[key] for key in ("anonymous", "files")}

    def watch() -> None:
        while not stop.wait(0.05):
            now = process_memory()
            highest.update({key: max(value, now[key]) for key, value in highest.items()})

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    m = model.from_pretrained(folder, torch.bfloat16, base_bits=base_bits)
    found = {"shape": shape, "method": method, "base_bits": base_bits, "python": start,
             "load_seconds": time.perf_counter() - began, "loaded": process_memory()}
    run = recipes.run_of(method, **recipes.recipe(locate.SHAPES[shape]["model_type"], "arithmetic", method))
    sibo.inject(m, **vars(run.settings)).train().grad_checkpoint = True
    trained, optimizer = [p for p in m.parameters() if p.requires_grad], loop.adamw(m, run.lr)
    found |= {"trained": sum(p.numel() for p in trained), "losses": [], "step_seconds": []}
    for ids in np.random.default_rng(run.seed).integers(3, m.config.vocab_size, (steps, run.cutoff)).tolist():
        began = time.perf_counter()
        found["losses"].append(loop.train_step(m, [batch.Row(ids, ids)], 1, 0))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found["step_seconds"].append(time.perf_counter() - began)
    stop.set()
    return found | {"highest": highest, "peak": process_memory()["peak"]}
