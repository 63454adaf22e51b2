"""sibo_lab/data/own.py and entries.py: the rows and files that people have, and what is refused by name."""

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sibo_lab.data import batch, commands, entries, own, readers, tasks

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=20).filter(str.strip)
HI = [("user", "Hi"), ("assistant", "Ho")]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())
    return path


def whole(path, ignore=None):
    """All of a user's own file, in its order."""
    task, = tasks.scored_whole([tasks.task(str(path), ignore)], [])
    return readers.load(task, "test", Path("/nowhere"))


def read(folder, row, ignore=None):
    return whole(write(folder / "a.jsonl", json.dumps(row)), ignore)[0]


# -------------------------------------------------------------------------------------------------------- forms of rows
@pytest.mark.parametrize("row", [
    {"instruction": "Hi", "output": "Ho"}, {"instruction": "Hi", "response": "Ho"},
    {"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "response": "Ho"}, {"question": "Hi", "answer": "Ho"},
    {"query": "Hi", "response": "Ho"}, {"input": "Hi", "output": "Ho"},
    {"instruction": "", "input": "Hi", "output": "Ho"},
    {"instruction": "Hi", "input": "", "output": "Ho", "system": "", "history": [], "answer": None, "context": None}])
def test_a_question_and_its_answer_may_have_any_of_their_usual_names(tmp_path, row):
    assert read(tmp_path, row) == tasks.Example("Hi", "Ho", "Ho")


@pytest.mark.parametrize("row", [
    {"messages": MESSAGES}, {"conversations": SHARED}, {"conversations": MESSAGES}, {"messages": SHARED},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    {"messages": [m | {"name": None, "tool_calls": None} for m in MESSAGES]}])
def test_a_conversation_may_have_any_of_its_usual_forms(tmp_path, row):
    assert read(tmp_path, row) == tasks.Chat.of(HI)
    expected = tasks.Chat.of([("system", "Be brief."), *HI])
    assert read(tmp_path, row | {"system": "Be brief."}) == expected


def test_many_turns_end_in_the_last_question_and_its_answer(tmp_path):
    turns = [("system", "Be brief."), *HI, ("user", "And?"), ("assistant", "So.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = read(tmp_path, row)
    assert found.turns == turns and (found.output, found.answer) == ("So.", "So.")
    assert found.instruction == "Be brief.\n\nHi\n\nHo\n\nAnd?", "nothing that was said before vanishes"


def test_system_history_and_input_of_a_row_become_turns(tmp_path):
    row = {"instruction": "And plus 3?", "input": "x", "output": "7", "system": "In French.",
           "history": [["2+2?", "4"]]}
    assert read(tmp_path, row).turns == [("system", "In French."), ("user", "2+2?"), ("assistant", "4"),
                                         ("user", "And plus 3?\n\nx"), ("assistant", "7")]


def test_what_is_scored_may_stand_beside_the_output(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "So 7."}]
    for row in ({"instruction": "q", "output": "So 7.", "answer": 7}, {"messages": said, "answer": "7"},
                {"question": "q", "response": "So 7.", "answer": "7"}):
        found = read(tmp_path, row)
        assert (found.instruction, found.output, found.answer) == ("q", "So 7.", "7")


@pytest.mark.parametrize(("output", "answer"), [
    ("48/2 = <<48/2=24>>24\n#### 1,072", "1,072"), ("No.\n#### -3.5\n", "-3.5"), ("7", "7"),
    ("So.\n#### $18", "$18"), ("So.\n#### 50% ", "50%"), ("So.\n#### 1/2", "1/2"),
    ("So.\n#### 5 apples", "5 apples"), ("### A\n#### B\nSo.\n#### 2", "2"),
    ("A heading\n#### 7 of them\nand text", "A heading\n#### 7 of them\nand text"), ("#### 7", "#### 7")])
def test_of_an_answer_worked_out_as_in_gsm8k_its_last_line_is_scored(tmp_path, output, answer):
    said = [MESSAGES[0], {"role": "assistant", "content": output}]
    for row in ({"question": "Hi", "answer": output}, {"messages": said}):
        found = read(tmp_path, row)
        assert (found.output, found.answer) == (output, answer)


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (-0.5, "-0.5"), (2.0, "2.0"), (True, "true"), (0, "0"),
                                             (10**30, "1" + "0" * 30), (False, "false")])
def test_a_number_that_answers_is_its_text_as_json_writes_it(tmp_path, value, text):
    assert read(tmp_path, {"question": "q", "answer": value}).output == text
    assert read(tmp_path, {"messages": [MESSAGES[0], {"role": "assistant", "content": value}]}).output == text


@pytest.mark.parametrize(("value", "text"), [
    ("0.00001", "0.00001"), ("1e16", "10000000000000000"), ("-2.5E-7", "-0.00000025"),
    ("1e2", "100.0"), ("0.1", "0.1")])
def test_a_number_that_answers_is_written_out(tmp_path, value, text):
    assert whole(write(tmp_path / "a.jsonl", f'{{"question": "q", "answer": {value}}}'))[0].answer == text


@pytest.mark.parametrize("value", ["1e400", "-1e999"])
def test_a_number_that_no_float_holds_is_refused_by_name(tmp_path, value):
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: 'answer': expected a finite number, got -?inf$"):
        whole(write(tmp_path / "a.jsonl", f'\n{{"question": "q", "answer": {value}}}'))


@pytest.mark.parametrize(("row", "says"), [
    ({"instruction": "q", "context": "c", "response": "a"},
     "nothing would use context beside instruction, response; .* --ignore-columns context$"),
    ({"instruction": "q", "output": "a", "id": 3, "source": "x"}, "nothing would use id, source .*columns id,source$"),
    ({"messages": MESSAGES, "prompt": "Hi", "prompt_id": "1"}, "nothing would use prompt, prompt_id beside messages"),
    ({"messages": MESSAGES, "conversations": SHARED}, "nothing would use conversations beside messages"),
    ({"messages": MESSAGES, "history": [["a", "b"]]}, "nothing would use history beside messages"),
    ({"messages": MESSAGES, "tools": [{"name": "f"}]}, "nothing would use tools beside messages"),
    ({"instruction": "q", "question": "p", "output": "a"}, "nothing would use question beside instruction, output"),
    ({"instruction": "q", "output": "a", "response": "b"}, "nothing would use response beside instruction, output"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "the key 'completion', got prompt, chosen, rejected; .*rename"),
    ({"chosen": MESSAGES, "rejected": MESSAGES}, "the key 'instruction', got chosen, rejected; of each pair .*better"),
    ({"prompt": "q", "completion": "a", "label": False}, "nothing would use label beside prompt, completion"),
    ({"text": "all of it"}, "expected the key 'instruction', got text; it holds both what is asked and its answer"),
    ({"text": "Hi", "role": "prompter", "parent_id": None}, "got text, role, parent_id; these are single messages"),
    ({"foo": 1}, "expected the key 'instruction', got foo"),
    ({"instruction": None, "output": "a"}, "'instruction': expected str, got NoneType"),
    ({"instruction": "q", "output": "a", "system": ["x"]}, "'system': expected str, got list"),
    ({"instruction": "q", "output": "a", "history": "x"}, "'history', pair 1: expected what was asked"),
    ({"instruction": "q", "output": "a", "history": [["x"]]}, "'history', pair 1: expected what was asked"),
    ({"instruction": "q", "output": "a", "history": [["x", ""]]}, "pair 1: 'answered': expected text, got none"),
    ({"messages": "Hi"}, "'messages': expected a list of messages, got 'Hi'"),
    ({"messages": [], "system": "s"}, r"'messages': expected a list of messages, got \[\]"),
    ({"conversations": ["Hi", "Ho"]}, "message 1: expected an object in braces, got str"),
    ({"messages": json.dumps(MESSAGES)}, "'messages': expected a list of messages, got '"),
    ({"messages": ["Hi"]}, "message 1: expected an object in braces, got str"),
    ({"messages": [{"role": "user", "content": "q", "weight": 0}]}, "message 1: nothing would use weight beside role"),
    ({"messages": [MESSAGES[0] | {"tool_calls": [1]}]}, "1: nothing would use tool_calls .*columns tool_calls$"),
    ({"messages": [MESSAGES[0] | {"from": "human"}]}, "nothing would use role, content beside from, value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'role': expected one of system, user, .*, got 'tool'"),
    ({"messages": [{"role": "user"}]}, "message 1: expected the key 'content', got role"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'content': expected str, got list"),
    ({"messages": [{"role": "user", "content": " "}, MESSAGES[1]]}, "message 1: 'content': expected text, got none"),
    ({"messages": [MESSAGES[1]]}, "and a user's turn before the assistant's last, got assistant"),
    ({"messages": [*MESSAGES, MESSAGES[1]]}, "before the assistant's last, got user, assistant, assistant"),
    ({"messages": [{"role": "system", "content": "s"}, *MESSAGES], "system": "t"}, "at most one system text, first"),
    ({"messages": [MESSAGES[0], {"role": "system", "content": "s"}, *MESSAGES]}, "at most one system text, first"),
    ({"prompt": MESSAGES, "completion": MESSAGES}, "'prompt': expected no assistant's turn, whose loss would count"),
    ({"prompt": MESSAGES[:1], "completion": "Ho"}, "'completion': expected a list of messages, got 'Ho'"),
])
def test_what_nothing_would_use_and_what_has_no_place_is_refused_by_name(tmp_path, row, says):
    with pytest.raises(ValueError, match=says) as error:
        read(tmp_path, row)
    assert f"{tmp_path / 'a.jsonl'}, line 1: " in str(error.value) and "\n" not in str(error.value)


KNOWN = {*own.FORMS, *own.BESIDE, *(key for keys in own.FORMS.values() for key in keys)}


@given(st.text(min_size=1, max_size=9).filter(lambda key: key not in KNOWN), TEXT)
@settings(max_examples=50, deadline=None)
def test_any_other_column_is_refused_until_it_is_ignored(tmp_path_factory, key, value):
    row, folder = {"instruction": "Hi", "output": "Ho", key: value}, tmp_path_factory.getbasetemp()
    with pytest.raises(ValueError, match="nothing would use"):
        read(folder, row)
    if "," not in key:
        assert read(folder, row, f"other,{key}") == tasks.Example("Hi", "Ho", "Ho")


def test_ignored_columns_are_those_of_messages_too_and_even_those_that_would_be_used(tmp_path):
    assert read(tmp_path, {"messages": [m | {"weight": 1} for m in MESSAGES]}, "weight").turns == HI
    row = {"instruction": "Hi", "input": "x", "output": "Ho", "system": "s"}
    assert read(tmp_path, row, "input,system") == tasks.Example("Hi", "Ho", "Ho")


@pytest.mark.parametrize("again", [False, True])
def test_an_ignored_column_that_no_row_has_is_named_once(tmp_path, capsys, again):
    rows = [{"messages": MESSAGES, "id": 1}, {"messages": [m | {"name": None} for m in MESSAGES]}]
    path = write(tmp_path / "a.json", rows)
    own.read(tasks.task(str(path), "id,nam,name,idd"), path, again)
    assert capsys.readouterr().err == (
        "" if again else f"{path}: no row has nam, idd, which --ignore-columns names\n")


def test_columns_to_ignore_are_refused_where_no_file_is_ones_own():
    own_file, gsm8k = tasks.parse("a.json", "gsm8k")
    tasks.require_own("id", gsm8k, own_file)
    tasks.require_own(None, gsm8k)
    with pytest.raises(ValueError, match="--ignore-columns id: expected a file of your own, got gsm8k"):
        tasks.require_own("id", gsm8k)


# -------------------------------------------------------------------------------------------------------- empty outputs
def test_rows_without_an_output_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"instruction": f"q{i}", "output": x} for i, x in enumerate(["a", "", None, " \n", "b"])]
    rows += [{"messages": MESSAGES[:1]}, {"messages": [MESSAGES[0], {"role": "assistant", "content": ""}]}]
    rows += [{"conversations": []}, {"instruction": "", "output": ""}]
    path = write(tmp_path / "a.json", rows)
    assert [row.output for row in whole(path)] == ["a", "b"]
    assert capsys.readouterr().err == f"{path}: 7 of 9 rows have no answer: left out of the test\n"
    readers.load(tasks.task(str(path)), "train", Path("/nowhere"))
    assert capsys.readouterr().err == f"{path}: 7 of 9 rows have no output: left out of training\n"


def test_an_answer_without_an_output_is_scored_but_never_learned_or_held_out_of_training(tmp_path):
    rows = [{"instruction": f"q{i}", "output": "", "answer": "7"} for i in range(20)] + [
        {"instruction": f"p{i}", "output": "So 7."} for i in range(20)]
    path = write(tmp_path / "a.json", rows)
    assert len(whole(path)) == 40 and whole(path)[0] == tasks.Example("q0", "", "7")
    for split, n in (("train", 18), ("test", 2)):
        assert [r.output for r in readers.load(tasks.task(str(path)), split, Path("/nowhere"))] == ["So 7."] * n


@pytest.mark.parametrize("empty", ["", None, " ", "no such key"])
@pytest.mark.parametrize("asks", ["question", "query"])
def test_beside_worked_responses_an_answer_without_one_is_scored_but_never_learned(tmp_path, capsys, asks, empty):
    without = {} if empty == "no such key" else {"response": empty}
    rows = [{asks: f"q{i}", "answer": "7"} | (without if i % 2 else {"response": "So 7."}) for i in range(40)]
    path = write(tmp_path / "a.json", rows)
    assert whole(path)[:2] == [tasks.Example("q0", "So 7.", "7"), tasks.Example("q1", "", "7")]
    capsys.readouterr()
    learned = readers.load(tasks.task(str(path)), "train", Path("/nowhere"))
    assert [row.output for row in learned] == ["So 7."] * 18
    assert capsys.readouterr().err == f"{path}: 20 of 40 rows have no output: left out of training\n"


@pytest.mark.parametrize("others", [
    [{"question": "p", "response": None, "answer": "8"}], [{"instruction": "p", "response": "Ho"}]])
def test_where_no_question_has_a_response_its_answer_is_learned(tmp_path, others):
    from pyarrow import Table, parquet

    rows = [{"instruction": None, "question": "q", "response": None, "answer": "7"}, *others]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")  # others get null where they have no value
    assert whole(tmp_path / "a.parquet")[0] == tasks.Example("q", "7", "7")


def test_a_file_of_empty_outputs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a.json: expected answers, got none in 2 rows"):
        whole(write(tmp_path / "a.json", [{"instruction": "q", "output": ""}] * 2))


# ------------------------------------------------------------------------------------------------------- kinds of files
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_every_kind_of_file_gives_back_the_same_rows(tmp_path_factory, pairs):
    from pyarrow import Table, parquet

    folder, rows = tmp_path_factory.getbasetemp(), [{"instruction": q, "output": a} for q, a in pairs]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["instruction", "output"])
    writer.writeheader()
    writer.writerows(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    expected = [tasks.Example(q, a, a) for q, a in pairs]
    for name, content in (("a.json", json.dumps(rows)), ("a.jsonl", lines), ("a.csv", table.getvalue())):
        assert whole(write(folder / name, content)) == expected
        assert whole(write(folder / f"{name}.gz", gzip.compress(content.encode()))) == expected
    assert whole(write(folder / "lines.json", lines)) == expected
    assert whole(write(folder / "list.jsonl", json.dumps(rows, indent=1))) == expected
    for mark in ";\t":
        table = io.StringIO()
        csv.writer(table, delimiter=mark).writerows([["instruction", "output"], *pairs])
        assert whole(write(folder / "other.csv", "\ufeff" + table.getvalue())) == expected
    parquet.write_table(Table.from_pylist(rows), folder / "a.parquet")
    assert whole(folder / "a.parquet") == expected


def test_parquet_holds_conversations_and_numbers(tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"messages": MESSAGES, "score": None}, {"messages": MESSAGES}]),
                        tmp_path / "a.parquet")
    assert [row.turns for row in whole(tmp_path / "a.parquet")] == [HI, HI]
    parquet.write_table(Table.from_pylist([{"question": "q", "answer": 7}, {"question": "q", "answer": None}]),
                        tmp_path / "b.parquet")
    assert [row.output for row in whole(tmp_path / "b.parquet")] == ["7"]


@pytest.mark.parametrize("width", ["float16", "float32", "float64"])
def test_numbers_of_parquet_have_the_digits_that_were_written(tmp_path, width):
    from pyarrow import Table, array, parquet

    written = [3.8, 0.1, None, 12.1, -7.0, 0.00002]
    answers = array(np.array(written, float).astype(width), mask=np.array([x is None for x in written]))
    parquet.write_table(Table.from_pydict({"question": list("abcdef"), "answer": answers}), tmp_path / "a.parquet")
    assert [row.answer for row in whole(tmp_path / "a.parquet")] == ["3.8", "0.1", "12.1", "-7.0", "0.00002"]


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match="a.parquet: a .parquet file needs pyarrow: pip install pyarrow$"):
        whole(write(tmp_path / "a.parquet", b"PAR1"))


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.csv", "instruction,output\nq\n", "a.csv, line 2: expected 2 columns separated by ',', got 1"),
    ("a.csv", 'instruction,output\n"q\n\n",a\nq,a,b\n', "a.csv, line 5: expected 2 columns separated by ',', got 3"),
    ("a.csv", "instruction,instruction\nq,a\n", "line 1: expected columns of different names, got instruction, instr"),
    ("a.csv", 'instruction,output\n"q"x,a\n', "a.csv, line 2: not valid CSV"),
    ("a.csv", 'instruction,output\n"q', "a.csv, line 2: not valid CSV"),
    ("a.csv", "", "a.csv: expected examples, got none"),
    ("a.csv", "instruction;output\nq;a;b\n", "line 2: expected 2 columns separated by ';', got 3"),
    ("a.csv", "instruction|output\nq|a\n", "line 2: expected the key 'instruction', got instruction|output"),
    ("a.csv", ",instruction,output\n0,q,a\n", "nothing would use Unnamed: 0 beside .*--ignore-columns 'Unnamed: 0'$"),
    ("a.csv", b"instruction,output\ncaf\xe9,a\n", "a.csv, line 2: expected UTF-8 text, got byte 0xe9"),
    ("a.json.gz", b"[]", "a.json.gz: not a whole gzip file"),
    ("a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], "a.json.gz: not a whole gzip file"),
    ("a.json.gz", gzip.compress(b"[1]", mtime=0), "a.json.gz, entry 1: expected an object in braces, got int"),
    ("a.jsonl.gz", gzip.compress(b"\n[1]", mtime=0), "a.jsonl.gz, line 2: expected an object in braces, got list"),
    ("a.parquet", b"PAR1 and so on", "a.parquet: not a whole Parquet file"),
    ("a.json", '{"instruction": "q", "output": "a"}\n{"instr', "a.json, line 2: not valid JSON"),
    ("a.json", '{"train": [{"instruction": "q"}]}', "a.json, line 1: expected the key 'instruction', got train"),
    *((f"a.{kind}", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "got a Git-LFS pointer to it")
      for kind in ("jsonl", "csv", "json.gz", "parquet")),
])
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, says):
    with pytest.raises(ValueError, match=says) as error:
        whole(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_columns_of_the_same_name_are_refused_in_parquet_too(tmp_path):
    from pyarrow import Table, array, parquet

    names = ["instruction", "output", "output"]
    parquet.write_table(Table.from_arrays([array(["q"])] * 3, names), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: expected columns of different names, got instruction, output, o"):
        whole(tmp_path / "a.parquet")


def test_a_small_gz_that_unpacks_to_more_than_memory_is_refused_before_it_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "UNPACKED", 1000)
    row = json.dumps({"instruction": "q", "output": "a"}).encode()
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(row + b" " * (1000 - len(row))))
    assert len(whole(path)) == 1
    write(path, gzip.compress(row + b" " * (1001 - len(row))))
    with pytest.raises(ValueError, match=r"a.jsonl.gz: expected at most 1,000 bytes once unpacked, got more; unpack"):
        whole(path)


def test_a_text_of_a_csv_may_be_long(tmp_path):
    assert whole(write(tmp_path / "a.csv", f"instruction,output\nq,{'a' * 200_000}\n"))[0].output == "a" * 200_000


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz"])
def test_a_path_with_any_of_the_endings_is_a_users_own_file(name):
    assert tasks.task(name).kind == "own" and [t.kind for t in tasks.parse(f"x+{name}")] == ["own"]


@pytest.mark.parametrize("name", ["a.tsv", "a.parquet.gz", "a.gz", "a.xlsx"])
def test_another_ending_is_none(name):
    with pytest.raises(ValueError, match=r"unknown task .*path of a .json, .jsonl, .csv or .parquet file"):
        tasks.task(name)


def test_show_prints_all_rows_that_are_learned_and_no_other(tmp_path, capsys, tiny_llama):
    rows = [{"instruction": f"q{i}", "output": f"Ho {i}" * (i != 1), "answer": "7"} for i in range(4)]
    path = write(tmp_path / "a.json", rows)
    commands.main(commands.parser().parse_args(["show", str(path), "--backbone", str(tiny_llama), "--rows", "9"]))
    out, err = capsys.readouterr()
    assert [f"Ho {i}" in out for i in range(4)] == [True, False, True, True] and "q1" not in out
    assert err == f"{path}: 1 of 4 rows have no output: left out of training\n"


# ------------------------------------------------------------------------------------------------- what stays as it was
def test_the_digest_of_a_plain_example_is_that_of_earlier_runs():
    example = tasks.Example("q", "o", "a", "p", ("x",))
    assert repr(example) == "Example(instruction='q', output='o', answer='a', part='p', choices=('x',))"
    assert batch.digest([example]) == "db6d21c8236dd4ecba03ada788cec75714f7067a6fc1d55c03ec2cc27468eac8"
    assert batch.digest([tasks.Chat.of([("system", "a"), *HI])]) != batch.digest([tasks.Chat.of([("user", "a"), *HI])])


def test_conversations_that_end_alike_are_different_questions(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Hi {i}"}, MESSAGES[1], *MESSAGES]} for i in range(30)]
    task = tasks.task(str(write(tmp_path / "a.json", rows)))
    train, test = (readers.load(task, split, Path("/nowhere")) for split in ("train", "test"))
    assert (len(train), len(test)) == (27, 3) and readers.overlap(train, test) == 0


def test_rows_of_a_conversation_ask_for_the_chat_protocol_and_others_for_the_clean_one():
    plain, chat = tasks.Example("q", "a"), tasks.Chat.of(HI)
    assert [batch.protocol_for(None, rows) for rows in ([plain], [plain, chat], [])] == ["clean", "chat", "clean"]
    assert [batch.protocol_for(p, [plain]) for p in batch.PROTOCOLS] == list(batch.PROTOCOLS)
    for protocol in ("clean", "paper"):
        with pytest.raises(ValueError, match=f"--protocol {protocol}: expected rows of a question .* no place; use"):
            batch.protocol_for(protocol, [plain, chat])


def test_lines_end_at_line_feeds_alone():
    assert list(entries.lines("a\u2028b\r\nc\n")) == [(1, "a\u2028b"), (2, "c")]
