"""What transformers' `save_pretrained`, and with it its Trainer, writes of an adapted model: what `sibo.load` reads.

Left alone it writes the wrapped weights under names that `from_pretrained` does not know, and draws anew at random."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from sibo_lab import adapter_file, files
from sibo_lab.wrapping import Wrapper

SETTINGS = ".sibo"  # no parameter's name begins so


def guard(m: nn.Module) -> None:
    """Has `save_pretrained` of the transformers classes in `m` look for adapters first: the model that is saved may be
    one around `m`. What it does to other models stays as it was."""
    kinds = {kind for x in m.modules() for kind in type(x).__mro__ if "save_pretrained" in vars(kind)}
    for kind in kinds:
        if not hasattr(kind.save_pretrained, "sibo"):
            kind.save_pretrained = _guarded(kind.save_pretrained)


def _guarded(plain: Callable) -> Callable:
    @functools.wraps(plain)
    def save_pretrained(m: nn.Module, *args, **kwargs):
        adapted = any(isinstance(x, Wrapper) for x in m.modules())
        save = plain if not adapted else save_adapter if getattr(m, "sibo_before", None) else refuse
        return save(m, *args, **kwargs)

    save_pretrained.sibo = True
    return save_pretrained


def save_adapter(m: nn.Module, save_directory: str | Path, is_main_process: bool = True, state_dict: dict | None = None,
                 push_to_hub: bool = False, **_) -> None:
    """Writes adapter.safetensors, for `sibo.load`, and the trained tensors as model.safetensors, from which Trainer
    resumes and takes its best model. `from_pretrained` refuses the folder: by its config.json and, where that is not
    read, by a weight of no size. ValueError for tensors that `m` does not have, or to push."""
    if unknown := sorted((state_dict or {}).keys() - m.state_dict().keys()):
        raise ValueError(f"save_pretrained: expected tensors of the adapted {type(m).__name__}, got "
                         f"{files.quoted(unknown[0])}; inject the whole model, then its new parts are saved")
    if push_to_hub:
        raise ValueError("push_to_hub: expected a whole model, got an adapted one; upload its folder instead")
    folder = Path(save_directory)
    trained = adapter_file.write(folder / "adapter.safetensors", m, state_dict or {})
    if is_main_process:
        config = json.loads(m.config.to_json_string()) | {"transformers_weights": "none here: use sibo.load"}
        files.write(folder / "config.json", json.dumps(config, indent=2) + "\n")
        frozen = next(n for n, p in m.named_parameters() if not p.requires_grad).replace(".base.", ".")
        settings = torch.tensor(list(json.dumps(asdict(m.sibo)).encode()), dtype=torch.uint8)
        files.write_tensors(folder / "model.safetensors", trained | {frozen: torch.empty(0), SETTINGS: settings},
                            {"format": "pt"})


def adopt(m: nn.Module, state_dict: dict[str, Tensor], *_) -> None:
    """Completes what save_adapter wrote with the frozen weights that `m` has. ValueError if other settings made it."""
    if SETTINGS not in state_dict:
        return
    theirs, ours = json.loads(bytes(state_dict.pop(SETTINGS).tolist())), json.loads(json.dumps(asdict(m.sibo)))
    if wrong := [k for k in ours if ours[k] != theirs.get(k)]:
        raise ValueError(f"model.safetensors: expected {wrong[0]}={ours[wrong[0]]!r}, got {theirs.get(wrong[0])!r}")
    for name in [n for n, t in state_dict.items() if not t.numel()]:
        del state_dict[name]
    mine = adapter_file.saved(m)
    state_dict |= {n: t for n, t in m.state_dict().items() if n not in mine}


def refuse(m: nn.Module, *_, **__) -> None:
    raise ValueError(f"save_pretrained: expected a model whose weights are all in place, got a {type(m).__name__} with "
                     "layers that transformers would draw at random; sibo.save what was injected, before sibo.merge")
