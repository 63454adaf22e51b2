"""resume.py: whatever stops a run, its newest whole state is found, and the run continues bit for bit as it would."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import kill
import pytest
import torch

import model
import sibo
from sibo_lab.data import batch
from sibo_lab.training import loop, recipes, resume, run_folder

LLAMA = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}
BERT = {"model_type": "bert", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2}
EACH = resume.SaveEvery(1, None)


def small(folder, method="lora-sibo", config=LLAMA, **changes):
    """A model with adapters, rows of many lengths, and a run of 10 steps of two micro-batches with dropout."""
    run = recipes.run_of(**{"method": method, "lam": 0.2, "learn_lam": "sibo" in method, "steps": 10, "batch_size": 4,
                            "micro_batch_size": 2, "rank": 4, "bottleneck": 4, "warmup": 2, "dropout": 0.1, "lr": 1e-2,
                            "validate_every": 3, "out": str(folder)} | changes)
    torch.manual_seed(run.seed)
    m = model.build(config, num_labels=2 if config is BERT else None).to_empty(device="cpu")
    for p in m.parameters():
        torch.nn.init.normal_(p, std=0.3)
    m = sibo.inject(m, **vars(run.settings)) if run.settings else m.requires_grad_(True)
    some = [[1 + i, *range(3 + i % 7, 9 + i)] for i in range(9)]
    rows = [batch.Row(ids, i % 2, types=[0] * len(ids)) if config is BERT else batch.Row(ids, ids)
            for i, ids in enumerate(some)]
    return m, rows, run


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def progress_of(folder):
    """The last state's progress, without what depends on the clock."""
    state, _ = resume.newest(folder)
    return {k: v for k, v in json.loads((state / "state.json").read_text()).items() if k != "seconds"}


def weights(m):
    return {n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def stopping(step):
    """A validation whose call number `step` sends the process SIGTERM, as a scheduler does."""
    calls = []

    def validate(m):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return float(sum(p.detach().sum() for p in m.parameters() if p.requires_grad))

    return validate


# --------------------------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize(("method", "config"), [(x, LLAMA) for x in recipes.METHODS] + [("lora-sibo", BERT)])
def test_ten_steps_equal_five_and_after_a_sigterm_five_more(method, config, tmp_path):
    """With gradient accumulation, dropout, learned λ, shuffled and bucketed rows over several epochs."""
    whole, rows, run = small(tmp_path / "whole", method, config, validate_every=1)
    once = loop.fit(whole, rows, 0, run, stopping(99))
    m, rows, run = small(tmp_path / "parts", method, config, validate_every=1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        loop.fit(m, rows, 0, run, stopping(5))
    line, code = stopped.value.args
    assert line == "stopped after step 5 of 10, which is saved: the same command with --resume continues"
    assert code == 128 + signal.SIGTERM
    again, rows, run = small(tmp_path / "parts", method, config, validate_every=1)
    result = loop.fit(again, rows, 0, run, stopping(99), resuming=True)
    assert equal(weights(again), weights(whole)) and result["best"] == once["best"]
    assert progress_of(tmp_path / "parts") == progress_of(tmp_path / "whole")
    keys = ("step", "loss", "lr", "grad_norm", "validation")
    assert [[x[k] for k in keys] for x in log_of(tmp_path / "parts")] == [[x[k] for k in keys]
                                                                       for x in log_of(tmp_path / "whole")]


def test_a_second_signal_stops_the_run_at_once(tmp_path):
    (m, rows, run), before = small(tmp_path), signal.getsignal(signal.SIGINT)

    def impatient(m):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal did not stop it")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        loop.fit(m, rows, 0, run, impatient)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_killed_at_random_moments_loses_no_more_than_a_save_interval(tmp_path):
    with contextlib.redirect_stderr(io.StringIO()):
        assert len(kill.killed(tmp_path, 5, random.Random(1))) == 5


# ------------------------------------------------------------------------------------------------------- what is kept


def test_the_last_two_states_and_the_best_are_kept(tmp_path):
    m, rows, run = small(tmp_path, validate_every=2)
    marks = iter([1.0, 5.0, 3.0, 2.0, 4.0])  # after steps 2, 4, 6, 8, 10
    result = loop.fit(m, rows, 0, run, lambda m: next(marks), EACH)
    assert [int(p.name) for p in resume.states(tmp_path)] == [4, 9, 10] and result["best"]["step"] == 4


def test_a_resumed_run_still_knows_the_best_state_from_before_the_stop(tmp_path):
    m, rows, run = small(tmp_path, validate_every=2)
    marks = iter([1.0, 5.0])
    seen = []

    def validate(m):
        seen.append(weights(m))
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(marks, 0.0)

    with pytest.raises(KeyboardInterrupt):
        loop.fit(m, rows, 0, run, validate, EACH)
    again, rows, run = small(tmp_path, validate_every=2)
    result = loop.fit(again, rows, 0, run, lambda m: 2.0, EACH, resuming=True)
    assert result["best"] == {"step": 4, "validation": 5.0} and equal(weights(again), seen[1])


def test_a_run_stopped_while_it_was_scored_trains_no_further_step(tmp_path):
    m, rows, run = small(tmp_path)
    loop.fit(m, rows, 0, run)
    again, rows, run = small(tmp_path)
    written = (tmp_path / "metrics.jsonl").read_text()
    loop.fit(again, rows, 0, run, resuming=True)
    assert equal(weights(again), weights(m)) and (tmp_path / "metrics.jsonl").read_text() == written


# ---------------------------------------------------------------------------------------------- what may break a state


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run folder with whole states after steps 9 and 10."""
    folder = tmp_path_factory.mktemp("stopped")
    m, rows, run = small(folder)
    loop.fit(m, rows, 0, run, None, EACH)
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_torn_or_corrupted_state_is_named_and_the_one_before_is_used(stopped, tmp_path, capsys, name, harm):
    shutil.copytree(stopped, tmp_path / "run")
    harm(tmp_path / "run" / "checkpoints" / "00000010" / name)
    state, corrupted = resume.newest(tmp_path / "run")
    (path, wrong), = corrupted.items()
    assert state.name == "00000009" and path.name == "00000010" and "00000010" in wrong and "\n" not in wrong
    m, rows, run = small(tmp_path / "run")
    loop.fit(m, rows, 0, run, None, EACH, resuming=True)
    printed = capsys.readouterr().err
    assert f"removed a corrupted state: {wrong}" in printed and "continuing after step 9 of 10" in printed
    with open(stopped / "checkpoints" / "00000010" / "state.safetensors", "rb") as a, \
            open(tmp_path / "run" / "checkpoints" / "00000010" / "state.safetensors", "rb") as b:
        assert a.read() == b.read()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_torn_state_does_not_push_out_a_whole_one(stopped, tmp_path, name):
    shutil.copytree(stopped, tmp_path / "run")
    cut(tmp_path / "run" / "checkpoints" / "00000010" / name)
    m, rows, run = small(tmp_path / "run", steps=12)
    loop.fit(m, rows, 0, run, None, resume.SaveEvery(12, None), resuming=True)
    assert [state.name for state in resume.states(tmp_path / "run")] == ["00000009", "00000012"]


def test_a_state_of_an_earlier_version_without_the_recent_losses_is_resumed(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    state = resume.state_folder(tmp_path / "run", 10)
    progress = json.loads((state / "state.json").read_text())
    assert len(progress.pop("recent")) == 10
    (state / "state.json").write_text(json.dumps(progress))
    digest = {"size": (state / "state.json").stat().st_size,
              "sha256": hashlib.sha256((state / "state.json").read_bytes()).hexdigest()}
    manifest = json.loads((state / "manifest.json").read_text())
    (state / "manifest.json").write_text(json.dumps(manifest | {"state.json": digest}))
    m, rows, run = small(tmp_path / "run", steps=12)
    loop.fit(m, rows, 0, run, None, EACH, resuming=True)
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 13))


def test_drafts_of_a_killed_writer_are_no_states_and_are_removed(tmp_path):
    draft = tmp_path / "checkpoints" / ".123.00000007"
    draft.mkdir(parents=True)
    (tmp_path / ".123.config.json").write_text("{")
    assert resume.states(tmp_path) == []
    resume.lock(tmp_path).close()
    assert not draft.exists() and not (tmp_path / ".123.config.json").exists()


class Refusing:
    """Wraps a system function and fails at call number `at`."""

    def __init__(self, real, at, error):
        self.real, self.left, self.error = real, at, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise OSError(self.error, os.strerror(self.error))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(("where", "error"), [
    ("fsync", errno.EIO), ("replace", errno.EACCES), ("open", errno.ENOSPC)])
def test_whichever_write_fails_a_state_no_older_than_one_interval_remains(where, error, tmp_path, monkeypatch):
    """Every single call in two saves fails once."""
    m, rows, run = small(tmp_path / "begun", steps=4)
    loop.fit(m, rows, 0, replace(run, steps=2), None, EACH)
    for at in range(1, 40):
        folder = shutil.copytree(tmp_path / "begun", tmp_path / str(at))
        real = getattr(os, where)
        refusing = Refusing(real, at, error)
        monkeypatch.setattr(os, where, refusing)
        failed = True
        try:
            again, rows, run = small(folder, steps=4)
            loop.fit(again, rows, 0, run, None, EACH, resuming=True)
            failed = False
        except OSError as e:
            assert e.errno == error
        monkeypatch.setattr(os, where, real)
        state, corrupted = resume.newest(folder)
        reached = log_of(folder)[-1]["step"] if (folder / "metrics.jsonl").exists() else 2
        assert not corrupted and int(state.name) >= reached - 1, (at, corrupted)
        resume.lock(folder).close()  # the next process
        assert not list(folder.glob("checkpoints/.*")) and not list(folder.glob(".[0-9]*"))
        if not failed:
            break
    assert not failed and at > 4  # every call failed once


# ------------------------------------------------------------------------------------------------ one writer per folder


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    ready, locked = os.pipe()

    def hold():
        held = resume.lock(tmp_path)
        os.write(locked, b".")
        signal.pause()
        held.close()

    pid = kill.child(hold)
    try:
        os.read(ready, 1)
        with pytest.raises(ValueError, match="another process trains in it"):
            resume.lock(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        kill.ended(pid)
    resume.lock(tmp_path).close()


def test_a_state_is_continued_from_only_when_asked(stopped, tmp_path):
    _, _, run = small(stopped)
    with pytest.raises(ValueError, match="expected no saved state, .*; continue it with --resume"):
        run_folder.claim(run)
    assert run_folder.claim(run, resuming=True) is None


def test_a_restored_optimizer_lies_where_the_weights_do(stopped):
    """As AdamW's fused kernels on a GPU require; the meta device needs none."""
    m, _, run = small(stopped)
    trained = {n: p for n, p in m.to("meta").named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    resume.restore(resume.newest(stopped)[0], trained, optimizer, "cpu")
    assert all(optimizer.state[p][key].device == p.device for p in trained.values() for key in ("step", "exp_avg"))


def test_data_other_than_the_run_began_with_are_refused(stopped):
    m, rows, run = small(stopped)
    with pytest.raises(ValueError, match="expected the training data of its state, sha256 .*, got "):
        loop.fit(m, rows[::-1], 0, run, resuming=True)


def test_the_state_of_several_processes_is_refused_by_one(stopped, tmp_path, monkeypatch):
    m, rows, run = small(stopped)
    monkeypatch.setattr(resume.parallel, "world", lambda: 2)
    with pytest.raises(ValueError, match="expected the state of 2 processes, got 1; resume with as many"):
        resume.restore(resume.newest(stopped)[0], {}, None, "cpu")


@pytest.mark.parametrize(("text", "every"), [("200", resume.SaveEvery(200, None)),
                                             ("10m", resume.SaveEvery(None, 600.0))])
def test_how_often_to_save_is_read_as_steps_or_minutes(text, every):
    assert resume.SaveEvery.read(text) == every
    assert every.due(200, 599.0) == (text == "200") and every.due(199, 600.0) == (text == "10m")


def test_resuming_without_a_state_starts_at_the_beginning_and_says_so(tmp_path, capsys):
    m, rows, run = small(tmp_path, steps=2)
    loop.fit(m, rows, 0, run, resuming=True)
    assert "no saved state, starting at step 1" in capsys.readouterr().err and len(log_of(tmp_path)) == 2
