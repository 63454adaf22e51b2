"""From the tasks' files, in the layout their authors publish, to examples."""

import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from sibo_lab import files
from sibo_lab.data import download, tasks, word_problems


def load(task: tasks.Task, split: str, data_dir: Path, n: int | None = None, seed: int = 0) -> list:
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
        made = itertools.islice(word_problems.word_problems(split, seed), n or {"train": 4000, "test": 200}[split])
        return [tasks.Example(*problem) for problem in made]
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
    def question(row: tasks.Example | tasks.Sentence) -> str:
        return row.instruction if isinstance(row, tasks.Example) else f"{row.text}\n{row.pair}"

    rows = sorted(rows, key=lambda row: hashlib.sha256(question(row).encode()).digest())
    questions = list(dict.fromkeys(map(question, rows)))
    held = set(questions[:max(1, min(n, len(questions) // 10))])
    return [row for row in rows if question(row) not in held], [row for row in rows if question(row) in held]


def _read(task: tasks.Task, path: Path, file: str) -> list:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: " + (
            "check the path of your data" if task.kind == "own" else
            f"`python -m sibo_lab data fetch {task.name} --data-dir {path.parents[file.count('/')]}` brings it from "
            f"https://{download.address(file)}; or name another data folder with --data-dir or $SIBO_DATA"))
    try:
        text = path.read_bytes().decode("utf-8-sig")  # -sig: MRPC, and files written on Windows, begin with a BOM
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x})") from None
    reader = {tasks.GSM8K: _gsm8k, tasks.MAWPS: _mawps, tasks.AQUA: _aqua}.get(file, _sentences if task.kind == "glue" else _examples)
    rows = list(reader(task, path, text))
    if not rows:
        raise ValueError(f"{path}: holds no examples")
    return rows


def _lines(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _entries(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON list or of JSON lines, each with the place to name in errors."""
    if path.suffix == ".jsonl":
        entries = [(f"line {i}", files.parse_json(line, path, i)) for i, line in enumerate(_lines(text), 1) if line.strip()]
    else:
        if not isinstance(whole := files.parse_json(text, path), list):
            raise ValueError(f"{path}, line 1: found a JSON {type(whole).__name__}, expected a list of objects")
        entries = [(f"entry {i}", entry) for i, entry in enumerate(whole, 1)]
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, {place}: found {type(entry).__name__}, expected an object in braces")
        yield f"{path}, {place}", entry


def _listed(names: Iterable[str]) -> str:
    """Names out of a file, as an error shows them."""
    return ", ".join(files.quoted(name)[1:-1] for name in itertools.islice(names, 20)) or "nothing"


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


def _examples(task: tasks.Task, path: Path, text: str) -> Iterator[tasks.Example]:
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
            raise ValueError(f"{where}: answer {files.quoted(answer)} is none of {task.name}'s, expected {task.answers}")
        yield tasks.Example(instruction, output, answer, choices=_choices(task, where, instruction, answer))


def _choices(task: tasks.Task, where: str, instruction: str, answer: str) -> tuple[str, ...]:
    """The words of the line that closes a commonsense question, "Answer format: solution1/solution2"; () elsewhere."""
    line = task.kind == "commonsense" and re.search(r"Answer format: (\S+)\s*$", instruction)
    choices = tuple(line[1].split("/")) if line else ()
    if task.kind == "commonsense" and task.answers and not (
            answer in choices and all(re.fullmatch(task.answers, choice) for choice in choices)):
        raise ValueError(f"{where}: 'instruction' ends in {instruction[-50:]!r}, expected 'Answer format: ' and "
                         f"choices of the form {task.answers}, separated by /, the answer {files.quoted(answer)} in them")
    return choices


def _gsm8k(task: tasks.Task, path: Path, text: str) -> Iterator[tasks.Example]:
    """The calculator marks <<48/2=24>> go, and the last line "#### 72" becomes the closing sentence."""
    for where, entry in _entries(path, text):
        work, mark, answer = _field(where, entry, "answer").rpartition("\n#### ")
        if not mark or not re.fullmatch(tasks.NUMBER, answer := answer.replace(",", "")):
            raise ValueError(f"{where}: 'answer' has no last line '#### number'")
        work = re.sub(r"<<[^<>\n]*>>", "", work)
        yield tasks.Example(_field(where, entry, "question"), f"{work}\nThe answer is {answer}.", answer)


def _mawps(task: tasks.Task, path: Path, text: str) -> Iterator[tasks.Example]:
    """The equation is the worked answer: "X=((22.0-14.0)/4.0)" and 2.0 become "x = ((22 - 14) / 4)" and the closing."""
    for where, entry in _entries(path, text):
        answer = _field(where, entry, "ans", (float, int, str)).removesuffix(".0")
        if not re.fullmatch(tasks.NUMBER, answer):  # 1e999 is infinite
            raise ValueError(f"{where}: 'ans' is {files.quoted(answer)}, expected a number")
        equation = re.sub(r"\.0\b", "", _field(where, entry, "equation")).replace("X", "x")
        equation = " ".join(part.strip() for part in re.split(r"([-+*/=])", equation))
        yield tasks.Example(_field(where, entry, "original_text"), f"{equation}\nThe answer is {answer}.", answer)


def _aqua(task: tasks.Task, path: Path, text: str) -> Iterator[tasks.Example]:
    r"""Columns: question with options, "(C)", rationale; \n is a line break. Options are set as in the test file."""
    for i, line in enumerate(_lines(text), 1):
        columns = line.replace("\\n", "\n").split("\t")
        if len(columns) != 3 or not re.fullmatch(r"\([A-E]\)", columns[1]):
            raise ValueError(f"{path}, line {i}: expected question, (letter) and rationale, separated by tabs")
        question, letter, rationale = columns
        question, _, options = question.partition("\nOptions:\n")
        question += " Answer Choices: " + " ".join(options.split("\n"))
        yield tasks.Example(question, f"{rationale}\nThe answer is {letter}.", letter[1])


def _sentences(task: tasks.Task, path: Path, text: str) -> Iterator[tasks.Sentence]:
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
            raise ValueError(f"{path}, line {i}: label {files.quoted(written)}, expected {' or '.join(task.classes)}")
        if not task.classes and not (re.fullmatch(r"[0-9]++\.?[0-9]*", written) and float(written) <= 5):
            raise ValueError(f"{path}, line {i}: score {files.quoted(written)}, expected a number from 0 to 5")
        yield tasks.Sentence(sentence, pair, task.classes.index(written) if task.classes else float(written), part)


def overlap(train: list, test: list) -> int:
    """How many rows of `test` (Examples or Sentences) stand in `train`: the question (or the sentences) has the same
    letters and digits there, case, spaces and punctuation aside."""
    def bare(row: tasks.Example | tasks.Sentence) -> str:
        text = row.instruction if isinstance(row, tasks.Example) else f"{row.text} {row.pair or ''}"
        return "".join(filter(str.isalnum, text.lower()))

    known = {bare(row) for row in train}
    return sum(bare(row) in known for row in test)
