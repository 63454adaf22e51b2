"""sibo_lab/evaluation/compare.py: what shares a table, the spread over seeds, the interval of a difference."""

import json

import numpy as np
import pytest
import scipy.stats
from run_folders import run

from sibo_lab.evaluation import compare, metrics


def test_the_difference_pairs_equal_seeds_and_its_interval_is_students(tmp_path):
    plain, sibo = {0: 0.50, 1: 0.60, 2: 0.55, 7: 0.9}, {0: 0.53, 1: 0.61, 2: 0.60}
    for seed, score in plain.items():
        run(tmp_path, "lora", seed, score)
    for seed, score in sibo.items():
        run(tmp_path, "lora-sibo", seed, score)
    (rows,) = compare.groups(compare.read([tmp_path]))
    d = compare.difference(next(g for g in rows if g.plain))
    oracle = scipy.stats.ttest_rel([sibo[s] for s in range(3)], [plain[s] for s in range(3)]).confidence_interval(0.95)
    assert (d.mean - d.half, d.mean + d.half) == pytest.approx(tuple(oracle), rel=1e-3)


def test_with_one_seed_the_interval_is_over_the_examples_that_both_answered(tmp_path):
    a, b = np.array([1, 1, 1, 0, 1, 0]), np.array([1, 0, 0, 0, 1, 1])
    run(tmp_path, "adapter-sibo", 0, a.mean(), a)
    run(tmp_path, "adapter", 0, b.mean(), b)
    (rows,) = compare.groups(compare.read([tmp_path]))
    d = compare.difference(next(g for g in rows if g.plain))
    assert d.mean == pytest.approx(1 / 6) and d.half == pytest.approx(1.96 * (a - b).std(ddof=1) / 6**0.5)


def lost(folder, *pairs, **settings):
    """Runs of LoRA and LoRA-SIBO whose answers cost these, per seed."""
    for seed, (plain, ours) in enumerate(pairs):
        run(folder, "lora", seed, lost=plain, **settings)
        run(folder, "lora-sibo", seed, lost=ours, **settings)
    (rows,) = compare.groups(compare.read([folder]))
    return next(g for g in rows if g.plain)


def test_losses_are_paired_by_seed_and_example(tmp_path):
    d = compare.loss_difference(lost(tmp_path, ([1, 2, 3], [2, 2, 5]), ([4, 4, 4], [4, 5, 6])))
    assert d == metrics.paired(np.array([[1, 0, 2], [0, 1, 2]])) and d.mean == 1


def test_with_one_seed_the_interval_of_a_loss_is_students_over_examples(tmp_path):
    plain, ours = np.random.default_rng(0).random((2, 20))
    d = compare.loss_difference(lost(tmp_path, (plain.tolist(), ours.tolist())))
    oracle = scipy.stats.ttest_rel(ours, plain).confidence_interval(0.95)
    assert (d.mean - d.half, d.mean + d.half) == pytest.approx(tuple(oracle), rel=1e-3)


def test_runs_without_losses_have_no_difference_of_them(tmp_path):
    assert compare.loss_difference(lost(tmp_path, (None, None))) is None


def test_the_table_has_the_loss_beside_the_score_and_alone_where_it_is_the_score(tmp_path):
    lost(tmp_path, ([1, 2, 3], [2, 2, 5]), ([4, 4, 4], [4, 5, 6]))
    lines = compare.tables(compare.read([tmp_path]), markdown=True).splitlines()
    cells = dict(zip(lines[2].split(" | "), lines[-1].split(" | "), strict=True))
    assert cells["loss per answer"] == "4.000 ± 1.414" and cells["loss against plain (95 %)"].startswith("+1.0000 ± ")


def test_a_result_from_before_losses_were_scored_stands_beside_others():
    old = {"method": "lora", "metric": "accuracy", "parts": {}, "lambda": 0.0} | dict.fromkeys((
        "score baseline_score baseline_n n similarity baseline_similarity trainable_parameters total_parameters "
        "train_seconds tokens_per_second peak_memory_bytes").split(), 1)
    assert "loss" not in compare.side_by_side([old, old])
    (line,) = (x for x in compare.side_by_side([old | {"loss": 2.5, "baseline_loss": 3.5}, old]).splitlines()
               if x.startswith("loss"))
    assert line.split() == ["loss", "per", "answer", "3.5000", "2.5000"]


def test_another_remedy_is_compared_with_none_and_with_sibo_too(tmp_path):
    run(tmp_path, "adapter", 0)
    run(tmp_path, "adapter", 0, stochastic_depth=0.1)
    run(tmp_path, "adapter-sibo", 0, stochastic_depth=0.1)
    (rows,) = compare.groups(compare.read([tmp_path]))
    none = rows[0].runs[0]
    assert [g.plain for g in rows] == [{}, {0: none}, {0: none}]


def test_without_a_run_that_has_no_remedy_sibo_is_compared_with_the_plain_method_and_the_same_one(tmp_path):
    run(tmp_path, "adapter", 0, similarity_loss=0.1)
    run(tmp_path, "adapter-sibo", 0, similarity_loss=0.1)
    (rows,) = compare.groups(compare.read([tmp_path]))
    assert [g.plain for g in rows] == [{}, rows[0].runs]


def test_a_run_from_before_a_setting_was_there_has_its_default(tmp_path):
    folder = run(tmp_path, "lora", 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in compare.OLD}))
    run(tmp_path, "lora", 1)
    (rows,) = compare.groups(compare.read([tmp_path]))
    assert len(rows) == 1


def test_a_plain_run_of_other_settings_is_no_counterpart(tmp_path):
    run(tmp_path, "lora", 0, rank=4)
    run(tmp_path, "lora-sibo", 0, rank=8)
    (rows,) = compare.groups(compare.read([tmp_path]))
    assert [compare.difference(g) for g in rows] == [None, None]


@pytest.mark.parametrize("differs", [{"task": "svamp"}, {"test": ("svamp",)}, {"limit": 5}, {"backbone": "minilm"},
                                     {"score_on": "validation"}, {"score_by": "loss"}])
def test_runs_that_are_scored_on_something_else_stand_in_another_table(tmp_path, differs):
    run(tmp_path, "lora", 0)
    run(tmp_path, "lora", 0, **differs)
    assert [len(rows) for rows in compare.groups(compare.read([tmp_path]))] == [1, 1]


def test_the_table_shows_mean_and_deviation_over_seeds_and_only_settings_that_differ(tmp_path):
    for seed, score in enumerate((0.5, 0.6)):
        run(tmp_path, "lora", seed, score)
        run(tmp_path, "lora-sibo", seed, score + 0.1)
    text = compare.tables(compare.read([tmp_path]))
    assert text.splitlines()[1].split()[:3] == ["method", "lam", "seeds"] and "rank" not in text
    assert text.splitlines()[2].split()[:6] == ["lora", "0", "2", "55.0", "±", "7.1"]
    assert text.splitlines()[3].split()[6:9] == ["+10.0", "±", "0.0"]
    markdown = compare.tables(compare.read([tmp_path]), markdown=True).splitlines()
    assert len({line.count("|") for line in markdown[2:]}) == 1


def test_a_label_says_what_sets_a_run_apart_and_nothing_else(tmp_path):
    run(tmp_path, "adapter", 0)
    run(tmp_path, "adapter-sibo", 0)
    run(tmp_path, "adapter-sibo", 0, skip="plain")
    run(tmp_path, "adapter-sibo", 0, side="parallel")
    (rows,) = compare.groups(compare.read([tmp_path]))
    assert sorted(compare.name(g, rows) for g in rows) == [
        "adapter", "adapter-sibo, mixed skip, side out", "adapter-sibo, mixed skip, side parallel",
        "adapter-sibo, plain skip, side out"]


def test_saved_runs_read_back_the_same_without_paths_of_this_machine(tmp_path):
    for seed in (0, 1):
        run(tmp_path, "lora", seed, right=[1, 0], data_dir="/home/someone's/data files", out="/home/someone/runs")
        run(tmp_path, "lora-sibo", seed, 0.6, right=[1, 1])
    runs = compare.read([tmp_path])
    compare.save(runs, tmp_path / "all.jsonl")
    assert "someone" not in (tmp_path / "all.jsonl").read_text()
    again = compare.read([tmp_path / "all.jsonl"])
    assert {r.result["command"] for r in again} == {"python train.py --lr 1"}
    assert compare.tables(again) == compare.tables(runs) and [r.right for r in again] == [r.right for r in runs]


def on(folder, **sha256):
    """The run folder, its data recorded."""
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"sha256": sha256}))
    return folder


def test_of_two_runs_of_the_same_settings_and_seed_with_other_results_none_is_taken(tmp_path):
    a, b = run(tmp_path, "lora", 0, 0.5, data_dir="/a"), run(tmp_path, "lora", 0, 0.6, data_dir="/b")
    run(tmp_path, "lora-sibo", 0, 0.6)
    with pytest.raises(ValueError, match=f"^{a} and {b}: expected one run of lora with seed 0 and these settings, got"):
        compare.groups(compare.read([tmp_path]))
    compare.save(compare.read([b]), tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'b.jsonl'}, line 1 and {a}: expected one run of lora"):
        compare.groups(compare.read([tmp_path / "b.jsonl", a]))


def test_a_run_may_stand_beside_its_own_line_of_a_saved_file(tmp_path):
    folder = on(run(tmp_path, "lora", 0, right=[1, 0], data_dir="/a", out="/b"), words="a")
    compare.save(compare.read([folder]), tmp_path / "a.jsonl")
    both = compare.read([folder, tmp_path / "a.jsonl"])
    assert len(both) == 2 and compare.tables(both) == compare.tables(both[:1])


@pytest.mark.parametrize("other", ["train", "words"])
def test_only_runs_that_learned_from_and_were_scored_on_the_same_examples_are_paired(tmp_path, other):
    plain = on(run(tmp_path, "lora", 0, lost=[1, 2]), train="a", words="b", validation="c")
    ours = on(run(tmp_path, "lora-sibo", 0, lost=[1, 3]), train="a", words="b")  # what one does not know is no other
    (rows,) = compare.groups(compare.read([tmp_path]))
    assert [compare.loss_difference(g) is None for g in rows] == [True, False]
    on(ours, **{"train": "a", "words": "b", other: "d"})
    with pytest.raises(ValueError, match=f"^{ours} and {plain}: expected the same {other} examples, to compare them, "):
        compare.groups(compare.read([tmp_path]))


def test_the_training_loss_of_a_run_is_the_mean_of_each_quarter_of_its_steps_skipped_steps_left_out(tmp_path):
    folder = run(tmp_path)
    losses = [4.0, 2.0, 3.0, None, 1.0, 1.5, 0.5, 1.0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    compare.save(compare.read([folder]), tmp_path / "all.jsonl")
    for found in compare.read([folder]) + compare.read([tmp_path / "all.jsonl"]):
        assert list(found.losses) == [3.0, 3.0, 1.25, 0.75]


def test_a_folder_without_finished_runs_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected finished runs .*, got none"):
        compare.read([tmp_path])


@pytest.mark.parametrize("line", ["{", "[1]", '{"instruction": "a", "output": "b"}',
                                  '{"config": {}, "result": {}, "right": {}}'])
def test_a_line_that_is_no_saved_run_is_named(tmp_path, line):
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="runs.jsonl, line 1: expected a run that eval.py --table --save wrote, got "):
        compare.read([tmp_path / "runs.jsonl"])


@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl"])
def test_a_place_that_is_not_there_is_not_an_empty_one(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: expected a folder of runs, or a .jsonl file of saved ones"):
        compare.read([tmp_path / name])
