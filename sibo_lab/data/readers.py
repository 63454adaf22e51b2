"""Read the tasks' files, in the layouts their authors publish, as examples (paper, Section 4.1)."""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice, starmap
from pathlib import Path

from sibo_lab.data import download, word_problems
from sibo_lab.data.tasks import AQUA, GSM8K, MAWPS, NUMBER, Example, Sentence, Task
from sibo_lab.files import parse_json, quoted
from sibo_lab.parallel import rank


def load(task: Task, split: str, data_dir: Path, n: int | None = None, seed: int = 0) -> list:
    """The first `n` examples of a split, "train" or "test": Sentences for GLUE (test: dev files), else Examples.

    `seed` makes the word problems (by default 4000 to train on, 200 to test). A test set without a file is held out of
    the training file, by question. Warns on stderr of another count than the published. ValueError names the line of a
    malformed file, and a task without a training file; FileNotFoundError the source of a missing file."""
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", got {split!r}')
    if n is not None and n < 1:
        raise ValueError(f"{task.name}: expected at least 1 example to load, got {n}")
    if task.kind == "word-problems":
        n = n or {"train": 4000, "test": 200}[split]
        return list(starmap(Example, islice(word_problems.word_problems(split, seed), n)))
    if split == "train" and not task.train:
        raise ValueError(f"{task.name} has no training file: train on math10k, math-mix, gsm8k, mawps or aqua")
    own = split == "test" and bool(task.test)  # a file for the test alone
    names, published = task.test if own else task.train, task.counts[own]
    rows = [row for name in names for row in _read(task, Path(data_dir), name)]
    paths = " + ".join(str(Path(data_dir, name)) for name in names)
    if published and len(rows) != published:
        print(f"warning: {paths}: expected the {published} published examples, got {len(rows)}; using these",
              file=sys.stderr)
    if not task.test:
        rows = hold_out(rows, task.held_out)[split == "test"]
        if not rows:
            raise ValueError(f"{paths}: expected two or more different questions, got one; the test holds it out")
    return rows[:n]


def load_tests(tests: Iterable[Task], data_dir: Path, n: int | None) -> list[tuple[Task, list]]:
    """Each task with its test examples; stderr says which have no file of their own."""
    found = [(t, load(t, "test", data_dir, n)) for t in tests]
    for t, test in found:
        if t.train and not t.test and not rank():
            print(f"{t.name} has no test file: {len(test)} of its examples are left out of training and scored",
                  file=sys.stderr)
    return found


def hold_out(rows: list, n: int) -> tuple[list, list]:
    """The rest of the rows (Examples or Sentences), and those of the n questions of lowest hash: at most a tenth, at
    least one. Both in the order of the hashes: always the same, and as good as shuffled (files are often sorted)."""
    def order(row):
        return hashlib.sha256("\n".join(map(str, _texts(row))).encode()).digest()

    questions = [list(same) for _, same in groupby(sorted(rows, key=order), order)]
    n = max(1, min(n, len(questions) // 10))
    return list(chain(*questions[n:])), list(chain(*questions[:n]))


def overlap(train: list, test: list) -> int:
    """How many rows of `test` ask what one of `train` asks: the same letters and digits, in any case."""
    def bare(row):
        return "".join(filter(str.isalnum, " ".join(filter(None, _texts(row))).lower()))

    known = set(map(bare, train))
    return sum(bare(row) in known for row in test)


def _texts(row: Example | Sentence) -> tuple[str | None, ...]:
    return (row.instruction,) if isinstance(row, Example) else (row.text, row.pair)


def _read(task: Task, data_dir: Path, name: str) -> list:
    path = data_dir / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; " + (
            "check the path of your data" if task.kind == "own" else
            f"`python -m sibo_lab data fetch {task.name} --data-dir {data_dir}` brings it from "
            f"https://{download.address(name)}; or set --data-dir or $SIBO_DATA"))
    try:
        text = path.read_bytes().decode("utf-8-sig")  # MRPC, and files written on Windows, begin with a BOM
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}, line {line}: expected UTF-8 text, got byte 0x{e.object[e.start]:02x}") from None
    read = {GSM8K: _gsm8k, MAWPS: _mawps, AQUA: _aqua}.get(name, _sentences if task.kind == "glue" else _examples)
    if rows := list(read(task, path, text)):
        return rows
    raise ValueError(f"{path}: expected examples, got none")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines and their numbers; only a line feed, with or without a carriage return, ends one."""
    for i, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        yield i, line.removesuffix("\r")


def _entries(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or of JSON lines, each with its place for errors."""
    if path.suffix == ".jsonl":
        entries = [(f"{path}, line {i}", parse_json(line, path, i)) for i, line in _lines(text) if line.strip()]
    elif isinstance(content := parse_json(text, path), list):
        entries = [(f"{path}, entry {i}", entry) for i, entry in enumerate(content, 1)]
    else:
        raise ValueError(f"{path}, line 1: expected a JSON list of objects, got {type(content).__name__}")
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected an object in braces, got {type(entry).__name__}")
        yield place, entry


def _listed(names: Iterable[str]) -> str:
    return ", ".join(quoted(name)[1:-1] for name in islice(names, 20)) or "nothing"


def _field(place: str, entry: dict, key: str, types: tuple = (str,)) -> str:
    if key not in entry:
        raise ValueError(f"{place}: expected the key {key!r}, got {_listed(entry)}")
    if type(entry[key]) not in types:
        raise ValueError(f"{place}: {key!r}: expected {types[0].__name__}, got {type(entry[key]).__name__}")
    value = str(entry[key])
    if not value.strip() or re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{place}: {key!r}: expected text, got {'half a surrogate pair' if value.strip() else 'none'}")
    return value


def _examples(task: Task, path: Path, text: str) -> Iterator[Example]:
    """LLM-Adapters' four keys; a user's own file may omit `input`, and `answer` if it is the output."""
    for place, entry in _entries(path, text):
        instruction = _field(place, entry, "instruction")
        if str(entry.get("input") or "").strip():
            instruction += "\n\n" + _field(place, entry, "input")
        model_written = task.kind == "arithmetic" and task.test  # and often wrong
        output = "" if model_written else _field(place, entry, "output")
        unanswered = task.kind == "own" and entry.get("answer") in (None, "")
        answer = output if unanswered else _field(place, entry, "answer")
        if task.answers and not re.fullmatch(task.answers, answer):
            raise ValueError(f"{place}: 'answer': expected {task.name}'s {task.answers}, got {quoted(answer)}")
        choices = ()
        if task.kind == "commonsense":  # "Answer format: solution1/solution2" ends a question
            line = re.search(r"Answer format: (\S+)\s*$", instruction)
            choices = tuple(line[1].split("/")) if line else ()
            if task.answers and not (answer in choices and all(re.fullmatch(task.answers, c) for c in choices)):
                raise ValueError(f"{place}: 'instruction': expected it to end in 'Answer format: ' and {task.answers} "
                                 f"joined by /, {quoted(answer)} among them, got {instruction[-50:]!r}")
        yield Example(instruction, output, answer, choices=choices)


def _gsm8k(task: Task, path: Path, text: str) -> Iterator[Example]:
    """Drops calculator marks <<48/2=24>>; the last line "#### 72" becomes the closing sentence."""
    for place, entry in _entries(path, text):
        work, mark, answer = _field(place, entry, "answer").rpartition("\n#### ")
        if not mark or not re.fullmatch(NUMBER, answer := answer.replace(",", "")):
            raise ValueError(f"{place}: 'answer': expected a last line '#### number', got none")
        work = re.sub(r"<<[^<>\n]*>>", "", work)
        yield Example(_field(place, entry, "question"), f"{work}\nThe answer is {answer}.", answer)


def _mawps(task: Task, path: Path, text: str) -> Iterator[Example]:
    """The equation becomes the worked answer: "X=((22.0-14.0)/4.0)" is "x = ((22 - 14) / 4)"."""
    for place, entry in _entries(path, text):
        answer = _field(place, entry, "ans", (float, int, str)).removesuffix(".0")
        if not re.fullmatch(NUMBER, answer):  # 1e999 is infinite
            raise ValueError(f"{place}: 'ans': expected a number, got {quoted(answer)}")
        equation = re.sub(r"\.0\b", "", _field(place, entry, "equation")).replace("X", "x")
        equation = " ".join(map(str.strip, re.split(r"([-+*/=])", equation)))
        yield Example(_field(place, entry, "original_text"), f"{equation}\nThe answer is {answer}.", answer)


def _aqua(task: Task, path: Path, text: str) -> Iterator[Example]:
    r"""Question with options, "(C)" and rationale; \n is a line break; options as in the test file."""
    for i, line in _lines(text):
        columns = line.replace("\\n", "\n").split("\t")
        if len(columns) != 3 or not re.fullmatch(r"\([A-E]\)", columns[1]):
            raise ValueError(f"{path}, line {i}: expected question, (letter) and rationale by tabs, got {quoted(line)}")
        question, letter, rationale = columns
        question, _, options = question.partition("\nOptions:\n")
        question += " Answer Choices: " + options.replace("\n", " ")
        yield Example(question, f"{rationale}\nThe answer is {letter}.", letter[1])


def _sentences(task: Task, path: Path, text: str) -> Iterator[Sentence]:
    """GLUE's TSV: only tabs and line feeds separate; a quotation mark is like any character."""
    lines, positions, width = _lines(text), task.columns, 4  # CoLA: no header, four columns
    part = path.stem.partition("_")[2]  # dev_matched -> matched; dev, train -> ""
    if isinstance(positions[0], str) and (first := next(lines, None)):
        header = first[1].split("\t")
        if missing := [name for name in positions if name not in header]:
            raise ValueError(f"{path}, line 1: expected a column {missing[0]!r}, got {_listed(header)}")
        positions, width = [header.index(name) for name in positions], len(header)
    for i, line in lines:
        row = line.split("\t")
        if len(row) != width:
            raise ValueError(f"{path}, line {i}: expected {width} columns separated by tabs, got {len(row)}")
        label, sentence, pair = (*(row[position] for position in positions), None)[:3]
        if not (label in task.classes if task.classes else
                re.fullmatch(r"[0-9]++\.?[0-9]*", label) and float(label) <= 5):
            expected = " or ".join(task.classes) or "a number from 0 to 5"
            raise ValueError(f"{path}, line {i}: label: expected {expected}, got {quoted(label)}")
        yield Sentence(sentence, pair, task.classes.index(label) if task.classes else float(label), part)
