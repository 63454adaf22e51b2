"""The table's arithmetic, the turns that sides take, and fresh processes."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from test_bench_large import TINY

from sibo_lab import cli
from sibo_lab.tools import bench, bench_large


def test_the_ratio_is_the_median_of_pairs_and_its_interval_that_of_a_median():
    row = bench.paired("x", "s", [2.0, 4.0, 9.0], [1.0, 4.0, 3.0], goal=2.5)
    assert (row.ours, row.peer, row.ratio, row.met, row.interval) == (4.0, 3.0, 2.0, True, None)
    low, high = bench.paired("x", "s", [float(i) for i in range(1, 31)], [1.0] * 30).interval
    outside = sum(math.comb(30, i) for i in [*range(int(low)), *range(int(high), 31)]) / 2**30
    assert 0.04 < outside < 0.05  # the median lies below the 10th of 30, or above the 21st


@pytest.mark.parametrize(("ratio", "unit", "met"), [(2.0, "tokens/s", True), (1.9, "tokens/s", False),
                                                    (2.0, "s", True), (2.1, "GB", False)])
def test_a_goal_bounds_speed_from_below_and_cost_from_above(ratio, unit, met):
    assert bench.paired("x", unit, [ratio], [1.0], 2.0).met is met


def test_what_was_not_measured_says_so():
    row = bench.paired("x", "s", [], [], 1.3)
    line = bench.table([row]).splitlines()[1]
    assert row.met is None
    assert line.count("not measured") == 2
    assert line.rstrip().endswith("≤ 1.3")


def test_all_sides_take_one_input_before_the_next_and_another_side_begins_each_time():
    seen = []
    found = bench.in_turn([lambda x: seen.append(("a", x)) or x, lambda x: seen.append(("b", x)) or -x], [1, 2, 3])
    assert found == [[1, 2, 3], [-1, -2, -3]]
    assert seen == [("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 3)]


def test_a_fresh_process_returns_its_figures_and_one_that_dies_is_one_line():
    found = bench.in_fresh_process(bench_large.process_memory)
    assert found["peak"] >= found["anonymous"] > 0
    with pytest.raises(OSError, match="expected figures, got a process that died") as e:
        bench.in_fresh_process(os._exit, 9)
    assert "\n" not in str(e.value)


def test_the_gpu_comparison_runs_both_sides_on_the_same_batches(tmp_path):
    bench_large.write_shape(TINY, tmp_path)
    with torch.compiler.set_stance("force_eager"):
        rows = list(bench.cuda(tmp_path, "cpu", sizes=((2, 80),)))
    assert [r.unit for r in rows] == ["tokens/s", "FLOP/s", "GB"]
    assert all(r.ours > 0 and r.peer > 0 for r in rows)


def test_the_gpu_comparison_has_rows_without_figures_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = list(bench.cuda())
    assert [(r.unit, r.goal, r.ours) for r in rows] == [("tokens/s", 1.3, None), ("FLOP/s", 0.5, None),
                                                        ("GB", None, None)] * 2


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


def test_the_committed_table_has_the_fields_that_readers_of_it_expect():
    rows = json.loads((Path(__file__).parents[2] / "docs" / "results" / "bench.json").read_text())
    assert {"name", "ours", "peer", "ratio", "goal", "met", "unit"} <= set.intersection(*map(set, rows))
    assert any(r["ours"] is None for r in rows) or torch.cuda.is_available()
