"""Models of billions of parameters, with random weights: memory and time of a step."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import model
import sibo
from sibo_lab import export, files
from sibo_lab.backbone import locate
from sibo_lab.data import batch
from sibo_lab.training import loop, recipes


def write_shape(said: dict, folder: Path, shards: int = 2) -> None:
    """Writes an HF folder with random bfloat16 weights of standard deviation 0.02 (norms: 1, biases: 0), shard by
    shard; nothing where it is already there. All matrices begin somewhere in the same random numbers: quick to make,
    and no two alike."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    m = model.build(said)
    tensors = {export.their_name(m, name): p.shape for name, p in m.named_parameters()}
    total, parts, weight_map = sum(s.numel() for s in tensors.values()), [[] for _ in range(shards)], {}
    noise = torch.randn(min(total, 1 << 26), generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    done = 0
    for name, shape in tensors.items():
        parts[min(shards - 1, done * shards // total)].append(name)
        done += shape.numel()
    for i, some in enumerate(parts):
        file, stored = f"model-{i + 1:05}-of-{shards:05}.safetensors", {}
        for name in some:
            shape, start = tensors[name], len(weight_map) * 4097 % (1 << 20)
            n = shape.numel()
            if len(shape) == 1:
                stored[name] = torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
            else:
                stored[name] = noise.roll(-start).repeat(-(-n // len(noise)))[:n].view(shape)
            weight_map[name] = file
        files.write_tensors(folder / file, stored, {"format": "pt"})
        del stored
    files.write(folder / "config.json", json.dumps(said, indent=2))
    files.write(index, json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map}, indent=2))


def watched() -> dict[str, int]:
    """Bytes of this process: resident, of which its own (anonymous) and mapped from files, and the peak so far."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("VmHWM", "Rss")))
    kib = {k: int(v.split()[0]) * 1024 for k, v in lines.items()}
    return {"anonymous": kib["RssAnon"], "files": kib["RssFile"], "peak": kib["VmHWM"]}


def train_shape(folder: str, run: recipes.Run, out) -> None:
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
        loss = loop.train_step(m, [batch.Row(row, row)], 1, 0)
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
    write_shape(locate.SHAPES[shape], folder)
    r = recipes.recipe(locate.SHAPES[shape]["model_type"], "arithmetic", method)
    run = recipes.Run(**asdict(r) | {
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
