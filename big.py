"""LLaMA-7B's and GPT-J-6B's shape on one machine: a folder of random weights, loaded and trained; memory watched."""

import argparse
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import checkpoint
import data
import model
import sibo
import train

SHAPES = {  # config.json of huggyllama/llama-7b and EleutherAI/gpt-j-6b, as far as it is read
    "llama7b": {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6},
    "gptj6b": {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16,
               "rotary_dim": 64, "n_positions": 2048},
}


def write_shape(said: dict, folder: Path, shards: int = 2) -> None:
    """Writes an HF folder with random bfloat16 weights of standard deviation 0.02 (norms: 1, biases: 0), shard by
    shard; nothing where it is already there. All matrices begin somewhere in the same random numbers: quick to make,
    and no two alike."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    m = model.build(said)
    names = {ours: theirs for theirs, ours in m.names.items() if ours}
    layers, tensors = range(m.config.num_hidden_layers), {}
    for theirs, ours in m.names.items():
        for i in layers if ours and "{}" in ours else [None]:
            try:
                shape = m.get_parameter(ours.format(i)).shape if ours else None
            except AttributeError:  # a bias that this configuration does not have
                continue
            if shape:
                tensors[("" if theirs.startswith("lm_head") else m.prefix) + theirs.format(i)] = shape
    assert len(tensors) == len(list(m.parameters())), (len(names), len(tensors))
    noise = torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    total, files, weight_map = sum(s.numel() for s in tensors.values()), [[] for _ in range(shards)], {}
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
        checkpoint.write(folder / file, lambda draft, stored=stored: save_file(stored, draft, {"format": "pt"}))
        del stored
    checkpoint.write(folder / "config.json", json.dumps(said, indent=2))
    checkpoint.write(index, json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": weight_map}, indent=2))


def memory() -> dict[str, int]:
    """Bytes of this process: resident, of which its own (anonymous) and mapped from files, and the peak so far."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("VmHWM", "Rss")))
    kib = {k: int(v.split()[0]) * 1024 for k, v in lines.items()}
    return {"anonymous": kib["RssAnon"], "files": kib["RssFile"], "peak": kib["VmHWM"]}


def train_shape(folder: str, run: train.Run, out) -> None:
    """In a fresh process: loads, injects and trains run.steps steps; sends what was seen to the pipe `out`."""
    torch.set_num_threads(torch.get_num_threads())
    start, highest, stop = memory(), {"anonymous": 0, "files": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            now = memory()
            highest.update({k: max(v, now[k]) for k, v in highest.items()})

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    m = model.from_pretrained(folder, getattr(torch, run.dtype), run.device, base_bits=run.base_bits)
    seen = {"python": start, "load_seconds": time.perf_counter() - began, "loaded": memory()}
    sibo.inject(m, **run.settings())
    m.grad_checkpoint = run.grad_checkpoint
    trained = [p for p in m.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, run.lr, weight_decay=0.0, fused=True)
    ids = np.random.default_rng(run.seed).integers(3, m.config.vocab_size, (run.steps, run.cutoff)).tolist()
    seen |= {"trained": sum(p.numel() for p in trained), "losses": [], "step_seconds": []}
    for row in ids:
        began = time.perf_counter()
        loss = train.train_step(m, [data.Row(row, row)], 1, 0)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen["losses"].append(loss)
        seen["step_seconds"].append(time.perf_counter() - began)
        print(f"  loss {loss:.4f}, {seen['step_seconds'][-1]:.1f} s, {memory()}", flush=True)
    stop.set()
    estimate = train.estimate(m, run) if hasattr(train, "MEMORY") else None
    out.send(seen | {"highest": highest, "peak": memory()["peak"], "estimate": estimate})


def big(shape: str, method: str, folder: Path, steps: int = 3, base_bits: int | None = None) -> dict:
    """Trains `shape` by `method` with the paper's recipe at micro-batch 1 × 256 tokens, gradient checkpointing on,
    bfloat16, in a process of its own; its losses, seconds and memory."""
    write_shape(SHAPES[shape], folder)
    r = train.recipe(SHAPES[shape]["model_type"], "arithmetic", method)
    run = train.Run(**train.asdict(r) | {
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


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("shape", choices=SHAPES)
    p.add_argument("method")
    p.add_argument("folder", type=Path)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--base-bits", type=int)
    a = p.parse_args()
    json.dump(big(a.shape, a.method, a.folder, a.steps, a.base_bits), sys.stdout, indent=1)
    print()
