"""Fine-tunes a backbone with adapters or LoRA, plain or SIBO: options, recipes, runs, and what they leave behind.

`python train.py` is the whole main job. Recipes: the paper's Section 4.2 and the official scripts (LLM-Adapters); what
they do not publish is chosen here and marked. Departures from the official code: the frozen model is scored too; the
plain method is the same code with λ = 0; examples that the cutoff shortens are counted and reported."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import eval as evaluation
import model
import sibo
from sibo_lab import cli, files, parallel
from sibo_lab.backbone import config, locate, quantized, subwords, tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import compare, metrics, pictures, scoring
from sibo_lab.training import estimate, loop, options, recipes, resume, run_folder
from sibo_lab.training.options import parser  # noqa: F401


@dataclass
class Baseline:
    """What the frozen backbone scores: measured once, used by a run and its plain counterpart."""

    score: scoring.Score
    curve: list[float]


@dataclass
class Data:
    """What a run learns from, chooses its best checkpoint by, and is scored on: each test with its task."""

    task: tasks.Task
    train: Sequence
    valid: Sequence
    tests: Sequence[tuple[tasks.Task, Sequence]]


def measure(m: nn.Module, t: subwords.Tokenizer, tests: Sequence[tuple[tasks.Task, Sequence]], run: recipes.Run,
            first: int | None = None) -> scoring.Score:
    """The score of each test on its first examples, and of several their mean."""
    found = {}
    for task, test in tests:
        if task.num_labels:
            rows = [batch.encode_sentence(s, t, run.cutoff) for s in test[:first]]
            found[task.name] = scoring.score_sentences(m, t, task, rows)
        else:
            found[task.name] = scoring.score_examples(m, t, task, test[:first], protocol=run.protocol)
    return scoring.mean(found)


@torch.no_grad()
def validation(m: nn.Module, t: subwords.Tokenizer, d: Data, rows: Sequence[batch.Row], run: recipes.Run) -> float:
    """How good the model is on the validation examples: GLUE's metric, or minus the loss a labelled token."""
    if d.task.num_labels:
        return scoring.score_sentences(m, t, d.task, rows).score
    total = loss = 0.0
    for start in range(0, len(rows), run.micro_batch_size):
        b = batch.to_device(batch.collate(rows[start:start + run.micro_batch_size], 0), m)
        n = int((b["labels"][:, 1:] != -100).sum())
        if n:
            loss += n * float(model.loss(m, b["input_ids"], b["labels"]))
        total += n
    return -loss / total


def load(run: recipes.Run, task: tasks.Task) -> nn.Module:
    """The backbone, with the seed set for all that is drawn anew; to be sharded: on the CPU, where files are mapped."""
    torch.manual_seed(run.seed)
    return model.from_pretrained(run.backbone, getattr(torch, run.dtype), "cpu" if run.shard else run.device,
                                 task.num_labels or None, run.base_bits)


def execute(run: recipes.Run, d: Data, before: Baseline | None = None, every: resume.SaveEvery | None = None,
            go_on: bool = False) -> tuple[dict, Baseline]:
    """Trains, scores and writes one run; returns its result and the frozen backbone's figures."""
    out, task = Path(run.out), d.task
    estimate.reset_peak(run.device)
    m = load(run, task)
    t = tokenizer.for_model(run.backbone, m.config.vocab_size, "pad" if task.num_labels else "eos")
    pad = t.eos_id if t.pad_id is None else t.pad_id
    encode = batch.encode_sentence if task.num_labels else partial(
        batch.encode, train_on_inputs=run.train_on_inputs, protocol=run.protocol)
    rows, valid = ([encode(e, t, run.cutoff) for e in part] for part in (d.train, d.valid))
    cut = sum(r.cut for r in rows)
    if cut and not parallel.rank():
        print(f"{cut} of {len(rows)} training examples are cut off at {run.cutoff} tokens (--cutoff)", file=sys.stderr)
    mute, mute_valid = (sum(isinstance(r.labels, list) and set(r.labels[1:]) <= {-100} for r in part)
                        for part in (rows, valid))
    for n, part, kind in ((mute, rows, "training"), (mute_valid, valid, "validation")):
        if part and n == len(part):
            raise ValueError(f"--cutoff {run.cutoff}: found no labelled token in any of the {n} {kind} examples: "
                             "their prompts fill it; raise it")
    if mute and not parallel.rank():
        print(f"{mute} of {len(rows)} training examples have no labelled token left: they teach nothing (--cutoff)",
              file=sys.stderr)
    texts = evaluation.similarity_rows(m, t, d.tests[0][1], protocol=run.protocol)
    if before is None:
        if run.shard:
            parallel.wrap(m, run.device, True)
        before = Baseline(scoring.mean({of.name: scoring.majority(
            of, d.train, [batch.encode_sentence(s, t, run.cutoff) for s in test]) for of, test in d.tests})
                        if task.num_labels else measure(m, t, d.tests, run, 50),
                        evaluation.layer_similarities(m, texts, pad))
        if run.shard:  # what is cut up takes no adapters: they come first
            m = load(run, task)
    m = m.requires_grad_(True) if run.method == "full" else sibo.inject(m, **run.settings())
    if not parallel.rank():
        files.write(out / "config.json", json.dumps(asdict(run), indent=2) + "\n")
    trace = {"versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
             "git": run_folder.git_state(), "sha256": {"train": batch.digest(rows), "validation": batch.digest(valid)}
             | {of.name: batch.digest(test) for of, test in d.tests}}
    came = loop.fit(m, rows, pad, run, valid and partial(validation, t=t, d=d, rows=valid, run=run), every, go_on)
    sibo.save(m, out)
    after = measure(m, t, d.tests, run)
    curve = evaluation.layer_similarities(m, texts, pad)
    trained = sum(p.numel() for p in m.parameters() if p.requires_grad)
    result = {
        "backbone": run.backbone, "method": run.method, "lambda": run_folder.learned_lam(m) if run.learn_lam else run.lam,
        "task": run.task, "scored_on": run.score_on, "metric": after.metric, "score": after.score, "n": after.n,
        "interval": after.interval, "parts": after.parts, "more": after.more, "empty": after.empty,
        "answers_given": after.said, "baseline_score": before.score.score, "baseline_n": before.score.n,
        "trainable_parameters": trained, "total_parameters": quantized.parameters(m), **came,
        "peak_memory_bytes": estimate.peak_memory(run.device), "similarity": metrics.last_five(curve),
        "baseline_similarity": metrics.last_five(before.curve), "examples_cut_off": cut,
        "examples_without_label": mute,
        "test_examples_cut_off": after.cut, "seed": run.seed,
        "similarity_per_layer": curve, "baseline_similarity_per_layer": before.curve,
        "command": run_folder.command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), **trace,
    }
    if not parallel.rank():
        files.write(out / "answers.jsonl", "".join(json.dumps(r) + "\n" for r in after.records))
        files.write(out / "result.json", json.dumps(result, indent=2) + "\n")
        shutil.rmtree(out / "checkpoints")  # the adapter is the best of them
    return result, before


def main(args: argparse.Namespace, several: bool = False) -> list[recipes.Run]:
    """One run, or (with lists, or `several`) a folder of runs and their table; returns those that are there now."""
    several_args = options.grid(args)
    several |= len(several_args) > 1
    for one in several_args:
        options.check(one)
    learned, folder = tasks.parse(args.task), tasks.data_dir(args.data_dir)
    task, tests = learned[0], tasks.scored_whole(tasks.parse(*args.test), learned) if args.test else learned
    if wrong := [t.name for t in tests if t.num_labels != task.num_labels]:
        raise ValueError(f"--test: found {wrong[0]}, expected a task that a model of {args.task} can answer")
    if task.num_labels and args.protocol == "paper":
        raise ValueError(f"--protocol paper: found --task {task.name}, expected a text-to-text task, with a prompt "
                         "and beams")
    made, dry = task.kind == "word-problems", args.dry_run or args.explain
    there = all((folder / file).is_file() for t in learned for file in t.train)
    train = [] if made or dry and not there else [row for t in learned for row in readers.load(t, "train", folder)]
    tests = [] if dry or args.score_on == "validation" else [(t, readers.load(t, "test", folder, args.limit))
                                                             for t in tests]
    said = dry and locate.SHAPES.get(args.backbone) or config.read_spec(
        parallel.one_rank_at_a_time(lambda: locate.locate(args.backbone, config_only=dry)))
    family = config.parse(said, args.backbone) and said["model_type"]
    if (family == "bert") != bool(task.num_labels):
        raise ValueError(f"--task {task.name}: found backbone {args.backbone}, a {family}, expected "
                         + ("a BERT, such as minilm" if task.num_labels else "an LLM, such as smollm2-135m"))
    runs = [run_folder.folder_of(options.resolve(one, said, task, len(train)), args, several) for one in several_args]
    if args.explain:
        for run in runs:
            if run.method == "full":
                raise ValueError("--explain: found --method full, which adapts no module; expected an adapter or LoRA")
            m = model.build(said, run.backbone, task.num_labels or None)
            print(estimate.explain(sibo.inject(m, **run.settings())))
        return []
    if dry:
        for run in runs:
            unknown = "epochs" if made or args.steps else "" if train else "steps"
            told = [f"{f.name} {getattr(run, f.name)}" for f in fields(recipes.Recipe)
                    if f.name != unknown and (f.name not in options.USED_BY or options.uses(run.method, options.USED_BY[f.name]))]
            beams = [] if task.num_labels else [f"protocol {run.protocol}: {scoring.BEAMS[run.protocol]} beams"]
            print(f"{estimate.dry_run(run, said, task)}\nrecipe: {', '.join(told + beams)}")
        return []
    for run in runs:  # whatever does not fit the model is said before weights are read
        if run.method != "full":
            sibo.inject(model.build(said, args.backbone, task.num_labels or None), **run.settings())
    for of, test in () if parallel.rank() else tests:
        if of.train and not of.test:
            print(f"{of.name} has no test file: scored are {len(test)} of its examples, left out of the training",
                  file=sys.stderr)
        if seen := readers.overlap(train, test):
            print(f"warning: {seen} of {of.name}'s {len(test)} test questions stand in the training set too: a right "
                  f"answer to one may be memory; see python -m sibo_lab data overlap --train {task.name}", file=sys.stderr)
    if args.compare:
        runs += [run.plain for run in runs if "sibo" in run.method]
    claimed = parallel.one_rank_at_a_time(lambda: [run_folder.claim(run, args.resume) for run in runs], ranks=1)
    done = [result for _, result in sorted(parallel.all_gather_dicts(dict(enumerate(claimed or ()))).items())]
    if not parallel.rank() and any(done):
        print(f"{sum(map(bool, done))} of {len(runs)} runs are finished already: read, not run again", file=sys.stderr)
    frozen = None
    for i, run in enumerate(runs):
        if done[i]:
            continue
        rows = readers.load(task, "train", folder, run.steps * run.batch_size, run.seed) if made else train
        rows, valid = readers.hold_out(rows, run.validate) if run.validate else (rows, [])
        d = Data(task, rows, valid, tests or [(task, valid)])
        with parallel.one_rank_at_a_time(lambda run=run: resume.lock(Path(run.out)), ranks=1) or nullcontext():
            done[i], frozen = execute(run, d, frozen, args.save_every, args.resume)
            if not parallel.rank():
                pictures.draw_training([run], [done[i]])
    if parallel.rank():
        return runs
    if args.compare:
        pictures.draw_training(runs, done)
    if several:
        folder = Path(runs[0].out).parent
        print(f"{compare.tables(compare.read([folder]))}\n{folder}/")
    else:
        print(compare.side_by_side(done) + "\n" + "\n".join(f"{r.out}/" for r in runs))
    return runs


if __name__ == "__main__":
    cli.run(main, parser())
