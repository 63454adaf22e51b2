"""Every task by its short name (paper, Section 4.1): its files, its answers, its metric."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sibo_lab import files

LEAD = "the correct answer is"  # a space and a choice follow: what the commonsense training files answer
NUMBER, LETTER = r"-?\d++\.?\d*+", r"[A-E]"  # possessive: never backtracks for long
OWN = re.compile(r"\.(jsonl?|csv)(\.gz)?$|\.parquet$")  # endings of a user's own file


@dataclass(frozen=True)
class Example:
    """A text-to-text problem."""

    instruction: str
    output: str = ""  # what to learn to write; "" in test files
    answer: str = ""  # what is scored: a number, a letter or a word
    part: str = ""  # a group also scored on its own, such as "new templates"
    choices: tuple[str, ...] = ()  # what a commonsense question offers; (): any

    @property
    def turns(self) -> list[tuple[str, str]]:
        """As a conversation: roles (system, user or assistant) and texts."""
        return [("user", self.instruction), ("assistant", self.output)]


@dataclass(frozen=True)
class Chat(Example):
    """A conversation: its output is the assistant's last turn, its instruction the text of all turns before."""

    given: tuple[tuple[str, str], ...] = ()  # these turns

    @classmethod
    def of(cls, turns: Sequence[tuple[str, str]], answer: str = "") -> "Chat":
        *given, (_, output) = turns
        return cls("\n\n".join(text for _, text in given), output, answer or output, given=tuple(given))

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [*self.given, ("assistant", self.output)]


@dataclass(frozen=True)
class Sentence:
    """A GLUE row: one sentence or a pair."""

    text: str
    pair: str | None
    label: int | float  # a class, or STS-B's score from 0 to 5
    part: str = ""  # in MNLI's test: "matched" or "mismatched"


@dataclass(frozen=True)
class Task:
    """Its files are relative to the data directory; without `test`, part of `train` is held out."""

    name: str
    kind: str  # word-problems | arithmetic | commonsense | glue | own
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    counts: tuple[int, int] = (0, 0)  # published, of training and test examples; 0: unknown
    answers: str = ""  # pattern of an answer in a response; "": the response ends in it
    held_out: int = 0  # questions at most, and at most a tenth
    metric: str = "accuracy"  # or matthews, f1, pearson
    columns: tuple = ()  # GLUE: label and sentences, by name or, without a header, position
    classes: tuple[str, ...] = ()  # GLUE: the labels as the file writes them; (): a score
    ignored: tuple[str, ...] = ()  # own: columns to pass over

    @property
    def num_labels(self) -> int:
        """0: text to text, 1: regression, more: classes."""
        return (len(self.classes) or 1) if self.kind == "glue" else 0

    @property
    def max_new_tokens(self) -> int:
        return {"word-problems": 96, "commonsense": 32, "glue": 0}.get(self.kind, 256)


GSM8K, MAWPS, AQUA = "raw/gsm8k/train.jsonl", "llm_adapters/mawps/trainset.json", "raw/aqua_train.tsv"
MAWPS_VALID = "llm_adapters/mawps/validset.json"
TASKS = {task.name: task for task in (
    Task("word-problems", "word-problems", answers=NUMBER),
    *(Task(folder.lower(), "arithmetic", tuple(train), (f"llm_adapters/{folder}/test.json",), counts,
           LETTER if folder == "AQuA" else NUMBER)
      for folder, counts, *train in (
        ("gsm8k", (7473, 1319), GSM8K), ("AQuA", (2728, 254), AQUA), ("mawps", (1898, 238), MAWPS),
        ("SVAMP", (0, 1000)), ("AddSub", (0, 395)), ("MultiArith", (0, 600)), ("SingleEq", (0, 508)))),
    Task("mawps-valid", "arithmetic", (MAWPS_VALID,), (), (237, 0), NUMBER, 120),
    Task("math10k", "arithmetic", ("llm_adapters/ft-training_set/math_10k.json",), held_out=120),
    Task("math-mix", "arithmetic", (GSM8K, MAWPS, AQUA), (), (12099, 0), held_out=120),
    *(Task(name, "commonsense", (f"llm_adapters/{folder}/train.json",), (f"llm_adapters/{folder}/test.json",), counts,
           answers) for name, folder, counts, answers in (
        ("boolq", "boolq", (9427, 3270), "true|false"), ("piqa", "piqa", (0, 1838), "solution[12]"),
        ("siqa", "social_i_qa", (0, 1954), "answer[1-5]"), ("hellaswag", "hellaswag", (0, 10042), "ending[1-4]"),
        ("winogrande", "winogrande", (0, 1267), "option[12]"), ("arc-e", "ARC-Easy", (2251, 2376), "answer[1-5]"),
        ("arc-c", "ARC-Challenge", (0, 1172), "answer[1-5]"), ("obqa", "openbookqa", (4957, 500), "answer[1-5]"))),
    Task("commonsense170k", "commonsense", ("llm_adapters/ft-training_set/commonsense_170k.json",), held_out=120),
    *(Task(folder.lower().replace("-", ""), "glue", (f"glue/{folder}/train.tsv",),
           tuple(f"glue/{folder}/{dev}.tsv" for dev in devs.split()), counts, metric=metric, columns=columns,
           classes=tuple(classes.split()))
      for folder, devs, counts, metric, columns, classes in (
        ("CoLA", "dev", (8551, 1043), "matthews", (1, 3), "0 1"),
        ("SST-2", "dev", (67349, 872), "accuracy", ("label", "sentence"), "0 1"),
        ("MRPC", "dev", (3668, 408), "f1", ("Quality", "#1 String", "#2 String"), "0 1"),
        ("STS-B", "dev", (5749, 1500), "pearson", ("score", "sentence1", "sentence2"), ""),
        ("QQP", "dev", (363846, 40430), "f1", ("is_duplicate", "question1", "question2"), "0 1"),
        ("MNLI", "dev_matched dev_mismatched", (392702, 9815 + 9832), "accuracy",
         ("gold_label", "sentence1", "sentence2"), "entailment neutral contradiction"),
        ("QNLI", "dev", (104743, 5463), "accuracy", ("label", "question", "sentence"), "entailment not_entailment"),
        ("RTE", "dev", (2490, 277), "accuracy", ("label", "sentence1", "sentence2"), "entailment not_entailment"))),
)}


def task(name: str, ignore_columns: str | None = None) -> Task:
    """By short name, or the path of a user's own file, without the columns of "A,B"; ValueError for other names."""
    if OWN.search(name):
        path = str(Path(name).expanduser().resolve())  # one name, from any working directory and by any way
        return Task(path, "own", (path,), held_out=200,
                    ignored=tuple(filter(None, (ignore_columns or "").split(","))))
    if name not in TASKS:
        hint = files.near(name, TASKS) or f"; expected one of {', '.join(TASKS)}"
        raise ValueError(f"unknown task {name!r}{hint} (or the path of a .json, .jsonl, .csv or .parquet file; the "
                         "first three may end in .gz too)")
    return TASKS[name]


def parse(*names: str, ignore_columns: str | None = None) -> list[Task]:
    """The tasks of names, several joined by +; ValueError if one model cannot answer them all."""
    found = [task(one, ignore_columns) for name in names for one in ([name] if OWN.search(name) else name.split("+"))]
    if len({t.num_labels and t.name for t in found}) > 1:
        raise ValueError(f"task {'+'.join(names)}: expected text-to-text tasks or one GLUE task, got several heads")
    return found


def require_own(ignore_columns: str | None, *given: Task) -> None:
    """ValueError for columns to ignore where no task is a user's own file."""
    if ignore_columns and all(t.kind != "own" for t in given):
        raise ValueError(f"--ignore-columns {ignore_columns}: expected a file of your own, got {given[0].name}")


def scored_whole(tests: Sequence[Task], trained: Sequence[Task]) -> list[Task]:
    """The tests; a file that was not trained on is scored whole, not only its held-out part."""
    return [t if t in trained else replace(t, test=t.test or t.train) for t in tests]


def data_dir(given: str | None) -> Path:
    """Where the tasks' files are: as given, else $SIBO_DATA, else data/ in the cache."""
    return Path(given or os.environ.get("SIBO_DATA") or files.cache() / "data").expanduser()
