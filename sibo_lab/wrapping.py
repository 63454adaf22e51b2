"""A module that stands in for another one, whatever calls it or reads its attributes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def reads(args: tuple, kwargs: dict) -> int | str:
    """Where the tensor stands that a module reads: its first argument, else a keyword of a usual name, else the only
    one of floats. RuntimeError where that leaves several."""
    if args:
        return 0
    floats = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    named = [k for k in ("hidden_states", "x", "input", "inputs", "hidden", "h", "src") if k in kwargs]
    if not named and len(floats) != 1:
        raise RuntimeError(f"expected one tensor, or a keyword called hidden_states, got {floats}")
    return [*named, *floats][0]


class Wrapper(nn.Module):
    """Computes adapt(h, base) of h, what `base` would read; of a tuple that `base` returns, the first is its output.
    `base` is set last: what others read or set then, and this has not, is of the module that it wraps."""

    off = False  # True: only what the module itself computes

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("base"), name)
        return Unread.of(value, self.name) if name == "weight" and isinstance(value, Tensor) else value

    def __setattr__(self, name: str, value: object) -> None:
        base = vars(self).get("_modules", {}).get("base")
        mine = hasattr(type(self), name) or any(name in vars(self)[k] for k in ("_parameters", "_modules"))
        if base is None or mine or name in vars(self) or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def adapt(self, h: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError

    def forward(self, *args, **kwargs):
        if self.off:
            return self.base(*args, **kwargs)
        if self.training and torch.is_grad_enabled() and self.down is not None and not self.down.requires_grad:
            raise RuntimeError(f"{self.name}: expected to be trained, got frozen, as peft's get_peft_model does; "
                               "call eval(), or make its parameters require gradients")
        key, outputs = reads(args, kwargs), []

        def base(h: Tensor) -> Tensor:
            outputs.append(self.base(h, *args[1:], **kwargs) if args else self.base(**kwargs | {key: h}))
            out = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            if not isinstance(out, Tensor):
                raise TypeError(f"{self.name}: expected it to return a tensor, or a tuple, got a {type(out).__name__}")
            return out

        out = self.adapt(args[0] if args else kwargs[key], base)
        if not isinstance(outputs[0], tuple):
            return out
        return getattr(outputs[0], "_make", tuple)((out, *outputs[0][1:]))


class Unread(Tensor):
    """A wrapped module's weight, to be looked at, but not computed with, which would pass by what was put on it."""

    @classmethod
    def of(cls, weight: Tensor, name: str) -> "Unread":
        weight = weight.detach().as_subclass(cls)
        weight.of_module = name
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs or {})
        if not any(isinstance(x, Tensor) for x in (out if isinstance(out, tuple) else (out,))):
            return out  # its size, dtype, device …
        name = next(getattr(x, "of_module", "?") for x in args if isinstance(x, cls))
        if func.__name__ == "__get__":  # its data, its transpose
            return cls.of(out, name)
        raise RuntimeError(f"{name}: expected to be called, got its weight in {func.__name__}, which passes by what "
                           "was put on it; adapt another module")


def uncompiled(m: nn.Module) -> nn.Module:
    """What torch.compile wrapped: it hands attributes through, but not names."""
    return getattr(m, "_orig_mod", m)


def injected(m: nn.Module) -> nn.Module:
    """`m`, uncompiled. ValueError where it has adapters, but those of a module that it holds, or is a part of."""
    m = uncompiled(m)
    if "sibo" not in vars(m) and any(isinstance(x, Wrapper) for x in m.modules()):
        inner = next((n for n, x in m.named_modules() if "sibo" in vars(x)), None)
        raise ValueError(f"{type(m).__name__}: expected the module that was injected, got " + (
            "a part of it; pass the whole" if inner is None else f"one around it; pass its {inner!r}"))
    return m


def swap(m: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Puts the values of `new` in the place of its keys, under every name that they have in `m`."""
    for owner in list(m.modules()):
        for name, child in owner._modules.items():
            if child in new:
                owner._modules[name] = new[child]
