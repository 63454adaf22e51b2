"""Which backbone an adapter was trained on: its configuration, and samples of its frozen weights."""

import json
import math
import re
from dataclasses import asdict, is_dataclass

import torch
from torch import Tensor, nn

from sibo_lab import parallel
from sibo_lab.files import quoted

NO_NUMBERS = re.compile(  # transformers' settings
    r"_(?!remove_final_layer_norm).*|.*((?<!token_)dropout|pdrop|version|dtype|label|token_(id|index)|tokenizer|"
    r"suppress_tokens|new_tokens|path|output_(\w*attentions|hidden_states|router_logits|past|retrieved|scores)|cache|initializer|"
    r"loss|layerdrop|mask_|apply_spec|(?<!attention_)chunk_?(size|wise)|ctc_).*|architectures|problem_type|"
    r"quantization_config|auto_map|return_dict|vocab_size")


def plain(name: str) -> str:  # one target may lie inside another
    return name.replace(".base.", ".").replace("_orig_mod.", "")


def is_outside(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def config_of(m: nn.Module) -> dict:
    """What changes the model's numbers: of transformers' config not the paths, versions and ids."""
    c = getattr(m, "config", None)
    if hasattr(c, "to_dict"):
        return _numbers(c.to_dict())
    return asdict(c) if is_dataclass(c) else {}


def _numbers(config: dict) -> dict:
    return {k: _numbers(v) if is_config(v) else v if not isinstance(v, float) or math.isfinite(v) else str(v)
            for k, v in config.items() if not NO_NUMBERS.fullmatch(k)}


def is_config(x: object) -> bool:  # of a part, such as text_config; other dicts, such as rope's, count as one value
    return isinstance(x, dict) and "model_type" in x


def samples_of(m: nn.Module) -> dict[str, Tensor]:
    """Of eight frozen tensors, spread over all, and of all outside of the blocks, where new heads stand."""
    frozen = {plain(n): p for n, p in m.named_parameters() if not p.requires_grad and p.is_floating_point()}
    known = {*list(frozen)[::len(frozen) // 8 + 1], *filter(is_outside, frozen)}
    return {n: _sample(p) for n, p in frozen.items() if n in known}


def _sample(p: Tensor) -> Tensor:  # 64 values, spread over all
    flat = parallel.full_tensor(p.detach()).flatten()
    return flat[::max(1, len(flat) // 64)][:64].clone()


def require_same(m: nn.Module, config: dict, samples: dict[str, Tensor], trained: set[str] | None) -> None:
    """ValueError where `m` has another setting, a value that rounding to its dtype does not explain, or, outside of its
    blocks, a tensor neither sampled nor `trained`, such as a new head (None: of a file that does not tell)."""
    if config:
        _require_settings(json.loads(json.dumps(config_of(m))), config, hasattr(m.config, "to_dict"))
    parameters = {plain(n): p for n, p in m.named_parameters()}
    for name, expected in samples.items():
        if (p := parameters.get(name)) is None:
            raise ValueError(f"another backbone: expected a tensor {quoted(name)}, got none")
        got, rtol = _sample(p), 0.0 if expected.dtype == p.dtype else 2.0**-7  # of bfloat16
        if p.is_floating_point() and not (got.shape == expected.shape and torch.allclose(
                got.double().cpu(), expected.double(), rtol, 0.01 * rtol)):  # quantised ones cannot be compared
            raise ValueError(f"another backbone: expected other values in {name}")
    new = {n for n, p in parameters.items() if is_outside(n) and p.is_floating_point()} - samples.keys()
    if trained is not None and (unknown := sorted(new - trained)):
        raise ValueError(f"another backbone: expected it without {quoted(unknown[0])}, which it was not trained with")


def _require_settings(ours: dict, theirs: dict, growing: bool, part: str = "") -> None:
    for key, got in ours.items():
        expected = theirs.get(key, got if growing else None)  # transformers' gain keys with each version
        if is_config(got) and is_config(expected):
            _require_settings(got, expected, growing, f"{part}{key}.")
        elif got != expected and not (
                type(got) is type(expected) is float and math.isclose(got, expected, rel_tol=1e-6)):
            raise ValueError(f"another backbone: expected {part}{key} {quoted(expected)}, got {got}")
