"""sibo_lab/data/readers.py: what is read from a user's own files and from the published ones.

Small files are made here; the checks on the published files run where ../shared/data is there."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sibo_lab.data import own as own_rows
from sibo_lab.data import readers, tasks
from sibo_lab.evaluation import answers

REAL = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30)


# ---------------------------------------------------------------------------------------------------------- user data
def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())
    return path


def load(name, split, folder):
    return readers.load(tasks.task(name), split, folder)


def own(path, split="train", **options):
    return readers.load(tasks.task(str(path)), split, Path("/nowhere"), **options)


ROWS = [{"instruction": f"Question {i}?", "output": f"So {i}.", "answer": str(i)} for i in range(30)]


def test_json_and_json_lines_hold_the_same_examples(tmp_path):
    lines = "".join(json.dumps(row) + "\r\n" for row in ROWS)
    a, b = write(tmp_path / "a.json", ROWS), write(tmp_path / "b.jsonl", lines)
    assert own(a) == own(b) and own(a, "test") == own(b, "test")
    assert tasks.Example("Question 7?", "So 7.", "7") in own(a) + own(a, "test")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    assert own(write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode())) == own(
        write(tmp_path / "b.json", ROWS))


def test_without_an_answer_the_output_is_the_answer_and_an_input_joins_the_instruction(tmp_path):
    row = {"instruction": "Translate.", "input": "chat", "output": "cat"}
    assert own(write(tmp_path / "a.json", [row]), "test") == [tasks.Example("Translate.\n\nchat", "cat", "cat")]


@given(st.lists(st.integers(0, 60), min_size=2, max_size=300).filter(lambda values: len(set(values)) > 1))
@settings(max_examples=40, deadline=None)
def test_a_tenth_of_the_questions_is_held_out_and_none_is_in_both(tmp_path_factory, numbers):
    rows = [{"instruction": f"Question {n}?", "output": f"Way {i}."} for i, n in enumerate(numbers)]
    path = write(tmp_path_factory.getbasetemp() / "held_out.json", rows)
    train, test = own(path), own(path, "test")
    assert sorted(e.output for e in train + test) == sorted(row["output"] for row in rows)
    held = {e.instruction for e in test}
    assert not held & {e.instruction for e in train}
    assert len(held) == max(1, len(set(numbers)) // 10)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=80).filter(lambda values: len(set(values)) > 1), st.data())
@settings(max_examples=40, deadline=None)
def test_as_many_questions_are_held_out_as_asked_for(numbers, data):
    rows = [tasks.Example(f"Question {n}?", str(i)) for i, n in enumerate(numbers)]
    n = data.draw(st.integers(1, len(set(numbers))))
    if n == len(set(numbers)):
        with pytest.raises(ValueError, match=f"expected more different questions than the {n} to hold out, got {n}"):
            readers.hold_out(rows, n)
        return
    rest, held = readers.hold_out(rows, n)
    assert len({e.instruction for e in held}) == n and sorted(e.output for e in rest + held) == sorted(
        e.output for e in rows)
    assert {e.instruction for e in readers.hold_out(rows, 1)[1]} <= {e.instruction for e in held}


def letters(text):
    return "".join(c for c in text.lower() if c.isalnum())


@given(st.lists(st.text("aB .?", min_size=1, max_size=4), min_size=2, max_size=30), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_questions_that_differ_in_spaces_case_or_punctuation_are_held_out_together(texts, n):
    rows = [tasks.Example(f"a{text}", str(i)) for i, text in enumerate(texts)]
    if len({letters(e.instruction) for e in rows}) > n:
        rest, held = readers.hold_out(rows, n)
        assert len({letters(e.instruction) for e in held}) == n and len(rest) + len(held) == len(rows)
        assert not {letters(e.instruction) for e in rest} & {letters(e.instruction) for e in held}


def test_questions_without_a_letter_or_digit_are_different_ones():
    assert len(readers.questions([tasks.Example("+"), tasks.Example("-"), tasks.Example("+")])) == 2


@pytest.mark.parametrize(("one", "other"), [
    ("What is 1.5 + 2?", "What is 15 + 2?"), ("What is .5?", "What is 5?"), ("1,5", "15"), ("At 10:30?", "At 1030?"),
    ("12 - 3", "12 + 3"), ("12 - 3", "12 / 3"), ("12 - 3", "123"), ("x / 3", "x * 3"), ("3 - x", "3 x"), ("1/2", "12"),
    ("Is -5 < 3?", "Is 5 < 3?"), ("5 < 3", "5 > 3"), ("x^2", "x2"), ("a + b", "ab"), ("$5", "£5"), ("10 %", "10"),
    ("2 * (3 + 4)", "2 * 3 + 4"), ("(1 + 2) * 3", "1 + 2 * 3"), ("किताब", "कतब"), ("กิน", "กัน")])
def test_numbers_formulas_and_vowel_signs_tell_questions_apart(one, other):
    assert readers.overlap([tasks.Example(one)], [tasks.Example(other)]) == 0


@pytest.mark.parametrize(("one", "other"), [
    ("What is 2+3?", "what is 2 + 3"), ("12 - 3", "12-3."), ("5 - 3", "5 \u2212 3"), ("He has 3.", "He has 3"),
    ("1,000,000", "1000000"),
    ("In 2020, 3 men (all 40) sang", "In 2020 3 men, all 40, sang"), ("A 3-year-old", "A 3 year old"),
    ("Covid-19", "covid 19"), ("\"Why\", he asks", "``Why'' he asks"), ("and/or", "and or"), ("$ 5", "$5"),
    ("caf\u00e9", "cafe\u0301")])
def test_punctuation_beside_a_number_is_no_other_question(one, other):
    assert readers.overlap([tasks.Example(one)], [tasks.Example(other)]) == 1


def test_questions_are_in_the_order_of_their_sha256():
    rows = [tasks.Example(f"Question {i}?") for i in range(30)]
    expected = sorted(rows, key=lambda e: hashlib.sha256(e.instruction.encode()).digest())
    assert readers.questions(rows) == [[e] for e in expected]


def chat(words):
    """A conversation of one-word turns."""
    said = words.split(" ")
    return tasks.Chat.of([("assistant" if i % 2 else "user", word) for i, word in enumerate(said)])


def test_a_conversation_that_goes_on_is_held_out_with_its_beginning():
    whole, part, start, other = map(chat, ("u1 a1 u2 a2 u3 a3", "u1 a1 U2 a2", "u1 a1", "u3 a3"))
    for rows in ([whole, part, start], [start, whole], [whole, part], [part, start], [part, whole, start]):
        assert [sorted(same, key=repr) for same in readers.questions(rows)] == [sorted(rows, key=repr)]
        assert len(readers.questions([*rows, other])) == 2
    assert len(readers.questions([chat("u1 a1 u2 a2"), chat("u1 b1 u3 a3")])) == 2  # none is the other's beginning


@given(st.lists(st.lists(st.sampled_from(["a", "b", "B", "?"]), min_size=1, max_size=3), min_size=2, max_size=25),
       st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_nothing_held_out_is_a_question_that_is_trained_on(conversations, n):
    rows = [chat(" ".join(f"{word} x" for word in words)) for words in conversations]
    if len(readers.questions(rows)) > n:
        rest, held = readers.hold_out(rows, n)
        trained = {tuple(letters(text) or text for _, text in row.turns[:i])
                   for row in rest for i in range(1, len(row.turns), 2)}
        assert not trained & {tuple(letters(text) or text for _, text in row.turns[:-1]) for row in held}
        assert readers.overlap(rest, held) == 0


def test_at_most_200_questions_of_a_users_own_file_are_held_out_and_120_of_a_published_set(tmp_path):
    rows = [{"instruction": f"Question {i}?", "output": "Yes.", "answer": "yes"} for i in range(3000)]
    assert len(own(write(tmp_path / "a.json", rows), "test")) == 200
    write(tmp_path / "llm_adapters/ft-training_set/math_10k.json", rows)
    math10k = tasks.task("math10k")
    assert len(readers.load(math10k, "test", tmp_path)) == 120 and len(readers.load(math10k, "train", tmp_path)) == 2880


def test_n_takes_the_first_examples(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    assert own(path, n=5) == own(path)[:5]
    with pytest.raises(ValueError, match="expected at least 1 example to load, got 0"):
        own(path, n=0)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.json", '[\n{"instruction": "q",\n oops}]', r"a.json, line 3: not valid JSON"),
    ("a.json", "5", r"a.json, entry 1: expected an object in braces, got int"),
    ("a.json", "[1]", r"a.json, entry 1: expected an object in braces, got int"),
    ("a.json", "[]", r"a.json: expected examples, got none"),
    ("a.json", "", r"a.json: expected examples, got none"),
    ("a.json", "[" * 100_000, r"a.json, line 1: nested too deeply"),
    ("a.json", b'[\n\n{"instruction": "caf\xe9"}]', r"a.json, line 3: expected UTF-8 text, got byte 0xe9"),
    ("a.json", '[{"output": "a"}]', r"a.json, entry 1: expected the key 'instruction', got output$"),
    ("a.json", '[{"instruction": "q"}]', r"a.json, entry 1: expected the key 'output', got instruction"),
    ("a.json", '[{"instruction": " ", "output": "a"}]', r"a.json, entry 1: 'instruction': expected text, got none"),
    ("a.json", '[{"instruction": "q", "output": ["a"]}]', r"a.json, entry 1: 'output': expected str, got list"),
    ("a.json", '[{"instruction": "q", "output": "a", "answer": [5]}]',
     r"a.json, entry 1: 'answer': expected str, got list"),
    ("a.json", '[{"instruction": "q", "input": [5], "output": "a"}]',
     r"a.json, entry 1: 'input': expected str, got list"),
    ("a.json", '[{"instruction": "q\\ud800", "output": "a"}]',
     r"entry 1: 'instruction': expected text, got half a surrogate"),
    ("a.json", '[{"instruction": "q", "output": "a"}]', r"a.json: expected two or more different questions, got one"),
    ("a.jsonl", '{"instruction": "q", "output": "a"}\n\n{"instruction": "q"}',
     r"a.jsonl, line 3: expected the key 'output', got instruction"),
    ("a.jsonl", '{"instruction": "q", "output": "a"}\n{"instr', r"a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", "\n", r"a.jsonl: expected examples, got none"),
])
def test_malformed_data_is_named_with_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        own(write(tmp_path / name, content))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_missing_file_is_named_with_its_source_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("rte", "train", tmp_path / "none")
    for part in (str(tmp_path / "none/glue/RTE/train.tsv"), "https://dl.fbaipublicfiles.com/glue/data/RTE.zip",
                 f"`python -m sibo_lab data fetch rte --data-dir {tmp_path / 'none'}`", "$SIBO_DATA"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="mine.json: no such file; check the path"):
        own(tmp_path / "mine.json")


# ---------------------------------------------------------------------------------------------------- published files
def test_of_several_processes_only_the_first_says_what_it_found(tmp_path, capsys, monkeypatch):
    write(tmp_path / "llm_adapters/gsm8k/test.json", [{"instruction": "q", "output": "", "answer": "9.0"}])
    mine = str(write(tmp_path / "a.json", [{"instruction": f"q{i}", "output": "a" * i} for i in range(4)]))
    for rank, notes in ((0, 5), (1, 0)):
        for module in (readers, own_rows):
            monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        load("gsm8k", "test", tmp_path)
        readers.load_tests(tasks.parse(mine), tmp_path, None)
        readers.load(tasks.task(mine, "id"), "train", tmp_path)
        # another count than published; rows without output, twice; no test file; a column that no row has
        assert capsys.readouterr().err.count("\n") == notes


def test_the_model_written_output_of_an_arithmetic_test_file_is_not_kept(tmp_path, capsys):
    write(tmp_path / "llm_adapters/gsm8k/test.json",
          [{"instruction": "q", "input": "", "output": "The answer is 8.", "answer": "9.0"}])
    assert load("gsm8k", "test", tmp_path) == [tasks.Example("q", "", "9.0")]
    assert capsys.readouterr().err.count("expected the 1319 published examples, got 1;") == 1


@pytest.mark.parametrize("name", ["math10k", "commonsense170k"])
def test_a_training_file_that_is_scored_whole_keeps_its_outputs(tmp_path, name):
    task, = tasks.scored_whole([tasks.task(name)], [])
    write(tmp_path / task.train[0], [{"instruction": "q", "input": "", "output": "So 9.", "answer": "9"}])
    assert readers.load(task, "test", tmp_path) == [tasks.Example("q", "So 9.", "9")]


def test_a_gold_answer_that_is_none_of_the_tasks_is_an_error(tmp_path):
    write(tmp_path / "llm_adapters/boolq/test.json",
          [{"instruction": "q", "input": "", "output": "the correct answer is maybe", "answer": "maybe"}])
    with pytest.raises(ValueError, match=r"test.json, entry 1: 'answer': expected boolq's true\|false, got 'maybe'"):
        load("boolq", "test", tmp_path)


@pytest.mark.parametrize("name", ["svamp", "addsub", "multiarith", "singleeq"])
def test_a_task_without_training_file_says_what_to_train_on(name):
    with pytest.raises(ValueError, match=f"{name} has no training file: train on math10k"):
        load(name, "train", Path("/nowhere"))


def test_gsm8k_mawps_and_aqua_become_worked_answers_that_close_with_the_answer(tmp_path, capsys):
    write(tmp_path / tasks.GSM8K, json.dumps(
        {"question": "q", "answer": "She has 48/2 = $<<48/2=24>>24.\n48*50=<<48*50=2400>>2400\n#### 2,400"}))
    assert load("gsm8k", "train", tmp_path) == [
        tasks.Example("q", "She has 48/2 = $24.\n48*50=2400\nThe answer is 2400.", "2400")]
    write(tmp_path / tasks.MAWPS, [{"original_text": "q", "equation": "X=((22.0-14.0)/4.05)", "ans": 2.0}])
    assert load("mawps", "train", tmp_path) == [
        tasks.Example("q", "x = ((22 - 14) / 4.05)\nThe answer is 2.", "2")]
    write(tmp_path / tasks.AQUA, "What?\\nOptions:\\n(A) 1\\n(B) 2\t(B)\tOne.\\nTwo.\n")
    assert load("aqua", "train", tmp_path) == [
        tasks.Example("What? Answer Choices: (A) 1 (B) 2", "One.\nTwo.\nThe answer is (B).", "B")]
    mix = load("math-mix", "train", tmp_path) + load("math-mix", "test", tmp_path)
    assert sorted(example.answer for example in mix) == ["2", "2400", "B"]


@pytest.mark.parametrize(("file", "task", "content", "message"), [
    (tasks.GSM8K, "gsm8k", '{"question": "q", "answer": "no mark"}',
     "line 1: 'answer': expected a last line '#### number'"),
    (tasks.MAWPS, "mawps", '[{"original_text": "q", "equation": "x=1"}]',
     "entry 1: expected the key 'ans', got original_text, equation"),
    (tasks.AQUA, "aqua", "q\t(B)\tr\nq\t(F)\tr\n", r"line 2: expected question, \(letter\) and rationale by tabs"),
    ("glue/CoLA/train.tsv", "cola", "a\t1\t\tx\nb\t1\tx\n", "line 2: expected 4 columns separated by tabs, got 3"),
    ("glue/CoLA/train.tsv", "cola", "a\tyes\t\tx\n", "line 1: label: expected 0 or 1, got 'yes'"),
    ("glue/CoLA/train.tsv", "cola", "", "train.tsv: expected examples, got none"),
    ("glue/RTE/train.tsv", "rte", "index\tsentence1\tlabel\n", "line 1: expected a column 'sentence2', got index,"),
    ("glue/RTE/train.tsv", "rte", "index\tsentence1\tsentence2\tlabel\n", "train.tsv: expected examples, got none"),
    ("glue/STS-B/train.tsv", "stsb", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "line 2: label: .* 0 to 5, got '5.1'"),
    ("glue/STS-B/train.tsv", "stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: label: .* 0 to 5, got 'nan'"),
])
def test_malformed_published_files_are_named_with_file_and_line(tmp_path, file, task, content, message):
    path = write(tmp_path / file, content)
    with pytest.raises(ValueError, match=re.escape(str(path.parent)) + ".*" + message):
        load(task, "train", tmp_path)


def test_in_glue_quotes_are_data_and_only_tab_and_line_feed_separate(tmp_path, capsys):
    write(tmp_path / "glue/MRPC/train.tsv",
          "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\t\" Yes\u2028, he said .\tNo \"\r\n")
    assert load("mrpc", "train", tmp_path) == [tasks.Sentence('" Yes\u2028, he said .', 'No "', 1)]
    write(tmp_path / "glue/CoLA/dev.tsv", "gj04\t0\t*\tThe the.")
    assert load("cola", "test", tmp_path) == [tasks.Sentence("The the.", None, 0)]
    write(tmp_path / "glue/RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n")
    assert load("rte", "test", tmp_path) == [tasks.Sentence("a", "b", 1)]
    write(tmp_path / "glue/STS-B/dev.tsv", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.400\n")
    assert load("stsb", "test", tmp_path) == [tasks.Sentence("a", "b", 2.4)]
    assert capsys.readouterr().err.count("warning:") == 4


HEADERS = {"sst2": "sentence\tlabel", "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
           "qnli": "index\tquestion\tsentence\tlabel",
           "mnli": "index\tpairID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label"}


@pytest.mark.parametrize(("name", "line", "sentence"), [
    ("sst2", "dull \t0", tasks.Sentence("dull ", None, 0)),
    ("sst2", "it 's fun\t1", tasks.Sentence("it 's fun", None, 1)),
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
    assert f"expected the {task.counts[0]} published examples, got 1;" in capsys.readouterr().err
    swapped = [", ".join(text.split("\t")[::-1]).replace(", ", "\t") for text in (HEADERS[name], line)]
    write(tmp_path / task.train[0], "\n".join(swapped))
    assert readers.load(task, "train", tmp_path) == [sentence]  # whatever the columns' order


@pytest.mark.parametrize("name", HEADERS)
def test_a_row_with_a_column_too_many_or_too_few_is_an_error_and_not_skipped(tmp_path, name):
    task, width = tasks.task(name), HEADERS[name].count("\t") + 1
    for columns in (width - 1, width + 1):
        path = write(tmp_path / task.train[0], HEADERS[name] + "\n" + "\t".join("x" * columns) + "\n")
        message = f"^{re.escape(str(path))}, line 2: expected {width} columns separated by tabs, got {columns}$"
        with pytest.raises(ValueError, match=message):
            readers.load(task, "train", tmp_path)


def test_mnlis_test_rows_have_two_parts(tmp_path, capsys):
    for part in ("mismatched", "matched"):
        write(tmp_path / f"glue/MNLI/dev_{part}.tsv", f"{HEADERS['mnli']}\n0\t1\t(A)\t{part}\tB\t\t\tneutral\n")
    assert load("mnli", "test", tmp_path) == [
        tasks.Sentence("matched", "B", 1, "matched"), tasks.Sentence("mismatched", "B", 1, "mismatched")]
    err = capsys.readouterr().err
    assert "dev_matched.tsv + " in err and "expected the 19647 published examples, got 2;" in err


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r"), max_size=12)


@given(st.lists(st.tuples(CELL, CELL, st.sampled_from(["0", "1"])), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_every_row_of_a_glue_file_comes_back_as_it_was_written(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "qqp"
    lines = [HEADERS["qqp"], *(f"{i}\t\t\t{a}\t{b}\t{label}" for i, (a, b, label) in enumerate(rows))]
    write(folder / "glue/QQP/train.tsv", "\n".join(lines) + "\n")
    assert load("qqp", "train", folder) == [tasks.Sentence(a, b, int(label)) for a, b, label in rows]


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
        assert [e.choices for e in load(name, "train", tmp_path)] == [choices]


@pytest.mark.parametrize("ending", ["", "Answer format: ", "Answer format: solution2/yes", "Answer format: solution1",
                                    "Answer format: solution1/solution2 or so"])
def test_a_commonsense_question_without_its_choices_is_an_error(tmp_path, ending):
    row = {"instruction": "q " + ending, "input": "", "output": "o", "answer": "solution2"}
    write(tmp_path / "llm_adapters/piqa/test.json", [row])
    with pytest.raises(ValueError, match="test.json, entry 1: 'instruction': expected it to end in 'Answer format: '"):
        load("piqa", "test", tmp_path)


def test_in_the_mixed_commonsense_set_choices_are_kept_where_there_are_any(tmp_path):
    rows = [{"instruction": f"{i} " + ending, "output": "o", "answer": "true"} for i, ending in
            enumerate(["Answer format: true/false", "no format"])]
    write(tmp_path / "llm_adapters/ft-training_set/commonsense_170k.json", rows)
    task = tasks.task("commonsense170k")
    read = readers.load(task, "train", tmp_path) + readers.load(task, "test", tmp_path)
    assert {e.instruction[0]: e.choices for e in read} == {"0": ("true", "false"), "1": ()}


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
    rows = load(name, split, REAL)
    assert len(rows) == count and capsys.readouterr().err == ""


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
    assert {len(set(e.choices)) for e in load(name, "test", REAL)} == counts


@real
def test_classes_are_as_balanced_as_published():
    assert sum(row.label == 0 for row in load("rte", "test", REAL)) == 146      # entailment
    assert sum(row.label for row in load("cola", "test", REAL)) == 721          # acceptable
    assert sum(row.label for row in load("mrpc", "test", REAL)) == 279          # paraphrases


# ------------------------------------------------------------------------------------------------------------ overlap
def test_a_question_counts_as_seen_whatever_its_case_spaces_and_punctuation():
    train = [tasks.Example("Tom has 3 apples."), tasks.Example("tom has 3 pears")]
    test = ["TOM has 3  apples?", "Tom has 3 apples", "Tom has 33 apples", "Tom has 3"]
    assert [readers.overlap(train, [tasks.Example(question)]) for question in test] == [1, 1, 0, 0]
    pairs, tests = [tasks.Sentence("A b.", "C", 0)], [("a B", "c!"), ("a b", "d"), ("a b", None)]
    assert [readers.overlap(pairs, [tasks.Sentence(*pair, 1)]) for pair in tests] == [1, 0, 0]


@pytest.mark.parametrize(("turns", "seen"), [
    ("u1 a1 u2", 1), ("U1. a1 u2?", 1), ("u1 a1 u2 a2 u3", 1), ("u1", 1), ("u2", 0), ("u1 a2 u2", 0),
    ("u1 a1 u2 a2 u3 a3 u4", 0)])
def test_all_that_a_conversation_trains_an_answer_to_counts_as_seen(turns, seen):
    assert readers.overlap([chat("u1 a1 u2 a2 u3 a3")], [chat(f"{turns} x")]) == seen


@given(st.lists(TEXT, max_size=9), st.lists(TEXT, max_size=9))
@settings(max_examples=60, deadline=None)
def test_every_test_question_is_counted_and_only_once(train, test):
    train, test = [tasks.Example(f"a{text}") for text in train], [tasks.Example(f"b{text}") for text in test]
    assert readers.overlap(train, test) == 0
    assert readers.overlap(train + train + test, test) == len(test)
