"""`python -m sibo_lab data list|fetch|overlap`."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from sibo_lab import cli
from sibo_lab.data import download, readers, tasks


def chosen(names: list[str]) -> list[tasks.Task]:
    """The tasks that have files to fetch, by short names and groups; ValueError for any other name."""
    found = []
    for name in names:
        group = [t for t in tasks.TASKS.values() if t.train + t.test and name in ("all", t.kind)]
        if not group and tasks.task(name).kind in ("own", "word-problems"):
            raise ValueError(f"{name}: found no published file of it, expected a task of `python -m sibo_lab data list` or a "
                             f"group: {', '.join(tasks.GROUPS)}")
        found += group or [tasks.task(name)]
    return list(dict.fromkeys(found))


def listing(tasks: Iterable[tasks.Task], data_dir: Path) -> str:
    """A table with a line for each file of each task: its place, whether it is there and right, and the published count
    of its split."""
    rows = [("task", "family", "split", "published", f"file, under {data_dir}", "found")]
    for t in tasks:
        for split, files, count in (("train", t.train, t.counts[0]), ("test", t.test, t.counts[1])):
            for file in files:
                rows.append((t.name, t.kind, split, (count or "?") if file == files[0] else "", file,
                             download.state(data_dir / file, file)))
        if not t.test:
            place = "held out of train" if t.train else "made from a seed"
            rows.append((t.name, t.kind, "test", t.held_out or "any", place, ""))
    return cli.format_table(rows, left=range(len(rows[0])))


def overlaps(train: tasks.Task, tests: list[tasks.Task], data_dir: Path) -> str:
    """A table of how many test questions of each task stand in the training set of `train`, held-out part included."""
    asked = readers.load(train, "train", data_dir)
    if train.train and not train.test:
        asked += readers.load(train, "test", data_dir)
    rows = [(f"in {train.name} ({len(asked)})", "test questions", "of them in it", "share")]
    for t in tests:
        if not all((data_dir / file).is_file() for file in t.test):
            rows.append((t.name, "missing", "", ""))
            continue
        test = readers.load(t, "test", data_dir)
        found = readers.overlap(asked, test)
        rows.append((t.name, len(test), found, f"{found / len(test):.1%}"))
    return cli.format_table(rows, left=range(len(rows[0])))


def parser() -> cli.Parser:
    p = cli.Parser("-m sibo_lab data", description="The benchmarks' files: which there are, fetching them, what they share.")
    commands = p.add_subparsers(dest="command", required=True, metavar="list | fetch | overlap")
    li = commands.add_parser("list", help="every task: counts, files, whether they are there and right")
    f = commands.add_parser("fetch", help="download from where they are published, and check")
    f.add_argument("tasks", nargs="+", metavar="TASK",
                   help=f"{', '.join(t.name for t in chosen(['all']))}; or a group: {', '.join(tasks.GROUPS)}")
    o = commands.add_parser("overlap", help="how many test questions stand in a training set")
    o.add_argument("--train", required=True, metavar="TASK", help="whose training set, such as math-mix")
    o.add_argument("--test", metavar="A,B", help="whose tests (default: all of the same family that have a file)")
    for command in (li, f, o):
        command.add_argument("--data-dir", metavar="DIR", help="the tasks' files (default: $SIBO_DATA, else the cache)")
    return p


def main(args: argparse.Namespace) -> None:
    directory = tasks.data_dir(args.data_dir)
    if args.command == "list":
        print(listing(tasks.TASKS.values(), directory))
    elif args.command == "fetch":
        wanted = chosen(args.tasks)
        for i, t in enumerate(wanted):
            try:
                download.fetch(t.train + t.test, directory)
            except OSError:
                left = [file for later in wanted[i:] for file in later.train + later.test]
                print("\n".join(download.missing(left, directory)), file=sys.stderr)
                raise
            for split, files in (("train", t.train), ("test", t.test)):
                if any(file not in download.BLOBS for file in files):
                    readers.load(t, split, directory)  # no hash is known: the published count is what can be compared
        print(listing(wanted, directory))
    else:
        train = tasks.task(args.train)
        asked = ([tasks.task(name) for name in args.test.split(",")] if args.test else
                 [t for t in tasks.TASKS.values() if t.kind == train.kind and t.test])
        if not asked or not all(t.test for t in asked):
            raise ValueError(f"--test: found {args.test or 'none'}, expected tasks with a test file, such as "
                             "mawps,svamp (questions that are made or held out stand in no training set)")
        print(overlaps(train, asked, directory))
