"""sibo_lab/evaluation/answers.py: the answer that a response gives, and what counts as right."""

import re
from pathlib import Path

import pytest

from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import answers

REAL = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")


@pytest.mark.parametrize(("name", "response", "answer"), [
    ("gsm8k", "She has 3 + 4 = 7 apples. The answer is 7.", "7."),      # the official pattern keeps a full stop
    ("gsm8k", "It costs $1,234.50 in all", "1234.50"),
    ("gsm8k", "It fell to -5 degrees", "-5"),
    ("gsm8k", "I do not know.", None),
    ("aqua", "The answer is (C)", "C"),
    ("aqua", "Adding, we find (C)", "A"),                               # the first capital A-E anywhere
    ("aqua", "no idea", None),
    ("boolq", "the correct answer is false, not true", "false"),
    ("piqa", "solution2", "solution2"),
    ("siqa", "answer9 or answer3", "answer3"),
    ("hellaswag", "ending4", "ending4"),
    ("winogrande", "", None),
    ("math10k", " 7 ", "7"),
    ("math10k", " ", None),
])
def test_an_answer_is_found_as_the_official_code_finds_it(name, response, answer):
    assert answers.answer_of(tasks.task(name), response) == answer


@pytest.mark.parametrize(("response", "letter"), [
    ("Adding, we find (C)", "C"), ("By Bayes, (D)", "D"), ("The answer is E.", "E"), ("A or B", "B"), ("CAB", None)])
def test_the_last_letter_is_the_last_that_stands_alone(response, letter):
    assert answers.last_letter(response) == letter


@pytest.mark.parametrize(("name", "response", "gold", "right"), [
    ("gsm8k", "The answer is 36.", "36.0", True),
    ("gsm8k", "The answer is 36.0009", "36", True),
    ("gsm8k", "The answer is 36.002", "36", False),
    ("gsm8k", "36 apples, 2 each", "36", False),
    ("gsm8k", "", "36", False),
    ("gsm8k", "9" * 400, "9", False),
    ("mawps", "x = 11 / 6\nThe answer is 1.8333", "1.8333333333333335", True),
    ("aqua", "C is right", "C", True),
    ("aqua", "By C, and D", "D", False),
    ("obqa", "the correct answer is answer4", "answer4", True),
    ("obqa", "Answer4", "answer4", False),
    ("gsm8k", "The answer is \u22125", "5", True),                        # the official pattern reads only -
    ("math10k", "so 3 + 4 = 7\nThe answer is 7.", "7.0", True),
    ("math10k", "All right.\nThe answer is (C).", "C", True),
    ("math10k", "All right.\nThe answer is (C).", "B", False),
    ("commonsense170k", "the correct answer is true", "true", True),
    ("mine.json", "Paris.", "paris", True),
    ("mine.json", "The capital is Paris", "Paris", True),
    ("mine.json", "It is untrue", "true", False),
    ("mine.json", "1,234", "1234", True),
    ("mine.json", "", "...", False), ("mine.json", "(no)", "?", False), ("mine.json", " ?!", "?!", True),
])
def test_right_is_a_number_within_a_thousandth_or_the_very_word(name, response, gold, right):
    assert answers.is_right(tasks.task(name), response, gold) is right


@pytest.mark.parametrize(("response", "gold"), [
    ("The answer is 2.5 apples.", "5 apples"), ("The tax is 12.5%", "5%"), ("The tax is 12,5 %", "5 %"),
    ("It fell by -5%", "5%"), ("It fell by \u22125%", "5%"), ("It fell by -$5", "$5"), ("The answer is -1/2", "1/2"),
    ("x = 2 3/4", "3/4"), ("It is $1,200 million", "200 million"), ("It is 1 200 m", "200 m"), ("x^2y", "2y"),
    ("The answer is 5", "0,5"), ("The answer is 15", "1,5"), ("The answer is 34", "3,4"), ("The answer is 5", "5%"),
    ("The answer is 5", "-5"), ("It is \u22125", "5"), ("It is .5", "5"), ("12345678901234567", "12345678901234568"),
    ("The answer is C", "C#"), ("不正确", "正确"), ("ไม่ใช่", "ใช่"), ("不是", "是"), ("nicht wahr, unwahr", "wahr"),
    ("It is 1,5", "15"), ("non-toxic", "toxic"), ("It is not toxic.", "toxic"), ("It isn't spam", "spam"),
    ("never smoker", "smoker"), ("Das ist nicht wahr", "wahr")])
def test_the_end_of_another_answer_is_wrong(response, gold):
    assert not answers.is_right(tasks.task("mine.json"), response, gold)


@pytest.mark.parametrize(("response", "gold"), [
    ("The answer is 5 apples.", "5 apples"), ("The tax is 5%.", "5%"), ("It fell by -5%", "-5%"), ("x = 1/2", "1/2"),
    ("The answers are 3,4", "3,4"), ("So 2 + 3 = 5\n5 apples", "5 apples"), ("1200", "1,200"), ("1,200.50", "1,200.5"),
    ("The answer is 0.5", ".5"), ("The answer is .5", "0.5"), ("It is \u22125", "-5"), ("It is 1.0009", "1"),
    ("x = 5 \n5 apples", "5 apples"), ("答案是北京", "北京"), ("北京。", "北京"), ("答えは東京", "東京"),
    ("答えは「東京」", "東京"), ("คำตอบคือกรุงเทพ", "กรุงเทพ"),
    ("Toxic or not? Toxic", "toxic"), ("No, Paris", "Paris"), ("It is not toxic", "not toxic"), ("So: no", "no"),
    ("The sum, 12, is 1,015.", "1015"), ("The capital—Paris", "Paris"), ("- Paris", "Paris"),
    ('The answer is "Paris"', "Paris"), ("**Paris**", "Paris"), ("It is `Paris`.", "Paris"), ("Paris,", "Paris"),
    ("Paris;", "Paris"), ("Paris…", "Paris"), ("Es ist „Paris“", "Paris"), ("C'est « oui »", "oui"), ("In C#.", "C#"),
    ("e\u0301te\u0301", "\u00e9t\u00e9"), ("\u00e9t\u00e9", "e\u0301te\u0301")])
def test_the_same_answer_in_another_spelling_is_right(response, gold):
    assert answers.is_right(tasks.task("mine.json"), response, gold)


def official(name, response, gold):
    """Whether LLM-Adapters' evaluation takes the response as right: prompt and response are read as one text."""
    text = (batch.prompt("How many?") + response).split("### Response:")[1].strip()
    if name == "aqua":
        return (re.findall("A|B|C|D|E", text) or [""])[0] == gold
    if name == "boolq":
        return (re.findall("true|false", text) or [""])[0] == gold
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return bool(found) and abs(float(gold) - float(found[-1])) <= 0.001


@pytest.mark.parametrize(("name", "response", "gold"), [
    (name, head + between + tail, gold) for name, gold, parts in (
        ("mawps", "7", ("The answer is 7.", "The answer is 8.", "")), ("aqua", "C", ("so (C)", "so (D)", "")),
        ("boolq", "true", ("it is true", "it is false", "")))
    for head in parts for tail in parts for between in ("\n### Response:\n", "\n### Instruction:\n", "\nResponse:\n")])
def test_a_response_that_goes_on_is_read_as_far_as_the_official_code_reads_it(name, response, gold):
    assert answers.is_right(tasks.task(name), response, gold) is official(name, response, gold)


def test_the_last_letter_too_is_sought_before_a_further_response():
    assert answers.last_letter("A, so (C)\n### Response:\n(D)") == "C"


def test_a_response_to_a_question_of_ones_own_is_read_whole():
    assert answers.is_right(tasks.task("mine.json"), "Write\n### Response:\nyes", "yes")


@real
@pytest.mark.parametrize("name", ["gsm8k", "mawps", "boolq", "arc-e", "obqa", "math-mix"])
def test_the_output_to_learn_counts_as_right(name):     # not so AQuA's: the official rule takes the first letter
    rows = readers.load(tasks.task(name), "train", REAL)
    assert all(answers.is_right(tasks.task(name), row.output, row.answer) for row in rows)
