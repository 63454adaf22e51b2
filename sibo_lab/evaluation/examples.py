"""What eval.py scores: the tests, or what a run left out of its training, as long as that is what it did leave out."""

import sys
from argparse import Namespace
from collections.abc import Sequence

from sibo_lab.backbone import chat_template, tokenizer
from sibo_lab.data import batch, readers, tasks

Loaded = list[tuple[tasks.Task, Sequence]]


def load(args: Namespace, tests: Sequence[tasks.Task]) -> Loaded:
    """Examples of each of the tests or, of a run that was scored on its validation examples, those. ValueError where a
    run left others out of training than the same file and options give now."""
    if args.held_out:
        return held_out(args, args.held_out)
    loaded, most = readers.load_tests(tests, args.data_dir, args.limit), args.config.get("limit")
    for task, test in loaded:
        if task in args.trained and task.train and not task.test:
            if task.name not in args.sha256 and "validation" in args.sha256 and args.config["validate"]:
                held_out(args, args.config["validate"])  # the same file, read in the same way
            _require_left_out(args, task.name, test if most == args.limit else
                              readers.load(task, "test", args.data_dir, most))
    return loaded


def held_out(args: Namespace, n: int) -> Loaded:
    """The training examples that a run held out for validation, n questions."""
    run, made = args.config, [t.kind for t in args.trained] == ["word-problems"]  # as many as the run learned from
    number_and_seed = (run["steps"] * run["batch_size"], run["seed"]) if made else ()
    loaded = [(t, readers.load(t, "train", args.data_dir, *number_and_seed)) for t in args.trained]
    tenth = "score_by" not in run  # an older run held out no more
    _, held = readers.hold_out([row for _, rows in loaded for row in rows], n, tenth)
    if "validation" in args.sha256:
        t, protocol = tokenizer.read(args.path), run.get("protocol", "clean")
        speaker = chat_template.Chat(args.path, t) if protocol == "chat" else t
        _require_left_out(args, "validation", batch.encode_all(held, speaker, run["cutoff"], run["train_on_inputs"],
                                                               protocol))
    return readers.by_task(held[:args.limit], loaded)


def warn_of_overlap(args: Namespace, tests: Loaded) -> None:
    """As train.py does, where the files that a run was trained on are there still."""
    learned = tasks.parse(args.config.get("task", "word-problems"), ignore_columns=args.config.get("ignore_columns"))
    try:
        readers.warn_of_overlap([(t, readers.load(t, "train", args.data_dir)) for t in learned if t.train], tests)
    except FileNotFoundError:
        pass
    except ValueError as e:  # a test does not need them
        print(f"{tests[0][0].name}: not compared with the training set: {e}", file=sys.stderr)


def _require_left_out(args: Namespace, name: str, rows: Sequence) -> None:
    found = batch.digest(rows)
    if (theirs := args.sha256.get(name, found)) != found:
        raise ValueError(f"{args.run}: expected to score the {name} examples that it left out of training, sha256 "
                         f"{theirs[:9]}…, got others, {found[:9]}…; which are left out follows from the file, "
                         "--ignore-columns and this code's version: bring back what changed, or score another file")
