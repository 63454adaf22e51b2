"""Files in and out: atomic writes, checked reads. As files may come from strangers, nothing is unpickled, and what is
wrong is a ValueError that names the file, before memory is taken (see tests/fuzz.py)."""

import difflib
import json
import mmap
import os
import re
import reprlib
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sibo_lab import parallel

Tensors = Iterator[tuple[str, torch.Tensor]]


def cache() -> Path:
    env = os.environ.get
    return Path(env("SIBO_CACHE") or Path(env("XDG_CACHE_HOME") or Path.home() / ".cache", "sibo"))


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no")


def near(name: str, known: Iterable[str]) -> str:
    """"; did you mean …?" with similar names, or ""."""
    similar = difflib.get_close_matches(name.lower(), known, 4, 0.4)
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


def check_archive(z: zipfile.ZipFile) -> None:
    """ValueError names a member that leads elsewhere or is packed in an unusual way."""
    for info in z.infolist():
        name = info.filename
        wrong = ("leads out of its folder" if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) else
                 "is a link" if stat.S_ISLNK(info.external_attr >> 16) else
                 "lies outside of the file" if not 0 <= info.header_offset < z.start_dir else
                 "is encrypted, or packed in an unknown way" if info.flag_bits & 0x61 or info.extract_version > 45 or
                 info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else "")
        if wrong:
            raise ValueError(f"its member {quoted(name)} {wrong}")


class Reader:
    """Takes bytes one after another; `whole` begins errors, as in "m.gguf: not a whole GGUF file"."""

    def __init__(self, data: bytes | mmap.mmap, whole: str):
        self.data, self.whole, self.at = data, whole, 0

    def error(self, found: str) -> ValueError:
        return ValueError(f"{self.whole} (found {found}, at byte {self.at} of {len(self.data)})")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.error(f"{size} bytes to come")
        self.at += size
        return self.data[self.at - size:self.at]


def refuse_pointer(file: Path) -> None:
    """ValueError if Git left a pointer where a large file should be."""
    with open(file, "rb") as f:
        if f.read(23) == b"version https://git-lfs":
            raise ValueError(f"{file}: expected the file itself, got a Git-LFS pointer to it; run `git lfs pull` there")


def read_safetensors(file: Path) -> Tensors:
    try:
        with safe_open(file, "pt") as f:
            names = list(f.offset_keys())
        while names:  # mapped again every 256 MB, or what was read stays in memory beside its copies
            with safe_open(file, "pt") as f:
                seen = 0
                while names and seen < 1 << 28:
                    tensor = f.get_tensor(names[0])
                    seen += tensor.nbytes
                    yield names.pop(0), tensor
                    del tensor
    except SafetensorError as e:
        raise ValueError(f"{file}: not a whole safetensors file ({one_line(e)}); fetch or copy it again") from None


def require_shapes(expected: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], path: Path) -> None:
    """ValueError names the first missing, unexpected or mis-shaped tensor of `stored`."""
    for name in sorted(expected.keys() | stored.keys()):
        want, got = (tuple(x[name].shape) if name in x else "none" for x in (expected, stored))
        if got != want:
            raise ValueError(f"{path}: tensor {quoted(name)}: expected {want}, got {got}")


def assign(parameters: dict[str, torch.nn.Parameter], stored: dict[str, torch.Tensor], path: Path) -> None:
    """Copies all of `stored`, or none, as require_shapes says."""
    require_shapes(parameters, stored, path)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(parallel.local_shard(stored[name], p))


def read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, expected one that sibo.save wrote")
    stored = dict(read_safetensors(file))
    with safe_open(file, "pt") as f:
        return stored, f.metadata() or {}


def write_tensors(file: Path, stored: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    write(file, lambda draft: save_file({n: t.contiguous() for n, t in stored.items()}, draft, metadata))


def write(file: Path, fill: Callable[[Path], object] | str) -> None:
    """Writes text, or what fill(draft) writes, to a draft, flushes and renames it: whole or not at all, and for others
    to read as the umask says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.getpid()}.{file.name}")  # keeps the suffix, a picture's format
    try:
        draft.touch()
        mode = draft.stat().st_mode
        draft.write_text(fill, "utf-8") if isinstance(fill, str) else fill(draft)
        draft.chmod(mode)  # safetensors makes a file of its own, which only its owner reads
        flush(draft)
        os.replace(draft, file)
        flush(file.parent)
    except SafetensorError as e:
        raise OSError(f"{file}: could not be written ({e})") from None
    finally:
        draft.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Forces a file, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(file: Path) -> dict:
    """The JSON object in `file`; ValueError names the file and line if there is none."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    refuse_pointer(file)
    if not isinstance(found := parse_json(file.read_bytes(), file), dict):
        raise ValueError(f"{file}: expected an object, got a JSON {type(found).__name__}")
    return found


def parse_json(text: str | bytes, file: object, line: int = 1) -> object:
    """The value of a JSON text that begins on this line of `file`; ValueError names both if it is invalid (NaN)."""
    def refuse(constant: str):
        raise ValueError(f"{constant} is no number")

    def once(pairs: list) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError(f"a second {quoted(Counter(key for key, _ in pairs).most_common(1)[0][0])}")
        return found

    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, parse_constant=refuse,
                          object_pairs_hook=once)
    except ValueError as e:  # also NaN, or an integer of more than 4300 digits
        line, what = line + getattr(e, "lineno", 1) - 1, f"not valid JSON ({getattr(e, 'msg', e)})"
    except RecursionError:
        what = "nested too deeply, expected flat objects"
    raise ValueError(f"{file}, line {line}: {what}")


def quoted(value: object) -> str:
    """A value's repr for errors, shortened if long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return _clipped(short.repr(value))


def one_line(e: Exception) -> str:
    """Another library's error message, on one line."""
    return _clipped(" ".join(str(e).split()))


def _clipped(text: str) -> str:
    return text if len(text) <= 250 else f"{text[:250]}..."
