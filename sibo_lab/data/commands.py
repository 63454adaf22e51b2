"""`python -m sibo_lab data list|fetch|overlap|show|harness`."""

import argparse
import sys
from itertools import groupby
from pathlib import Path

from sibo_lab import cli
from sibo_lab.backbone import chat_template, locate, tokenizer
from sibo_lab.data import batch, download, harness, readers, tasks

GROUPS = ("arithmetic", "commonsense", "glue", "all")


def chosen(names: list[str]) -> list[tasks.Task]:
    """The tasks with files to fetch, by short names and groups; ValueError for any other name."""
    found = []
    for name in names:
        some = [t for t in tasks.TASKS.values() if t.train + t.test and name in (t.name, t.kind, "all")]
        if not some and tasks.task(name):  # task refuses what is no task at all
            raise ValueError(f"{name} has no published file: expected another of `data list`, or {', '.join(GROUPS)}")
        found += some
    return list(dict.fromkeys(found))


def listing(some: list[tasks.Task], data_dir: Path) -> str:
    """A table: one line per file, with its split's published count, its place and its state."""
    rows = [("task", "family", "split", "published", f"file, under {data_dir}", "found")]
    for t in some:
        for split, names, count in (("train", t.train, t.counts[0]), ("test", t.test, t.counts[1])):
            rows += [(t.name, t.kind, split, "" if i else count or "?", name, download.state(data_dir / name, name))
                     for i, name in enumerate(names)]
        if not t.test:
            place = "held out of train" if t.train else "made from a seed"
            rows.append((t.name, t.kind, "test", t.held_out or "any", place, ""))
    return cli.format_table(rows, left=range(6))


def fetch(some: list[tasks.Task], data_dir: Path) -> None:
    """Downloads the tasks' files; OSError, after a list of what is missing, where that fails."""
    names = dict.fromkeys(name for t in some for name in t.train + t.test)
    try:
        download.fetch(names, data_dir)
    except OSError:
        print("\n".join(download.missing(names, data_dir)), file=sys.stderr)
        raise
    for t in some:
        for split, parts in (("train", t.train), ("test", t.test)):
            if any(download.sources()[name].sha1 is None for name in parts):
                readers.load(t, split, data_dir)  # warns if the count is not the published one


def overlaps(train: tasks.Task, tests: list[tasks.Task], data_dir: Path) -> str:
    """A table: how many test questions of each task are in all of `train`'s training set."""
    learned = readers.load(train, "train", data_dir)
    if train.train and not train.test:
        learned += readers.load(train, "test", data_dir)
    rows = [(f"in {train.name} ({len(learned)})", "test questions", "of them in it", "share")]
    for t in tests:
        if all((data_dir / name).is_file() for name in t.test):
            test = readers.load(t, "test", data_dir)
            shared = readers.overlap(learned, test)
            rows.append((t.name, len(test), shared, f"{shared / len(test):.1%}"))
        else:
            rows.append((t.name, "missing", "", ""))
    return cli.format_table(rows, left=range(4))


def spelled(t, ids: list[int]) -> str:
    """The text of ids, special tokens too."""
    found, end = "", 0
    for special, some in groupby(ids, t.special.__contains__):
        some = list(some)
        start, end = end, end + len(some)
        # after what came before: a SentencePiece text loses its first space when it is decoded on its own
        found += "".join(map(t.tokens.get, some)) if special else t.decode(ids[:end])[len(t.decode(ids[:start])):]
    return found


def shown(t, row: batch.Row) -> str:
    """A row as the model sees it, in ⟦ ⟧ what the loss does not count."""
    labels = row.labels if isinstance(row.labels, list) else row.ids
    text, before, end = "", "", 0
    for silent, some in groupby(labels, (-100).__eq__):
        end += len(list(some))
        piece = spelled(t, row.ids[:end])[len(before):]
        before += piece
        text += f"⟦{piece}⟧" if silent else piece
    return text


def show(args: argparse.Namespace, task: tasks.Task, data_dir: Path) -> str:
    """A file's first rows, or a task's first training examples, as the model will see them, with their tokens."""
    tasks.require_own(args.ignore_columns, task)
    glue = task.num_labels > 0
    if glue and args.protocol:
        raise ValueError(f"--protocol: expected a text-to-text task, got {task.name}")
    if task.kind == "own":
        task, = tasks.scored_whole([task], [])  # in the file's order, none held out
    split = "train" if task.train or not task.test else "test"
    examples = readers.load(task, split, data_dir, args.rows)
    protocol = batch.protocol_for(args.protocol, examples)
    name = args.backbone or ("minilm" if glue else "smollm2-135m")
    path = locate.locate(name)
    t = tokenizer.from_pretrained(path)
    if not glue and t.eos_id is None:
        raise ValueError(f"--backbone {name}: expected an LLM, whose tokenizer ends a text, got one without eos")
    speaker = chat_template.Chat(path, t) if protocol == "chat" else t
    cutoff, chosen, blocks = args.cutoff, args.train_on_inputs, []
    if cutoff is None:
        cutoff = 128 if glue else 256  # as train.py
    on_inputs = protocol != "chat" and task.kind != "word-problems" if chosen is None else chosen  # as train.py
    for i, example in enumerate(examples, 1):
        row = (batch.encode_sentence(example, t, cutoff) if glue else
               batch.encode(example, speaker, cutoff, on_inputs, protocol))
        loss = f"label {row.labels}" if glue else f"the loss counts {sum(x != -100 for x in row.labels[1:])}"
        cut = f", cut off at {cutoff}" if row.cut else ""
        blocks.append(f"--- {i}: {len(row.ids)} tokens, {loss}{cut}\n{shown(t, row)}")
    return "\n".join([*blocks, f"--- {task.name} for {name}, protocol {protocol}; no loss on what is in ⟦ ⟧"])


def write_harness(args: argparse.Namespace, data_dir: Path) -> None:
    """Task files for lm_eval: of the first examples of each task, those that eval.py scores."""
    known = [t.name for t in tasks.TASKS.values() if t.kind == "commonsense" and t.test]
    if wrong := [name for name in args.task.split(",") if name not in known]:
        raise ValueError(f"--task: expected multiple choice, any of {','.join(known)}, got {wrong[0]!r}")
    if (args.protocol == "chat") != bool(args.backbone):
        raise ValueError("--backbone: expected with --protocol chat, whose template it has, and only there, got "
                         f"{args.backbone or 'none'} with {args.protocol}")
    path = args.backbone and locate.locate(args.backbone)
    speaker = chat_template.Chat(path, tokenizer.from_pretrained(path)) if path else None
    tests = readers.load_tests(map(tasks.task, dict.fromkeys(args.task.split(","))), data_dir, args.limit)
    found = {t.name: [harness.document(e, speaker, args.protocol) for e in test] for t, test in tests}
    for t, test in tests:
        about = {"protocol": args.protocol, "examples": len(test), "sha256": batch.digest(test)}
        harness.write(args.folder, t.name, found[t.name], about)
    print("HF_HUB_OFFLINE=1 lm_eval --model hf --model_args pretrained=FOLDER,dtype=float32,trust_remote_code=True "
          f"--include_path {args.folder} --tasks {','.join(f'sibo_{name}' for name in found)}")


def parser() -> cli.Parser:
    p = cli.Parser("-m sibo_lab data", description="The benchmarks' files: list, download and compare them; what a "
                   "model sees of a task, or of a file of your own.")
    commands = p.add_subparsers(dest="command", required=True, metavar="list | fetch | overlap | show | harness")
    li = commands.add_parser("list", help="every task: counts, files, and whether they are there and right")
    f = commands.add_parser("fetch", help="download files from their publishers, and check them")
    f.add_argument("tasks", nargs="+", metavar="TASK",
                   help=f"{', '.join(t.name for t in chosen(['all']))}; or a group: {', '.join(GROUPS)}")
    o = commands.add_parser("overlap", help="count the test questions that are also in a training set")
    o.add_argument("--train", required=True, metavar="TASK", help="whose training set, such as math-mix")
    o.add_argument("--test", metavar="A,B", help="whose tests (default: all of the family with a test file)")
    s = commands.add_parser("show", help="print the first examples as a model will see them")
    add = s.add_argument
    add("task", metavar="FILE|TASK", help="a task's name, or a file of your own: .json, .jsonl, .csv (each also with "
        ".gz), .parquet")
    add("--backbone", metavar="NAME", help="whose tokens and chat template (default: smollm2-135m; GLUE minilm)")
    add("--protocol", choices=batch.PROTOCOLS, help="default: as train.py")
    add("--rows", type=int, default=3, metavar="N", help="how many (default: %(default)s)")
    add("--cutoff", type=int, metavar="N", help="as train.py's (default: 256; GLUE 128)")
    add("--train-on-inputs", action=argparse.BooleanOptionalAction, default=None, help="default: as train.py")
    add("--ignore-columns", metavar="A,B", help="columns of your own file that are not used")
    h = commands.add_parser("harness", help="write multiple choice as task files of lm-evaluation-harness")
    add = h.add_argument
    add("folder", type=Path, metavar="DIR", help="where to: lm_eval's --include_path")
    add("--task", required=True, metavar="A,B", help="such as boolq,arc-e,obqa")
    add("--limit", type=int, metavar="N", help="the first N examples, as eval.py's (default: all)")
    add("--protocol", choices=batch.PROTOCOLS, default="clean", help="as eval.py's (default: %(default)s)")
    add("--backbone", metavar="NAME", help="of --protocol chat: whose chat template")
    for command in (li, f, o, s, h):
        command.add_argument("--data-dir", metavar="DIR", help="the tasks' files (default: $SIBO_DATA, else the cache)")
    return p


def main(args: argparse.Namespace) -> None:
    data_dir, some = tasks.data_dir(args.data_dir), list(tasks.TASKS.values())
    if args.command == "overlap":
        train = tasks.task(args.train)
        tests = (list(map(tasks.task, args.test.split(","))) if args.test else
                 [t for t in some if t.kind == train.kind and t.test])
        if not tests or not all(t.test for t in tests):
            raise ValueError(f"--test: expected tasks with a test file, such as mawps,svamp, got {args.test or 'none'}")
        return print(overlaps(train, tests, data_dir))
    if args.command == "harness":
        return write_harness(args, data_dir)
    if args.command == "show":
        return print(show(args, tasks.task(args.task, args.ignore_columns), data_dir))
    if args.command == "fetch":
        some = chosen(args.tasks)
        fetch(some, data_dir)
    print(listing(some, data_dir))
