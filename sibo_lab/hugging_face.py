"""What transformers' `save_pretrained`, and with it its Trainer, writes of an adapted model: what `sibo.load` reads.

Left alone it writes the wrapped weights under names that `from_pretrained` does not know, and draws anew at random."""

import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sibo_lab import adapter_file, files, parallel
from sibo_lab.wrapping import Wrapper


def guard(m: nn.Module) -> None:
    """Gives `m`, and each transformers model in it, the `save_pretrained` that fits what is adapted in it now."""
    for x in m.modules():
        vars(x).pop("save_pretrained", None)
        if hasattr(type(x), "save_pretrained") and any(isinstance(y, Wrapper) for y in x.modules()):
            x.save_pretrained = partial(save_adapter if x is m and m.sibo_before else refuse, x)


def save_adapter(m: nn.Module, save_directory: str | Path, *, is_main_process: bool = True,
                 state_dict: dict | None = None, push_to_hub: bool = False, **_) -> None:
    """Writes adapter.safetensors, for `sibo.load`, and the trained tensors as model.safetensors, from which Trainer
    resumes and takes its best model. `from_pretrained` refuses the folder: by its config.json and, where that is not
    read, by a weight of no size. ValueError for tensors that `m` does not have, or to push."""
    if unknown := sorted((state_dict or {}).keys() - m.state_dict().keys()):
        raise ValueError(f"save_pretrained: expected tensors of the adapted {type(m).__name__}, got "
                         f"{files.quoted(unknown[0])}; inject the whole model, then its new parts are saved")
    if push_to_hub:
        raise ValueError("push_to_hub: expected a whole model, got an adapted one; upload its folder instead")
    folder = Path(save_directory)
    adapter_file.write(folder / "adapter.safetensors", m)
    trained = {n: parallel.full_tensor(p.detach()) for n, p in m.named_parameters() if p.requires_grad}
    plain = {n.replace(".base.", ".") for n, _ in m.named_parameters()} - dict(m.named_parameters()).keys()
    if is_main_process:
        config = json.loads(m.config.to_json_string()) | {"transformers_weights": "none here: use sibo.load"}
        files.write(folder / "config.json", json.dumps(config, indent=2) + "\n")
        refused = {n: torch.empty(0) for n in sorted(plain)[:1]}
        files.write_tensors(folder / "model.safetensors", trained | refused, {"format": "pt"})


def refuse(m: nn.Module, *_, **__) -> None:
    raise ValueError(f"save_pretrained: expected a model whose weights are all in place, got a {type(m).__name__} with "
                     "layers that read h0, which transformers would draw at random; sibo.save the whole model before "
                     "sibo.merge")
