"""Data: every task by its short name, from files to token ids and from answers back to scores (paper, Section 4.1).

A task is text to text (an instruction and its answer) or GLUE rows (one sentence or two, and a label). Files are read
in the layout their authors publish; nothing is shipped but the built-in word problems (word_problems.py).
Prompt, answer extraction and file layout follow LLM-Adapters, whose data the paper trains on, except that
  - the prompt is the plain Alpaca form: the official files indent its body by 16 spaces through a Python string, which
    protocol "paper" does too;
  - in the arithmetic test files `output` was written by a model and is often wrong: only `answer` is kept;
  - where a training file has no test file, questions are held out by their hash, so that no question stands in both
    (the official code draws 120 examples at random, of which some may be repeated among the rest);
  - the official loss mask assumes that the prompt's tokens begin the whole text's tokens; `encode` makes sure of it."""

import argparse
import difflib
import hashlib
import itertools
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import cli
import fetch
from checkpoint import cache, parse_json, shown
from word_problems import word_problems

NUMBER, LETTER = r"-?\d++\.?\d*+", r"[A-E]"  # possessive: the same matches, but no file's line can keep it busy


# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Example:
    """A text-to-text problem. `part` names a group that is reported on its own as well ("new templates"), else "".
    `choices`: the answers that a commonsense question offers, in its own order and words; () where any may be given."""

    instruction: str
    output: str = ""  # what to learn to write; "" in test files
    answer: str = ""  # what is scored: a number, a letter or a word
    part: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sentence:
    """A GLUE row: one sentence or a pair, and a class number or (STS-B) a score from 0 to 5. `part`: "matched" or
    "mismatched" for MNLI's test rows, else ""."""

    text: str
    pair: str | None
    label: int | float
    part: str = ""


@dataclass(frozen=True)
class Task:
    """What is to be known of a task. Files are relative to the data directory; `test` () means held out of `train`."""

    name: str
    kind: str  # word-problems | arithmetic | commonsense | glue | own
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    counts: tuple[int, int] = (0, 0)  # published number of training and test examples; 0: not known
    answers: str = ""  # pattern of an answer within a response; "": the response ends in the answer
    held_out: int = 0  # without a test file: at most so many questions, and at most a tenth
    metric: str = "accuracy"  # the score: accuracy | matthews | f1 | pearson
    columns: tuple = ()  # GLUE: label, sentence(s): their names in the header or, without one, places
    classes: tuple[str, ...] = ()  # GLUE: the labels as written in the file; none: a score

    @property
    def num_labels(self) -> int:
        """0: text to text, 1: regression, more: classes."""
        return (len(self.classes) or 1) if self.kind == "glue" else 0

    @property
    def max_new_tokens(self) -> int:
        return {"word-problems": 96, "arithmetic": 256, "commonsense": 32, "glue": 0, "own": 256}[self.kind]


GROUPS = ("arithmetic", "commonsense", "glue", "all")
GSM8K, MAWPS, AQUA = "raw/gsm8k/train.jsonl", "llm_adapters/mawps/trainset.json", "raw/aqua_train.tsv"
TASKS = {task.name: task for task in (
    Task("word-problems", "word-problems", answers=NUMBER),
    Task("gsm8k", "arithmetic", (GSM8K,), ("llm_adapters/gsm8k/test.json",), (7473, 1319), NUMBER),
    Task("aqua", "arithmetic", (AQUA,), ("llm_adapters/AQuA/test.json",), (2728, 254), LETTER),
    Task("mawps", "arithmetic", (MAWPS,), ("llm_adapters/mawps/test.json",), (1898, 238), NUMBER),
    Task("svamp", "arithmetic", (), ("llm_adapters/SVAMP/test.json",), (0, 1000), NUMBER),
    Task("addsub", "arithmetic", (), ("llm_adapters/AddSub/test.json",), (0, 395), NUMBER),
    Task("multiarith", "arithmetic", (), ("llm_adapters/MultiArith/test.json",), (0, 600), NUMBER),
    Task("singleeq", "arithmetic", (), ("llm_adapters/SingleEq/test.json",), (0, 508), NUMBER),
    Task("math10k", "arithmetic", ("llm_adapters/ft-training_set/math_10k.json",), held_out=120),
    Task("math-mix", "arithmetic", (GSM8K, MAWPS, AQUA), (), (12099, 0), held_out=120),
    *(Task(name, "commonsense", (f"llm_adapters/{folder}/train.json",), (f"llm_adapters/{folder}/test.json",), counts,
           answers) for name, folder, counts, answers in (
        ("boolq", "boolq", (9427, 3270), "true|false"), ("piqa", "piqa", (0, 1838), "solution[12]"),
        ("siqa", "social_i_qa", (0, 1954), "answer[1-5]"), ("hellaswag", "hellaswag", (0, 10042), "ending[1-4]"),
        ("winogrande", "winogrande", (0, 1267), "option[12]"), ("arc-e", "ARC-Easy", (2251, 2376), "answer[1-5]"),
        ("arc-c", "ARC-Challenge", (0, 1172), "answer[1-5]"), ("obqa", "openbookqa", (4957, 500), "answer[1-5]"))),
    Task("commonsense170k", "commonsense", ("llm_adapters/ft-training_set/commonsense_170k.json",), held_out=120),
    *(Task(name, "glue", (f"glue/{folder}/train.tsv",), tuple(f"glue/{folder}/{dev}.tsv" for dev in devs.split()),
           counts, metric=metric, columns=columns, classes=tuple(classes.split()))
      for name, folder, devs, counts, metric, columns, classes in (
        ("cola", "CoLA", "dev", (8551, 1043), "matthews", (1, 3), "0 1"),
        ("sst2", "SST-2", "dev", (67349, 872), "accuracy", ("label", "sentence"), "0 1"),
        ("mrpc", "MRPC", "dev", (3668, 408), "f1", ("Quality", "#1 String", "#2 String"), "0 1"),
        ("stsb", "STS-B", "dev", (5749, 1500), "pearson", ("score", "sentence1", "sentence2"), ""),
        ("qqp", "QQP", "dev", (363846, 40430), "f1", ("is_duplicate", "question1", "question2"), "0 1"),
        ("mnli", "MNLI", "dev_matched dev_mismatched", (392702, 9815 + 9832), "accuracy",
         ("gold_label", "sentence1", "sentence2"), "entailment neutral contradiction"),
        ("qnli", "QNLI", "dev", (104743, 5463), "accuracy", ("label", "question", "sentence"),
         "entailment not_entailment"),
        ("rte", "RTE", "dev", (2490, 277), "accuracy", ("label", "sentence1", "sentence2"),
         "entailment not_entailment"))),
)}


def task(name: str) -> Task:
    """The task of a short name, or of a user's own data by the path of a .json or .jsonl file; else ValueError."""
    if Path(name).suffix in (".json", ".jsonl"):
        path = str(Path(name).expanduser().absolute())  # a saved run finds its data from any working directory
        return Task(path, "own", (path,), held_out=200)
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(TASKS)}"
        raise ValueError(f"unknown task {name!r}: {hint} (or give the path of a .json or .jsonl file)")
    return TASKS[name]


def tasks(*names: str) -> list[Task]:
    """The tasks of names, each of one or of several joined by +; ValueError if one model cannot answer them all."""
    found = [task(one) for name in names
             for one in ([name] if name.endswith((".json", ".jsonl")) else name.split("+"))]
    if len({t.num_labels and t.name for t in found}) > 1:
        raise ValueError(f"task {'+'.join(names)}: found tasks that need a head each, expected one, or text-to-text "
                         "tasks")
    return found


def whole(tests: Sequence[Task], trained: Sequence[Task]) -> list[Task]:
    """The test sets as they are scored: of a file that nothing is trained on nothing is held out, all of it counts."""
    return [t if t in trained else replace(t, test=t.test or t.train) for t in tests]


def data_dir(given: str | None) -> Path:
    """Where the tasks' files stand: as given, else $SIBO_DATA, else data/ in the cache."""
    return Path(given or os.environ.get("SIBO_DATA") or cache() / "data").expanduser()


# -------------------------------------------------------------------------------------------------------------- reading


def load(task: Task, split: str, data_dir: Path, n: int | None = None, seed: int = 0) -> list:
    """The examples of one split, "train" or "test": Example for text-to-text tasks, Sentence for GLUE (test: its dev
    files).

    n: the first n only; of word problems n are made from the seed (by default 4000 to train on and 200 to test).
    A test set without a file of its own is held out of the training file, by question. A count other than the published
    one is reported on stderr. ValueError: a malformed or empty file, named with its line, or a task without training
    file; FileNotFoundError: a missing file, with its source."""
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}, expected "train" or "test"')
    if n is not None and n < 1:
        raise ValueError(f"{n} examples of {task.name} were asked for, expected at least 1")
    if task.kind == "word-problems":
        made = itertools.islice(word_problems(split, seed), n or {"train": 4000, "test": 200}[split])
        return [Example(*problem) for problem in made]
    if split == "train" and not task.train:
        raise ValueError(f"{task.name} has no training file: train on math10k, math-mix, gsm8k, mawps or aqua, "
                         f"and evaluate on {task.name}")
    held_out = not task.test
    files = task.train if split == "train" or held_out else task.test
    rows = [row for file in files for row in _read(task, Path(data_dir) / file, file)]
    expected = task.counts[split == "test" and not held_out]
    if expected and len(rows) != expected:
        paths = " + ".join(str(Path(data_dir) / file) for file in files)
        print(f"warning: {paths} holds {len(rows)} examples, published are {expected}; it is used as it is",
              file=sys.stderr)
    if held_out:
        rows = hold_out(rows, task.held_out)[split == "test"]
        if not rows:
            raise ValueError(f"{files[0]}: holds one question only and that is held out for the test; training needs "
                             "at least two")
    return rows[:n]


def hold_out(rows: list, n: int) -> tuple[list, list]:
    """The rest and a part of `rows` (Examples or Sentences): the n questions of lowest hash, at most a tenth and at
    least one, with all their answers. In the order of their hashes, too: always the same, and as good as shuffled
    (files are often sorted by source)."""
    def question(row: Example | Sentence) -> str:
        return row.instruction if isinstance(row, Example) else f"{row.text}\n{row.pair}"

    rows = sorted(rows, key=lambda row: hashlib.sha256(question(row).encode()).digest())
    questions = list(dict.fromkeys(map(question, rows)))
    held = set(questions[:max(1, min(n, len(questions) // 10))])
    return [row for row in rows if question(row) not in held], [row for row in rows if question(row) in held]


def _read(task: Task, path: Path, file: str) -> list:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: " + (
            "check the path of your data" if task.kind == "own" else
            f"`python data.py fetch {task.name} --data-dir {path.parents[file.count('/')]}` brings it from "
            f"https://{fetch.address(file)}; or name another data folder with --data-dir or $SIBO_DATA"))
    try:
        text = path.read_bytes().decode("utf-8-sig")  # -sig: MRPC, and files written on Windows, begin with a BOM
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from None
    reader = {GSM8K: _gsm8k, MAWPS: _mawps, AQUA: _aqua}.get(file, _sentences if task.kind == "glue" else _examples)
    rows = list(reader(task, path, text))
    if not rows:
        raise ValueError(f"{path}: holds no examples")
    return rows


def _lines(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _entries(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or of JSON lines, each with the place to name in errors."""
    if path.suffix == ".jsonl":
        entries = [(f"line {i}", parse_json(line, path, i)) for i, line in enumerate(_lines(text), 1) if line.strip()]
    else:
        if not isinstance(whole := parse_json(text, path), list):
            raise ValueError(f"{path}, line 1: found a JSON {type(whole).__name__}, expected a list of objects")
        entries = [(f"entry {i}", entry) for i, entry in enumerate(whole, 1)]
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, {place}: found {type(entry).__name__}, expected an object in braces")
        yield f"{path}, {place}", entry


def _listed(names: Iterable[str]) -> str:
    """Names out of a file, as an error shows them."""
    return ", ".join(shown(name)[1:-1] for name in itertools.islice(names, 20)) or "nothing"


def _field(where: str, entry: dict, key: str, types: tuple = (str,)) -> str:
    if key not in entry:
        raise ValueError(f"{where}: {key!r} is missing (found: {_listed(entry)})")
    if type(entry[key]) not in types:
        raise ValueError(f"{where}: {key!r} is {type(entry[key]).__name__}, expected {types[0].__name__}")
    if not (value := str(entry[key])).strip():
        raise ValueError(f"{where}: {key!r} is empty")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: {key!r} holds half a surrogate pair, expected whole characters")
    return value


def _examples(task: Task, path: Path, text: str) -> Iterator[Example]:
    """LLM-Adapters' four keys. A user's own file may leave out `input` and `answer`: the answer is the output then."""
    for where, entry in _entries(path, text):
        instruction = _field(where, entry, "instruction")
        if str(entry.get("input") or "").strip():
            instruction += "\n\n" + _field(where, entry, "input")
        model_written = task.kind == "arithmetic" and task.test
        output = "" if model_written else _field(where, entry, "output")
        unanswered = task.kind == "own" and entry.get("answer") in (None, "")
        answer = output if unanswered else _field(where, entry, "answer")
        if task.answers and not re.fullmatch(task.answers, answer):
            raise ValueError(f"{where}: answer {shown(answer)} is none of {task.name}'s, expected {task.answers}")
        yield Example(instruction, output, answer, choices=_choices(task, where, instruction, answer))


def _choices(task: Task, where: str, instruction: str, answer: str) -> tuple[str, ...]:
    """The words of the line that closes a commonsense question, "Answer format: solution1/solution2"; () elsewhere."""
    line = task.kind == "commonsense" and re.search(r"Answer format: (\S+)\s*$", instruction)
    choices = tuple(line[1].split("/")) if line else ()
    if task.kind == "commonsense" and task.answers and not (
            answer in choices and all(re.fullmatch(task.answers, choice) for choice in choices)):
        raise ValueError(f"{where}: 'instruction' ends in {instruction[-50:]!r}, expected 'Answer format: ' and "
                         f"choices of the form {task.answers}, separated by /, the answer {shown(answer)} in them")
    return choices


def _gsm8k(task: Task, path: Path, text: str) -> Iterator[Example]:
    """The calculator marks <<48/2=24>> go, and the last line "#### 72" becomes the closing sentence."""
    for where, entry in _entries(path, text):
        work, mark, answer = _field(where, entry, "answer").rpartition("\n#### ")
        if not mark or not re.fullmatch(NUMBER, answer := answer.replace(",", "")):
            raise ValueError(f"{where}: 'answer' has no last line '#### number'")
        work = re.sub(r"<<[^<>\n]*>>", "", work)
        yield Example(_field(where, entry, "question"), f"{work}\nThe answer is {answer}.", answer)


def _mawps(task: Task, path: Path, text: str) -> Iterator[Example]:
    """The equation is the worked answer: "X=((22.0-14.0)/4.0)" and 2.0 become "x = ((22 - 14) / 4)" and the closing."""
    for where, entry in _entries(path, text):
        answer = _field(where, entry, "ans", (float, int, str)).removesuffix(".0")
        if not re.fullmatch(NUMBER, answer):  # 1e999 is infinite
            raise ValueError(f"{where}: 'ans' is {shown(answer)}, expected a number")
        equation = re.sub(r"\.0\b", "", _field(where, entry, "equation")).replace("X", "x")
        equation = " ".join(part.strip() for part in re.split(r"([-+*/=])", equation))
        yield Example(_field(where, entry, "original_text"), f"{equation}\nThe answer is {answer}.", answer)


def _aqua(task: Task, path: Path, text: str) -> Iterator[Example]:
    r"""Columns: question with options, "(C)", rationale; \n is a line break. Options are set as in the test file."""
    for i, line in enumerate(_lines(text), 1):
        columns = line.replace("\\n", "\n").split("\t")
        if len(columns) != 3 or not re.fullmatch(r"\([A-E]\)", columns[1]):
            raise ValueError(f"{path}, line {i}: expected question, (letter) and rationale, separated by tabs")
        question, letter, rationale = columns
        question, _, options = question.partition("\nOptions:\n")
        question += " Answer Choices: " + " ".join(options.split("\n"))
        yield Example(question, f"{rationale}\nThe answer is {letter}.", letter[1])


def _sentences(task: Task, path: Path, text: str) -> Iterator[Sentence]:
    """GLUE's TSV: a quotation mark is a character like any other, and only a tab or a line feed separates."""
    rows = [line.split("\t") for line in _lines(text)]
    places, width, first = task.columns, 4, 0  # CoLA: no header, four columns
    part = path.stem.partition("_")[2]  # dev_matched -> matched; dev, train -> ""
    if rows and isinstance(places[0], str):
        if missing := [name for name in places if name not in rows[0]]:
            raise ValueError(f"{path}, line 1: the header has no column {missing[0]!r} (found: {_listed(rows[0])})")
        places, width, first = [rows[0].index(name) for name in places], len(rows[0]), 1
    for i, row in enumerate(rows[first:], first + 1):
        if len(row) != width:
            raise ValueError(f"{path}, line {i}: {len(row)} columns, expected {width} separated by tabs")
        written, sentence, pair = (*(row[place] for place in places), None)[:3]
        if task.classes and written not in task.classes:
            raise ValueError(f"{path}, line {i}: label {shown(written)}, expected {' or '.join(task.classes)}")
        if not task.classes and not (re.fullmatch(r"[0-9]++\.?[0-9]*", written) and float(written) <= 5):
            raise ValueError(f"{path}, line {i}: score {shown(written)}, expected a number from 0 to 5")
        yield Sentence(sentence, pair, task.classes.index(written) if task.classes else float(written), part)


def overlap(train: list, test: list) -> int:
    """How many rows of `test` (Examples or Sentences) stand in `train`: the question (or the sentences) has the same
    letters and digits there, case, spaces and punctuation aside."""
    def bare(row: Example | Sentence) -> str:
        text = row.instruction if isinstance(row, Example) else f"{row.text} {row.pair or ''}"
        return "".join(filter(str.isalnum, text.lower()))

    known = {bare(row) for row in train}
    return sum(bare(row) in known for row in test)


# ------------------------------------------------------------------------------------------ prompt, label mask, batches


@dataclass(frozen=True)
class Row:
    """One example as token ids. labels: one per token (-100: no loss there), or the GLUE label, or None (a prompt)."""

    ids: list[int]
    labels: list[int] | int | float | None = None
    cut: bool = False  # the cutoff took something away
    types: list[int] | None = None  # BERT's token types: 0 first sentence, 1 second
    part: str = ""  # as of its Sentence


_ABOVE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_INDENT = " " * 16
PROMPTS = {  # by protocol
    "clean": _ABOVE + "\n\n### Instruction:\n{}\n\n### Response:\n",
    # the official string, with all that its author did not mean to be in it: the linter's comment is part of the text
    "paper": (f"{_ABOVE}  # noqa: E501\n\n{_INDENT}### Instruction:\n{_INDENT}{{}}\n{_INDENT}\n"
              f"{_INDENT}### Response:\n{_INDENT}"),
}


def prompt(instruction: str, protocol: str = "clean") -> str:
    """The Alpaca form, up to where the model begins to write: plain, or ("paper") indented as the official code's."""
    return PROMPTS[protocol].format(instruction)


def continuation(text: str, output: str, tokenizer) -> tuple[list[int], list[int]]:
    """The ids of a prompt, as the model is given them at generation, and those of `output` behind it.

    Where the tokenizer would merge across the border, the output is spelled as it is alone, or behind a line feed.
    ValueError if none of these continues the prompt."""
    given, whole = tokenizer.encode(text), tokenizer.encode(text + output)
    for before in (text, "", "\n"):  # alone, SentencePiece puts a space before the output; BPE merges line feeds
        start, both = tokenizer.encode(before), tokenizer.encode(before + output)
        written = both[len(start):]
        if both[:len(start)] == start and tokenizer.decode(given + written) == tokenizer.decode(whole):
            return given, written
    raise ValueError(f"the tokenizer cannot continue the prompt with the output {output[:40]!r}")


def encode(example: Example, tokenizer, cutoff: int, train_on_inputs: bool = False, protocol: str = "clean") -> Row:
    """Prompt, output and EOS as ids; the labels are the ids, with -100 on the prompt unless train_on_inputs.

    The ids begin with exactly the ids of the prompt, which are what the model is given at generation. They are cut to
    `cutoff` tokens from the right; a cut example has no EOS (it would teach to stop in mid-sentence), and one whose
    prompt fills the cutoff has no label left. ValueError if the tokenizer cannot spell the output after the prompt."""
    given, written = continuation(prompt(example.instruction, protocol), example.output, tokenizer)
    ids = given + written + [tokenizer.eos_id]
    labels = ids if train_on_inputs else [-100] * len(given) + ids[len(given):]
    return Row(ids[:cutoff], labels[:cutoff], cut=len(ids) > cutoff)


def encode_sentence(sentence: Sentence, tokenizer, cutoff: int) -> Row:
    """[CLS] text [SEP] or [CLS] text [SEP] pair [SEP], at most `cutoff` tokens: the longer one loses its end first."""
    if len(special := tokenizer.encode("")) != 2:
        raise ValueError(f"the tokenizer puts {len(special)} special tokens around a text, expected BERT's two: "
                         "GLUE tasks need a BERT backbone")
    cls, sep = special
    parts = [tokenizer.encode(text)[1:-1] for text in (sentence.text, sentence.pair) if text is not None]
    room = max(0, cutoff - 1 - len(parts))
    cut = sum(map(len, parts)) > room
    while sum(map(len, parts)) > room:
        max(reversed(parts), key=len).pop()  # of two as long, the second
    ids, types = [cls], [0]
    for i, part in enumerate(parts):
        ids += [*part, sep]
        types += [i] * (len(part) + 1)
    return Row(ids, sentence.label, cut, types, sentence.part)


def batch(rows: list[Row], pad_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows padded to the longest: input_ids, attention_mask (B, T); labels (B, T) padded with -100, or (B,) for GLUE
    (int64 classes, float32 scores); token_type_ids (B, T) for BERT. side: "right" to train, "left" to generate."""
    if side not in ("right", "left"):
        raise ValueError(f'padding side is {side!r}, expected "right" or "left"')

    def pad(lists: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(items, dtype=torch.int64) for items in lists], True, value, side)

    tensors = {"input_ids": pad([row.ids for row in rows], pad_id),
               "attention_mask": pad([[1] * len(row.ids) for row in rows], 0)}
    labels = [row.labels for row in rows]
    if isinstance(labels[0], list):
        tensors["labels"] = pad(labels, -100)
    elif labels[0] is not None:
        tensors["labels"] = torch.tensor(labels)
    if rows[0].types is not None:
        tensors["token_type_ids"] = pad([row.types for row in rows], 0)
    return tensors


def to_device(batch: dict[str, torch.Tensor], m: torch.nn.Module) -> dict[str, torch.Tensor]:
    device = next(m.parameters()).device
    return {k: v.to(device) for k, v in batch.items()}


def batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices into `lengths`: in an epoch each once, shuffled anew; its last batch may be smaller.
    Neighbours of 16 batches are sorted by length before they are cut into batches, since padding is wasted work."""
    rng = random.Random(f"batches {seed}")
    while True:
        order = sorted(range(len(lengths)), key=lambda _: rng.random())
        epoch = []
        for start in range(0, len(order), 16 * batch_size):
            pool = sorted(order[start:start + 16 * batch_size], key=lambda i: lengths[i])
            cut = [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
            epoch += sorted(cut, key=lambda _: rng.random())
        yield from epoch


def digest(rows: Iterable) -> str:
    """sha256 of examples or rows, in their order: what a run was trained or scored on."""
    found = hashlib.sha256()
    for row in rows:
        found.update(repr(row).encode())
    return found.hexdigest()


# -------------------------------------------------------------------------------------------------------------- scoring


def answer_of(task: Task, text: str) -> str | None:
    """The answer that a response gives, found as the official code finds it, or None.

    Numbers: commas stripped, the last one. AQuA: the first capital A-E anywhere. Commonsense: the first of the task's
    own words. Other tasks (a user's data, training sets of several kinds): the response itself; see is_right."""
    if not task.answers:
        return text.strip() or None
    if task.answers == NUMBER:
        return _last_number(text)
    found = re.search(task.answers, text)
    return found[0] if found else None


def last_letter(text: str) -> str | None:
    """AQuA's answer read with care: the last capital A-E that stands alone ("By Bayes, (D)" gives D, not B)."""
    found = re.findall(rf"\b{LETTER}\b", text)
    return found[-1] if found else None


def _last_number(text: str) -> str | None:
    found = re.findall(NUMBER, text.replace(",", ""))
    return found[-1] if found else None


def is_right(task: Task, text: str, gold: str) -> bool:
    """Whether a response gives the gold answer: numbers within 1e-3, letters and words exactly.

    Tasks without an answer pattern: if gold is a number, the response's last number counts; otherwise the response must
    end in gold, case and closing punctuation aside."""
    gold = gold.strip()
    if task.answers and task.answers != NUMBER:
        return answer_of(task, text) == gold
    if re.fullmatch(NUMBER, number := gold.replace(",", "")):
        found = _last_number(text)
        return found is not None and abs(float(found) - float(number)) <= 1e-3
    said, wanted = (re.sub(r"(?<![\s.!?)])[\s.!?)]++$", "", words.strip().lower()) for words in (text, gold))
    return re.search(rf"(?<!\w){re.escape(wanted)}$", said) is not None


# --------------------------------------------------------------------------------------------------------- command line


def chosen(names: list[str]) -> list[Task]:
    """The tasks that have files to fetch, by short names and groups; ValueError for any other name."""
    tasks = []
    for name in names:
        group = [t for t in TASKS.values() if t.train + t.test and name in ("all", t.kind)]
        if not group and task(name).kind in ("own", "word-problems"):
            raise ValueError(f"{name}: found no published file of it, expected a task of `python data.py list` or a "
                             f"group: {', '.join(GROUPS)}")
        tasks += group or [task(name)]
    return list(dict.fromkeys(tasks))


def listing(tasks: Iterable[Task], data_dir: Path) -> str:
    """A table with a line for each file of each task: its place, whether it is there and right, and the published count
    of its split."""
    rows = [("task", "family", "split", "published", f"file, under {data_dir}", "found")]
    for t in tasks:
        for split, files, count in (("train", t.train, t.counts[0]), ("test", t.test, t.counts[1])):
            for file in files:
                rows.append((t.name, t.kind, split, (count or "?") if file == files[0] else "", file,
                             fetch.state(data_dir / file, file)))
        if not t.test:
            place = "held out of train" if t.train else "made from a seed"
            rows.append((t.name, t.kind, "test", t.held_out or "any", place, ""))
    return cli.aligned(rows, left=range(len(rows[0])))


def overlaps(train: Task, tests: list[Task], data_dir: Path) -> str:
    """A table of how many test questions of each task stand in the training set of `train`, held-out part included."""
    asked = load(train, "train", data_dir)
    if train.train and not train.test:
        asked += load(train, "test", data_dir)
    rows = [(f"in {train.name} ({len(asked)})", "test questions", "of them in it", "share")]
    for t in tests:
        if not all((data_dir / file).is_file() for file in t.test):
            rows.append((t.name, "missing", "", ""))
            continue
        test = load(t, "test", data_dir)
        found = overlap(asked, test)
        rows.append((t.name, len(test), found, f"{found / len(test):.1%}"))
    return cli.aligned(rows, left=range(len(rows[0])))


def parser() -> cli.Parser:
    p = cli.Parser("data.py", description="The benchmarks' files: which there are, fetching them, what they share.")
    commands = p.add_subparsers(dest="command", required=True, metavar="list | fetch | overlap")
    li = commands.add_parser("list", help="every task: counts, files, whether they are there and right")
    f = commands.add_parser("fetch", help="download from where they are published, and check")
    f.add_argument("tasks", nargs="+", metavar="TASK",
                   help=f"{', '.join(t.name for t in chosen(['all']))}; or a group: {', '.join(GROUPS)}")
    o = commands.add_parser("overlap", help="how many test questions stand in a training set")
    o.add_argument("--train", required=True, metavar="TASK", help="whose training set, such as math-mix")
    o.add_argument("--test", metavar="A,B", help="whose tests (default: all of the same family that have a file)")
    for command in (li, f, o):
        command.add_argument("--data-dir", metavar="DIR", help="the tasks' files (default: $SIBO_DATA, else the cache)")
    return p


def main(args: argparse.Namespace) -> None:
    directory = data_dir(args.data_dir)
    if args.command == "list":
        print(listing(TASKS.values(), directory))
    elif args.command == "fetch":
        tasks = chosen(args.tasks)
        for i, t in enumerate(tasks):
            try:
                fetch.fetch(t.train + t.test, directory)
            except OSError:
                left = [file for later in tasks[i:] for file in later.train + later.test]
                print("\n".join(fetch.missing(left, directory)), file=sys.stderr)
                raise
            for split, files in (("train", t.train), ("test", t.test)):
                if any(file not in fetch.BLOBS for file in files):
                    load(t, split, directory)  # no hash is known: the published count is what can be compared
        print(listing(tasks, directory))
    else:
        train = task(args.train)
        tests = ([task(name) for name in args.test.split(",")] if args.test else
                 [t for t in TASKS.values() if t.kind == train.kind and t.test])
        if not tests or not all(t.test for t in tests):
            raise ValueError(f"--test: found {args.test or 'none'}, expected tasks with a test file, such as "
                             "mawps,svamp (questions that are made or held out stand in no training set)")
        print(overlaps(train, tests, directory))


if __name__ == "__main__":
    cli.run(main, parser())
