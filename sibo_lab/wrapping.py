"""A module that stands in for another one, whatever calls it or reads its attributes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def reads(args: tuple, kwargs: dict) -> int | str:
    """Where the tensor stands that a module reads: its first argument, else a keyword of a usual name, else the only
    one of floats. RuntimeError where that leaves several."""
    floats = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    named = [k for k in ("hidden_states", "x", "input", "inputs", "hidden", "h", "src") if k in kwargs]
    if not args and not named and len(floats) != 1:
        raise RuntimeError(f"expected one tensor, or a keyword called hidden_states, got {floats}")
    return 0 if args else [*named, *floats][0]


class Wrapper(nn.Module):
    """Computes adapt(h, base) of what `base` would read, h; of a tuple that `base` returns, the first is its output."""

    off = False  # on: only what the module itself computes

    def __init__(self, name: str, base: nn.Module):
        super().__init__()
        self.name, self.base = name, base

    def __getattr__(self, name: str):  # others read weight, in_features … of the module it wraps
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def adapt(self, h: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError

    def forward(self, *args, **kwargs):
        if self.off:
            return self.base(*args, **kwargs)
        if self.training and torch.is_grad_enabled() and self.down is not None and not self.down.requires_grad:
            raise RuntimeError(f"{self.name}: expected to be trained, got frozen, as peft's get_peft_model does; "
                               "call eval(), or make its parameters require gradients")
        key, rest = reads(args, kwargs), []

        def base(h: Tensor) -> Tensor:
            out = self.base(h, *args[1:], **kwargs) if args else self.base(**kwargs | {key: h})
            rest.append(out[1:] if isinstance(out, tuple) else None)
            return out if rest[0] is None else out[0]

        out = self.adapt(args[0] if args else kwargs[key], base)
        return out if rest[0] is None else (out, *rest[0])


def swap(m: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Puts the values of `new` in the place of its keys, under every name that they have in `m`."""
    for owner in list(m.modules()):
        for name, child in owner._modules.items():
            if child in new:
                owner._modules[name] = new[child]
