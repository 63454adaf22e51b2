"""Small models trained from nothing: their text, their start, and what the study writes of them."""

import json
import sys

import numpy as np
import pytest
import torch

from sibo_lab import __main__
from sibo_lab.evaluation import metrics
from sibo_lab.tools import depth


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two depths, three words of text a file, rows of eight tokens."""
    monkeypatch.setattr(depth, "T", 8)
    monkeypatch.setattr(depth, "WORDS", 40)
    monkeypatch.setattr(depth, "HELD_OUT", 4)
    monkeypatch.setattr(depth, "BLOCKS", (2, 3))
    monkeypatch.setattr(depth, "COMPARED_AT", 3)
    monkeypatch.setattr(depth, "TEXT", ("gsm8k", "cola"))
    (tmp_path / "raw/gsm8k").mkdir(parents=True)
    (tmp_path / "glue/CoLA").mkdir(parents=True)
    (tmp_path / "raw/gsm8k/train.jsonl").write_text("".join(
        json.dumps({"question": f"What is {i} and {i}?", "answer": f"So it is.\n#### {2 * i}"}) + "\n"
        for i in range(9)))
    (tmp_path / "glue/CoLA/train.tsv").write_text("".join(f"x\t1\t\tSome {i % 5} words.\n" for i in range(20)))
    return tmp_path


def run(monkeypatch, data, backbone, *options):
    monkeypatch.setattr(sys, "argv", [__main__.__file__, "study", "depth", *map(str, (
        "--data-dir", data, "--backbone", backbone, "--steps", 2, "--batch-size", 2, "--out", data / "runs",
        "--results", data / "results", *options))])
    __main__.main()


def test_every_text_stands_there_once_and_held_out_rows_apart(small, tiny_llama):
    rows, held = depth.corpus(small, tiny_llama)
    assert len(held) == 4 and all(len(r.ids) == 8 and r.labels == r.ids for r in rows + held)
    assert {i for r in rows + held for i in r.ids} <= set(range(40))
    ends = [i for r in held + rows for i in r.ids]
    eos = max(set(ends), key=lambda i: ends.count(i) == 14)  # 9 problems and 5 sentences
    assert ends.count(eos) in (13, 14)  # the last may be cut


def test_models_of_a_seed_begin_alike_whatever_the_remedy():
    begun = [depth.prepare(depth.build(3, 1), variant).state_dict() for variant in depth.VARIANTS]
    for state in begun[1:]:
        assert all(torch.equal(state[n], t) for n, t in begun[0].items())
    assert not torch.equal(depth.build(3, 2).embed.weight, begun[0]["embed.weight"])


def test_the_held_out_loss_is_that_of_a_training_step(small, tiny_llama):
    _, held = depth.corpus(small, tiny_llama)
    m = depth.build(2, 0)
    for row, loss in zip(held, depth.losses(m, held), strict=True):
        ids = torch.tensor([row.ids])
        assert loss == pytest.approx(float(m(ids, labels=ids)), rel=1e-5)


def test_the_study_compares_at_each_depth_and_resumes(monkeypatch, capsys, small, tiny_llama):
    run(monkeypatch, small, tiny_llama, "--seeds", "0,1")
    line = capsys.readouterr().out.splitlines()[-1]
    saved = [depth.Trained(**json.loads(text)) for text in (small / "results/depth.jsonl").open()]
    assert {"--out" in x.command or "--data-dir" in x.command for x in saved} == {False}
    assert len(saved) == 2 * (3 + 7) and line.count("against none") == 2 + 6
    by = {(x.variant, x.blocks, x.seed): np.array(x.losses) for x in saved}
    d = metrics.paired(np.array([by["h0", 2, seed] - by["none", 2, seed] for seed in (0, 1)]))
    mean = np.mean([by["h0", 2, seed] for seed in (0, 1)])
    assert f"h0, 2 blocks: {mean:.3f}, against none {d.mean:+.4f} ± {d.half:.4f}" in line
    learned = [x for x in saved if "learned" in x.variant]
    assert all(len(x.lam) == x.blocks - 1 and x.lam != [0.1] * len(x.lam) for x in learned)
    assert all(x.lam == [0.1] * (x.blocks - 1) for x in saved if x.variant == "h0")
    assert json.loads((small / "runs/h0-2-seed1/config.json").read_text())["lr"] == 2e-3
    written = {f: f.stat().st_mtime_ns for f in (small / "runs").rglob("result.json")}
    run(monkeypatch, small, tiny_llama, "--seeds", "0,1")
    assert all(f.stat().st_mtime_ns == t for f, t in written.items())


def test_without_seeds_it_is_seed_0(monkeypatch, small, tiny_llama):
    run(monkeypatch, small, tiny_llama)
    assert {json.loads(line)["seed"] for line in (small / "results/depth.jsonl").open()} == {0}


@pytest.mark.parametrize(("given", "told"), [
    (("--lr", "1e-3,2e-3"), "--lr: expected one for all models, got 0.001,0.002"),
    (("--steps", "3"), "expected steps 3, got a run with 2; name a new --out, or delete the folder")])
def test_models_of_other_settings_are_not_averaged(monkeypatch, capsys, small, tiny_llama, given, told):
    run(monkeypatch, small, tiny_llama)
    with pytest.raises(SystemExit):
        run(monkeypatch, small, tiny_llama, *given, "--seeds", "0,1")
    assert told in capsys.readouterr().err


def test_nor_are_models_of_other_text(monkeypatch, capsys, small, tiny_llama):
    run(monkeypatch, small, tiny_llama)
    text = small / "glue/CoLA/train.tsv"
    text.write_text(text.read_text() + "x\t1\t\tMore words.\n")
    with pytest.raises(SystemExit):
        run(monkeypatch, small, tiny_llama, "--seeds", "0,1")
    assert "none-2-seed0: expected a run on today's train examples, sha256 " in capsys.readouterr().err
