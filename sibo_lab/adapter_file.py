"""One file of what was trained: its tensors, what `sibo.inject` was told, and what tells its backbone from others.

In the official code λ is told by hand again when an adapter is loaded, and any backbone of the same shape takes it: a
wrong λ or backbone is no error, only another score. Here the file knows both, and what does not fit is refused before
the model is touched."""

import json
import math
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from sibo_lab import files, parallel, placement


def write(file: Path, m: nn.Module) -> None:
    """Exactly the trained tensors of `m`; ValueError where there is none."""
    trained = {n: parallel.full_tensor(p.detach()) for n, p in m.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{type(m).__name__}: found nothing trainable to save; save before merge, and after inject")
    said = asdict(m.sibo) if hasattr(m, "sibo") else {"method": "full"}
    said["backbone"] = _fingerprint(m)
    if parallel.rank() == 0:
        files.write_tensors(file, trained, {"sibo": json.dumps(said)})


def read(file: Path, m: nn.Module) -> tuple[placement.Settings | None, dict[str, Tensor]]:
    """What `inject` was told (None: all of the model was trained) and the tensors.

    Raises ValueError naming the file, where its settings, shapes or backbone are not those of `m`."""
    stored, metadata = files.read_tensors(file)
    said = files.parse_json(metadata.get("sibo", "null"), f"{file}, its settings")
    known = {"backbone", *placement.Settings.__dataclass_fields__}
    if not isinstance(said, dict) or not {"method"} <= said.keys() <= known:
        raise ValueError(f"{file}: found settings {files.quoted(said)}, expected those of sibo.inject")
    backbone = said.pop("backbone", None)
    settings, widths = getattr(m, "sibo", None), {}
    if not settings and said["method"] != "full":
        try:
            where = placement.place(m, placement.Settings(**said))
        except ValueError as e:
            raise ValueError(f"{file}: found settings {files.quoted(said)}, unfit for {type(m).__name__}: {e}") from e
        settings, widths = where.settings, where.widths
    if settings and (ours := json.loads(json.dumps(asdict(settings)))) != said:
        key = next(k for k, v in ours.items() if k not in said or said[k] != v)
        found = f"{key}={files.quoted(said[key])}" if key in said else f"without {key}"
        raise ValueError(f"{file}: found settings {found}, expected the model's own {key}={ours[key]!r}")
    shapes = {_plain(name): tuple(t.shape) for name, t in stored.items()}
    for name, width in widths.items():  # said before `inject` makes them, as a few bytes can ask for any rank
        expected = (settings.rank if settings.method == "lora" else settings.bottleneck, width)
        if (shape := shapes.get(_plain(f"{name}.down"), "none")) != expected:
            raise ValueError(f"{file}: tensor '{name}.down': found {shape}, expected {expected}")
    if other := backbone and _unlike(backbone, m):
        raise ValueError(f"{file}: found an adapter for another backbone ({other}); load the one it was trained on")
    return settings, stored


def _plain(name: str) -> str:
    """The name without the wrappers around it: one target may lie inside another."""
    return name.replace(".base.", ".")


def _fingerprint(m: nn.Module) -> dict:
    """What tells a frozen model from others: its settings, and some values of some of its frozen tensors (those kept in
    fewer bits left out)."""
    frozen = {_plain(n): p for n, p in m.named_parameters() if not p.requires_grad and p.is_floating_point()}
    names = list(frozen)[::max(1, len(frozen) // 8)]
    return {"config": _config(m), "dtype": str(frozen[names[0]].dtype) if names else None,
            "values": {n: _some(frozen[n]) for n in names}}


def _config(m: nn.Module) -> dict:
    c = getattr(m, "config", None)  # transformers' own, which has a to_dict, knows paths and versions too
    return json.loads(json.dumps(asdict(c))) if is_dataclass(c) and not hasattr(c, "to_dict") else {}


def _some(p: Tensor) -> list[float]:
    flat = parallel.full_tensor(p.detach()).flatten()
    return flat[::max(1, len(flat) // 64)][:64].tolist()


def _unlike(expected: dict, m: nn.Module) -> str | None:
    """How `m` differs from the model of a fingerprint, or None: in a setting, or in a value (of another dtype: by more
    than rounding to bfloat16 explains)."""
    if not isinstance(expected, dict) or not all(isinstance(expected.get(k), dict) for k in ("config", "values")):
        return f"described as {files.quoted(expected)}"
    for key, found in _config(m).items() if expected["config"] else ():
        value = expected["config"].get(key)
        numbers = isinstance(value, float) and isinstance(found, float)
        if found != value and not (numbers and math.isclose(found, value, rel_tol=1e-6)):
            return f"{key} is {found}, not {files.quoted(value)}"
    parameters = {_plain(n): p for n, p in m.named_parameters()}
    for name, values in expected["values"].items():
        if name not in parameters:
            return f"it has no tensor {files.quoted(name)}"
        p = parameters[name]
        rtol = 0.0 if expected.get("dtype") == str(p.dtype) else 2.0**-7
        numbers = isinstance(values, list) and all(type(v) is float for v in values)
        if p.is_floating_point() and not (numbers and len(values) == len(some := _some(p)) and
                                          np.allclose(some, values, rtol, 0.01 * rtol)):
            return f"the values of {name} are others"
    return None
