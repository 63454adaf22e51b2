"""run_folder.py: what a run's folder is called, and who may write into it."""

import argparse
import json

import pytest
from run_train import run_train

from sibo_lab.evaluation import compare
from sibo_lab.training import recipes, run_folder


@pytest.mark.parametrize(("given", "name"), [
    ("smollm2-135m", "smollm2-135m"), ("meta/llama-3.2-1b", "llama-3.2-1b"), ("/a/b.Q4_1.gguf", "b.Q4_1"),
    ("/data/mine.jsonl", "mine"), ("rte", "rte")])
def test_a_run_folder_is_named_after_the_last_part_of_backbone_and_task(given, name):
    assert compare.name_of(given) == name


def test_a_run_folder_that_holds_another_run_is_left_alone(monkeypatch, capsys, tmp_path, tiny_llama):
    (tmp_path / "config.json").write_text('{"backbone": "another"}')
    code, _, err = run_train(monkeypatch, capsys, "--backbone", tiny_llama, "--out", tmp_path)
    assert code == 2 and "expected backbone" in err and "got a run with another" in err
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_an_interrupted_run_begins_again_and_a_finished_one_is_only_read(tmp_path):
    run = recipes.run_of(out=str(tmp_path))
    assert run_folder.claim(run) is None
    (tmp_path / "config.json").write_text(json.dumps(run.config()))
    assert run_folder.claim(run) is None
    (tmp_path / "result.json").write_text('{"score": 1.0}')
    assert run_folder.claim(run) == {"score": 1.0}


def test_a_run_is_named_after_backbone_method_and_task_and_one_of_several_after_what_sets_it_apart():
    run = recipes.run_of("lora-sibo", backbone="meta/llama-3.2-1b", task="rte", lam=0.3, sibo_at="both", lr=1e-3,
                         seed=2)
    given = argparse.Namespace(out=None)
    assert run_folder.folder_of(run, given, False).out == "runs/llama-3.2-1b-lora-sibo-rte"
    assert run_folder.folder_of(run, given, True).out == "runs/llama-3.2-1b-rte/lora-sibo-lam0.3-both-lr0.001-seed2"
    full = recipes.run_of("full")
    assert run_folder.folder_of(full, argparse.Namespace(out="x"), True).out == "x/full-lr0.0003-seed0"
