"""log.py: what TensorBoard's own reader finds in an event file is what metrics.jsonl says, line by line."""

import json
import os
import signal
import sys
import time

import kill
import numpy as np
import pytest
import torch
from run_train import run_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sibo_lab.data import batch
from sibo_lab.training import log, loop, recipes, resume


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder):
    """{tag: [(step, value)]} of a folder's event files, as TensorBoard reads them."""
    found = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(lines):
    """The same of metrics.jsonl: a list by its length; event files hold float32."""
    tags = {}
    for line in lines:
        for tag, value in line.items():
            if tag != "step" and value is not None:
                value = len(value) if isinstance(value, list) else value
                tags.setdefault(tag, []).append((line["step"], float(np.float32(value))))
    return tags


def small(folder, steps, **changes):
    """kill.train's model, rows and run, with the log."""
    run = recipes.run_of("lora-sibo", lam=0.2, steps=steps, batch_size=4, micro_batch_size=2, rank=4, warmup=2,
                         lr=1e-2, validate_every=3, out=str(folder), **{"log": "tensorboard"} | changes)
    torch.manual_seed(0)
    m = kill.model.build(kill.CONFIG).to_empty(device="cpu")
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3)
    kill.sibo.inject(m, **vars(run.settings))
    return m, [batch.Row(ids, ids) for ids in ([1 + i, *range(3 + i % 7, 9 + i)] for i in range(9))], run


def fit(folder, steps, resuming=False, validate=lambda m: 0.5, **changes):
    m, rows, run = small(folder, steps, **changes)
    return loop.fit(m, rows, 0, run, validate, resume.SaveEvery(3, None), resuming)


def test_an_event_file_holds_every_number_of_metrics_jsonl_by_step(tmp_path):
    fit(tmp_path, 7)
    lines = lines_of(tmp_path)
    assert told(tmp_path) == expected(lines) and len(lines) == 7
    assert told(tmp_path).keys() == {"loss", "lr", "grad_norm", "validation", "tokens_per_second"}
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_skipped_steps_and_spikes_are_told_too(tmp_path):
    run = recipes.run_of(out=str(tmp_path), log="tensorboard")
    lines = [{"step": 1, "loss": 1.0, "lr": 1e-9, "spike": True},
             {"step": 2, "loss": None, "lr": 1e-4, "grad_norm": None, "skipped": [3, 4, 5], "validation": None}]
    with log.open_log(run, 0) as write:
        for line in lines:
            write(line)
    assert lines_of(tmp_path) == lines and told(tmp_path) == expected(lines)
    assert told(tmp_path)["spike"] == [(1, 1.0)] and told(tmp_path)["skipped"] == [(2, 3.0)]


def test_a_step_can_be_followed_while_the_run_goes_on(tmp_path):
    run = recipes.run_of(out=str(tmp_path), log="tensorboard")
    with log.open_log(run, 0) as write:
        write({"step": 1, "loss": 0.25})
        assert told(tmp_path) == {"loss": [(1, 0.25)]}


@pytest.mark.parametrize("before", ["tensorboard", None])
def test_a_run_that_was_killed_and_continued_has_no_step_twice_and_none_missing(before, tmp_path):
    """Killed after its state, so that steps come again; begun with the log or without."""
    def work():
        fit(tmp_path, 60, log=before)

    pid = kill.child(work)
    while kill.reached(tmp_path) < 11:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert kill.ended(pid) == -signal.SIGKILL
    ahead, state = kill.reached(tmp_path), int(resume.newest(tmp_path)[0].name)
    fit(tmp_path, 60, resuming=True)
    lines = lines_of(tmp_path)
    assert [x["step"] for x in lines] == list(range(1, 61)) and state <= ahead
    assert told(tmp_path) == expected(lines) and len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_a_run_that_begins_again_forgets_the_first_attempt(tmp_path):
    fit(tmp_path, 6)
    fit(tmp_path, 3)
    assert told(tmp_path) == expected(lines_of(tmp_path)) and len(told(tmp_path)["loss"]) == 3


def test_only_the_first_process_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(log, "rank", lambda: 1)
    with log.open_log(recipes.run_of(out=str(tmp_path), log="tensorboard"), 0) as write:
        write({"step": 1, "loss": 1.0})
    assert not list(tmp_path.iterdir())


COMMON = ("--steps", 2, "--batch-size", 2, "--limit", 1, "--dtype", "float32")


def test_each_run_of_a_grid_has_its_own_and_a_dry_run_none(monkeypatch, capsys, tmp_path, tiny_llama):
    args = ("--backbone", tiny_llama, *COMMON, "--method", "lora,lora-sibo", "--log", "tensorboard", "--out",
            tmp_path / "runs")
    assert run_train(monkeypatch, capsys, *args, "--dry-run")[0] == 0 and not (tmp_path / "runs").exists()
    assert run_train(monkeypatch, capsys, *args)[0] == 0
    folders = sorted(f.parent for f in tmp_path.rglob("events.out.tfevents.*"))
    assert folders == sorted(f.parent for f in tmp_path.rglob("result.json")) and len(folders) == 2
    assert all(told(f) == expected(lines_of(f)) for f in folders)


def test_a_log_changes_no_number_so_that_a_run_may_continue_with_or_without(monkeypatch, capsys, tmp_path, tiny_llama):
    args = ("--backbone", tiny_llama, *COMMON, "--out", tmp_path)
    assert run_train(monkeypatch, capsys, *args)[0] == 0
    code, _, err = run_train(monkeypatch, capsys, *args, "--log", "tensorboard")
    assert code == 0 and "1 of 1 runs are finished" in err


def test_without_tensorboard_it_is_one_line_before_anything_is_fetched(monkeypatch, capsys, tmp_path):
    for name in [n for n in sys.modules if n.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, out, err = run_train(monkeypatch, capsys, "--backbone", "no/such", "--log", "tensorboard", "--out",
                               tmp_path / "run")
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    assert err == "error: --log tensorboard: needs the tensorboard package: pip install tensorboard\n"


def test_only_tensorboard_can_follow(monkeypatch, capsys):
    code, _, err = run_train(monkeypatch, capsys, "--log", "wandb")
    assert code == 2 and "argument --log: invalid choice: 'wandb'" in err and err.count("\n") == 1
