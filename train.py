"""Fine-tunes a backbone with adapters or LoRA, plain or SIBO: `python train.py` is the whole main job.

`execute` tells one run as a story: load, baseline, inject, fit, save, score. Departures from the official code: the
frozen model is scored too, the plain method is the same code with λ = 0, and what the cutoff shortens is counted."""

import copy
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import eval as evaluation
import model
import sibo
from sibo_lab import cli, files
from sibo_lab.backbone import chat_template, config, locate, tokenizer, weights
from sibo_lab.backbone.subwords import Tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import compare, pictures, scoring
from sibo_lab.parallel import all_gather_dicts, one_rank_at_a_time, rank, wrap
from sibo_lab.placement import place
from sibo_lab.training import estimate, loop, options, remedies, resume, run_folder
from sibo_lab.training.options import parser
from sibo_lab.training.recipes import Run


@dataclass
class Data:
    """What a run learns from, is scored on, and chooses its best checkpoint by."""

    task: tasks.Task  # the first of those to learn
    learned: Sequence[tuple[tasks.Task, Sequence]]  # each with its training examples; none: made to measure
    train: Sequence  # all of these; of a run, without what it holds out
    tests: Sequence[tuple[tasks.Task, Sequence]]
    valid: Sequence = ()
    rows: tuple[Sequence[batch.Row], Sequence[batch.Row]] = ((), ())  # train and valid, encoded
    cut: dict[str, int] | None = None  # what the cutoff took from them


@dataclass
class Backbone:
    """Where it is, its config.json, the model without weights, which each run fills, its tokenizer (in its chat
    template, where that is the protocol; None in a dry run), its weights' digest, and, once measured, its score."""

    path: Path
    spec: dict
    skeleton: nn.Module
    t: Tokenizer | chat_template.Chat | None
    sha256: str
    baseline: tuple[list[str], run_folder.Measured | None] = ((), None)  # of what, and its measurement

    def load(self, run: Run) -> nn.Module:
        """Seeds whatever is drawn next. What is to be sharded stays on the CPU, where files are mapped."""
        torch.manual_seed(run.seed)
        return model.load_weights(copy.deepcopy(self.skeleton), self.path, getattr(torch, run.dtype),
                                  "cpu" if run.shard else run.device, run.base_bits)


def execute(run: Run, d: Data, backbone: Backbone, every: resume.SaveEvery, resuming: bool) -> dict:
    """Trains, scores and writes one run, and returns its result."""
    out, t, (rows, valid) = Path(run.out), backbone.t, d.rows
    estimate.reset_peak(run.device)
    m = backbone.load(run)
    scored = [run.dtype, *(batch.digest(test) for _, test in d.tests)]
    if backbone.baseline[0] != scored:
        if run.shard:  # frozen: of what learns, FSDP2 takes one dtype
            wrap(m.requires_grad_(False), run.device, True)
        backbone.baseline = scored, measure(m, t, d, run, frozen=True)
        if run.shard:  # what is cut up takes no adapters: they come first
            m = backbone.load(run)
    m = sibo.inject(m, **vars(run.settings)) if run.settings else m.requires_grad_(True)
    if run.stochastic_depth:
        remedies.stochastic_depth(m, run.stochastic_depth)
    if run.similarity_loss:
        remedies.SimilarityLoss(m, run.similarity_loss, evaluation.similarities)
    if not rank():
        files.write(out / "config.json", json.dumps(run.config(), indent=2) + "\n")
    choose = valid and (run.score_on == "test" or run.validate_every < run.steps)  # else the score says the same
    validate = partial(validation, t=t, d=d, rows=valid, run=run) if choose else None
    trained = loop.fit(m, rows, 0, run, validate, every, resuming, backbone.sha256)  # 0: nothing attends to padding
    sibo.save(m, out)
    measured = measure(m, t, d, run)
    result = run_folder.result(m, run, measured, backbone.baseline[1], d.cut, trained, digests(d, run, backbone))
    if not rank():
        files.write(out / "answers.jsonl", "".join(json.dumps(r) + "\n" for r in measured[0].records))
        files.write(out / "result.json", json.dumps(result, indent=2) + "\n")
        shutil.rmtree(out / "checkpoints")  # the adapter is the best of them
    return result


def digests(d: Data, run: Run, backbone: Backbone) -> dict[str, str]:
    """sha256 of what a run begins with, learns from and is scored on, by name."""
    tests = d.tests if run.score_on == "test" else ()  # else: the validation examples
    return {"backbone": backbone.sha256, "train": batch.digest(d.rows[0]), "validation": batch.digest(d.rows[1])} | {
        task.name: batch.digest(test) for task, test in tests}


def encode(examples: Sequence, t: Tokenizer, run: Run) -> list[batch.Row]:
    return batch.encode_all(examples, t, run.cutoff, run.train_on_inputs, run.protocol)


def count_cut(rows: Sequence[batch.Row], valid: Sequence[batch.Row], run: Run) -> dict[str, int]:
    """How many training examples the cutoff shortens, or leaves without a label, also printed. ValueError where it
    leaves none to train or to validate on."""
    lost = [[isinstance(r.labels, list) and set(r.labels[1:]) <= {-100} for r in part] for part in (rows, valid)]
    for kind, part in zip(("training", "validation"), lost, strict=True):
        if part and all(part):
            raise ValueError(f"--cutoff {run.cutoff}: expected labelled tokens in the {len(part)} {kind} examples, got "
                             "none: their prompts fill it; raise it")
    cut, unlabelled = sum(r.cut for r in rows), sum(lost[0])
    for n, what in ((cut, f"cut off at {run.cutoff} tokens"), (unlabelled, "left without a label")):
        if n and not rank():
            print(f"{n} of {len(rows)} training examples are {what} (--cutoff)", file=sys.stderr)
    return {"examples_cut_off": cut, "examples_without_label": unlabelled}


def measure(m: nn.Module, t: Tokenizer, d: Data, run: Run, frozen: bool = False) -> run_folder.Measured:
    """The tests' mean score, and Eq. (3) of each hidden state. Frozen, an LLM answers 50 examples; a BERT, its head
    untrained, scores as always guessing the commonest class would."""
    scores = {}
    for task, test in d.tests:
        if task.num_labels:
            rows = encode(test, t, run)
            found = scoring.majority(task, d.train, rows) if frozen else scoring.score_sentences(m, t, task, rows)
        else:
            found = scoring.score_examples(m, t, task, test[:50] if frozen else test, protocol=run.protocol,
                                           by=run.score_by)
        scores[task.name] = found
    texts = evaluation.similarity_rows(m, t, d.tests[0][1], protocol=run.protocol)
    return scoring.mean(scores), evaluation.layer_similarities(m, texts)


@torch.no_grad()
def validation(m: nn.Module, t: Tokenizer, d: Data, rows: Sequence[batch.Row], run: Run) -> float:
    """How good the model is on the validation examples: GLUE's metric, or minus the loss per labelled token."""
    if d.task.num_labels:
        return scoring.score_sentences(m, t, d.task, rows).score
    total = loss = 0.0
    for start in range(0, len(rows), run.micro_batch_size):
        b = batch.to_device(batch.collate(rows[start:start + run.micro_batch_size]), m)
        n = int((b["labels"][:, 1:] != -100).sum())
        if n:
            loss += n * float(model.loss(m, b["input_ids"], b["labels"]))
        total += n
    return -loss / total


def main(args: Namespace, several: bool = False) -> list[Run]:
    """One run, or (with lists, or `several`) a folder of runs and their table; returns the runs."""
    choices, dry = options.grid(args), args.dry_run or args.explain
    several |= len(choices) > 1
    for one in choices:
        options.check_options(one)
    d = read_data(args, dry)
    protocol = batch.protocol_for(args.protocol, [row for rows in (d.train, *(t for _, t in d.tests)) for row in rows])
    for one in choices:
        one.protocol = protocol
    backbone = find_backbone(args, d.task, protocol, dry)
    for e in (e for _, test in d.tests for e in test if protocol == "chat" and not dry):
        batch.prompt_of(e, backbone.t, protocol)  # or refused, before weights are read
    runs = [run_folder.folder_of(options.resolve(one, backbone.spec["model_type"], d.task, d.train), args, several)
            for one in choices]
    if dry:
        unknown = "epochs" if args.steps or d.task.kind == "word-problems" else "" if d.train else "steps"
        for run in runs:
            print(estimate.explain(run, copy.deepcopy(backbone.skeleton)) if args.explain else
                  estimate.dry_run(run, backbone.spec, d.task, unknown))
        return []
    for run in runs:  # what does not fit the model is said before weights are read
        if run.settings:
            place(backbone.skeleton, run.settings)
    if args.compare:
        plain = [run.plain for run in runs if "sibo" in run.method]
        if not plain:
            raise ValueError(f"--compare: expected a SIBO method, got --method {','.join(args.method)}, which is plain")
        runs += plain
    results = train_all(runs, args, d, backbone)
    if rank():
        return runs
    if args.compare:
        pictures.draw_training(runs, results)
    folder = Path(runs[0].out).parent
    print(f"{compare.tables(compare.read([folder]))}\n{folder}/" if several else
          "\n".join([compare.side_by_side(results), *(f"{run.out}/" for run in runs)]))
    return runs


def read_data(args: Namespace, dry: bool) -> Data:
    """The (first) task to learn, the training examples (word problems alone are made for each run), and the tests'."""
    folder, parse = tasks.data_dir(args.data_dir), partial(tasks.parse, ignore_columns=args.ignore_columns)
    learned = parse(args.task)
    task = learned[0]
    tests = tasks.scored_whole(parse(*args.test), learned) if args.test else learned
    tasks.require_own(args.ignore_columns, *learned, *tests)
    if other := [t.name for t in tests if t.num_labels != task.num_labels]:
        raise ValueError(f"--test: expected tasks that a model of {args.task} can answer, got {other[0]}")
    if args.similarity_loss and not task.num_labels:
        raise ValueError(f"--similarity-loss: expected a GLUE task, with a BERT, got {args.task}, whose prompts begin "
                         "alike")
    if task.num_labels and args.score_by == "loss":
        raise ValueError(f"--score-by loss: expected a text-to-text task, got {args.task}, whose loss stands "
                         "beside its score")
    if task.num_labels and args.protocol in ("paper", "chat"):
        raise ValueError(f"--protocol {args.protocol}: expected a text-to-text task, with a prompt and beams, got "
                         f"{args.task}")
    absent = any(not (folder / file).is_file() for t in learned for file in t.train)
    unread = len(learned) == 1 and task.kind == "word-problems" or dry and absent and task.kind != "own"
    learned = [] if unread else [(t, readers.load(t, "train", folder)) for t in learned]
    train = [row for _, rows in learned for row in rows]
    tests = [] if dry or args.score_on == "validation" else readers.load_tests(tests, folder, args.limit)
    if not dry:
        readers.say_unscored([t for t, _ in learned], [t for t, _ in tests], folder)
    scoring.require_answers(tests, args.score_by)
    readers.warn_of_overlap(learned, tests)
    return Data(task, learned, train, tests)


def find_backbone(args: Namespace, task: tasks.Task, protocol: str, dry: bool) -> Backbone:
    """Located once, built once. A dry run of a large model reads its shape from a table and fetches nothing."""
    spec, path = dry and locate.SHAPES.get(args.backbone), Path(args.backbone)
    if not spec:
        path = one_rank_at_a_time(lambda: locate.locate(args.backbone, config_only=dry))
        spec = config.read_spec(path)
    c = config.parse(spec, args.backbone)
    if (spec["model_type"] == "bert") != bool(task.num_labels):
        kind = "a BERT, such as minilm" if task.num_labels else "an LLM, such as smollm2-135m"
        raise ValueError(f"--task {task.name}: expected {kind}, got --backbone {args.backbone}, a {spec['model_type']}")
    if len(task.columns) > 2 and c.type_vocab_size == 1:
        raise ValueError(f"--task {task.name}: its pairs of sentences need a BERT of two segments, got --backbone "
                         f"{args.backbone}, with type_vocab_size 1")
    m = model.build(spec, args.backbone, task.num_labels or None)
    if not dry:
        model.check(m, path)  # what is missing is said before anything is written
    t = None if dry else tokenizer.for_model(path, m.config.vocab_size, "pad" if task.num_labels else "eos")
    t = chat_template.Chat(path, t) if t and protocol == "chat" else t
    return Backbone(path, spec, m, t, "" if dry else weights.digest(path))


def data_of(run: Run, d: Data, t: Tokenizer) -> Data:
    """What is a run's own: its training examples, those that it holds out, and both encoded."""
    learned = d.learned or [(d.task, readers.load(d.task, "train", Path(run.data_dir), run.steps * run.batch_size,
                                                  run.seed))]
    rows, valid = d.train or learned[0][1], []
    if run.validate:
        rows, valid = readers.hold_out(rows, run.validate)
    encoded = encode(rows, t, run), encode(valid, t, run)
    return replace(d, train=rows, valid=valid, tests=d.tests or readers.by_task(valid[:run.limit], learned),
                   rows=encoded, cut=count_cut(*encoded, run))


def train_all(runs: Sequence[Run], args: Namespace, d: Data, backbone: Backbone) -> list[dict]:
    """The results of the runs; those of finished ones are read. One process at a time trains in a folder."""
    claimed = one_rank_at_a_time(lambda: [run_folder.claim(run, args.resume) for run in runs], ranks=1)
    results = list(all_gather_dicts(dict(enumerate(claimed or ()))).values())
    if not rank() and any(results):
        print(f"{sum(map(bool, results))} of {len(runs)} runs are finished: read, not run again", file=sys.stderr)
    last, mine = None, d
    for i, run in enumerate(runs):
        key = [run.cutoff, run.train_on_inputs, run.validate, *([] if d.train else [run.steps, run.seed])]
        if key != last:  # else as of the run before
            last, mine = key, data_of(run, d, backbone.t)  # or refused: no folder is made yet
        if results[i]:
            run_folder.require_same_data(run, results[i], digests(mine, run, backbone))
            continue
        with one_rank_at_a_time(lambda run=run: resume.lock(Path(run.out)), ranks=1) or nullcontext():
            results[i] = execute(run, mine, backbone, args.save_every, args.resume)
            if not rank():
                pictures.draw_training([run], [results[i]])
    return results


if __name__ == "__main__":
    cli.run(main, parser())
