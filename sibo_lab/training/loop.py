"""The training loop: steps of AdamW, the best checkpoint, and whatever may go wrong.

Departures from the official code (transformers.Trainer): the loss is the mean over the labelled tokens of the whole
batch, so micro-batches change nothing; a step without a finite loss or gradient is skipped; a stopped run continues."""

import math
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
from sibo_lab import cli, cores, fast
from sibo_lab.data import batch
from sibo_lab.parallel import accumulating, all_reduce, full_tensor, rank, world, wrap
from sibo_lab.training import resume
from sibo_lab.training.log import open_log
from sibo_lab.training.optimizer import adamw
from sibo_lab.training.recipes import Run

BAD_STEPS = 10  # in a row without a finite loss or gradient end a run


def learning_rate(run: Run, step: int) -> float:
    """Linear warm-up from 0, then linear decay to 0 at the end; `step` counts from 0."""
    warmup = run.warmup if run.warmup >= 1 else math.ceil(run.warmup * run.steps)
    return run.lr * min((step + 1) / max(warmup, 1), (run.steps - step) / max(run.steps - warmup, 1), 1.0)


def train_step(m: nn.Module, rows: Sequence[batch.Row], micro_batch_size: int, pad_id: int) -> float:
    """Adds the gradient of a batch's loss, the mean over its labelled tokens (BERT: examples), and returns the loss.
    Each process takes every world-th row."""
    counts = [sum(x != -100 for x in r.labels[1:]) if isinstance(r.labels, list) else 1 for r in rows]
    total, loss = sum(counts), 0.0
    if not total:
        raise ValueError(f"expected a labelled token in each batch, got {len(rows)} examples without one; raise "
                         "--cutoff, which their prompts fill")
    spare = rows[counts.index(max(counts))]  # taken, times 0, where a process has nothing to learn from
    for start in range(0, len(rows), world() * micro_batch_size):
        end = start + world() * micro_batch_size
        mine = slice(start + rank(), end, world())
        weight = sum(counts[mine]) / total
        b = batch.to_device(batch.collate(rows[mine] if weight else [spare], pad_id), m)
        if "token_type_ids" not in b:
            del b["attention_mask"]  # a causal model needs none: padding comes after its last label
        with accumulating(m, last=end >= len(rows)):
            part = model.loss(m, **b) * weight
            (part * world()).backward()  # the mean over the processes is then the sum of their parts
        loss += part.detach()
    return float(all_reduce(loss))


def step_halving_on_oom(m: nn.Module, rows: Sequence[batch.Row], pad_id: int, progress: resume.Progress) -> float:
    """train_step; when memory runs out, again, with half as many examples at a time."""
    while True:
        random, size = torch.get_rng_state(), progress.micro_batch_size
        try:
            return train_step(m, rows, size, pad_id)
        except RuntimeError as e:
            if not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
                raise
        where = f"step {progress.step + 1}: out of memory with {size} examples at a time"
        if size == 1 or world() > 1:  # the other processes wait within the step
            raise ValueError(f"{where}; lower --micro-batch-size or --cutoff, or use --grad-checkpoint, --base-bits 4 "
                             "or --shard")
        progress.micro_batch_size = size // 2
        print(f"{where}; continuing with {size // 2}, still {len(rows)} per step", file=sys.stderr)
        m.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.set_rng_state(random)


class Training:
    def __init__(self, m: nn.Module, rows: Sequence[batch.Row], pad_id: int, run: Run, backbone: str):
        m.grad_checkpoint = run.grad_checkpoint
        if run.compile:
            torch.compiler.set_stance("default")
            fast.compiled(m)
        self.m, self.rows, self.pad_id, self.run, self.out = m, rows, pad_id, run, Path(run.out)
        self.engine = wrap(m.train(), run.device, run.shard)
        self.trained = {n: p for n, p in m.named_parameters() if p.requires_grad}
        self.optimizer = adamw(m, run.lr)
        self.progress = resume.Progress(batch.digest(rows), run.micro_batch_size, backbone=backbone)
        if rank():
            torch.manual_seed(run.seed + rank())  # different dropout, after the same weights

    def resume_latest(self) -> None:
        """Restores the run folder's newest whole state, if there is one."""
        begun, (state, corrupted) = self.progress, resume.newest(self.out)
        where = "no saved state, starting at step 1"
        if state:
            self.progress = resume.restore(state, self.trained, self.optimizer, self.run.device)
            where = f"continuing after step {self.progress.step} of {self.run.steps}"
        for what, expected, got in (("training data", self.progress.data, begun.data),
                                    ("backbone", self.progress.backbone or begun.backbone, begun.backbone)):
            if got != expected:
                raise ValueError(f"{self.out}: expected the {what} of its state, sha256 {expected[:9]}…, got "
                                 f"{got[:9]}…; restore it, or name a new --out")
        if not rank():
            for newer, wrong in corrupted.items():
                print(f"removed a corrupted state: {wrong}", file=sys.stderr)
                resume.remove(newer)  # among the last, it would displace a whole one
            print(f"{self.out}: {where}", file=sys.stderr)

    def take_step(self, picked: Sequence[int]) -> dict:
        """Trains on the rows `picked`; returns the step's line of metrics.jsonl."""
        rows, progress, recent = [self.rows[i] for i in picked], self.progress, self.progress.recent
        rate = learning_rate(self.run, progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        loss = step_halving_on_oom(self.engine, rows, self.pad_id, progress)
        if idle := [n for n, p in self.trained.items() if p.grad is None]:
            raise ValueError(f"{idle[0]}: expected a gradient, got none in {len(idle)} of {len(self.trained)} trained "
                             "tensors; the loss must depend on them")
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self.trained.values(), 1.0)))
        progress.step += 1
        progress.tokens += sum(len(r.ids) for r in rows)
        line = {"step": progress.step, "loss": loss, "lr": rate, "grad_norm": norm}
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            progress.skipped_in_a_row = 0
            if len(recent) >= 20 and loss > np.mean(recent) + 5 * np.std(recent):
                progress.spikes += 1
                line["spike"] = True
            progress.recent = [*recent[-49:], loss]
        else:  # a step along it would spoil every weight
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            line |= {"loss": None, "grad_norm": None, "skipped": picked}
        self.optimizer.zero_grad(set_to_none=True)
        return line

    def validate_and_keep_best(self, validate: Callable[[nn.Module], float], line: dict) -> bool:
        """Whether the model is better than ever; the step's line says how good."""
        found = torch.tensor(validate(self.m.eval()), dtype=torch.float64, device=self.run.device)
        found = float(all_reduce(found)) / world()  # all must agree on what is best
        self.m.train()
        finite, best = math.isfinite(found), self.progress.best
        line["validation"] = found if finite else None
        better = finite and (not best or found > best["validation"])
        if better:
            self.progress.best = {"step": self.progress.step, "validation": found}
        return better

    def save_if_due(self, due: bool, asked: Sequence[int], line: dict) -> bool:
        """Whether any process found a state due, which is then saved. KeyboardInterrupt if one was `asked` to stop."""
        run, progress, bad = self.run, self.progress, self.progress.skipped_in_a_row >= BAD_STEPS
        due, stop = all_reduce(torch.tensor([due or bad, len(asked)], device=run.device)).tolist()
        if due or stop:
            resume.save(self.out, progress, self.trained, self.optimizer, run.device)
        if bad:
            raise ValueError(f"step {progress.step}: expected a finite loss and gradient, got none for {BAD_STEPS} "
                             f"steps in a row, the last on examples {line['skipped']} (all: {run.out}/metrics.jsonl); "
                             f"lower --lr {run.lr}, or use --dtype float32")
        if stop:
            raise KeyboardInterrupt(f"stopped after step {progress.step} of {run.steps}, which is saved: the same "
                                    "command with --resume continues", 128 + (asked or [signal.SIGTERM])[0])
        return bool(due)


def fit(m: nn.Module, rows: Sequence[batch.Row], pad_id: int, run: Run,
        validate: Callable[[nn.Module], float] | None = None, every: resume.SaveEvery | None = None,
        resuming: bool = False, backbone: str = "") -> dict:
    """Trains for run.steps steps and returns what result.json says of it. Writes a line of metrics.jsonl per step, and
    states as often as `every` says and at the end. Leaves the model that `validate`, called every run.validate_every
    steps and at the end, finds best. ValueError after BAD_STEPS, for a trained tensor without a gradient, and where a
    state is of other rows or another `backbone`, its weights' digest."""
    training = Training(m, rows, pad_id, run, backbone)
    if resuming:
        training.resume_latest()
    progress, saved = training.progress, time.perf_counter()
    began = saved - progress.seconds
    batches = islice(batch.batches([len(r.ids) for r in rows], run.batch_size, run.seed), progress.step, run.steps)
    bar = tqdm(batches, run.method, run.steps, initial=progress.step, unit="step", disable=rank() > 0)
    with open_log(run, progress.step) as log, cli.stop_asked() as asked, cores.shared(m):
        for picked in bar:
            line = training.take_step(picked)
            due = last = progress.step == run.steps
            if validate and (last or progress.step % run.validate_every == 0):
                due |= training.validate_and_keep_best(validate, line)
            progress.seconds = time.perf_counter() - began
            line["tokens_per_second"] = round(progress.tokens / progress.seconds, 1)
            log(line)
            bar.set_postfix({name: line[name] for name in ("loss", "lr", "tokens_per_second")})
            due |= bool(every and every.due(progress.step, time.perf_counter() - saved))
            if training.save_if_due(due, asked, line):
                saved = time.perf_counter()
    m.eval()
    if progress.best and progress.best["step"] < run.steps:
        resume.restore_weights(resume.state_folder(training.out, progress.best["step"]), training.trained)
    if run.compile:
        torch.compiler.set_stance("force_eager")  # scoring has too many shapes
    return progress.summary()
