"""`python -m sibo_lab data list|fetch|overlap`, downloading from a server on this machine."""

import json
import re
from functools import partial
from pathlib import Path

import local_server
import pytest
from local_server import CONTENT, FILE, MEMBERS, SST2, SST2_ZIP, TSV, zipped

from sibo_lab.data import commands, download, tasks

REAL = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the published files are not here")


def command(*args):
    commands.main(commands.parser().parse_args(list(map(str, args))))


@pytest.fixture
def local(monkeypatch):
    """A server on this machine, from which the commands download."""
    with local_server.running(monkeypatch) as server:
        monkeypatch.setattr(download, "fetch", partial(download.fetch, base=server.base, wait=0))
        yield server


def test_list_has_a_line_for_every_file_and_says_how_it_is(tmp_path, monkeypatch, capsys):
    local_server.expect(monkeypatch, FILE, CONTENT)
    for file, content in ((FILE, CONTENT), ("llm_adapters/SVAMP/test.json", b"[]"), (SST2[1], TSV.encode())):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(content)
    command("list", "--data-dir", tmp_path)
    lines = {tuple(line.split()[:3]): re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[1:]}
    assert {name for name, *_ in lines} == set(tasks.TASKS)
    assert lines["boolq", "commonsense", "test"] == ["boolq", "commonsense", "test", "3270", FILE, "ok"]
    assert lines["boolq", "commonsense", "train"][3:] == ["9427", FILE.replace("test", "train"), "missing"]
    assert lines["svamp", "arithmetic", "test"][-1] == "wrong: expected 459713 bytes, got 2"
    assert lines["sst2", "glue", "test"][-1] == "hash unknown"
    assert lines["math-mix", "arithmetic", "test"][3:5] == ["120", "held out of train"]


def test_fetched_files_without_a_known_hash_are_counted(local, tmp_path, capsys):
    local.content[SST2_ZIP] = zipped(MEMBERS)
    command("fetch", "sst2", "--data-dir", tmp_path)
    out, err = capsys.readouterr()
    assert f"warning: {tmp_path / SST2[0]}: expected the 67349 published examples, got 2;" in err
    assert out.count("\n") == 3 and out.count("hash unknown") == 2
    local.content[SST2_ZIP] = zipped(MEMBERS | {"SST-2/dev.tsv": "a\tb\n"})
    with pytest.raises(ValueError, match="dev.tsv, line 1: expected a column 'label', got a, b"):
        command("fetch", "sst2", "--data-dir", tmp_path / "other")


def test_groups_are_all_tasks_of_a_kind():
    assert {t.name for t in commands.chosen(["glue"])} == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}
    assert [t.name for t in commands.chosen(["rte", "arithmetic", "rte", "gsm8k"])][:2] == ["rte", "gsm8k"]
    assert {t.name for t in commands.chosen(["all"])} == set(tasks.TASKS) - {"word-problems"}
    assert {t.name for t in commands.chosen(["commonsense"])} >= {"boolq", "commonsense170k"}


@pytest.mark.parametrize(("name", "says"), [
    ("word-problems", "no published file"), ("mine.json", "no published file"), ("gsm9k", "did you mean gsm8k")])
def test_only_published_files_are_fetched(name, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        command("fetch", name, "--data-dir", tmp_path)


@real
def test_overlap_counts_the_test_questions_that_are_in_the_mawps_training_set(capsys):
    command("overlap", "--train", "mawps", "--data-dir", REAL)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    found = {name: (int(in_it), int(questions)) for name, questions, in_it, _ in lines}
    assert found == {"multiarith": (490, 600), "addsub": (327, 395), "singleeq": (436, 508), "mawps": (28, 238),
                     "svamp": (0, 1000), "gsm8k": (0, 1319), "aqua": (0, 254)}


def test_overlap_names_sets_that_are_missing_and_refuses_those_without_a_file(tmp_path, capsys):
    (tmp_path / tasks.MAWPS).parent.mkdir(parents=True)
    (tmp_path / tasks.MAWPS).write_text(json.dumps([{"original_text": "q", "equation": "X=1", "ans": 1.0}]))
    command("overlap", "--train", "mawps", "--test", "svamp,mawps", "--data-dir", tmp_path)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["svamp", "missing"], ["mawps", "missing"]]
    for options in (["--train", "mawps", "--test", "math-mix"], ["--train", "word-problems"]):
        with pytest.raises(ValueError, match="--test: expected tasks with a test file, .*, got (math-mix|none)$"):
            command("overlap", *options, "--data-dir", tmp_path)


@pytest.mark.parametrize(("args", "wrong"), [
    ([], []), (["list"], ["--data-dir"]), (["fetch"], []), (["overlap"], ["--test", "svamp"])])
def test_help_and_errors_name_the_command_as_it_is_typed(args, wrong, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    name = " ".join(["python -m sibo_lab data", *args])
    with pytest.raises(SystemExit):
        command(*args, "--help")
    assert capsys.readouterr().out.startswith(f"usage: {name} [-h] [--offline] ")
    with pytest.raises(ValueError, match=f"; see {name} --help$"):
        command(*args, *wrong)
