"""The benchmark's command, and the committed table and page."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from test_bench_large import TINY

from sibo_lab import cli
from sibo_lab.tools import bench, bench_large, bench_rows

ROOT = Path(__file__).parents[2]


def test_a_run_writes_its_machine_first_and_every_row_with_its_group(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.GROUPS, "start", lambda: iter([bench_rows.paired("x", "s", [1.0], goal=2)]))
    out = tmp_path / "bench.json"
    cli.run(bench.main, bench.parser(), ["--only", "start", "--out", str(out)])
    first, second = json.loads(out.read_text())
    assert first["group"] == "machine" and "bfloat16 units; " in first["name"] and "torch" in first["name"]
    assert (second["group"], second["name"], second["ours"], second["met"]) == ("start", "x", 1.0, True)
    assert "≤ 2" in capsys.readouterr().out


def test_a_part_is_printed_and_replaces_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench.GROUPS, "start", lambda: iter([bench_rows.paired("x", "s", [1.0], goal=2)]))
    cli.run(bench.main, bench.parser(), ["--only", "start"])
    assert "≤ 2" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["adapter-sibo", "lora"])
def test_big_trains_what_lies_in_its_folder_in_a_process_of_its_own(tmp_path, capsys, method):
    bench_large.write_shape(TINY, tmp_path)
    cli.run(bench.main, bench.parser(), ["--big", "llama7b", "--method", method, "--folder", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert (found["shape"], found["method"], found["base_bits"]) == ("llama7b", method, None)
    assert len(found["losses"]) == len(found["step_seconds"]) == 3
    assert found["peak"] >= found["highest"]["anonymous"] >= found["loaded"]["anonymous"] > 0


def test_an_unknown_group_is_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        cli.run(bench.main, bench.parser(), ["--only", "trainning"])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert "--only: expected some of training, generation" in err and "got 'trainning'" in err


def committed():
    return json.loads((ROOT / bench.OUT).read_text("utf-8"))


def test_the_committed_table_has_the_fields_that_readers_of_it_expect():
    assert set.intersection(*map(set, committed())) == {f.name for f in fields(bench_rows.Row)}
    assert committed()[0]["group"] == "machine"


def test_the_pages_tables_are_the_committed_ones():
    page = (ROOT / bench.PAGE).read_text("utf-8")
    assert bench_rows.filled(page, [bench_rows.Row(**row) for row in committed()]) == page


def test_the_page_shows_every_group():
    page = (ROOT / bench.PAGE).read_text("utf-8")
    assert [name for name in ("machine", *bench.GROUPS) if f"<!-- bench: {name} -->" not in page] == []
