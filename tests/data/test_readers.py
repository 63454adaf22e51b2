"""data.py: what is read, what is made, what the model sees, what counts as right.

Small files are made here; the checks on the published files run where ../shared/data is there.
"""
import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sibo_lab.data import batch, readers, tasks, word_problems
from sibo_lab.evaluation import answers

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")


# ------------------------------------------------------------------------------------------------------- toy tokenizers
class Letters:
    """One id a character after BOS (0): every prefix of a text has a prefix of its ids."""
    eos_id = 1

    def encode(self, text, pair=None):
        return [0] + [2 + ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i - 2) for i in ids if i > 1)


class Merging(Letters):
    """As Letters without BOS, but runs of white space are one token, as in byte-level BPE: prefixes are not kept."""
    def encode(self, text, pair=None):
        return [2 + ord(run[0]) + (len(run) - 1) * 2_000_000 for run in re.findall(r"\n+|[^\n]", text)]

    def decode(self, ids):
        return "".join(chr((i - 2) % 2_000_000) * ((i - 2) // 2_000_000 + 1) for i in ids if i > 1)


class Words:
    """BERT-like: [CLS] 101, a word is its length, [SEP] 102."""
    def encode(self, text, pair=None):
        ids = [101] + [len(word) for word in text.split()] + [102]
        return ids if pair is None else ids + [len(word) for word in pair.split()] + [102]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)


# ---------------------------------------------------------------------------------------------------------------- tasks
def test_an_unknown_task_is_met_with_the_near_matches():
    with pytest.raises(ValueError, match="unknown task 'gsm9k': did you mean gsm8k"):
        tasks.task("gsm9k")
    with pytest.raises(ValueError, match="known are word-problems, .*path of a .json or .jsonl"):
        tasks.task("zzzzz")


def test_every_task_goes_by_its_own_name():
    assert all(tasks.task(name).name == name for name in tasks.TASKS)
    assert [tasks.task(name).num_labels for name in ("cola", "stsb", "gsm8k")] == [2, 1, 0]


def test_the_data_directory_is_the_given_one_then_the_environments_then_the_caches(monkeypatch):
    monkeypatch.setenv("SIBO_CACHE", "/cache")
    monkeypatch.setenv("SIBO_DATA", "/env")
    assert tasks.data_dir("/given") == Path("/given")
    assert tasks.data_dir(None) == Path("/env")
    monkeypatch.delenv("SIBO_DATA")
    assert tasks.data_dir(None) == Path("/cache/data")


# -------------------------------------------------------------------------------------------------------- word problems
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


def test_every_template_is_filled_completely_and_stands_on_both_sides(many):
    assert len(word_problems.TRAINED) >= 24 and len(word_problems.NEVER_TRAINED) >= 6
    assert all("{" not in p.instruction + p.output and "[" not in p.instruction + p.output for p in many)

    def templates(problems, candidates):
        patterns = [re.sub(r"\\\{\w+\\\}", r"[\\w]+", re.escape(question)) for question, *_ in candidates]
        found = [[i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, p.instruction)] for p in problems]
        assert all(len(places) == 1 for places in found)
        return {places[0] for places in found}

    everything = word_problems.TRAINED + word_problems.NEVER_TRAINED
    trained = set(range(len(word_problems.TRAINED)))
    assert templates(many[:4000], everything) == trained
    assert templates([p for p in many[4000:] if not p.part], everything) == trained
    assert templates([p for p in many[4000:] if p.part], everything) == set(range(len(everything))) - trained


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_no_question_stands_in_training_and_test_whatever_the_seeds_and_lengths(seed, other, n, m):
    train, test = problems("train", n, seed), problems("test", m, other)
    assert len({p.instruction for p in train}) == n and len({p.instruction for p in test}) == m
    assert not {p.instruction for p in train} & {p.instruction for p in test}


def test_no_test_question_is_a_training_question_about_other_people_or_things(many):
    words = "|".join((*word_problems.NAMES, *word_problems.THINGS, *(word for pair in word_problems.BOXES for word in pair)))

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
    code = "import data; print(data.load(data.task('word-problems'), 'test', None, n=9)[8].instruction)"
    runs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, text=True, check=True,
                           capture_output=True).stdout.strip() for seed in ("1", "2")}
    assert runs == {problems("test", 9)[8].instruction}


def test_the_problems_of_a_seed_are_the_same_to_the_byte_in_every_version_and_on_every_machine():
    text = "\n".join("\t".join((p.instruction, p.output, p.answer, p.part))
                     for split, n in (("train", 4000), ("test", 2000)) for p in problems(split, n, seed=3))
    assert hashlib.sha256(text.encode()).hexdigest()[:32] == "5859e6ec0ba5d72661326ee873e223e3"


# ------------------------------------------------------------------------------------------------------------ user data
def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())
    return path


def test_tasks_are_joined_by_a_plus_and_an_own_file_stands_beside_them(tmp_path):
    mine = str(tmp_path / "a+b.json")
    assert [t.name for t in tasks.parse("mawps+svamp", mine)] == ["mawps", "svamp", mine]


def own(path, split="train", **options):
    return readers.load(tasks.task(str(path)), split, Path("/nowhere"), **options)


ROWS = [{"instruction": f"Question {i}?", "output": f"So {i}.", "answer": str(i)} for i in range(30)]


def test_json_and_json_lines_hold_the_same_examples(tmp_path):
    lines = "".join(json.dumps(row) + "\r\n" for row in ROWS)
    a, b = write(tmp_path / "a.json", ROWS), write(tmp_path / "b.jsonl", lines)
    assert own(a) == own(b) and own(a, "test") == own(b, "test")
    assert tasks.Example("Question 7?", "So 7.", "7") in own(a) + own(a, "test")


def test_a_file_of_ones_own_is_scored_whole_where_nothing_is_trained_on_it(tmp_path):
    mine = tasks.task(str(write(tmp_path / "a.json", ROWS)))
    (whole,) = tasks.scored_whole([mine], tasks.parse("mawps"))
    assert len(readers.load(whole, "test", tmp_path)) == 30
    assert tasks.scored_whole([mine], [mine]) == [mine] and len(readers.load(mine, "test", tmp_path)) == 3


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    assert own(write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode())) == own(
        write(tmp_path / "b.json", ROWS))


def test_without_an_answer_the_output_is_the_answer_and_an_input_joins_the_instruction(tmp_path):
    row = {"instruction": "Translate.", "input": "chat", "output": "cat"}
    assert own(write(tmp_path / "a.json", [row]), "test") == [tasks.Example("Translate.\n\nchat", "cat", "cat")]


@given(st.lists(st.integers(0, 60), min_size=2, max_size=300).filter(lambda values: len(set(values)) > 1))
@settings(max_examples=40, deadline=None)
def test_a_tenth_of_the_questions_is_held_out_and_none_stands_in_both(tmp_path_factory, numbers):
    rows = [{"instruction": f"Question {n}?", "output": f"Way {i}."} for i, n in enumerate(numbers)]
    path = write(tmp_path_factory.getbasetemp() / "held_out.json", rows)
    train, test = own(path), own(path, "test")
    assert sorted(e.output for e in train + test) == sorted(row["output"] for row in rows)
    held = {e.instruction for e in test}
    assert not held & {e.instruction for e in train}
    assert len(held) == max(1, len(set(numbers)) // 10)


def test_at_most_200_questions_of_ones_own_are_held_out_and_120_of_a_published_set(tmp_path):
    rows = [{"instruction": f"Question {i}?", "output": "Yes.", "answer": "yes"} for i in range(3000)]
    assert len(own(write(tmp_path / "a.json", rows), "test")) == 200
    write(tmp_path / "llm_adapters/ft-training_set/math_10k.json", rows)
    math10k = tasks.task("math10k")
    assert len(readers.load(math10k, "test", tmp_path)) == 120 and len(readers.load(math10k, "train", tmp_path)) == 2880


def test_n_takes_the_first_examples(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    assert own(path, n=5) == own(path)[:5]
    with pytest.raises(ValueError, match="0 examples"):
        own(path, n=0)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.json", '[\n{"instruction": "q",\n oops}]', r"a.json, line 3: not valid JSON"),
    ("a.json", '{"instruction": "q", "output": "a"}', r"a.json, line 1: found a JSON dict, expected a list"),
    ("a.json", "[1]", r"a.json, entry 1: found int, expected an object"),
    ("a.json", "[]", r"a.json: holds no examples"),
    ("a.json", "", r"a.json, line 1: not valid JSON"),
    ("a.json", "[" * 100_000, r"a.json, line 1: nested too deeply"),
    ("a.json", b'[\n\n{"instruction": "caf\xe9"}]', r"a.json, line 3: not UTF-8 text \(byte 0xe9\)"),
    ("a.json", '[{"output": "a"}]', r"a.json, entry 1: 'instruction' is missing \(found: output\)"),
    ("a.json", '[{"instruction": "q"}]', r"a.json, entry 1: 'output' is missing"),
    ("a.json", '[{"instruction": " ", "output": "a"}]', r"a.json, entry 1: 'instruction' is empty"),
    ("a.json", '[{"instruction": "q", "output": null}]', r"a.json, entry 1: 'output' is NoneType, expected str"),
    ("a.json", '[{"instruction": "q", "output": "a", "answer": 5}]', r"a.json, entry 1: 'answer' is int, expected str"),
    ("a.json", '[{"instruction": "q", "input": 5, "output": "a"}]', r"a.json, entry 1: 'input' is int, expected str"),
    ("a.json", '[{"instruction": "q\\ud800", "output": "a"}]', r"entry 1: 'instruction' holds half a surrogate"),
    ("a.json", '[{"instruction": "q", "output": "a"}]', r"a.json: holds one question only"),
    ("a.jsonl", '{"instruction": "q", "output": "a"}\n\n{"instruction": "q"}', r"a.jsonl, line 3: 'output' is missing"),
    ("a.jsonl", '{"instruction": "q", "output": "a"}\n{"instr', r"a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", "\n", r"a.jsonl: holds no examples"),
])
def test_malformed_data_is_named_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        own(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_missing_file_is_named_with_its_source_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        readers.load(tasks.task("rte"), "train", tmp_path / "none")
    for part in (str(tmp_path / "none/glue/RTE/train.tsv"), "https://dl.fbaipublicfiles.com/glue/data/RTE.zip",
                 f"`python data.py fetch rte --data-dir {tmp_path / 'none'}`", "$SIBO_DATA"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="mine.json is not there: check the path"):
        own(tmp_path / "mine.json")


# ------------------------------------------------------------------------------------------------------ published files
def test_the_model_written_output_of_an_arithmetic_test_file_is_not_kept(tmp_path, capsys):
    write(tmp_path / "llm_adapters/gsm8k/test.json",
          [{"instruction": "q", "input": "", "output": "The answer is 8.", "answer": "9.0"}])
    assert readers.load(tasks.task("gsm8k"), "test", tmp_path) == [tasks.Example("q", "", "9.0")]
    assert capsys.readouterr().err.count("holds 1 examples, published are 1319") == 1


def test_a_gold_answer_that_is_none_of_the_tasks_is_an_error(tmp_path):
    write(tmp_path / "llm_adapters/boolq/test.json",
          [{"instruction": "q", "input": "", "output": "the correct answer is maybe", "answer": "maybe"}])
    with pytest.raises(ValueError, match=r"test.json, entry 1: answer 'maybe' is none of boolq's"):
        readers.load(tasks.task("boolq"), "test", tmp_path)


@pytest.mark.parametrize("name", ["svamp", "addsub", "multiarith", "singleeq"])
def test_a_task_without_training_file_says_what_to_train_on(name):
    with pytest.raises(ValueError, match=f"{name} has no training file: train on math10k"):
        readers.load(tasks.task(name), "train", Path("/nowhere"))


def test_gsm8k_mawps_and_aqua_become_worked_answers_that_close_with_the_answer(tmp_path, capsys):
    write(tmp_path / tasks.GSM8K, json.dumps(
        {"question": "q", "answer": "She has 48/2 = $<<48/2=24>>24.\n48*50=<<48*50=2400>>2400\n#### 2,400"}))
    assert readers.load(tasks.task("gsm8k"), "train", tmp_path) == [
        tasks.Example("q", "She has 48/2 = $24.\n48*50=2400\nThe answer is 2400.", "2400")]
    write(tmp_path / tasks.MAWPS, [{"original_text": "q", "equation": "X=((22.0-14.0)/4.05)", "ans": 2.0}])
    assert readers.load(tasks.task("mawps"), "train", tmp_path) == [
        tasks.Example("q", "x = ((22 - 14) / 4.05)\nThe answer is 2.", "2")]
    write(tmp_path / tasks.AQUA, "What?\\nOptions:\\n(A) 1\\n(B) 2\t(B)\tOne.\\nTwo.\n")
    assert readers.load(tasks.task("aqua"), "train", tmp_path) == [
        tasks.Example("What? Answer Choices: (A) 1 (B) 2", "One.\nTwo.\nThe answer is (B).", "B")]
    mix = readers.load(tasks.task("math-mix"), "train", tmp_path) + readers.load(tasks.task("math-mix"), "test", tmp_path)
    assert sorted(example.answer for example in mix) == ["2", "2400", "B"]


@pytest.mark.parametrize(("file", "task", "content", "message"), [
    (tasks.GSM8K, "gsm8k", '{"question": "q", "answer": "no mark"}', "line 1: 'answer' has no last line '#### number'"),
    (tasks.MAWPS, "mawps", '[{"original_text": "q", "equation": "x=1"}]', "entry 1: 'ans' is missing"),
    (tasks.AQUA, "aqua", "q\t(B)\tr\nq\t(F)\tr\n", r"line 2: expected question, \(letter\) and rationale"),
    ("glue/CoLA/train.tsv", "cola", "a\t1\t\tx\nb\t1\tx\n", "line 2: 3 columns, expected 4"),
    ("glue/CoLA/train.tsv", "cola", "a\tyes\t\tx\n", "line 1: label 'yes', expected 0 or 1"),
    ("glue/CoLA/train.tsv", "cola", "", "train.tsv: holds no examples"),
    ("glue/RTE/train.tsv", "rte", "index\tsentence1\tlabel\n", "line 1: the header has no column 'sentence2'"),
    ("glue/RTE/train.tsv", "rte", "index\tsentence1\tsentence2\tlabel\n", "train.tsv: holds no examples"),
    ("glue/STS-B/train.tsv", "stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "line 2: score '5.1', expected"),
    ("glue/STS-B/train.tsv", "stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: score 'nan', expected"),
])
def test_malformed_published_files_are_named_with_file_and_line(tmp_path, file, task, content, message):
    path = write(tmp_path / file, content)
    with pytest.raises(ValueError, match=re.escape(str(path.parent)) + ".*" + message):
        readers.load(tasks.task(task), "train", tmp_path)


def test_in_glue_quotes_are_data_and_only_tab_and_line_feed_separate(tmp_path, capsys):
    write(tmp_path / "glue/MRPC/train.tsv",
          "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\t\" Yes\u2028, he said .\tNo \"\r\n")
    assert readers.load(tasks.task("mrpc"), "train", tmp_path) == [tasks.Sentence('" Yes\u2028, he said .', 'No "', 1)]
    write(tmp_path / "glue/CoLA/dev.tsv", "gj04\t0\t*\tThe the.")
    assert readers.load(tasks.task("cola"), "test", tmp_path) == [tasks.Sentence("The the.", None, 0)]
    write(tmp_path / "glue/RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n")
    assert readers.load(tasks.task("rte"), "test", tmp_path) == [tasks.Sentence("a", "b", 1)]
    write(tmp_path / "glue/STS-B/dev.tsv", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.400\n")
    assert readers.load(tasks.task("stsb"), "test", tmp_path) == [tasks.Sentence("a", "b", 2.4)]
    assert capsys.readouterr().err.count("warning:") == 4


HEADERS = {"sst2": "sentence\tlabel", "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
           "qnli": "index\tquestion\tsentence\tlabel",
           "mnli": "index\tpairID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label"}


@pytest.mark.parametrize(("name", "line", "sentence"), [
    ("sst2", "dull \t0", tasks.Sentence("dull ", None, 0)), ("sst2", "it 's fun\t1", tasks.Sentence("it 's fun", None, 1)),
    ("qqp", "7\t1\t2\tWho?\t\"Why?\t1", tasks.Sentence("Who?", '"Why?', 1)),
    ("qnli", "0\tWho?\tHe.\tentailment", tasks.Sentence("Who?", "He.", 0)),
    ("qnli", "0\tWho?\tHe.\tnot_entailment", tasks.Sentence("Who?", "He.", 1)),
    ("mnli", "0\t1n\t(A)\tA\tB\tneutral\tentailment\tentailment", tasks.Sentence("A", "B", 0)),
    ("mnli", "0\t1n\t(A)\tA\tB\tneutral\tentailment\tneutral", tasks.Sentence("A", "B", 1)),
    ("mnli", "0\t1n\t(A)\tA\tB\tneutral\tentailment\tcontradiction", tasks.Sentence("A", "B", 2)),
])
def test_the_large_glue_sets_are_read_by_the_names_in_their_headers(tmp_path, capsys, name, line, sentence):
    task = tasks.task(name)
    write(tmp_path / task.train[0], f"{HEADERS[name]}\n{line}\n")
    assert readers.load(task, "train", tmp_path) == [sentence]
    assert f"holds 1 examples, published are {task.counts[0]}" in capsys.readouterr().err
    swapped = [", ".join(text.split("\t")[::-1]).replace(", ", "\t") for text in (HEADERS[name], line)]
    write(tmp_path / task.train[0], "\n".join(swapped))
    assert readers.load(task, "train", tmp_path) == [sentence]  # whatever the columns' order


@pytest.mark.parametrize("name", HEADERS)
def test_a_row_with_a_column_too_many_or_too_few_is_an_error_and_not_left_out(tmp_path, name):
    task, width = tasks.task(name), HEADERS[name].count("\t") + 1
    for columns in (width - 1, width + 1):
        path = write(tmp_path / task.train[0], HEADERS[name] + "\n" + "\t".join("x" * columns) + "\n")
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 2: {columns} columns, expected {width}"):
            readers.load(task, "train", tmp_path)


def test_mnlis_test_rows_are_of_two_parts(tmp_path, capsys):
    for part in ("mismatched", "matched"):
        write(tmp_path / f"glue/MNLI/dev_{part}.tsv", f"{HEADERS['mnli']}\n0\t1\t(A)\t{part}\tB\t\t\tneutral\n")
    assert readers.load(tasks.task("mnli"), "test", tmp_path) == [
        tasks.Sentence("matched", "B", 1, "matched"), tasks.Sentence("mismatched", "B", 1, "mismatched")]
    err = capsys.readouterr().err
    assert "dev_matched.tsv + " in err and "holds 2 examples, published are 19647" in err


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r"), max_size=12)


@given(st.lists(st.tuples(CELL, CELL, st.sampled_from(["0", "1"])), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_every_row_of_a_glue_file_comes_back_as_it_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "qqp"
    lines = [HEADERS["qqp"], *(f"{i}\t\t\t{a}\t{b}\t{label}" for i, (a, b, label) in enumerate(rows))]
    write(folder / "glue/QQP/train.tsv", "\n".join(lines) + "\n")
    assert readers.load(tasks.task("qqp"), "train", folder) == [tasks.Sentence(a, b, int(label)) for a, b, label in rows]


@real
@pytest.mark.parametrize(("name", "count"), [("mnli", 480), ("qqp", 320), ("qnli", 320)])
def test_published_pieces_of_the_large_glue_sets_are_read_whole(tmp_path, name, count):
    task, folder = tasks.task(name), name.upper()
    write(tmp_path / task.train[0], (REAL / f"glue/{folder}/train_kshot.tsv").read_bytes())
    write(tmp_path / task.test[0], (REAL / f"glue/{folder}/heldout_subset.tsv").read_bytes())
    write(tmp_path / task.test[-1], (REAL / f"glue/{folder}/heldout_subset.tsv").read_bytes())
    train, test = readers.load(task, "train", tmp_path), readers.load(task, "test", tmp_path)
    assert len(train) == count and len(test) == 1000 * len(task.test)
    assert all(row.text and row.pair for row in train + test)
    assert {row.label for row in train} == {row.label for row in test} == set(range(task.num_labels))


@pytest.mark.parametrize(("name", "ending", "choices"), [
    ("boolq", "\n\nAnswer format: true/false", ("true", "false")),
    ("winogrande", "Option2: b Answer format: option1/option2", ("option1", "option2")),
    ("arc-c", "\n\nAnswer format: answer1/answer2/answer3/answer4/answer5", tuple(f"answer{i}" for i in range(1, 6))),
])
def test_the_choices_of_a_commonsense_question_are_those_of_its_last_line(tmp_path, name, ending, choices):
    for answer in choices:
        row = {"instruction": "Answer format: none? " + ending, "input": "", "output": "o", "answer": answer}
        write(tmp_path / tasks.task(name).train[0], [row])
        assert [e.choices for e in readers.load(tasks.task(name), "train", tmp_path)] == [choices]


@pytest.mark.parametrize("ending", ["", "Answer format: ", "Answer format: solution2/yes", "Answer format: solution1",
                                    "Answer format: solution1/solution2 or so"])
def test_a_commonsense_question_without_its_choices_is_an_error(tmp_path, ending):
    row = {"instruction": "q " + ending, "input": "", "output": "o", "answer": "solution2"}
    write(tmp_path / "llm_adapters/piqa/test.json", [row])
    with pytest.raises(ValueError, match="test.json, entry 1: 'instruction' ends in .*expected 'Answer format: '"):
        readers.load(tasks.task("piqa"), "test", tmp_path)


def test_in_the_mixed_commonsense_set_choices_are_kept_where_they_stand(tmp_path):
    rows = [{"instruction": f"{i} " + ending, "output": "o", "answer": "true"} for i, ending in
            enumerate(["Answer format: true/false", "no format"])]
    write(tmp_path / "llm_adapters/ft-training_set/commonsense_170k.json", rows)
    task = tasks.task("commonsense170k")
    read = readers.load(task, "train", tmp_path) + readers.load(task, "test", tmp_path)
    assert {e.instruction[0]: e.choices for e in read} == {"0": ("true", "false"), "1": ()}


# -------------------------------------------------------------------------------------------------------------- overlap
def test_a_question_stands_in_a_training_set_whatever_its_case_spaces_and_punctuation():
    train = [tasks.Example("Tom has 3 apples."), tasks.Example("tom has 3 pears")]
    test = ["TOM has 3  apples?", "Tom has 3 apples", "Tom has 33 apples", "Tom has 3"]
    assert [readers.overlap(train, [tasks.Example(question)]) for question in test] == [1, 1, 0, 0]
    pairs, tests = [tasks.Sentence("A b.", "C", 0)], [("a B", "c!"), ("a b", "d"), ("a b", None)]
    assert [readers.overlap(pairs, [tasks.Sentence(*pair, 1)]) for pair in tests] == [1, 0, 0]


@given(st.lists(TEXT, max_size=9), st.lists(TEXT, max_size=9))
@settings(max_examples=60, deadline=None)
def test_every_test_question_is_counted_and_only_once(train, test):
    train, test = [tasks.Example(f"a{text}") for text in train], [tasks.Example(f"b{text}") for text in test]
    assert readers.overlap(train, test) == 0
    assert readers.overlap(train + train + test, test) == len(test)


@real
@pytest.mark.parametrize(("name", "split", "count"), [
    ("gsm8k", "test", 1319), ("svamp", "test", 1000), ("aqua", "test", 254), ("mawps", "test", 238),
    ("addsub", "test", 395), ("multiarith", "test", 600), ("singleeq", "test", 508), ("boolq", "test", 3270),
    ("piqa", "test", 1838), ("siqa", "test", 1954), ("winogrande", "test", 1267), ("arc-e", "test", 2376),
    ("obqa", "test", 500), ("cola", "train", 8551), ("cola", "test", 1043), ("mrpc", "train", 3668),
    ("mrpc", "test", 408), ("stsb", "train", 5749), ("stsb", "test", 1500), ("rte", "train", 2490),
    ("rte", "test", 277), ("gsm8k", "train", 7473), ("mawps", "train", 1898), ("aqua", "train", 2728),
    ("boolq", "train", 9427), ("arc-e", "train", 2251), ("obqa", "train", 4957), ("math-mix", "test", 120),
])
def test_published_files_are_read_whole(name, split, count, capsys):
    rows = readers.load(tasks.task(name), split, REAL)
    assert len(rows) == count and capsys.readouterr().err == ""


@real
@pytest.mark.parametrize("name", ["gsm8k", "mawps", "boolq", "arc-e", "obqa", "math-mix"])
def test_the_output_to_learn_counts_as_right(name):     # not so AQuA's: the official rule takes the first letter
    rows = readers.load(tasks.task(name), "train", REAL)
    assert all(answers.is_right(tasks.task(name), row.output, row.answer) for row in rows)


@real
def test_training_questions_of_the_mix_are_not_in_its_held_out_part():
    mix = tasks.task("math-mix")
    train, test = readers.load(mix, "train", REAL), readers.load(mix, "test", REAL)
    assert not {e.instruction for e in train} & {e.instruction for e in test}
    assert len(train) + len(test) == 7473 + 1898 + 2728
    assert all(answers.is_right(mix, e.output, e.answer) for e in test)


@real
@pytest.mark.parametrize(("name", "counts"), [("boolq", {2}), ("piqa", {2}), ("siqa", {3}), ("winogrande", {2}),
                                              ("arc-e", {3, 4, 5}), ("obqa", {4})])
def test_every_published_commonsense_question_offers_its_choices(name, counts):
    assert {len(set(e.choices)) for e in readers.load(tasks.task(name), "test", REAL)} == counts


@real
def test_classes_are_as_balanced_as_published():
    assert sum(row.label == 0 for row in readers.load(tasks.task("rte"), "test", REAL)) == 146      # entailment
    assert sum(row.label for row in readers.load(tasks.task("cola"), "test", REAL)) == 721          # acceptable
    assert sum(row.label for row in readers.load(tasks.task("mrpc"), "test", REAL)) == 279          # paraphrases


# ----------------------------------------------------------------------------------------------- prompt and label mask
def test_the_prompt_is_the_plain_alpaca_form():
    assert batch.prompt("Add 2 and 3.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 2 and 3.\n\n### Response:\n")


def test_the_papers_prompt_is_the_official_codes_string_with_its_indentation_and_its_linters_comment():
    instruction = "Add {2} and 3."
    official = f"""Below is an instruction that describes a task. Write a response that appropriately completes the \
request.  # noqa: E501

                ### Instruction:
                {instruction}
                {""}
                ### Response:
                """
    assert batch.prompt(instruction, "paper") == official


def check_encoding(tokenizer, example, cutoff=10_000, protocol="clean"):
    row = batch.encode(example, tokenizer, cutoff, protocol=protocol)
    given = tokenizer.encode(batch.prompt(example.instruction, protocol))
    assert row.ids[:len(given)] == given and row.labels[:len(given)] == [-100] * len(given)
    assert row.labels[len(given):] == row.ids[len(given):]
    assert row.ids[-1] == tokenizer.eos_id and not row.cut
    assert tokenizer.decode(row.ids[:-1]) == tokenizer.decode(tokenizer.encode(
        batch.prompt(example.instruction, protocol) + example.output))


@given(TEXT, TEXT)
@settings(max_examples=100, deadline=None)
def test_the_loss_is_on_the_output_and_its_eos_and_the_prompt_is_what_generation_sees(instruction, output):
    for tokenizer in (Letters(), Merging()):
        check_encoding(tokenizer, tasks.Example(instruction, output))


def test_an_output_that_begins_with_a_line_feed_leaves_the_prompts_tokens_alone():
    tokenizer = Merging()       # it merges the prompt's last line feed with the output's
    given = tokenizer.encode(batch.prompt("q"))
    assert tokenizer.encode(batch.prompt("q") + "\nA")[:len(given)] != given
    check_encoding(tokenizer, tasks.Example("q", "\nA"))


def test_an_output_that_cannot_be_spelled_after_the_prompt_is_an_error():
    class Spaced(Merging):      # SentencePiece's space before every text, together with a merge across the border
        def encode(self, text, pair=None):
            return super().encode(" " + text if text else "")
    with pytest.raises(ValueError, match="cannot continue the prompt with the output"):
        batch.encode(tasks.Example("q", "\nA"), Spaced(), 1000)


@given(TEXT, TEXT, st.integers(-2, 3) | st.integers(0, 150), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_cutoff_cuts_from_the_right_says_so_and_leaves_no_eos(instruction, output, missing, train_on_inputs):
    tokenizer, example = Letters(), tasks.Example(instruction, output)
    whole = batch.encode(example, tokenizer, 10_000, train_on_inputs)
    cutoff = len(whole.ids) - missing
    row = batch.encode(example, tokenizer, cutoff, train_on_inputs)
    assert row.ids == whole.ids[:cutoff] and row.labels == whole.labels[:cutoff]
    assert row.cut == (len(whole.ids) > cutoff) == (tokenizer.eos_id not in row.ids)


def test_trained_on_inputs_the_labels_are_the_ids():
    row = batch.encode(tasks.Example("q", "a"), Letters(), 1000, train_on_inputs=True)
    assert row.labels == row.ids


# ------------------------------------------------------------------------------------------------------- GLUE encoding
WORDS = st.lists(st.text("abc", min_size=1, max_size=9), max_size=20).map(" ".join)


@given(WORDS, st.none() | WORDS, st.integers(3, 50))
@settings(max_examples=100, deadline=None)
def test_a_pair_fits_the_cutoff_and_the_longer_sentence_gives_way(text, pair, cutoff):
    row = batch.encode_sentence(tasks.Sentence(text, pair, 1), Words(), cutoff)
    whole = Words().encode(text, pair)
    assert row.cut == (len(whole) > cutoff) and len(row.ids) == len(row.types) == min(cutoff, len(whole))
    assert row.cut or row.ids == whole
    if pair is None:
        return
    end = row.ids.index(102)                            # no word is 102 letters long
    assert row.types == [0] * (end + 1) + [1] * (len(row.ids) - end - 1)
    kept = end - 1, len(row.ids) - end - 2
    lost = len(text.split()) - kept[0], len(pair.split()) - kept[1]
    assert row.ids[1:end] == [len(word) for word in text.split()][:kept[0]]
    assert not lost[0] or kept[0] >= kept[1] - 1        # a sentence that lost its end is no shorter than the other
    assert not lost[1] or kept[1] >= kept[0] - 1


def test_glue_asks_for_a_bert_tokenizer():
    with pytest.raises(ValueError, match="expected BERT's two"):
        batch.encode_sentence(tasks.Sentence("a", None, 1), Letters(), 10)


# -------------------------------------------------------------------------------------------------------------- batches
IDS = st.lists(st.integers(0, 99), min_size=1, max_size=12)


@given(st.lists(IDS, min_size=1, max_size=6), st.sampled_from(["left", "right"]))
@settings(max_examples=50, deadline=None)
def test_a_batch_gives_every_row_back_where_the_mask_is_one(lists, side):
    tensors = batch.collate([batch.Row(ids, ids) for ids in lists], pad_id=7, side=side)
    for ids, row, mask, labels in zip(lists, tensors["input_ids"], tensors["attention_mask"], tensors["labels"],
                                      strict=True):
        assert row[mask == 1].tolist() == labels[mask == 1].tolist() == ids
        assert (row[mask == 0] == 7).all() and (labels[mask == 0] == -100).all()
        assert mask[0 if side == "right" else -1] == 1 and mask.sum() == len(ids)
        assert (mask.diff() <= 0).all() if side == "right" else (mask.diff() >= 0).all()


def test_labels_of_glue_are_one_a_row_and_prompts_have_none():
    rows = [batch.Row([1, 2], 1, types=[0, 1]), batch.Row([1], 0, types=[0])]
    tensors = batch.collate(rows, 0)
    assert tensors["labels"].tolist() == [1, 0] and tensors["labels"].dtype == torch.int64
    assert tensors["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    scores = batch.collate([dataclasses.replace(row, labels=2.5) for row in rows], 0)["labels"]
    assert scores.dtype == torch.float32 and scores.shape == (2,)
    assert set(batch.collate([batch.Row([1, 2])], 0, side="left")) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="padding side is 'middle'"):
        batch.collate(rows, 0, side="middle")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=50), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_epoch_visits_every_index_once_and_the_seed_decides_the_order(lengths, batch_size, seed):
    count = len(lengths)
    steps = -(-count // batch_size)
    first = list(itertools.islice(batch.batches(lengths, batch_size, seed), 2 * steps))
    for epoch in (first[:steps], first[steps:]):
        assert sorted(itertools.chain(*epoch)) == list(range(count))
        assert sorted(map(len, epoch))[1:] == [batch_size] * (steps - 1)
    assert first == list(itertools.islice(batch.batches(lengths, batch_size, seed), 2 * steps))


def test_epochs_and_seeds_differ_in_order():
    same = [1] * 100
    order = list(itertools.islice(batch.batches(same, 100, 0), 2))
    assert order[0] != order[1] and order[0] != next(batch.batches(same, 100, 1)) and order[0] != list(range(100))


def test_batches_hold_rows_of_like_length():
    lengths = [i * 37 % 101 for i in range(160)]
    padding = [sum(max(lengths[i] for i in some) - lengths[j] for j in some)
               for some in itertools.islice(batch.batches(lengths, 10, 0), 16)]
    assert sum(padding) < 16 * 10 * 6  # shuffled alone it is 45 a row


# -------------------------------------------------------------------------------------------------------------- scoring
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
    ("math10k", "so 3 + 4 = 7\nThe answer is 7.", "7.0", True),
    ("math10k", "All right.\nThe answer is (C).", "C", True),
    ("math10k", "All right.\nThe answer is (C).", "B", False),
    ("commonsense170k", "the correct answer is true", "true", True),
    ("mine.json", "Paris.", "paris", True),
    ("mine.json", "The capital is Paris", "Paris", True),
    ("mine.json", "It is untrue", "true", False),
    ("mine.json", "1,234", "1234", True),
])
def test_right_is_a_number_within_a_thousandth_or_the_very_word(name, response, gold, right):
    assert answers.is_right(tasks.task(name), response, gold) is right


# ------------------------------------------------------------------------------------------------- the real tokenizers
class SentencePiece:
    def __init__(self, path):
        import sentencepiece
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.eos_id = self.model.eos_id()

    def encode(self, text, pair=None):
        return [self.model.bos_id()] + self.model.encode(text)

    def decode(self, ids):
        return self.model.decode(ids)


class ByteLevel:
    eos_id = 50256

    def __init__(self, folder):
        import tokenizers
        self.model = tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))

    def encode(self, text, pair=None):
        return self.model.encode(text).ids

    def decode(self, ids):
        return self.model.decode(ids)


@pytest.fixture(scope="module")
def libraries():
    return SentencePiece(REAL / "tokenizers/llama/tokenizer.model"), ByteLevel(REAL / "tokenizers/gpt2")


@real
@given(TEXT, TEXT | st.sampled_from(["\nA: 7", " 7", "\n\n", "  7", "7 \n"]))
@settings(max_examples=150, deadline=None)
def test_prompt_tokens_begin_the_training_tokens_for_llamas_and_gpt2s_tokenizer(libraries, instruction, output):
    for tokenizer in libraries:
        check_encoding(tokenizer, tasks.Example(instruction, output))
        check_encoding(tokenizer, tasks.Example(instruction, output), protocol="paper")


@real
@pytest.mark.parametrize("protocol", ["clean", "paper"])  # the paper's ends in 16 spaces, one of which would merge
def test_sentencepiece_puts_no_space_between_prompt_and_output(libraries, protocol):
    llama = libraries[0]
    row = batch.encode(tasks.Example("q", "Tom has 7."), llama, 1000, protocol=protocol)
    assert llama.decode(row.ids[:-1]) == batch.prompt("q", protocol) + "Tom has 7."


@real
def test_the_projects_own_llama_tokenizer_keeps_the_prompts_tokens_too(tmp_path):
    from sibo_lab.backbone.tokenizer import from_pretrained

    write(tmp_path / "config.json", {"model_type": "llama"})
    write(tmp_path / "tokenizer.model", (REAL / "tokenizers/llama/tokenizer.model").read_bytes())
    tokenizer = from_pretrained(tmp_path)
    for example in problems("train", 20) + [tasks.Example("q", "\nA: 7"), tasks.Example(" q ", " 7")]:
        check_encoding(tokenizer, example)


def test_the_built_in_problems_fit_the_default_backbones_cutoff_and_new_tokens():
    from sibo_lab.backbone.tokenizer import from_pretrained

    tokenizer = from_pretrained("smollm2-135m")
    for problem in problems("train", 500) + problems("test", 500):
        check_encoding(tokenizer, problem, cutoff=256)
        check_encoding(tokenizer, problem, cutoff=256, protocol="paper")
        assert len(tokenizer.encode(problem.output)) < WORD_PROBLEMS.max_new_tokens


def test_a_sentence_pair_is_encoded_as_the_bert_tokenizer_does():
    from sibo_lab.backbone.tokenizer import from_pretrained

    tokenizer = from_pretrained("minilm")
    for text, pair in [("Tom has 7.", None), ("Tom has 7.", "He doesn't!"), ("", "x"), ("naïve 学", "")]:
        assert batch.encode_sentence(tasks.Sentence(text, pair, 0), tokenizer, 64).ids == tokenizer.encode(text, pair)
