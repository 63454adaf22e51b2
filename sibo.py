"""SIBO: every adapter or LoRA module also sees the initial token representation h0. This file is the whole method.

      token embedding ──────► h0 ─────────────┬───────────────────────────┐
             │                                │ λ                         │ λ
      ┌──────┴─────┐           ┌──────────────┴──────────┐  ┌─────────────┴─────────────┐
      │ sub-layer  │ ── h ───► │ h̃ = (1−λ)h + λh0        │  │ h̃ = (1−λ)h + λh0          │
      └────────────┘   1−λ     │ h ← h̃ + f(h̃ Wdown)Wup   │  │ h ← hW + s·h̃ Wdown Wup    │
                               └─── Adapter-SIBO (4) ────┘  └────── LoRA-SIBO (5) ──────┘

Source: Wen, Zhang, Fang, "SIBO", Findings of ACL 2024 (arXiv 2402.11896); equation and section numbers are its own.
Where the authors' code departs from the paper, the paper is the default: the skip is mixed (theirs: skip="plain"), an
adapter stands on a sub-layer's output (theirs: side="in"), a missing h0 is an error (theirs: silently the plain
method), λ is read from the file with the weights (theirs: told by hand) and merging is exact (theirs: drops h0)."""

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from sibo_lab import adapter_file, fast, files, placement


class InitialResidual:
    """Carries h0 (B, T, d) through one forward pass. A plain object: no parameter, no buffer, nothing to shard."""

    h0 = low = down = None  # down, low: in a merged model all modules' A side by side, and h0 A, one slice a module
    running = False

    def clear(self, root, args):  # a pass that bypasses the source must not find the h0 of an earlier one
        self.h0, self.low, self.running = None, None, True

    def capture(self, source, args, output):
        if self.running:  # a call past the root would have nobody to clear and keep h0 for it: missing is safer
            self.h0 = output
            self.low = self.down and self.down(output).split(self.rank, -1)

    def keep(self, root, args, output):
        """Checkpointed blocks run forward again inside the backward, when a later pass may have left its h0 here: the
        first gradient to reach this pass's output puts this pass's h0 back. (A compiled graph holds h0 by value.)"""
        for t in () if torch.compiler.is_compiling() else tree_leaves(output):
            if isinstance(t, torch.Tensor) and t.requires_grad:
                t.register_hook(partial(self.put_back, self.h0))
        self.running = False

    def put_back(self, h0, grad):
        self.h0 = h0

    def __getstate__(self):  # a deepcopy leaves the activations behind
        return {k: v for k, v in vars(self).items() if k not in ("h0", "low")}


class SIBOLayer(nn.Module):
    """A module `base` of the model with a trained W_down, W_up and, where λ > 0, h0."""

    def __init__(self, name: str, base: nn.Module, d_in: int, d_out: int, lam: float, s: placement.Settings, residual, like):
        super().__init__()
        self.name, self.base, self.fixed, self.s, self.residual = name, base, lam, s, residual
        lora, dtype = s.method == "lora", torch.promote_types(like.dtype, torch.float32)
        r = s.rank if lora else s.bottleneck
        self.down = nn.Parameter(torch.empty(r, d_in, dtype=dtype, device=like.device))  # as nn.Linear stores it: x Wᵀ
        self.up = nn.Parameter(torch.zeros(d_out, r, dtype=dtype, device=like.device))
        start = torch.tensor([math.log(lam / (1 - lam))], device=like.device) if lam and s.learn_lam else None
        self.logit = nn.Parameter(start) if start is not None else None
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5)) if lora else nn.init.normal_(self.down, std=0.02)
        self.train(base.training)

    def lam(self) -> float | torch.Tensor:
        return self.fixed if self.logit is None else self.logit.sigmoid()

    def fit(self, h0: torch.Tensor | None, *shape: int) -> torch.Tensor:
        if h0 is None or h0.shape != shape:  # nothing is broadcast
            found = "missing" if h0 is None else tuple(h0.shape)
            raise RuntimeError(f"{self.name}: found h0 {found}, expected {shape}; call the whole model, with input_ids")
        return h0

    def mix(self, h: torch.Tensor) -> torch.Tensor:
        if not self.fixed:
            return h
        h0, lam = self.fit(self.residual.h0, *h.shape).to(h.dtype), self.lam()
        return torch.lerp(h, h0, lam if self.logit is None else lam.to(h.dtype))  # h̃ = (1−λ)h + λh0


class Adapter(SIBOLayer):
    def adapt(self, h: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(h)
        skip = mixed if self.s.skip == "mixed" else h
        return skip + fast.mixed_linear(torch.tanh(fast.mixed_linear(mixed, self.down)), self.up)  # Eq. (4); λ = 0: Eq. (1)

    def forward(self, h: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.s.side == "in":
            return self.base(self.adapt(h), *args, **kwargs)
        if self.s.side == "parallel":  # He et al. 2022; the paper calls its idea general
            return self.base(h, *args, **kwargs) + fast.mixed_linear(torch.tanh(fast.mixed_linear(self.mix(h), self.down)), self.up)
        return self.adapt(self.base(h, *args, **kwargs))


class LoRA(SIBOLayer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(h)
        frozen = self.base(mixed if self.s.frozen_too else h)  # Table 6: should W see h̃ too?
        low = fast.mixed_linear(fast.dropout(mixed, self.s.dropout, self.training), self.down)
        return frozen + self.s.alpha / self.s.rank * fast.mixed_linear(low, self.up)  # Eq. (5); λ = 0: Eq. (2)


class FoldedLoRA(nn.Module):
    """A merged LoRA-SIBO, one product: h[W + s(1−λ)AB] + (h0 A)[λsB] = [h | h0 A] · [W + s(1−λ)AB ; λsB], where
    A = W_down, B = W_up. With frozen_too: h̃[W + sAB]."""

    def __init__(self, lora: LoRA, index: int):
        super().__init__()
        self.base, self.lora, self.index = lora.base, lora, index
        lora.base = lora.down = lora.up = None  # what is left of it: h0's way in, and λ

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.lora.s.frozen_too:
            return self.base(self.lora.mix(h))
        lows = self.lora.residual.low
        low = self.lora.fit(lows and lows[self.index], *h.shape[:-1], self.lora.s.rank)
        return self.base(torch.cat((h, low.to(h.dtype)), -1))


def inject(m: nn.Module, method: str = "lora", lam: float = 0.2, **settings) -> nn.Module:
    """Freezes `m`, puts adapters or LoRA on it in place as `Settings` say (these are its keywords), and returns it.

    A child called `classifier` is trained whole. Raises ValueError for what does not fit, before `m` is touched."""
    s = placement.Settings(method, lam, **settings)
    if hasattr(m, "sibo"):
        raise ValueError(f"{type(m).__name__}: found it injected already with {m.sibo}; build or load it anew")
    where, residual = placement.place(m, s), InitialResidual()
    m.sibo = where.settings
    m.requires_grad_(False)
    modules = dict(m.named_modules())  # as they stand now: a target may lie inside another
    for name, width in where.widths.items():
        base, (owner, _, leaf) = modules[name], name.rpartition(".")
        kind, d_out = (LoRA, base.out_features) if method == "lora" else (Adapter, width)
        d_out = base.out_features if s.side == "parallel" and isinstance(base, nn.Linear) else d_out
        like = next(base.parameters(), next(m.parameters()))
        new = kind(name, base, width, d_out, lam if name in where.mixed else 0.0, s, residual, like)
        setattr(modules[owner], leaf, new)
    if where.mixed:  # bound methods: deepcopy binds them to the copy, where a closure would go on filling the original
        m.register_forward_pre_hook(residual.clear)
        m.get_submodule(m.sibo.h0).register_forward_hook(residual.capture)
        m.register_forward_hook(residual.keep)
    if isinstance(getattr(m, "classifier", None), nn.Module):
        m.classifier.requires_grad_(True)
    return m


@torch.no_grad()
def merge(m: nn.Module) -> nn.Module:
    """Folds LoRA and LoRA-SIBO into the weights, in place, exactly (dropout off); a second call changes nothing.

    s·h̃AB = h·[s(1−λ)AB] + λs(h0 A)B: the first term joins W, added in float32 and rounded once, the second stays, and
    h0 A is one product for all modules. λ = 0 leaves the plain nn.Linear. ValueError for adapters."""
    if adapters := [n for n, x in m.named_modules() if isinstance(x, Adapter)]:
        raise ValueError(f"{adapters[0]}: an adapter is not linear in h (tanh), so no weight holds it: only LoRA folds")
    downs, found = [], [(n, x) for n, x in m.named_modules() if isinstance(x, LoRA) and x.base is not None]
    for name, x in found:
        if not x.base.weight.is_floating_point():
            raise ValueError(f"{name}: found a quantised weight ({x.base.weight.dtype}), which cannot hold the fold; "
                             "load the backbone in 16 bits (no --base-bits), the adapter onto it, and merge there")
    for name, x in found:
        lam, scale, W = float(x.lam()), x.s.alpha / x.s.rank, x.base.weight
        share = scale * (1 if x.s.frozen_too else 1 - lam)
        folded = W.to(x.up.dtype) + share * x.up @ x.down
        if lam and not x.s.frozen_too:
            folded = torch.cat((folded, lam * scale * x.up), 1)  # (out, in + r)
            x.base.in_features += x.s.rank
            downs.append(x.down.to(W.dtype))
        x.base.weight = nn.Parameter(folded.to(W.dtype), requires_grad=False)
        m.set_submodule(name, FoldedLoRA(x, len(downs) - 1) if lam else x.base)
    if downs:
        x.residual.down = m.h0_down = nn.Linear(downs[0].shape[1], sum(map(len, downs)), bias=False, device="meta")
        m.h0_down.weight, x.residual.rank = nn.Parameter(torch.cat(downs)), x.s.rank
    return m.requires_grad_(False)


def save(m: nn.Module, folder: str | Path) -> None:
    """Writes folder/adapter.safetensors: exactly what is trained, what `inject` was told, and what tells this backbone
    from others. ValueError where nothing is trained."""
    adapter_file.write(Path(folder, "adapter.safetensors"), m)


def load(m: nn.Module, folder: str | Path) -> nn.Module:
    """Injects as folder/adapter.safetensors says (where `m` is not injected yet), loads it strictly, and returns `m`.

    Raises ValueError naming the file and a missing, unexpected or mis-shaped tensor, or settings or a backbone that do
    not fit."""
    file = Path(folder, "adapter.safetensors")
    settings, stored = adapter_file.read(file, m)
    if settings is None:
        m.requires_grad_(True)
    elif not hasattr(m, "sibo"):
        inject(m, **vars(settings))
    files.assign({n: p for n, p in m.named_parameters() if p.requires_grad}, stored, file)
    return m
