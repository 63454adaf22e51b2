"""sibo_lab/data/word_problems.py: what is made from a seed is right, and is never in both training and test."""

import hashlib
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sibo_lab.data import readers, tasks, word_problems
from sibo_lab.evaluation import answers

ROOT = Path(__file__).parents[2]

WORD_PROBLEMS = tasks.task("word-problems")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}


def problems(split, n, seed=0):
    return readers.load(WORD_PROBLEMS, split, Path("/nowhere"), n=n, seed=seed)


@pytest.fixture(scope="module")
def many():
    return problems("train", 4000) + problems("test", 2000)


def test_every_step_of_every_worked_answer_is_true(many):
    for problem in many:
        steps = STEP.findall(problem.output)
        assert 1 <= len(steps) <= 3 and problem.output.count("=") == len(steps), problem
        for left, operation, right, result in steps:
            assert OPERATIONS[operation](Fraction(left), Fraction(right)) == int(result), problem


def test_a_worked_answer_closes_with_its_last_result(many):
    for problem in many:
        assert problem.answer == STEP.findall(problem.output)[-1][-1]
        assert problem.output.endswith(f" The answer is {problem.answer}.")
        assert answers.is_right(WORD_PROBLEMS, problem.output, problem.answer)


def test_a_worked_answer_uses_the_numbers_of_the_question_and_nothing_from_nowhere(many):
    for problem in many:
        known = set(re.findall(r"\d+", problem.instruction))
        for left, _, right, result in STEP.findall(problem.output):
            assert {left, right} <= known, problem
            known.add(result)


def test_operands_stay_within_100_and_no_plural_noun_meets_a_one(many):
    for problem in many:
        numbers = [int(number) for number in re.findall(r"\d+", problem.instruction)]
        steps = STEP.findall(problem.output)
        assert 2 <= min(numbers) and max(numbers) <= 100
        assert max(int(operand) for left, _, right, _ in steps for operand in (left, right)) <= 100
        assert min(int(result) for *_, result in steps) >= 2


def test_every_template_is_filled_completely_and_is_on_both_sides(many):
    to_train, never_trained = word_problems.TRAINED, word_problems.NEW
    assert len(to_train) >= 24 and len(never_trained) >= 6
    assert all("{" not in p.instruction + p.output and "[" not in p.instruction + p.output for p in many)

    def templates(problems, candidates):
        patterns = [re.sub(r"\\\{\w+\\\}", r"[\\w]+", re.escape(question)) for question, *_ in candidates]
        found = [[i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, p.instruction)] for p in problems]
        assert all(len(places) == 1 for places in found)
        return {places[0] for places in found}

    everything = to_train + never_trained
    trained = set(range(len(to_train)))
    assert templates(many[:4000], everything) == trained
    assert templates([p for p in many[4000:] if not p.part], everything) == trained
    assert templates([p for p in many[4000:] if p.part], everything) == set(range(len(everything))) - trained


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_no_question_is_in_both_training_and_test_whatever_the_seeds_and_lengths(seed, other, n, m):
    train, test = problems("train", n, seed), problems("test", m, other)
    assert len({p.instruction for p in train}) == n and len({p.instruction for p in test}) == m
    assert not {p.instruction for p in train} & {p.instruction for p in test}


def test_no_test_question_is_a_training_question_about_other_people_or_things(many):
    boxes = [word for pair in word_problems.BOXES for word in pair]
    words = "|".join((*word_problems.NAMES, *word_problems.THINGS, *boxes))

    def bare(problem):
        return re.sub(rf"\b({words})\b", "_", problem.instruction)
    assert not {bare(p) for p in many[:4000]} & {bare(p) for p in many[4000:]}


def test_every_fifth_test_problem_comes_from_a_new_template():
    assert [p.part for p in problems("test", 11)] == ([""] * 4 + ["new templates"]) * 2 + [""]
    assert all(p.part == "" for p in problems("train", 50))


def test_a_shorter_set_begins_a_longer_one_and_another_seed_makes_another():
    assert problems("test", 40) == problems("test", 200)[:40]
    assert problems("train", 20, seed=1) != problems("train", 20, seed=2)
    assert len(problems("train", None)) == 4000 and len(problems("test", None)) == 200


def test_word_problems_are_the_same_in_every_process():
    code = ("from sibo_lab.data import readers, tasks; "
            "print(readers.load(tasks.task('word-problems'), 'test', None, n=9)[8].instruction)")
    runs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, text=True, check=True,
                           capture_output=True).stdout.strip() for seed in ("1", "2")}
    assert runs == {problems("test", 9)[8].instruction}


def test_the_problems_of_a_seed_are_the_same_to_the_byte_in_every_version_and_on_every_machine():
    text = "\n".join("\t".join((p.instruction, p.output, p.answer, p.part))
                     for split, n in (("train", 4000), ("test", 2000)) for p in problems(split, n, seed=3))
    assert hashlib.sha256(text.encode()).hexdigest()[:32] == "5859e6ec0ba5d72661326ee873e223e3"
