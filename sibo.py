"""SIBO: every adapter or LoRA module also sees the initial token representation h0. This file is the whole method.

      token embedding ──────► h0 ─────────────┬───────────────────────────┐
             │                                │ λ                         │ λ
      ┌──────┴─────┐           ┌──────────────┴──────────┐  ┌─────────────┴─────────────┐
      │ sub-layer  │ ── h ───► │ h̃ = (1−λ)h + λh0        │  │ h̃ = (1−λ)h + λh0          │
      └────────────┘   1−λ     │ h ← h̃ + f(h̃ Wdown)Wup   │  │ h ← hW + s·h̃ Wdown Wup    │
                               └─── Adapter-SIBO (4) ────┘  └────── LoRA-SIBO (5) ──────┘

Source: Wen, Zhang, Fang, "SIBO", Findings of ACL 2024 (arXiv 2402.11896), with its equation numbers. The authors' code
leaves the skip unmixed (here skip="plain"), adapts inputs (side="in"), runs the plain method where h0 is missing (here
an error), needs λ repeated by hand (here saved), and merges without h0 (here exact)."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibo_lab import adapter_file, files
from sibo_lab.placement import place
from sibo_lab.settings import Settings


class InitialResidual:
    """Carries h0 (B, T, d) through one forward pass. A plain object: no parameter, no buffer, nothing to shard."""
    running, h0, down, low = False, None, None, None  # down, low: in a merged model all A, and h0 A by module

    def begin(self, root, args):
        self.h0, self.low, self.running = None, None, True

    def capture(self, source, args, output):
        if self.running:  # outside a pass of the root nothing is kept
            self.h0 = output
            self.low = self.down and self.down(output).split(self.rank, -1)

    def end(self, root, args, output):
        """Checkpointed blocks run again in the backward: the first gradient to reach this pass's output puts this
        pass's h0 back. (Compiled graphs hold h0 by value.)"""
        for t in () if torch.compiler.is_compiling() else torch.utils._pytree.tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(lambda grad, h0=self.h0: setattr(self, "h0", h0))
        self.running, self.h0, self.low = False, None, None

    def __getstate__(self):  # a deepcopy leaves the activations behind
        return {k: v for k, v in vars(self).items() if k not in ("h0", "low")}


class SIBOLayer(nn.Module):
    """A module `base` with a trained W_down (r, d_in), W_up (d_out, r) and, where λ > 0, h0."""

    dropout, linear = staticmethod(F.dropout), staticmethod(lambda x, W: F.linear(x, W.to(x.dtype)))

    def __init__(self, name: str, base: nn.Module, d_in: int, d_out: int, lam: float, s: Settings, residual, like):
        super().__init__()
        self.name, self.base, self.lam_start, self.settings, self.residual = name, base, lam, s, residual
        lora, dtype = s.method == "lora", torch.promote_types(like.dtype, torch.float32)
        r = s.rank if lora else s.bottleneck
        self.down = nn.Parameter(torch.empty(r, d_in, dtype=dtype, device=like.device))  # as nn.Linear stores it: x Wᵀ
        self.up = nn.Parameter(torch.zeros(d_out, r, dtype=dtype, device=like.device))
        start = torch.tensor([math.log(lam / (1 - lam))], device=like.device) if lam and s.learn_lam else None
        self.lam_logit = None if start is None else nn.Parameter(start)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5)) if lora else nn.init.normal_(self.down, std=0.02)

    def lam(self) -> float | Tensor:
        return self.lam_start if self.lam_logit is None else self.lam_logit.sigmoid()

    def require_h0(self, h0: Tensor | None, *shape: int) -> Tensor:
        if h0 is None or h0.shape != shape:  # nothing is broadcast
            got = h0 if h0 is None else tuple(h0.shape)
            raise RuntimeError(f"{self.name}: expected h0 {shape}, got {got}; call the whole model, on input_ids")
        return h0

    def mix(self, h: Tensor) -> Tensor:
        if not self.lam_start:
            return h
        h0, lam = self.require_h0(self.residual.h0, *h.shape).to(h.dtype), self.lam()
        return torch.lerp(h, h0, lam if self.lam_logit is None else lam.to(h.dtype))  # h̃ = (1−λ)h + λh0


class Adapter(SIBOLayer):
    def forward(self, h: Tensor, *args, **kwargs) -> Tensor:
        side, f = self.settings.side, torch.tanh
        out = h if side == "in" else self.base(h, *args, **kwargs)
        h = h if side == "parallel" else out  # what the adapter reads; beside the module: He et al. 2022
        mixed = self.mix(h)
        skip = out if side == "parallel" else mixed if self.settings.skip == "mixed" else h
        out = skip + self.linear(f(self.linear(mixed, self.down)), self.up)  # Eq. (4); λ = 0: Eq. (1)
        return self.base(out, *args, **kwargs) if side == "in" else out


class LoRA(SIBOLayer):
    def forward(self, h: Tensor) -> Tensor:
        mixed, s = self.mix(h), self.settings
        frozen = self.base(mixed if s.frozen_too else h)  # Table 6: should W see h̃ too?
        if self.up is None:
            return frozen  # h̃[W + sAB], merged
        low = self.linear(self.dropout(mixed, s.dropout, self.training), self.down)
        return frozen + s.alpha / s.rank * self.linear(low, self.up)  # Eq. (5); λ = 0: Eq. (2)


class FoldedLoRA(nn.Module):
    """A merged LoRA-SIBO, as one product: [h | h0 A] · [W + s(1−λ)AB ; λsB], where A = W_down and B = W_up."""

    def __init__(self, lora: LoRA, index: int):
        super().__init__()
        self.base, self.lora, self.index = lora.base, lora, index
        lora.base = None  # what is left of it: how h0 gets in

    def forward(self, h: Tensor) -> Tensor:
        lows = self.lora.residual.low
        low = self.lora.require_h0(lows and lows[self.index], *h.shape[:-1], self.lora.settings.rank)
        return self.base(torch.cat((h, low.to(h.dtype)), -1))


def inject(m: nn.Module, method: str = "lora", lam: float = 0.2, **settings) -> nn.Module:
    """Freezes `m`, puts adapters or LoRA on it, in place, as `Settings` say (its keywords), and returns it.
    A child called `classifier` is trained whole. ValueError for what does not fit, before `m` is touched."""
    s = Settings(method, lam, **settings)
    if hasattr(m, "sibo"):
        raise ValueError(f"{type(m).__name__}: expected a model not injected yet, got {m.sibo}; load it again")
    (m.sibo, widths, mixed), residual = place(m, s), InitialResidual()
    m.requires_grad_(False)
    modules = dict(m.named_modules())  # as they are now: a target may lie inside another
    for name, (d_in, d_out) in widths.items():
        base, (owner, _, leaf), lam = modules[name], name.rpartition("."), s.lam if name in mixed else 0.0
        like = next(base.parameters(), next(m.parameters()))
        layer = (LoRA if s.method == "lora" else Adapter)(name, base, d_in, d_out, lam, s, residual, like)
        vars(layer).update(getattr(type(m), "kernels", {}))  # a model may bring a faster dropout and linear
        setattr(modules[owner], leaf, layer.train(base.training))
    if mixed:  # bound methods: deepcopy binds them to the copy, where a closure would keep filling the original
        m.register_forward_pre_hook(residual.begin)
        m.get_submodule(m.sibo.h0).register_forward_hook(residual.capture)
        m.register_forward_hook(residual.end)
    if isinstance(getattr(m, "classifier", None), nn.Module):
        m.classifier.requires_grad_(True)
    return m


@torch.no_grad()
def merge(m: nn.Module) -> nn.Module:
    """Folds LoRA and LoRA-SIBO into the weights, in place, exactly (dropout off); a second call changes nothing.

    s·h̃AB = h·[s(1−λ)AB] + λs(h0 A)B: the first term joins W in float32, rounded once; the second stays, with one
    product h0 A for all modules. λ = 0 leaves the plain nn.Linear. ValueError: adapters, quantised weights."""
    downs, layers = [], {n: x for n, x in m.named_modules() if isinstance(x, SIBOLayer) and x.up is not None}
    if rigid := [n for n, x in layers.items() if isinstance(x, Adapter) or not x.base.weight.is_floating_point()]:
        got = "an adapter, whose tanh is not linear" if m.sibo.method == "adapter" else "a quantised weight"
        raise ValueError(f"{rigid[0]}: expected LoRA on a weight of 16 bits or more, to hold the fold, got {got}")
    for name, x in layers.items():
        lam, s, W, r = float(x.lam()), x.settings, x.base.weight, x.settings.rank
        folded = W.to(x.up.dtype) + s.alpha / r * (1 if s.frozen_too else 1 - lam) * x.up @ x.down
        if lam and not s.frozen_too:
            folded, x.base.in_features = torch.cat((folded, lam * s.alpha / r * x.up), 1), x.base.in_features + r
            downs.append(x.down.to(W.dtype))
        x.base.weight = nn.Parameter(folded.to(W.dtype), requires_grad=False)
        m.set_submodule(name, x.base if not lam else x if s.frozen_too else FoldedLoRA(x, len(downs) - 1))
        x.down = x.up = None
    if downs:
        x.residual.down = m.h0_down = nn.Linear(downs[0].shape[1], sum(map(len, downs)), bias=False, device="meta")
        m.h0_down.weight, x.residual.rank = nn.Parameter(torch.cat(downs)), r
    return m.requires_grad_(False)


def save(m: nn.Module, folder: str | Path) -> None:
    """Writes folder/adapter.safetensors: the settings and what is trained. ValueError where nothing is."""
    adapter_file.write(Path(folder, "adapter.safetensors"), m)


def load(m: nn.Module, folder: str | Path) -> nn.Module:
    """Injects as folder/adapter.safetensors says (unless `m` is injected), loads it strictly, and returns `m`.
    ValueError names the file and the tensor, setting or backbone that does not fit."""
    file = Path(folder, "adapter.safetensors")
    settings, stored = adapter_file.read(file, m)
    if not hasattr(m, "sibo"):
        m = inject(m, **vars(settings)) if settings else m.requires_grad_(True)
    files.assign({n: p for n, p in m.named_parameters() if p.requires_grad}, stored, file)
    return m
