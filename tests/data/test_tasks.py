"""sibo_lab/data/tasks.py: names, files and what is scored."""

import json
from pathlib import Path

import pytest

from sibo_lab.data import readers, tasks


def test_an_unknown_task_is_met_with_the_near_matches():
    with pytest.raises(ValueError, match="unknown task 'gsm9k'; did you mean gsm8k"):
        tasks.task("gsm9k")
    with pytest.raises(ValueError, match="expected one of word-problems, .*path of a .json, .jsonl, .csv or .parquet"):
        tasks.task("zzzzz")


def test_every_task_goes_by_its_own_name():
    assert all(tasks.task(name).name == name for name in tasks.TASKS)
    assert [tasks.task(name).num_labels for name in ("cola", "stsb", "gsm8k")] == [2, 1, 0]


def test_tasks_are_joined_by_a_plus_and_a_users_own_file_may_be_among_them(tmp_path):
    mine = str(tmp_path / "a+b.json")
    assert [t.name for t in tasks.parse("mawps+svamp", mine)] == ["mawps", "svamp", mine]


def test_a_users_own_file_is_scored_whole_if_nothing_was_trained_on_it(tmp_path):
    rows = [{"instruction": f"Question {i}?", "output": f"So {i}."} for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    mine = tasks.task(str(tmp_path / "a.json"))
    (whole,) = tasks.scored_whole([mine], tasks.parse("mawps"))
    assert len(readers.load(whole, "test", tmp_path)) == 30
    assert tasks.scored_whole([mine], [mine]) == [mine] and len(readers.load(mine, "test", tmp_path)) == 3


def test_the_data_directory_is_the_given_one_then_the_environments_then_the_caches(monkeypatch):
    monkeypatch.setenv("SIBO_CACHE", "/cache")
    monkeypatch.setenv("SIBO_DATA", "/env")
    assert tasks.data_dir("/given") == Path("/given")
    assert tasks.data_dir(None) == Path("/env")
    monkeypatch.delenv("SIBO_DATA")
    assert tasks.data_dir(None) == Path("/cache/data")


def test_a_file_has_one_name_by_whatever_way_it_is_reached(tmp_path, monkeypatch):
    """Or the file that a run learned from would be scored whole, for another."""
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    names = ["../a.jsonl", "../folder/../a.jsonl", "../link.jsonl", str(tmp_path / "folder" / ".." / "a.jsonl")]
    assert {tasks.task(name).name for name in names} == {str(tmp_path / "a.jsonl")}
