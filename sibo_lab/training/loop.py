"""The training loop: batches, the loss of a step, AdamW, the checkpoint that validates best, and whatever may go wrong.

Departures from the official code (transformers.Trainer): the loss is normalised by the labelled tokens of the whole
effective batch, so that micro-batches change nothing; a step without a finite loss or gradient is skipped, not taken;
a run goes on after any stop with the same numbers, bit for bit on a CPU in float32."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import model
from sibo_lab import cli, files, parallel
from sibo_lab.data import batch
from sibo_lab.training import recipes, resume

BAD_STEPS = 10  # without a finite loss or gradient, in a row, before training is given up
LAM_PACE = 50  # AdamW moves every number by about its rate: W_down is drawn with size 0.02, λ's log-odds are of size 1


def learning_rate(run: recipes.Run, step: int) -> float:
    """Linear warm-up from 0, then linear decay to 0 at the end; `step` counts from 0."""
    warmup = run.warmup if run.warmup >= 1 else math.ceil(run.warmup * run.steps)
    return run.lr * min((step + 1) / max(warmup, 1), (run.steps - step) / max(run.steps - warmup, 1), 1.0)


def train_step(m: nn.Module, rows: Sequence[batch.Row], micro_batch_size: int, pad_id: int) -> float:
    """Adds the gradient of one effective batch's mean loss to the parameters, and returns that loss.

    The mean is over the labelled tokens (BERT: the examples) of the whole batch, so each micro-batch weighs what it
    holds of them, on whichever process: each takes its part of `rows`, in as many micro-batches as all others, for
    they meet in each. Rows are padded on the right, behind a causal model's last label: no mask is needed there."""
    counts = [sum(x != -100 for x in r.labels[1:]) if isinstance(r.labels, list) else 1 for r in rows]
    total, loss = sum(counts), 0.0
    if not total:
        raise ValueError(f"found a batch of {len(rows)} examples without one labelled token; raise --cutoff, "
                         "which their prompts fill")
    rank, world = parallel.rank(), parallel.world()
    spare = rows[counts.index(max(counts))]  # where there is nothing to learn from, this row, times 0
    micro_batches = math.ceil(len(rows) / (world * micro_batch_size))
    for i in range(micro_batches):
        part = slice(rank + i * micro_batch_size * world, (i + 1) * micro_batch_size * world, world)
        share = sum(counts[part]) / total
        b = batch.to_device(batch.collate(rows[part] if share else [spare], pad_id), m)
        if "token_type_ids" not in b:
            del b["attention_mask"]
        with parallel.accumulating(m, last=i == micro_batches - 1):
            part_loss = model.loss(m, **b) * share
            (part_loss * world).backward()  # the processes' mean is to be the sum of their parts
        loss += part_loss.detach()
    return float(parallel.all_reduce(loss))


def step_halving_on_oom(m: nn.Module, rows: Sequence[batch.Row], pad_id: int, progress: resume.Progress) -> float:
    """train_step; where memory does not suffice, once more with half as many examples at a time."""
    while True:
        random = torch.get_rng_state()
        try:
            return train_step(m, rows, progress.micro_batch_size, pad_id)
        except RuntimeError as e:
            if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
                raise
        where = f"step {progress.step + 1}: out of memory with {progress.micro_batch_size} examples at a time"
        if progress.micro_batch_size == 1 or parallel.world() > 1:  # other processes wait within the step for this one
            raise ValueError(f"{where}; lower --micro-batch-size or --cutoff, or use --grad-checkpoint, --base-bits 4 "
                             "or --shard")
        progress.micro_batch_size //= 2
        print(f"{where}; going on with {progress.micro_batch_size}, and {len(rows)} a step as before", file=sys.stderr)
        m.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.set_rng_state(random)


def adamw(m: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW over what is trained in `m`, at the rate `lr`; λ's log-odds, where it is learned, LAM_PACE times that."""
    weights, lams = ([p for n, p in m.named_parameters() if p.requires_grad and n.endswith(".lam_logit") == of_lam]
                     for of_lam in (False, True))
    return torch.optim.AdamW([{"params": weights, "lr": lr, "pace": 1},
                              {"params": lams, "lr": lr * LAM_PACE, "pace": LAM_PACE}], weight_decay=0.0, fused=True)


def compiled(m: nn.Module) -> nn.Module:
    """`m` with its blocks compiled, in place: they differ in their tensors only, so one's code serves all. The first
    stays as it is: its input often needs no gradient, which would take another minute to compile."""
    for block in m.blocks[1:]:
        block.compile(dynamic=True)
    return m


def resume_latest(out: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, run: recipes.Run,
             progress: resume.Progress) -> resume.Progress:
    """Goes back to the newest whole state in the run folder, if there is one; else `progress`."""
    state, flaws = resume.newest(out)
    if state:
        begun, progress = progress, resume.restore(state, trained, optimizer, run.device)
        if progress.data != begun.data:
            raise ValueError(f"{out}: found training data of sha256 {begun.data[:9]}…, expected {progress.data[:9]}…: "
                             "they changed since the run began; bring the old ones back, or name a new --out")
    if not parallel.rank():
        for flaw in flaws:
            print(f"passed over a saved state: {flaw}", file=sys.stderr)
        resume.forget(out, progress.step)  # they would count among the last, and a whole one go instead
        where = f"going on behind step {progress.step} of {run.steps}" if state else "found no saved state, begins anew"
        print(f"{out}: {where}", file=sys.stderr)
    return progress


def fit(m: nn.Module, rows: Sequence[batch.Row], pad_id: int, run: recipes.Run,
        validate: Callable[[nn.Module], float] | None = None, every: resume.SaveEvery | None = None,
        go_on: bool = False) -> dict:
    """Trains for run.steps steps of AdamW on shuffled rows. In the run folder: metrics.jsonl, a line a step, and the
    state, saved `every` so often (None: at the end); `go_on`: from the newest state there. Returns what came of it.

    `validate`, called every run.validate_every steps and at the end, says how good the model is: it is left as it was
    when that was highest (the official code: by validation loss, among its evaluations). ValueError after BAD_STEPS
    steps in a row without a finite loss or gradient, and where a trained tensor gets no gradient at all."""
    out, log, first = Path(run.out), Path(run.out, "metrics.jsonl"), not parallel.rank()
    m.grad_checkpoint = run.grad_checkpoint
    if run.compile:
        torch.compiler.set_stance("default")
        compiled(m)
    m.train()
    engine = parallel.wrap(m, run.device, run.shard)
    trained = {n: p for n, p in m.named_parameters() if p.requires_grad}
    optimizer = adamw(m, run.lr)
    if not first:
        torch.manual_seed(run.seed + parallel.rank())  # the weights are drawn alike, dropout is not
    progress = resume.Progress(batch.digest(rows), run.micro_batch_size)
    progress = resume_latest(out, trained, optimizer, run, progress) if go_on else progress
    lines = log.read_text().splitlines()[:progress.step] if progress.step and first else []
    recent = [loss for line in lines[-50:] if (loss := json.loads(line)["loss"]) is not None]
    if first:
        files.write(log, "".join(line + "\n" for line in lines))  # a stopped run was ahead of its state
    saved = time.perf_counter()
    began = saved - progress.seconds
    batches = islice(batch.batches([len(r.ids) for r in rows], run.batch_size, run.seed), progress.step, run.steps)
    bar = tqdm(batches, run.method, run.steps, initial=progress.step, unit="step", disable=not first)
    with open(log if first else os.devnull, "a") as f, cli.stop_asked() as asked:
        for some in bar:
            rate = learning_rate(run, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["pace"]
            loss = step_halving_on_oom(engine, [rows[i] for i in some], pad_id, progress)
            if idle := [n for n, p in trained.items() if p.grad is None]:
                raise ValueError(f"{idle[0]}: found no gradient after a step, expected one in each trained tensor; "
                                 f"nothing that is computed goes through it ({len(idle)} of {len(trained)} are so)")
            norm = float(parallel.full_tensor(nn.utils.clip_grad_norm_(trained.values(), 1.0)))
            progress.step += 1
            progress.tokens += sum(len(rows[i].ids) for i in some)
            line = {"step": progress.step, "loss": loss, "lr": rate, "grad_norm": norm}
            if math.isfinite(loss) and math.isfinite(norm):
                optimizer.step()
                progress.skipped_in_a_row = 0
                if len(recent) >= 20 and loss > np.mean(recent) + 5 * np.std(recent):
                    progress.spikes, line["spike"] = progress.spikes + 1, True
                recent = [*recent[-49:], loss]
            else:  # a step along it would spoil every weight
                progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
                line |= {"loss": None, "grad_norm": None, "skipped": some}
            optimizer.zero_grad(set_to_none=True)
            last, is_best = progress.step == run.steps, False
            if validate and (last or progress.step % run.validate_every == 0):
                found = torch.tensor(validate(m.eval()), dtype=torch.float64, device=run.device)
                found = float(parallel.all_reduce(found)) / parallel.world()  # all must agree on what is best
                m.train()
                line["validation"] = found if math.isfinite(found) else None
                is_best = math.isfinite(found) and (not progress.best or found > progress.best["validation"])
                progress.best = {"step": progress.step, "validation": found} if is_best else progress.best
            progress.seconds = time.perf_counter() - began
            line["tokens_per_second"] = round(progress.tokens / progress.seconds, 1)
            f.write(json.dumps(line) + "\n")
            f.flush()
            bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {line['tokens_per_second']:.0f} tokens/s")
            bad = progress.skipped_in_a_row >= BAD_STEPS
            due = every is not None and every.due(progress.step, time.perf_counter() - saved)
            stop, due = parallel.all_reduce(torch.tensor([len(asked), int(due)], device=run.device))
            if due or stop or bad or last or is_best:
                if first:
                    os.fsync(f.fileno())
                resume.save(out, progress, trained, optimizer, run.device)
                saved = time.perf_counter()
            if bad:
                raise ValueError(f"step {progress.step}: found no finite loss or gradient for {BAD_STEPS} steps in a "
                                 f"row; none was taken. The last was of examples {some}, all stand in {log}. Lower "
                                 f"--lr (now {run.lr}) or use --dtype float32")
            if stop:
                raise KeyboardInterrupt(f"stopped behind step {progress.step} of {run.steps}, which is saved: the same "
                                        "command with --resume goes on", 128 + (asked or [signal.SIGTERM])[0])
    m.eval()
    if progress.best and progress.best["step"] < run.steps:
        resume.restore_weights(resume.state_folder(out, progress.best["step"]), trained)
    if run.compile:
        torch.compiler.set_stance("force_eager")  # generation meets too many shapes to compile for each
    return {"train_seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / progress.seconds, 1), "best": progress.best,
            "steps_skipped": progress.skipped, "loss_spikes": progress.spikes,
            "micro_batch_size": progress.micro_batch_size}
