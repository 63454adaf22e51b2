"""Word problems made from a seed: the built-in task, which needs no file.

Ours, in the manner of the arithmetic sets that the paper trains on (Section 4.1): a question, its steps worked out, a
closing sentence with the answer. The paper and the official code have nothing of the kind."""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator

# Question, ranges of its numbers, worked answer. A step in brackets is worked out: [a + b] becomes "12 + 5 = 17", and
# the results of the first, second and third step are called x, y and z.
TRAINED = (
    # one step
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
     "a 5-60 b 5-40", "{name} has [a + b] {things}."),
    ("There are {a} {things} in a {box}. {name} takes {b} of them out. How many {things} are left in the {box}?",
     "a 20-90 b 5-60", "[a - b] {things} are left."),
    ("{name} has {a} {boxes} with {b} {things} in each. How many {things} are there in all?",
     "a 2-9 b 3-20", "There are [a * b] {things}."),
    ("{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
     "a 6-90 b 2-9", "Each friend gets [a / b] {things}."),
    ("{name} collected {a} {things} and {friend} collected {b}. How many more {things} did {name} collect?",
     "a 20-99 b 5-80", "{name} collected [a - b] more."),
    ("A train travels {a} miles every hour. How many miles does it travel in {b} hours?",
     "a 11-99 b 2-9", "It travels [a * b] miles."),
    ("A book has {a} pages. {name} has read {b} of them. How many pages are left to read?",
     "a 40-100 b 11-90", "[a - b] pages are left."),
    ("A rope of {a} meters is cut into pieces of {b} meters each. How many pieces are there?",
     "a 10-100 b 2-10", "There are [a / b] pieces."),
    ("{name} is {a} years old. {name}'s grandmother is {b} years older. How old is the grandmother?",
     "a 6-30 b 38-60", "She is [a + b] years old."),
    ("{name} waits {a} minutes for the bus and then rides it for {b} minutes. How many minutes is that in all?",
     "a 5-45 b 10-55", "It is [a + b] minutes."),
    # two steps
    ("{name} had {a} {things}, gave {b} of them to {friend} and then found {c} more. "
     "How many {things} does {name} have now?",
     "a 20-80 b 5-50 c 3-40", "After giving, [a - b] are left. After finding, [x + c]."),
    ("{name} buys {a} {things} for ${b} each and pays with a $100 bill. How many dollars does {name} get back?",
     "a 2-9 b 2-20", "The {things} cost [a * b] dollars. {name} gets back [100 - x] dollars."),
    ("{name} has {a} {boxes} of {b} {things} and gives away {c} {things}. How many {things} are left?",
     "a 2-9 b 3-12 c 3-50", "There are [a * b] {things}. [x - c] are left."),
    ("{name} has {a} {things} and {friend} has {b}. They share all of them equally among {c} children. "
     "How many {things} does each child get?",
     "a 5-60 b 5-40 c 2-9", "Together they have [a + b]. Each child gets [x / c]."),
    ("{name} earns ${a} a day. After {b} days {name} spends ${c}. How many dollars are left?",
     "a 6-20 b 2-9 c 5-70", "{name} earns [a * b] dollars. [x - c] dollars are left."),
    ("A baker bakes {a} rolls and sells {b} of them. The rest go into bags of {c}. How many bags are there?",
     "a 30-100 b 10-80 c 2-9", "[a - b] rolls are left. They fill [x / c] bags."),
    ("A hall has {a} rows of {b} chairs and {c} extra chairs. How many chairs are there in all?",
     "a 3-9 b 4-12 c 2-30", "The rows have [a * b] chairs. In all there are [x + c]."),
    ("A bike costs ${a}. {name} has ${b} and saves ${c} every week. "
     "How many weeks does {name} need to save for the bike?",
     "a 50-100 b 5-60 c 2-10", "{name} needs [a - b] more dollars. That takes [x / c] weeks."),
    ("{name} walked {a} miles in May and {b} miles more than that in June. How many miles is that in both months?",
     "a 5-45 b 2-40", "In June it was [a + b] miles. Both months make [a + x] miles."),
    ("{name} has {a} {things}. {friend} has {b} times as many. How many {things} do they have together?",
     "a 3-20 b 2-6", "{friend} has [a * b]. Together they have [a + x]."),
    ("A ticket costs ${a} for an adult and ${b} for a child. How many dollars do {c} adults and one child pay?",
     "a 5-20 b 2-12 c 2-8", "The adults pay [a * c] dollars. All pay [x + b] dollars."),
    ("{a} girls and {b} boys are split into teams of {c}. How many teams are there?",
     "a 6-50 b 6-50 c 2-10", "There are [a + b] children. They make [x / c] teams."),
    ("{name} has ${a} and buys a cap for ${b} and a shirt for ${c}. How many dollars are left?",
     "a 40-100 b 5-30 c 8-50", "The cap and the shirt cost [b + c] dollars. [a - x] dollars are left."),
    ("{a} workers build a wall in {b} hours. How many hours would {c} workers need?",
     "a 2-9 b 2-11 c 2-9", "The work takes [a * b] hours. {c} workers need [x / c] hours."),
    # three steps
    ("{name} buys {a} {things} at ${b} each and {c} {others} at ${d} each. How many dollars does {name} pay?",
     "a 2-9 b 2-9 c 2-9 d 2-9", "The {things} cost [a * b]. The {others} cost [c * d]. Together they cost [x + y]."),
    ("A farmer has {a} hens. Each hen lays {b} eggs a week. The farmer eats {c} and packs the rest in cartons of {d}. "
     "How many cartons are filled in a week?",
     "a 5-15 b 3-7 c 2-20 d 4-12", "The hens lay [a * b] eggs. [x - c] are left. They fill [y / d] cartons."),
    ("{name} had ${a} and bought {b} books for ${c} each and a pen for ${d}. How many dollars are left?",
     "a 40-100 b 2-8 c 3-11 d 2-9", "The books cost [b * c]. [a - x] dollars are left. After the pen, [y - d]."),
    ("A bus starts with {a} people. Then {b} people get on, {c} get off and {d} more get on. "
     "How many people are on the bus now?",
     "a 8-40 b 3-25 c 3-30 d 3-20", "After the first stop, [a + b]. After the second, [x - c]. Now, [y + d]."),
    ("{name} has {a} {boxes} of {b} {things} and finds {c} more. {name} shares all of them equally among {d} children. "
     "How many {things} does each child get?",
     "a 2-9 b 3-11 c 2-30 d 2-9", "There are [a * b]. With the others, [x + c]. Each child gets [y / d]."),
)
NEVER_TRAINED = (
    ("{name} needs {a} {things} for a project and has {b} so far. How many {things} are missing?",
     "a 20-90 b 5-70", "[a - b] {things} are missing."),
    ("A library lends {a} books in the morning and {b} books in the afternoon. How many books does it lend that day?",
     "a 10-60 b 10-40", "It lends [a + b] books."),
    ("One notebook costs ${a}. How many dollars do {b} notebooks cost?",
     "a 2-20 b 3-9", "They cost [a * b] dollars."),
    ("A gardener plants {a} rows of {b} tulips, but {c} tulips do not bloom. How many tulips bloom?",
     "a 3-9 b 4-12 c 2-40", "There are [a * b] tulips. [x - c] bloom."),
    ("{a} friends order a pizza for ${b} and drinks for ${c}. They split the bill equally. "
     "How many dollars does each of them pay?",
     "a 2-8 b 10-40 c 4-30", "The bill is [b + c] dollars. Each pays [x / a] dollars."),
    ("A tank holds {a} liters of water. A goat drinks {b} liters a day. How many liters are left after {c} days?",
     "a 50-100 b 2-9 c 3-9", "The goat drinks [b * c] liters. [a - x] liters are left."),
    ("{name} swims {a} laps a day for {b} days. {friend} swims {c} laps in all. How many more laps does {name} swim?",
     "a 4-20 b 2-7 c 5-60", "{name} swims [a * b] laps. That is [x - c] more."),
    ("A school sends {a} classes of {b} pupils and {c} teachers on a trip in vans of {d} seats. "
     "How many vans are needed?",
     "a 2-4 b 12-24 c 2-9 d 4-12", "There are [a * b] pupils. With the teachers, [x + c]. They need [y / d] vans."),
)
NAMES = ("Ada Amir Anna Ben Carla Chen Dan Diego Ella Emma Fatima George Grace Hana Ivan Jack Jada Kim Leo Lina Lucy "
         "Marco Maria Mia Nina Noah Omar Paul Priya Rosa Ruth Sam Sara Tom Uma Victor Wei Yuki Zoe").split()
THINGS = ("apples balls bananas beads buttons cards coins cookies crayons erasers feathers lemons marbles muffins "
          "oranges peaches pears pencils pens plums postcards puzzles ribbons shells stamps stickers tokens").split()
BOXES = (("bag", "bags"), ("basket", "baskets"), ("bowl", "bowls"), ("box", "boxes"), ("crate", "crates"))


def word_problems(split: str, seed: int) -> Iterator[tuple[str, str, str, str]]:
    """Endless different problems, "train" or "test": question, worked answer, result and part, which is "new templates"
    for every fifth test problem (its template is never trained on), else "".

    A problem's side is decided by the hash of its template and numbers: whatever seeds and lengths are asked for, no
    training question stands in a test, not even under another name or about other things."""
    rng, made = random.Random(f"{split} {seed}"), set()
    for i in itertools.count():
        part = "new templates" if split == "test" and i % 5 == 4 else ""
        question = None
        while question is None or question in made:
            question, work, answer = _word_problem(_pick(rng, NEVER_TRAINED if part else TRAINED), split, rng)
        made.add(question)
        yield question, f"{work} The answer is {answer}.", str(answer), part


def _pick(rng: random.Random, choices):
    return choices[int(rng.random() * len(choices))]  # random() alone is promised to stay the same in every Python


def _word_problem(template: tuple[str, str, str], split: str, rng: random.Random) -> tuple[str, str, int]:
    question, ranges, work = template
    while True:  # numbers are drawn until they belong to this side and every step is one for the head
        # the least of three draws: small numbers are the likelier ones, as they are in MAWPS and its kin
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
    """The worked answer with its steps worked out, and the last result. None if an operand is above 100, a result below
    2 (so that every noun can stay plural), a division not exact, or a factor or divisor above 12."""
    known, pieces = dict(numbers), re.split(r"\[(.+?)\]", work)
    for place, result in zip(range(1, len(pieces), 2), "xyz", strict=False):
        left, op, right = pieces[place].split()
        p, q = (known[operand] if operand in known else int(operand) for operand in (left, right))
        value = {"+": p + q, "-": p - q, "*": p * q, "/": p // q}[op]
        if max(p, q) > 100 or value < 2 or (op == "/" and p % q) or (op in "*/" and min(p, q) > 12):
            return None
        known[result] = value
        pieces[place] = f"{p} {op} {q} = {value}"
    return "".join(pieces), value
