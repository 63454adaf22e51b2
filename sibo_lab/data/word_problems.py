"""Word problems made from a seed: the built-in task, which needs no download. They are ours, in the manner of the
paper's arithmetic sets (Section 4.1): a question, its worked steps, a closing sentence with the answer."""

import hashlib
import random
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

_FILE = Path(__file__).with_name("word_problems.txt").read_text("utf-8")
((_names, _things, _boxes), *TRAINED), NEW = (  # templates: question, ranges, worked answer
    [block.split("\n") for block in section.strip().split("\n\n") if block[0] != "#"]
    for section in _FILE.split("# never trained on\n"))
NAMES, THINGS, BOXES = _names.split(), _things.split(), [pair.split("/") for pair in _boxes.split()]


def word_problems(split: str, seed: int) -> Iterator[tuple[str, str, str, str]]:
    """Endless different problems, "train" or "test": question, worked answer, result and part ("new templates", never
    trained on, in every fifth test problem; else ""). The hash of template and numbers decides the split: whatever the
    seeds and lengths, no training question is in a test, not even about other people or things."""
    rng, made = random.Random(f"{split} {seed}"), {""}
    for i in count():
        part = "new templates" if split == "test" and i % 5 == 4 else ""
        question = ""
        while question in made:
            question, work, answer = _word_problem(_pick(rng, NEW if part else TRAINED), split, rng)
        made.add(question)
        yield question, f"{work} The answer is {answer}.", str(answer), part


def _pick(rng: random.Random, choices):
    return choices[int(rng.random() * len(choices))]  # only random() is promised to be the same in every Python


def _word_problem(template: list[str], split: str, rng: random.Random) -> tuple[str, str, int]:
    question, ranges, work = template
    while True:  # draw numbers until they belong to this split and every step can be done in the head
        # the least of three draws: small numbers are likelier, as in MAWPS
        numbers = {letter: min(_pick(rng, range(int(low), int(high) + 1)) for _ in range(3))
                   for letter, low, high in re.findall(r"(\w) (\d+)-(\d+)", ranges)}
        side = "test" if hashlib.sha256(f"{question} {numbers}".encode()).digest()[0] < 52 else "train"  # one in five
        if side == split and (solved := _solve(work, numbers)):
            break
    work, answer = solved
    (box, boxes), things, name = _pick(rng, BOXES), _pick(rng, THINGS), _pick(rng, NAMES)
    friend = _pick(rng, [other for other in NAMES if other != name])
    others = _pick(rng, [other for other in THINGS if other != things])
    words = dict(name=name, friend=friend, things=things, others=others, box=box, boxes=boxes, **numbers)
    return question.format(**words), work.format(**words), answer


def _solve(work: str, numbers: dict[str, int]) -> tuple[str, int] | None:
    """The worked answer with its steps computed, and the last result. None if an operand is above 100, a result below 2
    (every noun is plural), a division not exact, or a factor or divisor above 12."""
    known, pieces = dict(numbers), re.split(r"\[(.+?)\]", work)
    for i, result in zip(range(1, len(pieces), 2), "xyz", strict=False):
        left, op, right = pieces[i].split()
        p, q = (int(known.get(operand, operand)) for operand in (left, right))
        value = {"+": p + q, "-": p - q, "*": p * q, "/": p // q}[op]
        if max(p, q) > 100 or value < 2 or (op == "/" and p % q) or (op in "*/" and min(p, q) > 12):
            return None
        known[result] = value
        pieces[i] = f"{p} {op} {q} = {value}"
    return "".join(pieces), value
