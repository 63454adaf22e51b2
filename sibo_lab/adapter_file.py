"""One file of what was trained: its tensors, the settings of `sibo.inject`, and samples of the backbone.

The official code has λ repeated by hand and takes any backbone of that shape; here what does not fit is refused."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sibo_lab import files, fingerprint, parallel
from sibo_lab.files import quoted
from sibo_lab.fingerprint import plain
from sibo_lab.placement import place
from sibo_lab.settings import Settings
from sibo_lab.stacks import is_embedding

SAMPLE, FORMAT = ".frozen.", 2  # no parameter's name begins so; since 2, h0= names the module that reads h0


def saved(m: nn.Module) -> dict[str, Tensor]:
    """What is trained in `m`, and the buffers of its heads and batch norms, by name."""
    before = getattr(m, "sibo_before", None)
    state = before.state if before else ()
    tensors = {n: p for n, p in m.named_parameters() if p.requires_grad}
    tensors |= {n: b for n, b in m.named_buffers() if plain(n) in state and n in m.state_dict()}
    return {n.replace("_orig_mod.", ""): t for n, t in tensors.items()}  # which torch.compile puts in


def require_on(m: nn.Module, call: str) -> None:
    """Inside of sibo.disabled heads hold other values, which go at its end."""
    before = getattr(m, "sibo_before", None)
    if before and before.depth:
        raise ValueError(f"{type(m).__name__}: expected the method to be on, got it disabled; {call} after "
                         "sibo.disabled")


def write(file: Path, m: nn.Module, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Writes what is trained in `m` (or `given` instead, by name), and samples of its backbone; returns the former.
    ValueError where nothing is trained."""
    trained = {n: parallel.full_tensor((given or {}).get(n, p.detach())) for n, p in saved(m).items()}
    if not any(p.requires_grad for p in m.parameters()):
        raise ValueError(f"{type(m).__name__}: expected trained tensors, got none; save before merge")
    samples = {SAMPLE + n: t for n, t in fingerprint.samples_of(m).items()}
    require_on(m, "save")
    before = getattr(m, "sibo_before", None)
    if frozen := [x.name for x in before.layers if not x.down.requires_grad] if before else []:
        raise ValueError(f"{frozen[0]}: expected to be trained, got frozen, as peft's get_peft_model does")
    spec = _spec(getattr(m, "sibo", None)) | {"backbone": fingerprint.config_of(m), "format": FORMAT}
    if parallel.rank() == 0:
        files.write_tensors(file, trained | samples, {"sibo": json.dumps(spec)})
    return trained


def read(file: Path, m: nn.Module) -> tuple[Settings | None, dict[str, Tensor]]:
    """The settings (None: all of `m` was trained) and the tensors. ValueError where they do not fit `m`."""
    require_on(m, "load")
    stored, metadata = files.read_tensors(file)
    spec = files.parse_json(metadata.get("sibo", "{}"), f"{file}, its settings")
    if not isinstance(spec, dict) or not spec.keys() <= {"backbone", "format", *Settings.__dataclass_fields__}:
        raise ValueError(f"{file}: expected settings of sibo.inject, got {quoted(spec)}")
    samples = {n.removeprefix(SAMPLE): stored.pop(n) for n in list(stored) if n.startswith(SAMPLE)}
    try:
        config, known = spec.pop("backbone", {}), spec.pop("format", 1)
        if known not in (1, FORMAT):
            raise ValueError(f"expected a file of format 1 or {FORMAT}, got {quoted(known)}; a newer version wrote it")
        if "values" in config:  # as files held them until November 2026
            dtype, old = getattr(torch, str(config["dtype"]).removeprefix("torch."), None), config["values"]
            samples, config = {n: torch.tensor(v, dtype=dtype) for n, v in old.items()}, config["config"]
        if spec.get("h0") and known < 2 and not is_embedding(m.get_submodule(spec["h0"])):
            raise ValueError(f"expected an h0 that a module reads, got what {quoted(spec['h0'])} writes, as h0= meant "
                             "in format 1; train it again")
        settings, widths = getattr(m, "sibo", None), {}
        if not settings and spec.get("method") != "full":
            settings, widths, *_ = place(m, Settings(**spec))
        ours = json.loads(json.dumps(_spec(settings)))
        if settings:  # what older files lack
            spec = {"modules_to_save": ours.get("modules_to_save"), "lam_by_depth": Settings.lam_by_depth} | spec
        if wrong := [k for k in ours | spec if k not in ours or k not in spec or ours[k] != spec[k]]:
            raise ValueError(f"expected {wrong[0]}={ours.get(wrong[0])!r}, got {quoted(spec.get(wrong[0]))}")
        shapes = {plain(n): tuple(t.shape) for n, t in stored.items()}
        for name, (d_in, _) in widths.items():  # a few bytes can ask for any rank
            expected = (settings.rank if settings.method == "lora" else settings.bottleneck, d_in)
            if (shape := shapes.get(plain(f"{name}.down"), "none")) != expected:
                raise ValueError(f"tensor '{name}.down': expected {expected}, got {shape}")
        fingerprint.require_same(m, config, samples, set(shapes) if settings and known > 1 else None)
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as e:
        raise ValueError(f"{file}: malformed ({files.one_line(e)})") from e
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e
    return settings, {re.sub(r"\.logit$", ".lam_logit", n): t for n, t in stored.items()}  # its name until then

def _spec(settings: Settings | None) -> dict:
    """As place() leaves it, where λ was set to 0 afterwards."""
    return asdict(replace(settings, **{} if settings.lam else {"sibo_at": ()})) if settings else {"method": "full"}
