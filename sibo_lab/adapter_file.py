"""One file of what was trained: its tensors, the settings of `sibo.inject`, and samples of the backbone.

The official code has λ repeated by hand and takes any backbone of that shape; here what does not fit is refused."""

import json
import math
import re
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sibo_lab import files, parallel
from sibo_lab.files import quoted
from sibo_lab.placement import place
from sibo_lab.settings import Settings
from sibo_lab.stacks import is_embedding

SAMPLE = ".frozen."  # no parameter's name begins so
NO_NUMBERS = re.compile(r"_.*|.*(dropout|pdrop|version|dtype|label|token|path|output|cache|initializer|loss_coef).*|"
                        "architectures|problem_type|quantization_config|auto_map|return_dict|vocab_size")


def write(file: Path, m: nn.Module, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Writes what is trained in `m` (or `given` instead, by name), and samples of its backbone; returns the former.
    ValueError where nothing is trained."""
    trained = {n: parallel.full_tensor((given or {}).get(n, p.detach())) for n, p in m.named_parameters()
               if p.requires_grad}
    if not trained:
        raise ValueError(f"{type(m).__name__}: expected trained tensors, got none; save before merge")
    others = {_plain(n): p for n, p in m.named_parameters() if not p.requires_grad and p.is_floating_point()}
    samples = {SAMPLE + n: _sample(others[n]) for n in list(others)[::len(others) // 8 + 1]}
    before = getattr(m, "sibo_before", None)
    if frozen := [x.name for x in before.layers if not x.down.requires_grad] if before else []:
        raise ValueError(f"{frozen[0]}: expected to be trained, got frozen, as peft's get_peft_model does")
    spec = _spec(getattr(m, "sibo", None))
    if parallel.rank() == 0:
        metadata = {"sibo": json.dumps(spec | {"backbone": _config(m)}), "h0": "input"}  # of the module that h0= names
        files.write_tensors(file, trained | samples, metadata)
    return trained


def read(file: Path, m: nn.Module) -> tuple[Settings | None, dict[str, Tensor]]:
    """The settings (None: all of `m` was trained) and the tensors. ValueError where they do not fit `m`."""
    stored, metadata = files.read_tensors(file)
    spec = files.parse_json(metadata.get("sibo", "{}"), f"{file}, its settings")
    if not isinstance(spec, dict) or not spec.keys() <= {"backbone", *Settings.__dataclass_fields__}:
        raise ValueError(f"{file}: expected settings of sibo.inject, got {quoted(spec)}")
    samples = {n.removeprefix(SAMPLE): stored.pop(n) for n in list(stored) if n.startswith(SAMPLE)}
    try:
        config = spec.pop("backbone", {})
        if "values" in config:  # as files held them until November 2026
            dtype, old = getattr(torch, str(config["dtype"]).removeprefix("torch."), None), config["values"]
            samples, config = {n: torch.tensor(v, dtype=dtype) for n, v in old.items()}, config["config"]
        if spec.get("h0") and "h0" not in metadata and not is_embedding(m.get_submodule(spec["h0"])):
            raise ValueError(f"expected an h0 that a module reads, got what {quoted(spec['h0'])} writes, as h0= meant "
                             "until November 2026; train it again")
        settings, widths = getattr(m, "sibo", None), {}
        if not settings and spec.get("method") != "full":
            settings, widths, _ = place(m, Settings(**spec))
        ours = json.loads(json.dumps(_spec(settings)))
        spec = {"modules_to_save": ours.get("modules_to_save")} | spec if settings else spec  # older files lack it
        if wrong := [k for k in ours | spec if k not in ours or k not in spec or ours[k] != spec[k]]:
            raise ValueError(f"expected {wrong[0]}={ours.get(wrong[0])!r}, got {quoted(spec.get(wrong[0]))}")
        shapes = {_plain(n): tuple(t.shape) for n, t in stored.items()}
        for name, (d_in, _) in widths.items():  # a few bytes can ask for any rank
            expected = (settings.rank if settings.method == "lora" else settings.bottleneck, d_in)
            if (shape := shapes.get(_plain(f"{name}.down"), "none")) != expected:
                raise ValueError(f"tensor '{name}.down': expected {expected}, got {shape}")
        _require_backbone(m, config, samples)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as e:
        raise ValueError(f"{file}: malformed ({files.one_line(e)})") from e
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e
    return settings, {re.sub(r"\.logit$", ".lam_logit", n): t for n, t in stored.items()}  # its name until then


def _spec(settings: Settings | None) -> dict:
    """As place() leaves it, where λ was set to 0 afterwards."""
    return asdict(replace(settings, **{} if settings.lam else {"sibo_at": ()})) if settings else {"method": "full"}


def _plain(name: str) -> str:  # one target may lie inside another
    return name.replace(".base.", ".")


def _config(m: nn.Module) -> dict:
    """What changes the model's numbers: of transformers' config not the paths, versions and ids."""
    c = getattr(m, "config", None)
    if hasattr(c, "to_dict"):
        return {k: v for k, v in c.to_dict().items() if not NO_NUMBERS.fullmatch(k)}
    return asdict(c) if is_dataclass(c) else {}


def _sample(p: Tensor) -> Tensor:  # 64 values, spread over all
    flat = parallel.full_tensor(p.detach()).flatten()
    return flat[::max(1, len(flat) // 64)][:64].clone()


def _require_backbone(m: nn.Module, config: dict, samples: dict[str, Tensor]) -> None:
    """ValueError where `m` has another setting, or a value that rounding to its dtype does not explain."""
    for key, got in json.loads(json.dumps(_config(m))).items() if config else ():
        expected = config.get(key, got if hasattr(m.config, "to_dict") else None)  # theirs gain keys with each version
        if got != expected and not (type(got) is type(expected) is float and math.isclose(got, expected, rel_tol=1e-6)):
            raise ValueError(f"another backbone: expected {key} {quoted(expected)}, got {got}")
    parameters = {_plain(n): p for n, p in m.named_parameters()}
    for name, expected in samples.items():
        if (p := parameters.get(name)) is None:
            raise ValueError(f"another backbone: expected a tensor {quoted(name)}, got none")
        got, rtol = _sample(p), 0.0 if expected.dtype == p.dtype else 2.0**-7  # of bfloat16
        if p.is_floating_point() and not (got.shape == expected.shape and torch.allclose(
                got.double().cpu(), expected.double(), rtol, 0.01 * rtol)):  # quantised ones cannot be compared
            raise ValueError(f"another backbone: expected other values in {name}")
