"""train.py: whole runs of the command, on models small enough to watch."""

import json
import os
import shutil

import pytest
import torch
import twins
from run_train import run_train
from safetensors.torch import load_file

import model
import train
from sibo_lab.data import batch, readers, tasks
from sibo_lab.training import options, recipes


def test_what_is_trained_whole_is_float32(monkeypatch, capsys, tmp_path, tiny_llama):
    monkeypatch.setattr(options, "fast_bfloat16", lambda: True)
    code, *_ = run_train(monkeypatch, capsys, "--backbone", tiny_llama, "--method", "full,lora", "--steps", 1,
                         "--limit", 1, "--rank", 2, "--out", tmp_path)
    kept = [json.loads((tmp_path / f"{name}-lr0.0003-seed0" / "config.json").read_text())["dtype"]
            for name in ("full", "lora")]
    assert code == 0 and kept == ["float32", "bfloat16"]
    assert {t.dtype for t in load_file(tmp_path / "full-lr0.0003-seed0" / "adapter.safetensors").values()} == {
        torch.float32}


def test_a_full_disk_ends_in_one_line_and_leaves_no_draft(monkeypatch, capsys, tmp_path, tiny_llama):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run_train(monkeypatch, capsys, "--backbone", tiny_llama, "--dtype", "float32", "--steps", "1",
                           "--limit", "2", "--out", tmp_path / "run")
    assert code == 2 and "No space left on device" in err.splitlines()[-1]
    assert [p.name for p in (tmp_path / "run").rglob("*")] == [".lock"]


def test_a_grid_continues_where_it_stopped_and_ends_in_one_table(monkeypatch, capsys, tmp_path, tiny_llama):
    args = ("--backbone", tiny_llama, "--dtype", "float32", "--method", "lora,lora-sibo", "--steps", 1, "--batch-size",
            2, "--limit", 2, "--out", tmp_path)
    code, out, _ = run_train(monkeypatch, capsys, *args)
    assert code == 0 and len(list(tmp_path.iterdir())) == 2
    written = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}
    code, out, err = run_train(monkeypatch, capsys, *args, "--seeds", "0,1")
    assert code == 0 and "2 of 4 runs are finished" in err and "against plain" in out
    assert len(list(tmp_path.iterdir())) == 4 and all(f.stat().st_mtime_ns == t for f, t in written.items())


@pytest.mark.parametrize("missing", [True, False])
def test_weights_that_are_not_there_are_said_before_anything_is_written(monkeypatch, capsys, tmp_path, tiny_llama,
                                                                        missing):
    folder = shutil.copytree(tiny_llama, tmp_path / "backbone")
    (folder / "model.safetensors").unlink() if missing else (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    code, _, err = run_train(monkeypatch, capsys, "--backbone", folder, "--steps", 1, "--out", tmp_path / "run")
    assert code == 2 and ("got none" if missing else "got a Git-LFS pointer") in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "says"), [
    (lambda stored: stored.update({"model.norm.weight": torch.ones(31)}), "'model.norm.weight': expected"),
    (lambda stored: stored.update({"model.norm.bias": stored.pop("model.norm.weight")}), "unexpected tensor"),
    (lambda stored: stored.pop("model.norm.weight"), "1 tensors are missing for a Llama, such as 'norm.weight'"),
    (lambda stored: stored.update({"model.norm.weight": torch.ones(32).int()}), "got torch.int32")], ids=range(4))
def test_tensors_that_do_not_fit_are_said_before_anything_is_written(monkeypatch, capsys, tmp_path, tiny_llama, change,
                                                                     says):
    twins.edit_tensors(folder := shutil.copytree(tiny_llama, tmp_path / "backbone"), change)
    code, _, err = run_train(monkeypatch, capsys, "--backbone", folder, "--steps", 1, "--out", tmp_path / "run")
    assert code == 2 and says in err.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("pooler", [True, False])
def test_a_pooler_that_is_drawn_is_said_once(capsys, tmp_path, tiny_bert, pooler):
    folder = shutil.copytree(tiny_bert, tmp_path / "backbone")
    if not pooler:
        twins.edit_tensors(folder, lambda stored: [stored.pop(f"pooler.dense.{leaf}") for leaf in ("weight", "bias")])
    args = train.parser().parse_args(["--backbone", str(folder), "--task", "mrpc"])
    train.find_backbone(args, tasks.parse("mrpc")[0], "clean", dry=False)
    assert capsys.readouterr().err == (
        "" if pooler else f"{folder}: has no pooler; a random one is trained with the head\n")


def test_pairs_are_not_for_a_bert_of_one_segment(monkeypatch, capsys, tmp_path, tiny_bert):
    folder = shutil.copytree(tiny_bert, tmp_path / "backbone")
    config = json.loads((folder / "config.json").read_text()) | {"type_vocab_size": 1}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = run_train(monkeypatch, capsys, "--backbone", folder, "--task", "mrpc", "--dry-run")
    assert code == 2 and "its pairs of sentences need a BERT of two segments" in err.splitlines()[-1]


@pytest.mark.parametrize(("more", "says"), [
    ((), "100 of its examples are left out of training and scored\n"),
    (("--test", "mine.jsonl,other.jsonl"), "100 of its examples are left out of training and scored\n"),
    (("--test", "other.jsonl"), "100 of its examples are left out of training, and not scored\n"),
    (("--score-on", "validation"), "100 of its examples are left out of training, and not scored\n")])
def test_what_is_neither_learned_nor_scored_is_counted_once(monkeypatch, capsys, tmp_path, more, says):
    monkeypatch.chdir(tmp_path)
    for name, n in (("mine", 1000), ("other", 50)):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"question": f"{name} {i}?", "answer": f"{i}"}) + "\n" for i in range(n)))
    args, = options.grid(train.parser().parse_args(["--task", "mine.jsonl", *more]))
    d = train.read_data(args, dry=False)
    assert len(d.train) == 900 and capsys.readouterr().err == f"{tmp_path / 'mine.jsonl'} has no test file: {says}"


@pytest.mark.parametrize("both", ["mawps+word-problems", "word-problems+mawps"])
def test_tasks_are_learned_together_in_any_order(tmp_path, both):
    (tmp_path / tasks.MAWPS).parent.mkdir(parents=True)
    (tmp_path / tasks.MAWPS).write_text(json.dumps([{"original_text": "q", "equation": "x=1", "ans": 1}]))
    args = train.parser().parse_args(["--task", both, "--data-dir", str(tmp_path), "--score-on", "validation"])
    learned = train.read_data(args, dry=False).train
    assert len(learned) == 4001 and "q" in {example.instruction for example in learned}


def test_of_a_mix_each_held_out_example_is_scored_as_its_own_task_says(monkeypatch, capsys, tmp_path, tiny_llama):
    (tmp_path / tasks.MAWPS).parent.mkdir(parents=True)
    (tmp_path / tasks.MAWPS).write_text(json.dumps([
        {"original_text": f"q {i}", "equation": "x=1", "ans": 1} for i in range(30)]))
    (tmp_path / "llm_adapters/boolq").mkdir(parents=True)
    (tmp_path / "llm_adapters/boolq/train.json").write_text(json.dumps([
        {"instruction": f"{i}? Answer format: true/false", "output": "the correct answer is true", "answer": "true"}
        for i in range(30)]))
    code, _, err = run_train(monkeypatch, capsys, "--backbone", tiny_llama, "--dtype", "float32", "--task",
                             "boolq+mawps", "--score-on", "validation", "--validate", 20, "--steps", 1, "--batch-size",
                             1, "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert not code, err
    answers = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").open()]
    assert {(a["task"], a["gold"]) for a in answers} == {("boolq", "true"), ("mawps", "1")}
    assert len(answers) == 20 and json.loads((tmp_path / "run/result.json").read_text())["parts"].keys() == {
        "boolq", "mawps"}


def test_a_finished_run_on_data_that_changed_is_not_read_again(monkeypatch, capsys, tmp_path, tiny_llama):
    mine, rows = tmp_path / "mine.json", [{"instruction": f"Say {i}.", "output": str(i)} for i in range(20)]
    args = ("--backbone", tiny_llama, "--dtype", "float32", "--task", mine, "--steps", 1, "--batch-size", 2, "--out",
            tmp_path / "run", "--method", "lora")
    mine.write_text(json.dumps(rows))
    held = {e.instruction for e in readers.load(tasks.task(str(mine)), "test", tmp_path)}
    assert run_train(monkeypatch, capsys, *args)[0] == 0 and run_train(monkeypatch, capsys, *args)[0] == 0
    for changed, told in ((held, f"today's {mine} examples"),
                          ({e["instruction"] for e in rows} - held, "today's train examples")):
        mine.write_text(json.dumps([row | ({"output": "9"} if row["instruction"] in changed else {}) for row in rows]))
        code, _, err = run_train(monkeypatch, capsys, *args)
        assert code == 2 and told in err.splitlines()[-1] and "name a new --out, or delete the folder" in err


def test_a_run_is_not_read_again_nor_continued_on_a_backbone_that_was_trained_on(monkeypatch, capsys, tmp_path,
                                                                                 tiny_llama):
    def stop(*_):
        raise KeyboardInterrupt

    twins.edit_tensors(folder := shutil.copytree(tiny_llama, tmp_path / "backbone"), lambda stored: None)
    args = ("--backbone", folder, "--dtype", "float32", "--method", "lora", "--steps", 1, "--batch-size", 2, "--limit",
            2, "--out")
    done, stopped = tmp_path / "done", tmp_path / "stopped"
    assert run_train(monkeypatch, capsys, *args, done)[0] == run_train(monkeypatch, capsys, *args, done)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(train.sibo, "save", stop)
        assert run_train(patch, capsys, *args, stopped)[0] == 130
    twins.edit_tensors(folder, lambda stored: stored["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    for run, told in (done, "a run on today's backbone, sha256"), (stopped, "the backbone of its state, sha256"):
        code, _, err = run_train(monkeypatch, capsys, *args, run, "--resume")
        assert code == 2 and told in err.splitlines()[-1] and "name a new --out" in err
    result = json.loads((done / "result.json").read_text())
    del result["sha256"]["backbone"]  # as older runs have it
    (done / "result.json").write_text(json.dumps(result))
    assert run_train(monkeypatch, capsys, *args, done)[0] == 0


def test_the_frozen_model_is_scored_anew_where_a_seed_holds_out_other_problems(monkeypatch, capsys, tmp_path,
                                                                               tiny_llama):
    run_train(monkeypatch, capsys, "--backbone", tiny_llama, "--dtype", "float32", "--method", "lora", "--score-by",
              "loss", "--score-on", "validation", "--validate", 5, "--seeds", "0,1", "--steps", 5, "--batch-size", 2,
              "--out", tmp_path)
    a, b = (json.loads(f.read_text())["baseline_loss"] for f in tmp_path.rglob("result.json"))
    assert a != b


def test_a_run_scored_by_one_loss_is_read_again(monkeypatch, capsys, tmp_path, tiny_llama):
    args = ("--backbone", tiny_llama, "--dtype", "float32", "--method", "lora,lora-sibo", "--score-by", "loss",
            "--score-on", "validation", "--validate", 5, "--limit", 1, "--steps", 5, "--batch-size", 2, "--out",
            tmp_path)
    first, again = (run_train(monkeypatch, capsys, *args) for _ in range(2))
    assert first[0] == again[0] == 0 and "2 of 2 runs are finished" in again[2] and "(no interval)" in again[1]


def test_validation_is_minus_the_loss_of_a_labelled_token_over_all_examples(tiny_llama):
    m = model.from_pretrained(tiny_llama)
    rows = [batch.Row(list(range(3, 3 + n)), [-100] * 2 + list(range(5, 3 + n))) for n in (4, 9, 6)]
    run = recipes.run_of(backbone=str(tiny_llama), micro_batch_size=2)
    losses = [float(model.loss(m, torch.tensor([r.ids]), torch.tensor([r.labels]))) for r in rows]
    counts = [2, 7, 4]
    expected = -sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    found = train.validation(m, None, train.Data(tasks.task("gsm8k"), [], [], [], []), rows, run)
    assert found == pytest.approx(expected, rel=1e-5)
