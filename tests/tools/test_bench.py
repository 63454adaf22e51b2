"""The table's arithmetic, and the code that waits for big models and GPUs, tried on a small one."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import model
from sibo_lab import cli, files
from sibo_lab.tools import bench, bench_large

TINY = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "rms_norm_eps": 1e-6}
TINY_GPTJ = {"model_type": "gptj", "vocab_size": 90, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}


def test_the_ratio_is_the_median_of_pairs_and_its_interval_that_of_a_median():
    row = bench.compare("x", "s", [2.0, 4.0, 9.0], [1.0, 4.0, 3.0], goal=2.5)
    assert (row.ours, row.peer, row.ratio, row.met) == (4.0, 3.0, 2.0, True)
    low, high = bench.compare("x", "s", [float(i) for i in range(1, 31)], [1.0] * 30, None, interval=True).interval
    outside = sum(math.comb(30, i) for i in [*range(int(low)), *range(int(high), 31)]) / 2**30
    assert 0.04 < outside < 0.05  # the median lies below the 10th of 30, or above the 21st


@pytest.mark.parametrize(("ratio", "faster", "met"), [(2.0, True, True), (1.9, True, False), (2.0, False, True),
                                                      (2.1, False, False), (None, True, None)])
def test_a_goal_bounds_speed_from_below_and_cost_from_above(ratio, faster, met):
    assert bench.Row("x", "s", 1.0, 1.0, ratio, 2.0, faster).met is met


def test_what_was_not_measured_says_so():
    line = bench.table([bench.Row("x", "s", goal=1.3)]).splitlines()[1]
    assert line.count("not measured") == 2
    assert line.rstrip().endswith("≤ 1.3")


@pytest.mark.parametrize("said", [TINY, TINY_GPTJ])
def test_a_written_shape_is_two_shards_that_load_whole(tmp_path, said):
    bench_large.write_shape(said, tmp_path)
    index = files.read_json(tmp_path / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) == 2
    m = model.from_pretrained(tmp_path, torch.bfloat16)  # strict: nothing missing, nothing unknown
    assert sum(p.numel() * 2 for p in m.parameters()) == index["metadata"]["total_size"]
    logits = m(torch.arange(9)[None])
    assert torch.isfinite(logits).all() and logits.std() > 0.01


def test_the_gpu_comparison_runs_both_sides_on_the_same_batches(tmp_path):
    bench_large.write_shape(TINY, tmp_path)
    with torch.compiler.set_stance("force_eager"):
        rows = list(bench.cuda(tmp_path, "cpu", sizes=((2, 80),)))
    assert [r.unit for r in rows] == ["tokens/s", "FLOP/s", "GB"]
    assert all(r.ours > 0 and r.peer > 0 for r in rows[:2])
    assert math.isnan(rows[2].ours)  # a GPU's allocator alone can tell


def test_an_unknown_group_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "trainning"])
    with pytest.raises(SystemExit) as e:
        cli.run(bench.main, bench.parser())
    assert e.value.code == 2
    assert "--only: found 'trainning', expected some of training, generation" in capsys.readouterr().err


def test_the_committed_table_has_the_fields_that_readers_of_it_expect():
    rows = json.loads((Path(__file__).parents[2] / "docs" / "results" / "bench.json").read_text())
    assert {"name", "ours", "peer", "ratio", "goal", "met", "unit"} <= set.intersection(*map(set, rows))
    assert any(r["ours"] is None for r in rows) or torch.cuda.is_available()
