"""Read the tasks' files, in the layouts their authors publish, as examples (paper, Section 4.1)."""

import hashlib
import io
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from itertools import chain, islice, starmap
from pathlib import Path

import regex

from sibo_lab.data import download, entries, own, word_problems
from sibo_lab.data.entries import field, in_json, lines, listed
from sibo_lab.data.tasks import AQUA, GSM8K, MAWPS, MAWPS_VALID, NUMBER, Example, Sentence, Task
from sibo_lab.files import quoted
from sibo_lab.parallel import rank

MEANT = regex.compile(  # of a text: all but punctuation, which in numbers and formulas is none
    r"[\p{L}\p{M}\p{N}\p{Sm}\p{Sc}\p{So}^%]++|(?<!\w)\.(?=\d)|(?<=\d)(?!,\d{3}(?!\d))[.,:](?=\d)"  # not 1,000
    r"|[*/](?=\s*\d)|(?<=\d\s*)[*/]|(?<!\p{L})-(?=\s*\d)|(?<=\d\s*)-(?!\p{L})"  # 3 - 2, not 3-year-old
    r"|(?<=[-+*/^]\s*)\(|\)(?=\s*[-+*/^])")


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
    apart = split == "test" and bool(task.test)  # a file for the test alone
    names, published = task.test if apart else task.train, task.counts[apart]
    rows = [row for name in names for row in _read(task, Path(data_dir), name, split == "test" and not apart)]
    paths = " + ".join(str(Path(data_dir, name)) for name in names)
    if published and len(rows) != published and not rank():
        print(f"warning: {paths}: expected the {published} published examples, got {len(rows)}; using these",
              file=sys.stderr)
    if task.kind == "own":
        rows = own.answered(rows, paths, split, apart)
    if not task.test:
        rows = hold_out(rows, task.held_out, tenth=True)[split == "test"]
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


def say_unscored(learned: Iterable[Task], scored: Iterable[Task], data_dir: Path) -> None:
    """On stderr, of tasks without a test file that are learned and not scored, how much of their files is in neither:
    a run leaves it out all the same, so that eval.py can score it later."""
    for t in () if rank() else learned:
        if t.train and not t.test and t not in scored:
            with redirect_stderr(io.StringIO()):  # what its rows lack was said as they were learned
                n = len(load(t, "test", data_dir))
            print(f"{t.name} has no test file: {n} of its examples are left out of training, and not scored",
                  file=sys.stderr)


def hold_out(rows: list, n: int, tenth: bool = False) -> tuple[list, list]:
    """The rest of the rows (Examples or Sentences), and those of the first n `questions` (tenth: or of a tenth of them,
    where that is less, but at least one). ValueError for n or fewer questions."""
    each = questions(rows)
    if tenth:
        n = a_tenth(each, n)
    elif n >= len(each):
        raise ValueError(f"expected more different questions than the {n} to hold out, got {len(each)}")
    return list(chain(*each[n:])), list(chain(*each[:n]))


def questions(rows: list) -> list[list]:
    """The rows (Examples or Sentences) of each question, those that go on from it among them, in the order of their
    hashes: always the same, and as good as shuffled (files are often sorted)."""
    def order(row):
        texts = [text for _, text in row.turns[:-1]] if isinstance(row, Example) else [row.text, row.pair]
        return hashlib.sha256("\n".join(map(str, texts)).encode()).digest()

    asked, found = {id(row): _asked(row) for row in rows}, {}
    own = {each[-1] for each in asked.values()}
    for row in sorted(rows, key=order):
        found.setdefault(next(question for question in asked[id(row)] if question in own), []).append(row)
    return list(found.values())


def by_task(rows: list, loaded: list[tuple[Task, list]]) -> list[tuple[Task, list]]:
    """Rows that were held out of several tasks' together, each with its own task, which knows how it is scored."""
    task_of = {id(row): task for task, some in loaded for row in some}
    return [(task, some) for task, _ in loaded if (some := [row for row in rows if task_of[id(row)] is task])]


def a_tenth(questions: list[list], most: int) -> int:
    return min(most, max(1, len(questions) // 10))


def overlap(train: list, test: list) -> int:
    """How many rows of `test` ask what one of `train` asks, at any turn."""
    known = set(chain(*map(_asked, train)))
    return sum(_asked(row)[-1] in known for row in test)


def warn_of_overlap(learned: list[tuple[Task, list]], tests: list[tuple[Task, list]]) -> None:
    """On stderr, of tasks with their training examples, and of tests with theirs."""
    train = [row for _, rows in learned for row in rows]
    for t, test in () if rank() else tests:
        if seen := overlap(train, test):
            print(f"warning: {seen} of {t.name}'s {len(test)} test questions are in the training set too: a right "
                  f"answer may be memory; see python -m sibo_lab data overlap --train {learned[0][0].name}",
                  file=sys.stderr)


def _asked(row: Example | Sentence) -> list[tuple[str, ...]]:
    """Each question that a row answers, its own last: all texts before, without case, spaces and punctuation."""
    turns = row.turns if isinstance(row, Example) else [("user", row.text), ("user", row.pair or ""), ("assistant", "")]
    texts = [unicodedata.normalize("NFC", text.lower()).replace("\u2212", "-") for _, text in turns[:-1]]
    texts = ["".join(MEANT.findall(text)) or text for text in texts]
    return [tuple(texts[:i]) for i, (role, _) in enumerate(turns) if role == "assistant"]


def _read(task: Task, data_dir: Path, name: str, again: bool) -> list:
    path = data_dir / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; " + (
            "check the path of your data" if task.kind == "own" else
            f"`python -m sibo_lab data fetch {task.name} --data-dir {data_dir}` brings it from "
            f"https://{download.address(name)}; or set --data-dir or $SIBO_DATA"))
    if task.kind == "own":
        rows = own.read(task, path, again)
    else:
        read = {GSM8K: _gsm8k, MAWPS: _mawps, MAWPS_VALID: _mawps, AQUA: _aqua}.get(
            name, _sentences if task.kind == "glue" else _examples)
        rows = list(read(task, path, entries.text(path)))
    if rows:
        return rows
    raise ValueError(f"{path}: expected examples, got none")


def _examples(task: Task, path: Path, text: str) -> Iterator[Example]:
    """LLM-Adapters' four keys."""
    for place, entry in in_json(path, text):
        instruction = field(place, entry, "instruction")
        if str(entry.get("input") or "").strip():
            instruction += "\n\n" + field(place, entry, "input")
        model_written = task.kind == "arithmetic" and path.name == "test.json"  # and often wrong
        output = "" if model_written else field(place, entry, "output")
        answer = field(place, entry, "answer")
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
    for place, entry in in_json(path, text):
        work, mark, answer = field(place, entry, "answer").rpartition("\n#### ")
        if not mark or not re.fullmatch(NUMBER, answer := answer.replace(",", "")):
            raise ValueError(f"{place}: 'answer': expected a last line '#### number', got none")
        work = re.sub(r"<<[^<>\n]*>>", "", work)
        yield Example(field(place, entry, "question"), f"{work}\nThe answer is {answer}.", answer)


def _mawps(task: Task, path: Path, text: str) -> Iterator[Example]:
    """The equation becomes the worked answer: "X=((22.0-14.0)/4.0)" is "x = ((22 - 14) / 4)"."""
    for place, entry in in_json(path, text):
        answer = field(place, entry, "ans", (float, int, str)).removesuffix(".0")
        if not re.fullmatch(NUMBER, answer):  # 1e999 is infinite
            raise ValueError(f"{place}: 'ans': expected a number, got {quoted(answer)}")
        equation = re.sub(r"\.0\b", "", field(place, entry, "equation")).replace("X", "x")
        equation = " ".join(map(str.strip, re.split(r"([-+*/=])", equation)))
        yield Example(field(place, entry, "original_text"), f"{equation}\nThe answer is {answer}.", answer)


def _aqua(task: Task, path: Path, text: str) -> Iterator[Example]:
    r"""Question with options, "(C)" and rationale; \n is a line break; options as in the test file."""
    for i, line in lines(text):
        columns = line.replace("\\n", "\n").split("\t")
        if len(columns) != 3 or not re.fullmatch(r"\([A-E]\)", columns[1]):
            raise ValueError(f"{path}, line {i}: expected question, (letter) and rationale by tabs, got {quoted(line)}")
        question, letter, rationale = columns
        question, _, options = question.partition("\nOptions:\n")
        question += " Answer Choices: " + options.replace("\n", " ")
        yield Example(question, f"{rationale}\nThe answer is {letter}.", letter[1])


def _sentences(task: Task, path: Path, text: str) -> Iterator[Sentence]:
    """GLUE's TSV: only tabs and line feeds separate; a quotation mark is like any character."""
    rows, positions, width = lines(text), task.columns, 4  # CoLA: no header, four columns
    part = path.stem.partition("_")[2]  # dev_matched -> matched; dev, train -> ""
    if isinstance(positions[0], str) and (first := next(rows, None)):
        header = first[1].split("\t")
        if missing := [name for name in positions if name not in header]:
            raise ValueError(f"{path}, line 1: expected a column {missing[0]!r}, got {listed(header)}")
        positions, width = [header.index(name) for name in positions], len(header)
    for i, line in rows:
        row = line.split("\t")
        if len(row) != width:
            raise ValueError(f"{path}, line {i}: expected {width} columns separated by tabs, got {len(row)}")
        label, sentence, pair = (*(row[position] for position in positions), None)[:3]
        if not (label in task.classes if task.classes else
                re.fullmatch(r"[0-9]++\.?[0-9]*", label) and float(label) <= 5):
            expected = " or ".join(task.classes) or "a number from 0 to 5"
            raise ValueError(f"{path}, line {i}: label: expected {expected}, got {quoted(label)}")
        yield Sentence(sentence, pair, task.classes.index(label) if task.classes else float(label), part)
