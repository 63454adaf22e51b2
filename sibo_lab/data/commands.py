"""`python -m sibo_lab data list|fetch|overlap`."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from sibo_lab import cli
from sibo_lab.data import download, readers, tasks

GROUPS = ("arithmetic", "commonsense", "glue", "all")


def chosen(names: Iterable[str]) -> list[tasks.Task]:
    """The tasks with files to fetch, by short names and groups; ValueError for any other name."""
    found = []
    for name in names:
        group = [t for t in tasks.TASKS.values() if t.train + t.test and name in ("all", t.kind)]
        if not group and tasks.task(name).kind in ("own", "word-problems"):
            raise ValueError(f"{name} has no published file: expected a task from `python -m sibo_lab data list` "
                             f"or a group ({', '.join(GROUPS)})")
        found += group or [tasks.task(name)]
    return list(dict.fromkeys(found))


def listing(some: Iterable[tasks.Task], data_dir: Path) -> str:
    """A table with one line per file: its split's published count, its place and its state."""
    rows = [("task", "family", "split", "published", f"file, under {data_dir}", "found")]
    for t in some:
        for split, names, count in (("train", t.train, t.counts[0]), ("test", t.test, t.counts[1])):
            rows += [(t.name, t.kind, split, "" if i else count or "?", name, download.state(data_dir / name, name))
                     for i, name in enumerate(names)]
        if not t.test:
            place = "held out of train" if t.train else "made from a seed"
            rows.append((t.name, t.kind, "test", t.held_out or "any", place, ""))
    return cli.format_table(rows, left=range(len(rows[0])))


def fetch(some: Sequence[tasks.Task], data_dir: Path) -> None:
    """Downloads the tasks' files; when that fails, lists what is missing before it raises."""
    for i, t in enumerate(some):
        try:
            download.fetch(t.train + t.test, data_dir)
        except OSError:
            left = [name for later in some[i:] for name in later.train + later.test]
            print("\n".join(download.missing(left, data_dir)), file=sys.stderr)
            raise
        for split, names in (("train", t.train), ("test", t.test)):
            if any(download.sources()[name].sha1 is None for name in names):
                readers.load(t, split, data_dir)  # warns if the count is not the published one


def overlaps(train: tasks.Task, tests: Iterable[tasks.Task], data_dir: Path) -> str:
    """A table: how many test questions of each task are in the training set of `train`, all of it."""
    learned = readers.load(train, "train", data_dir)
    if train.train and not train.test:
        learned += readers.load(train, "test", data_dir)
    rows = [(f"in {train.name} ({len(learned)})", "test questions", "of them in it", "share")]
    for t in tests:
        if not all((data_dir / name).is_file() for name in t.test):
            rows.append((t.name, "missing", "", ""))
            continue
        test = readers.load(t, "test", data_dir)
        shared = readers.overlap(learned, test)
        rows.append((t.name, len(test), shared, f"{shared / len(test):.1%}"))
    return cli.format_table(rows, left=range(len(rows[0])))


def parser() -> cli.Parser:
    p = cli.Parser("-m sibo_lab data", description="The benchmarks' files: list, download and compare them.")
    commands = p.add_subparsers(dest="command", required=True, metavar="list | fetch | overlap")
    li = commands.add_parser("list", help="every task: counts, files, and whether they are there and right")
    f = commands.add_parser("fetch", help="download files from where they are published, and check them")
    f.add_argument("tasks", nargs="+", metavar="TASK",
                   help=f"{', '.join(t.name for t in chosen(['all']))}; or a group: {', '.join(GROUPS)}")
    o = commands.add_parser("overlap", help="count the test questions that are also in a training set")
    o.add_argument("--train", required=True, metavar="TASK", help="the training set's task, such as math-mix")
    o.add_argument("--test", metavar="A,B", help="the tests' tasks (default: all of the same family with a test file)")
    for command in (li, f, o):
        command.add_argument("--data-dir", metavar="DIR", help="the tasks' files (default: $SIBO_DATA, else the cache)")
    for command in (p, li, f, o):  # the program's name has no "python", which cli.Parser's errors add
        command.usage = "python " + command.format_usage().removeprefix("usage: ").strip()
    return p


def main(args: argparse.Namespace) -> None:
    data_dir = tasks.data_dir(args.data_dir)
    if args.command == "list":
        print(listing(tasks.TASKS.values(), data_dir))
    elif args.command == "fetch":
        wanted = chosen(args.tasks)
        fetch(wanted, data_dir)
        print(listing(wanted, data_dir))
    else:
        train = tasks.task(args.train)
        tests = ([tasks.task(name) for name in args.test.split(",")] if args.test else
                 [t for t in tasks.TASKS.values() if t.kind == train.kind and t.test])
        if not tests or not all(t.test for t in tests):
            raise ValueError(f"--test: expected tasks with a test file, such as mawps,svamp, got {args.test or 'none'} "
                             "(questions that are made or held out are in no training set)")
        print(overlaps(train, tests, data_dir))
