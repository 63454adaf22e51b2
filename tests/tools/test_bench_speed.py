"""What both sides run, tried on a tiny shape; nothing is compared with a time."""

import os

import pytest
import torch
from test_bench_large import TINY

import sibo
from sibo_lab.data import batch
from sibo_lab.tools import bench_large, bench_speed


def random_problems(n, on_inputs=False):
    rows = torch.randint(3, 5000, (n, 24)).tolist()
    return [batch.Row(ids, ids if on_inputs else [-100] * 16 + ids[16:]) for ids in rows]


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_speed, "problems", random_problems)
    monkeypatch.setattr(bench_speed, "SIZES", {8: 4, 64: 3})
    monkeypatch.setattr(bench_speed, "PAIRS", {"training": 2, "generation": 1, "overhead": 2})
    monkeypatch.setattr(bench_speed, "matmul_rate", lambda case: 1e12)
    bench_large.write_shape(TINY, tmp_path)
    bench_speed.frozen.cache_clear()
    return bench_speed.Case(tmp_path)


def test_the_gpu_comparison_measures_every_row_on_the_same_batches(case):
    with torch.compiler.set_stance("force_eager"):
        rows = list(bench_speed.cuda({"tiny": lambda: case}))
    assert {r.name: (r.unit, r.goal) for r in rows} == {f"tiny: {k}": v for k, v in bench_speed.GOALS.items()}
    assert len(rows) == len(bench_speed.GOALS) and all(r.ours is not None for r in rows)


def test_there_are_rows_without_figures_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = list(bench_speed.cuda())
    assert [(r.unit, r.goal, r.ours, r.dtype) for r in rows] == [
        (unit, goal, None, "bfloat16") for unit, goal in bench_speed.GOALS.values()] * 2


def test_a_gpu_that_is_too_small_leaves_rows_without_figures(case, monkeypatch, capsys):
    def measures(case):
        yield case.row("training: peak memory", [1.0], [2.0])
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(bench_speed, "measures", measures)
    rows = list(bench_speed.cuda({"tiny": lambda: case}))
    assert [r.name for r in rows if r.ours] == ["tiny: training: peak memory"] and len(rows) == len(bench_speed.GOALS)
    assert capsys.readouterr().err == "tiny: CUDA out of memory.\n"


def test_a_group_runs_on_all_cores_and_on_one_each_time_without_compiled_code(case, monkeypatch):
    monkeypatch.setattr(bench_speed, "smollm2", lambda: case)
    seen, before = [], (torch.get_num_threads(), os.environ.get("TORCHINDUCTOR_CACHE_DIR"))

    def measure(case):
        seen.append((torch.get_num_threads(), os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])))
        yield case.row("training: peak memory", [1.0], [2.0])

    with bench_speed.threads(2):
        rows = list(bench_speed.at_threads(measure))
    assert [r.threads for r in rows] == [2, 1] and seen == [(2, []), (1, [])]
    assert (torch.get_num_threads(), os.environ.get("TORCHINDUCTOR_CACHE_DIR")) == before


def test_all_of_ours_share_the_frozen_weights_and_folding_one_leaves_the_others(case):
    m, folded, base = bench_speed.ours(case, "lora-sibo"), bench_speed.ours(case, "lora-sibo"), bench_speed.frozen(case)
    ids = torch.arange(3, 12)[None]
    before = m.eval()(ids)
    sibo.merge(folded)
    assert torch.equal(m(ids), before)
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in m.parameters()}


def test_both_sides_compute_the_same_logits(case):
    mine, peer = bench_speed.ours(case).eval(), bench_speed.theirs(case).eval()
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(mine(ids), peer(ids).logits)


@pytest.mark.parametrize("packs", [True, False])
def test_the_peer_runs_in_whichever_dtype_is_faster_of_those_that_the_cpu_has(case, monkeypatch, packs):
    monkeypatch.setattr(bench_speed.fast, "packs", lambda dtype: packs)
    for dtype in (torch.bfloat16, torch.float32):
        peer, m = bench_speed.fastest(case, lambda m, dtype=dtype: float(m.dtype == dtype))
        assert peer.dtype == m.dtype == (dtype if packs else torch.float32)


def test_the_speed_of_answers_counts_their_tokens_up_to_eos(case, monkeypatch):
    monkeypatch.setattr(bench_speed, "seconds", lambda f: f() or 2.0)
    found = torch.tensor([[7, 2, 5, 2, 2], [7, 7, 5, 5, 5]])
    monkeypatch.setattr(bench_speed, "generate", lambda m, input_ids, **_: found)
    prompts = {"input_ids": torch.tensor([[7, 2], [7, 7]])}
    assert bench_speed.answer(bench_speed.ours(case), 3, prompts) == (2 + 3) / 2


def test_each_way_of_the_peer_gives_the_same_answers(case):
    prompts, said = {"input_ids": torch.randint(3, 1000, (2, 6)), "attention_mask": torch.ones(2, 6).long()}, []
    for way in bench_speed.ways(case, bench_speed.theirs(case).eval()).values():
        m, how = way.args[0], way.keywords
        with torch.compiler.set_stance("force_eager"):
            said.append(m.generate(**prompts, do_sample=False, max_new_tokens=5, **how).tolist())
    assert said[0] == said[1] == said[2]


def test_prompts_end_before_the_answer_are_of_one_width_and_in_the_vocabulary(case):
    for b in bench_speed.prompts(case, 2, 3):
        assert b["input_ids"].shape == (3, 16) and int(b["input_ids"].max()) < TINY["vocab_size"]
    assert [len(rows) for rows in bench_speed.batches(case, 2, 3)] == [3, 3]
