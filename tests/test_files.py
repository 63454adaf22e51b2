"""files.py: a write is whole or not at all, and tensors come back bit by bit."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from twins import refused

from sibo_lab import files

ROOT = Path(__file__).parent.parent


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("SIBO_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert files.cache() == Path("/a")
    monkeypatch.delenv("SIBO_CACHE")
    assert files.cache() == Path("/b/sibo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache() == Path.home() / ".cache" / "sibo"


@pytest.mark.parametrize("fill", [
    lambda draft: (draft.write_text("half"), (_ for _ in ()).throw(OSError(28, "No space left on device"))),
    lambda draft: save_file({"a": torch.ones(2)}, draft.parent / "no such folder" / "x"),
    lambda draft: (draft.write_text("half"), (_ for _ in ()).throw(KeyboardInterrupt()))],
    ids=["disk full", "safetensors fails", "interrupted"])
def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path, fill):
    file = tmp_path / "result.json"
    files.write(file, "λ = 0.2")
    with pytest.raises((OSError, KeyboardInterrupt)):
        files.write(file, fill)
    assert file.read_text(encoding="utf-8") == "λ = 0.2" and os.listdir(tmp_path) == ["result.json"]


def test_write_makes_the_folder_and_replaces_the_file(tmp_path):
    file = tmp_path / "a" / "b" / "curves.png"
    files.write(file, "old")
    files.write(file, lambda draft: draft.write_bytes(draft.suffix.encode()))
    assert file.read_bytes() == b".png" and os.listdir(file.parent) == ["curves.png"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("fill", [
    "text", lambda draft: draft.write_bytes(b"bytes"), lambda draft: save_file({"a": torch.ones(2)}, draft)],
    ids=["text", "bytes", "tensors"])
def test_others_may_read_a_file_as_the_umask_says(tmp_path, umask, fill):
    before = os.umask(umask)
    try:
        for _ in range(2):  # made, and replaced
            files.write(tmp_path / "new" / "file", fill)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "file", tmp_path / "new")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask]


def test_nothing_is_written_past_write():
    own = "save_file(", "torch.save(", "mkstemp", "NamedTemporaryFile", ".write_text(", ".write_bytes(", "os.open("
    written = {(file.name, word) for file in (ROOT / "sibo_lab").rglob("*.py") for word in own
               if word in file.read_text("utf-8")}
    assert {name for name, _ in written} == {"files.py", "cli.py", "estimate.py"}  # /dev/null, /proc


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_before_write_returns(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args))
    files.write(tmp_path / "file", "λ = 0.2")
    assert calls == ["fsync", "replace", "fsync"]


def test_tensors_and_their_metadata_come_back_bit_by_bit(tmp_path):
    stored = {"a": torch.randn(3, 4).t(), "b": torch.randn(2).bfloat16()}
    files.write_tensors(tmp_path / "x.safetensors", stored, {"sibo": "{}"})
    back, metadata = files.read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"sibo": "{}"} and back.keys() == stored.keys()
    assert all(torch.equal(back[n], stored[n]) and back[n].dtype == stored[n].dtype for n in stored)
    with refused("y.safetensors", by=FileNotFoundError):
        files.read_tensors(tmp_path / "y.safetensors")


@pytest.mark.parametrize("stored, named", [
    ({"a": torch.ones(2)}, "tensor 'b': expected (3,), got none"),
    ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "tensor 'c': expected none, got (1,)"),
    ({"a": torch.ones(2), "b": torch.ones(1)}, "tensor 'b': expected (3,), got (1,)")])
def test_assign_is_strict_and_all_or_nothing(stored, named):
    parameters = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(3))}
    with refused("file.safetensors", named):
        files.assign(parameters, stored, Path("file.safetensors"))
    assert not any(p.any() for p in parameters.values())


def test_assign_copies_in_place(tmp_path):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    files.assign({"a": p}, {"a": torch.tensor([1.0, 2.0])}, tmp_path)
    assert p.tolist() == [1.0, 2.0] and p.dtype == torch.float64


def test_a_reader_takes_no_more_bytes_than_there_are():
    r = files.Reader(b"abcde", "m.gguf: not a whole GGUF file")
    assert (r.take(2), r.take(0), r.take(3)) == (b"ab", b"", b"cde")
    with refused("m.gguf: not a whole GGUF file (found 1 bytes to come, at byte 5 of 5)"):
        r.take(1)


def test_an_object_that_says_one_key_twice_is_refused_as_only_one_of_the_two_could_count():
    with pytest.raises(ValueError, match=r"^a.json, line 2: not valid JSON \(a second 'b'\)$"):
        files.parse_json('{"a": [{"b": 1, "c": 2, "b": 1}]}', "a.json", 2)
    assert files.parse_json('{"a": {"b": 1}, "b": 1}', "a.json") == {"a": {"b": 1}, "b": 1}
