"""The analyses on a tiny model: what they write, and the two that measure against a computation by hand."""

import csv
import json
import sys

import pytest
import torch

import model
from sibo_lab import __main__
from sibo_lab.backbone import tokenizer
from sibo_lab.data import batch, readers, tasks
from sibo_lab.evaluation import compare
from sibo_lab.tools import study


@pytest.fixture
def mine(tmp_path):
    words = "one two three four five six seven eight nine ten".split()
    rows = [{"instruction": f"Say {w}.", "output": w} for w in words]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    return tmp_path / "mine.json"


def run(monkeypatch, *options):
    """`python -m sibo_lab study …`"""
    monkeypatch.setattr(sys, "argv", [__main__.__file__, "study", *map(str, options)])
    __main__.main()


def command(monkeypatch, capsys, tmp_path, name, *options):
    """The last line printed, and the rows of the CSV."""
    run(monkeypatch, "--results", tmp_path / "results", name, *options)
    (file,) = (tmp_path / "results").glob("*.csv")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out.splitlines()[-1], list(csv.DictReader(file.open()))


@pytest.mark.parametrize(("name", "runs"), [("lambda", 2 + 2 * 7), ("low-rank", 3), ("learned", 4 + 2)])
def test_a_study_of_runs_writes_one_line_per_run_a_picture_and_a_line_for_the_table(monkeypatch, capsys, tmp_path,
                                                                               tiny_llama, mine, name, runs):
    line, rows = command(monkeypatch, capsys, tmp_path, name, "--backbone", tiny_llama, "--task", mine, "--steps", 1,
                         "--batch-size", 1, "--dtype", "float32", "--validate", 0, "--out", tmp_path / "runs")
    assert len(rows) == runs and {float(r["lam"]) > 0 for r in rows if r["method"].endswith("-sibo")} == {True}
    assert len(rows[0]["similarity_per_layer"].split()) == 3
    assert line.startswith(
        f"| {study.STUDIES[name][0]} | `python -m sibo_lab study --results")
    assert ({r["frozen_too"] for r in rows} == {"True", "False"}) == (name == "low-rank")
    again, _ = command(monkeypatch, capsys, tmp_path, name, "--backbone", tiny_llama, "--task", mine, "--steps", 1,
                       "--batch-size", 1, "--dtype", "float32", "--validate", 0, "--out", tmp_path / "runs")
    assert again == line


@pytest.mark.parametrize(("name", "plain", "compared", "seeds"), [("gain", 3, 3, 2), ("where", 2, 8, 1)])
def test_a_study_of_losses_compares_each_sibo_with_its_plain_method_and_keeps_every_answers_loss(
        monkeypatch, capsys, tmp_path, tiny_llama, mine, name, plain, compared, seeds):
    line, rows = command(monkeypatch, capsys, tmp_path, name, "--backbone", tiny_llama, "--task", mine, "--steps", 2,
                         "--batch-size", 1, "--dtype", "float32", "--validate", 3, "--score-on", "validation",
                         "--seeds", ",".join(map(str, range(seeds))), "--out", tmp_path / "runs")
    assert len(rows) == seeds * (plain + compared) and line.count("(could show ") == compared
    assert {r["metric"] for r in rows} == {"loss"}
    marks = [(r["method"], r["lam"], r["side"], r["lam_by_depth"], r["learn_lam"], r["seed"]) for r in rows]
    assert len(set(marks)) == len(marks)
    saved = compare.read([tmp_path / f"results/{name}-{tiny_llama.name}-mine.jsonl"])
    assert len(saved) == len(rows) and {len(run.answers[str(mine)]) for run in saved} == {3}
    (groups,) = compare.groups(saved)
    for g in groups:
        if g.plain:
            d = compare.loss_difference(g)
            assert f"{d.mean:+.4f} ± {d.half:.4f} (could show {d.could_show:.4f})" in line


def test_a_study_of_losses_needs_known_answers(monkeypatch, capsys, tmp_path, tiny_llama):
    (tmp_path / "raw/mawps").mkdir(parents=True)
    (tmp_path / "raw/mawps/trainset.json").write_text("[]")
    with pytest.raises(SystemExit):
        run(monkeypatch, "remedies", "--backbone", tiny_llama, "--task", "gsm8k", "--data-dir", tmp_path, "--results",
            tmp_path / "results", "--out", tmp_path / "runs")
    assert "--similarity-loss: expected a GLUE task, with a BERT, got gsm8k" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_of_losses_the_least_is_the_best(tmp_path):
    runs = [compare.Done(compare.OLD | {
        "method": "adapter-sibo", "lam": lam, "backbone": "b", "task": "t", "test": [], "score_on": "validation",
        "limit": None, "sibo_at": None, "lr": 1.0, "seed": 0, "side": "out", "frozen_too": False, "learn_lam": False,
        "skip": "mixed"}, {"backbone": "b", "task": "t", "scored_on": "validation", "metric": "loss", "n": 3,
                           "score": cost, "lambda": lam}, {}) for lam, cost in ((0.1, 3.0), (0.3, 2.0), (0.5, 4.0))]
    (rows,) = compare.groups(runs)
    assert study.score_by_lam(rows, f"{tmp_path}/x") == ["adapter-sibo, λ 0.3 2.000 (one seed)"]


def test_the_remedies_are_compared_with_none(monkeypatch, capsys, tmp_path, tiny_bert):
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    lines = "".join(f"x\t{i % 2}\t\tSome {i} words.\n" for i in range(12))
    for split in ("train", "dev"):
        (tmp_path / f"glue/CoLA/{split}.tsv").write_text(lines)
    line, rows = command(monkeypatch, capsys, tmp_path, "remedies", "--backbone", tiny_bert, "--task", "cola",
                         "--steps", 2, "--data-dir", tmp_path, "--out", tmp_path / "runs")
    assert len(rows) == 6 and line.count("(could show ") == 5
    for remedy in ("stochastic depth 0.1", "similarity loss 0.1"):
        assert f"adapter, {remedy} " in line and f"adapter-sibo, {remedy}, λ 0.2 " in line


def test_a_learned_lam_is_drawn_where_not_every_block_has_one(monkeypatch, capsys, tmp_path, tiny_llama, mine):
    _, (row,) = command(monkeypatch, capsys, tmp_path, "learned", "--backbone", tiny_llama, "--task", mine, "--steps",
                        1, "--batch-size", 1, "--dtype", "float32", "--validate", 0, "--out", tmp_path / "runs",
                        "--method", "lora-sibo", "--learn-lam", "--targets", "blocks.1.mlp.up_proj")
    assert len(row["lambda"].split()) == 1


def test_norms_are_those_that_transformers_modules_have(monkeypatch, capsys, tmp_path, tiny_llama, mine):
    from transformers import LlamaForCausalLM

    _, rows = command(monkeypatch, capsys, tmp_path, "norms", "--backbone", tiny_llama, "--task", mine)
    (example,) = readers.load(tasks.task(str(mine)), "test", tmp_path)
    ids = tokenizer.from_pretrained(tiny_llama).encode(batch.prompt(example.instruction))
    theirs, seen = LlamaForCausalLM.from_pretrained(tiny_llama).model, {}
    for i, layer in enumerate(theirs.layers):
        layer.mlp.register_forward_hook(lambda _, args, out, i=i: seen.update({f"blocks.{i}.mlp": out}))
        layer.mlp.up_proj.register_forward_hook(
            lambda _, args, out, i=i: seen.update({f"blocks.{i}.mlp.up_proj": args[0]}))
    theirs.embed_tokens.register_forward_hook(lambda _, args, out: seen.update(h0=out))
    theirs(torch.tensor([ids]))
    rms = {name: h[0].square().mean(-1).sqrt().median().item() for name, h in seen.items()}
    assert {r["module"]: float(r["rms_h"]) for r in rows} == pytest.approx({n: x for n, x in rms.items() if n != "h0"},
                                                                          abs=1e-4)
    assert [float(r["rms_h0"]) for r in rows] == pytest.approx([rms["h0"]] * 4, abs=1e-4)


def test_a_dot_in_a_backbones_name_stays_in_the_names_of_the_files(monkeypatch, tmp_path, tiny_llama, mine):
    (tmp_path / "tiny-1.5b").symlink_to(tiny_llama)
    run(monkeypatch, "norms", "--backbone", tmp_path / "tiny-1.5b", "--task", mine, "--results", tmp_path / "results")
    names = sorted(file.name for file in (tmp_path / "results").iterdir())
    assert names == ["norms-tiny-1.5b-mine.csv", "norms-tiny-1.5b-mine.png"]


def test_mixing_costs_three_operations_per_element_and_no_product(monkeypatch, capsys, tmp_path, tiny_llama, mine):
    line, rows = command(monkeypatch, capsys, tmp_path, "cost", "--backbone", tiny_llama, "--task", mine)
    t = tokenizer.from_pretrained(tiny_llama)
    (example,) = readers.load(tasks.task(str(mine)), "test", tmp_path)
    elements = len(t.encode(batch.prompt(example.instruction))) * model.from_pretrained(tiny_llama).config.hidden_size
    for r in rows:
        assert int(r["flops_sibo"]) - int(r["flops_plain"]) == 3 * elements * 2  # two blocks, one module each
        assert float(r["low"]) <= float(r["time_ratio"]) <= float(r["high"])


def test_an_option_of_the_user_wins_over_the_studys_own(monkeypatch, capsys, tmp_path, tiny_llama, mine):
    line, rows = command(monkeypatch, capsys, tmp_path, "lambda", "--backbone", tiny_llama, "--task", mine, "--steps",
                         1, "--dtype", "float32", "--validate", 0, "--out", tmp_path / "runs", "--method",
                         "lora,lora-sibo", "--lam", 0.4)
    assert [(r["method"], float(r["lam"])) for r in rows] == [("lora", 0.0), ("lora-sibo", 0.4)] and "--lam 0.4" in line


def test_runs_of_another_study_in_the_same_folder_are_no_part_of_this_one(monkeypatch, capsys, tmp_path, tiny_llama,
                                                                         mine):
    same = ("--backbone", tiny_llama, "--task", mine, "--steps", 1, "--dtype", "float32", "--validate", 0, "--out",
            tmp_path / "runs")
    command(monkeypatch, capsys, tmp_path, "low-rank", *same)
    (tmp_path / "results").rename(tmp_path / "those")
    _, rows = command(monkeypatch, capsys, tmp_path, "lambda", *same, "--method", "lora,lora-sibo", "--lam", 0.4)
    assert [(r["lam"], r["frozen_too"]) for r in rows] == [("0.0", "False"), ("0.4", "False")]


def test_a_dry_run_of_a_study_says_what_it_would_train_and_stops(monkeypatch, capsys, tmp_path, tiny_llama, mine):
    run(monkeypatch, "low-rank", "--backbone", tiny_llama, "--task", mine, "--dry-run", "--results",
        tmp_path / "results")
    assert capsys.readouterr().out.count("trainable parameters") == 3 and not (tmp_path / "results").exists()


@pytest.mark.parametrize(("name", "given"), [
    ("norms", ("--steps", 3)), ("cost", ("--lr", 3)), ("depth", ("--rank", 4))])
def test_an_option_that_a_study_does_not_read_is_refused(monkeypatch, capsys, tmp_path, name, given):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, name, *given, "--results", tmp_path)
    assert e.value.code == 2 and f"error: {given[0]}: expected an option that study {name} reads (--backbone, " in (
        capsys.readouterr().err)


def test_scores_against_lam_are_of_one_learning_rate(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "lambda", "--lr", "1e-3,3e-4")
    assert "--lr: expected one value, as study lambda draws scores against λ alone, got 0.001,0.0003" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("name", ["norms", "cost"])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path, tiny_llama, mine, name):
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, name, "--backbone", tiny_llama, "--task", mine, "--device", "cuda:99", "--results", tmp_path)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: --device: expected ") and err.count("\n") == 1
