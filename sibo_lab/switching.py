"""The method switched: off for a while, to another λ, or taken out; and what it did to a model, in words."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from threading import Lock

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sibo_lab.fingerprint import plain
from sibo_lab.stacks import find_all, is_affine, patterns
from sibo_lab.wrapping import Wrapper, injected, swap, uncompiled

LOCK = Lock()  # of depth


@dataclass
class Before:
    """What `inject` found in a model, and what it put in."""

    trained: list[str]  # the parameters that learned
    state: dict[str, Tensor]  # copies of what now changes: heads, and the statistics of batch norms
    layers: list[nn.Module] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    now: dict[str, Tensor] | None = None  # while the method is disabled, its own values of `state`
    depth: int = 0  # how often it is, by whichever threads

    @classmethod
    def of(cls, m: nn.Module, whole: tuple[str, ...]) -> "Before":
        changing = {id(t) for n in find_all(m, whole) for t in m.get_submodule(n).state_dict(keep_vars=True).values()}
        changing |= {id(t) for x in m.modules() if isinstance(x, nn.modules.batchnorm._NormBase) for t in x.buffers()}
        return cls([plain(n) for n, p in m.named_parameters() if p.requires_grad],
                   {n: t.detach().clone() for n, t in named_tensors(m) if id(t) in changing})


def named_tensors(m: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((plain(n), t) for n, t in chain(m.named_parameters(), m.named_buffers()))


def require_whole(m: nn.Module) -> None:
    """ValueError for a model that cannot be adapted: it is already, or its weights are elsewhere."""
    name, modules = type(m).__name__, dict(m.named_modules())
    if hasattr(m, "sibo"):
        raise ValueError(f"{name}: expected a model not injected yet, got " + (
            f"one with {m.sibo.method}; sibo.remove it first" if m.sibo_before else "a merged one; load it again"))
    for n, x in modules.items():
        if hasattr(x, "sibo") or isinstance(x, Wrapper):
            raise ValueError(f"{name}: expected a model without adapters, got them at {n!r}; sibo.remove them first")
        if "peft" in (type(x).__module__.partition(".")[0], *vars(x).keys() & {"peft"}):
            raise ValueError(f"{name}: expected a model without adapters, got peft's at {n!r}, which would freeze; "
                             "merge_and_unload() them, or load the model again")
        if getattr(getattr(x, "_hf_hook", None), "offload", False) or any(p.is_meta for p in x.parameters(False)):
            raise ValueError(f"{name}: expected its weights in memory, got offloaded or meta ones at {n!r}; load it "
                             "whole, or quantised")
        if small := [p.dtype for p in x.parameters(False) if p.is_floating_point() and p.element_size() < 2]:
            raise ValueError(f"{name}: expected weights of 16 bits or more, or quantised to whole numbers, got "
                             f"{small[0]} at {n!r}; load it dequantised")


def require_foldable(loras: dict[str, nn.Module]) -> None:
    """ValueError for what the weights cannot hold, or what one product with h0 cannot serve."""
    devices = {}
    for n, x in loras.items():
        tanh, here = x.settings.method == "adapter", x.down.device
        if tanh or not is_affine(x.base):
            got = "an adapter, whose tanh is not linear" if tanh else "a quantised or computed one"
            raise ValueError(f"{n}: expected LoRA on a weight of 16 bits or more, to hold the fold, got {got}")
        h0 = x.residual if float(x.lam()) and not x.settings.frozen_too else None
        if h0 and here != (first := devices.setdefault(h0, here)):
            raise ValueError(f"{n}: expected it on {first}, as the others that read its h0, got it on {here}; load the "
                             "model on one device to merge it")


def layers(m: nn.Module) -> list[nn.Module]:
    """The adapters or LoRA of an injected model. ValueError if it is not injected, or merged."""
    if getattr(injected(m), "sibo_before", None) is None:
        raise ValueError(f"{type(m).__name__}: expected an injected model, got one that is "
                         f"{'merged' if hasattr(m, 'sibo') else 'not injected'}")
    return m.sibo_before.layers


@contextmanager
def disabled(m: nn.Module) -> Iterator[nn.Module]:
    """Inside, `m` is the frozen model, its heads as they were too, for all threads; `sibo.save` waits outside.
    ValueError if `m` is not injected."""
    inside, before, tensors = layers(m), m.sibo_before, dict(named_tensors(m))
    with LOCK:
        before.depth += 1
        if before.depth == 1:
            before.now = {n: tensors[n].data for n in before.state}
            for n, t in before.state.items():
                tensors[n].data = t.to(tensors[n], copy=True)
        for x in inside:
            x.off = True
    try:
        yield m
    finally:
        with LOCK:
            before.depth -= 1
            for n in before.state if not before.depth else ():
                tensors[n].data = before.now[n]
            for x in inside:
                x.off = before.depth > 0


def set_lam(m: nn.Module, lam: float) -> nn.Module:
    """Sets λ, in [0, 1), of all modules that get h0, in place, and returns `m`. A learned λ goes on from there.
    ValueError for another number, or where nothing gets h0."""
    mixing, settings = [x for x in layers(m) if x.residual], replace(m.sibo, lam=lam)
    if not mixing:
        raise ValueError(f"{type(m).__name__}: expected modules that get h0, got the plain method; inject with lam > 0")
    m.sibo = settings
    for x in mixing:
        x.lam_start = lam * x.share
        if x.lam_logit is not None:
            x.lam_logit.data.fill_(math.log(x.lam_start / (1 - x.lam_start)))
    return m


@torch.no_grad()
def remove(m: nn.Module) -> nn.Module:
    """Takes everything out again, in place: `m` as it was before `inject`, bit for bit. ValueError if it is merged,
    disabled, or of other sizes by now."""
    inside, before, tensors = layers(m), m.sibo_before, dict(named_tensors(m))
    for n, t in before.state.items():
        if before.depth or tensors[n].shape != t.shape:
            raise ValueError(f"{n}: expected {tuple(t.shape)}, not disabled, got {tuple(tensors[n].shape)}")
        tensors[n].copy_(t)
    swap(m, {x: x.base for x in inside})
    for hook in before.hooks:
        hook.remove()
    trained = set(before.trained)
    for n, p in m.named_parameters():
        p.requires_grad_(plain(n) in trained)
    del uncompiled(m).sibo, uncompiled(m).sibo_before
    return m


def summary(m: nn.Module) -> str:
    """Which modules are adapted, which of them get h0, what else is trained, and how many parameters. For printing."""
    inside, s, modules = layers(m), m.sibo, [plain(n) for n, _ in m.named_modules()]
    named = lambda found: ", ".join(patterns(modules, [plain(x.name) for x in found])) or "none"  # noqa: E731
    trained, total = (sum(p.numel() for p in m.parameters() if p.requires_grad or every) for every in (False, True))
    size = f"rank {s.rank}, alpha {s.alpha:g}" if s.method == "lora" else f"bottleneck {s.bottleneck}, side {s.side}"
    mixing = [x for x in inside if x.residual]
    lam = f"{s.lam:g}{f', {s.lam_by_depth}' * (s.lam_by_depth != 'even')}{', learned' * s.learn_lam}"
    return "\n".join([
        f"{type(uncompiled(m)).__name__}: {s.method}, {size}, λ = {lam}",
        f"adapted: {len(inside)} modules ({named(inside)})", f"get h0:  {len(mixing)} modules ({named(mixing)})",
        f"whole:   {', '.join(s.modules_to_save) or 'none'}",
        f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})"])
