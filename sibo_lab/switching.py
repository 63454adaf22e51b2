"""The method switched: off for a while, to another λ, or taken out; and what it did to a model, in words."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sibo_lab.stacks import find_all, patterns
from sibo_lab.wrapping import swap


@dataclass
class Before:
    """What `inject` changed in a model, beside the layers it put in."""

    trained: list[str]  # the parameters that learned
    heads: dict[str, Tensor]  # copies of those that are trained whole
    layers: list[nn.Module] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, m: nn.Module, whole: tuple[str, ...]) -> "Before":
        heads = {id(p) for n in find_all(m, whole) for p in m.get_submodule(n).parameters()}
        return cls([n for n, p in m.named_parameters() if p.requires_grad],
                   {n: p.detach().clone() for n, p in m.named_parameters() if id(p) in heads})


def require_whole(m: nn.Module) -> None:
    """ValueError for a model that cannot be adapted: it is already, or its weights are elsewhere."""
    name, modules = type(m).__name__, dict(m.named_modules())
    if hasattr(m, "sibo"):
        raise ValueError(f"{name}: expected a model not injected yet, got {m.sibo}; sibo.remove it first")
    for n, x in modules.items():
        if "peft" in (type(x).__module__.partition(".")[0], *vars(x).keys() & {"peft"}):
            raise ValueError(f"{name}: expected a model without adapters, got peft's at {n!r}, which would freeze; "
                             "merge_and_unload() them, or load the model again")
        if getattr(getattr(x, "_hf_hook", None), "offload", False) or any(p.is_meta for p in x.parameters(False)):
            raise ValueError(f"{name}: expected its weights in memory, got offloaded or meta ones at {n!r}; load it "
                             "whole, or quantised")


def layers(m: nn.Module) -> list[nn.Module]:
    """The adapters or LoRA of an injected model. ValueError if it is not injected, or merged."""
    if getattr(m, "sibo_before", None) is None:
        raise ValueError(f"{type(m).__name__}: expected an injected model, got one that is "
                         f"{'merged' if hasattr(m, 'sibo') else 'not injected'}")
    return m.sibo_before.layers


@contextmanager
def disabled(m: nn.Module) -> Iterator[nn.Module]:
    """Inside, `m` is the frozen model, its heads as they were too; for all threads. ValueError if not injected."""
    inside, heads = layers(m), {n: m.get_parameter(n) for n in m.sibo_before.heads}
    trained, off = {n: p.data for n, p in heads.items()}, [x.off for x in inside]
    try:
        for x in inside:
            x.off = True
        for n, p in heads.items():
            p.data = m.sibo_before.heads[n].to(p)
        yield m
    finally:
        for x, was in zip(inside, off, strict=True):
            x.off = was
        for n, p in heads.items():
            p.data = trained[n]


def set_lam(m: nn.Module, lam: float) -> nn.Module:
    """Sets λ, in [0, 1), of all modules that get h0, in place, and returns `m`. A learned λ goes on from there.
    ValueError for another number, or where nothing gets h0."""
    mixing, settings = [x for x in layers(m) if x.residual], replace(m.sibo, lam=lam)
    if not mixing:
        raise ValueError(f"{type(m).__name__}: expected modules that get h0, got the plain method; inject with lam > 0")
    m.sibo = settings
    for x in mixing:
        x.lam_start = lam
        if x.lam_logit is not None:
            x.lam_logit.data.fill_(math.log(lam / (1 - lam)))
    return m


@torch.no_grad()
def remove(m: nn.Module) -> nn.Module:
    """Takes everything out again, in place: `m` as it was before `inject`, bit for bit. ValueError if it is merged."""
    swap(m, {x: x.base for x in layers(m)})
    for hook in m.sibo_before.hooks:
        hook.remove()
    for n, p in m.named_parameters():
        p.requires_grad_(n in m.sibo_before.trained)
        if n in m.sibo_before.heads:
            p.copy_(m.sibo_before.heads[n])
    del m.sibo, m.sibo_before
    return m


def summary(m: nn.Module) -> str:
    """Which modules are adapted, which of them get h0, what else is trained, and how many parameters. For printing."""
    inside, s, modules = layers(m), m.sibo, dict(m.named_modules())
    named = lambda found: ", ".join(patterns(modules, [x.name for x in found])) or "none"  # noqa: E731
    trained, total = (sum(p.numel() for p in m.parameters() if p.requires_grad or every) for every in (False, True))
    size = f"rank {s.rank}, alpha {s.alpha:g}" if s.method == "lora" else f"bottleneck {s.bottleneck}, side {s.side}"
    mixing = [x for x in inside if x.residual]
    return "\n".join([
        f"{type(m).__name__}: {s.method}, {size}, λ = {s.lam:g}{', learned' * s.learn_lam}",
        f"adapted: {len(inside)} modules ({named(inside)})", f"get h0:  {len(mixing)} modules ({named(mixing)})",
        f"whole:   {', '.join(s.modules_to_save) or 'none'}",
        f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})"])
