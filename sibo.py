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
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibo_lab import adapter_file, files, hugging_face
from sibo_lab.initial_residual import InitialResidual, is_turned
from sibo_lab.placement import Placement, place
from sibo_lab.settings import Settings
from sibo_lab.stacks import find
from sibo_lab.switching import Before, disabled, remove, require_foldable, require_whole, set_lam, summary  # noqa: F401
from sibo_lab.wrapping import Wrapper, injected, swap, uncompiled


class SIBOLayer(Wrapper):
    """A module `base` with a trained W_down (r, d_in), W_up (d_out, r) and, where λ > 0, h0."""

    dropout, linear = staticmethod(F.dropout), staticmethod(lambda x, W: F.linear(x, W.to(x.dtype)))

    def __init__(self, name: str, base: nn.Module, d_in: int, d_out: int, s: Settings, residual, share: float, like):
        super().__init__(name)
        self.settings, self.residual, self.share, self.lam_start = s, residual, share, s.lam * share
        lora, dtype = s.method == "lora", torch.promote_types(like.dtype, torch.float32)
        r = s.rank if lora else s.bottleneck
        self.down = nn.Parameter(torch.empty(r, d_in, dtype=dtype, device=like.device))  # as nn.Linear stores it: x Wᵀ
        self.up = nn.Parameter(torch.zeros(d_out, r, dtype=dtype, device=like.device))
        start = torch.tensor([self.lam_start], dtype=torch.float32, device=like.device)
        self.lam_logit = nn.Parameter(start.logit()) if residual and s.learn_lam else None
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5)) if lora else nn.init.normal_(self.down, std=0.02)
        self.base = base

    def lam(self) -> float | Tensor:
        return self.lam_start if self.lam_logit is None else self.lam_logit.sigmoid()

    def require_h0(self, h0: Tensor | None, width: int, *read: Tensor) -> Tensor:
        shape = (*read[0].shape[:-1], width)
        turned = self.residual.turned or any(map(is_turned, read)) and not is_turned(h0)
        if h0 is None or h0.shape != shape or turned:  # nothing is broadcast
            got = h0 if h0 is None else f"{tuple(h0.shape)}" + ", its dimensions in another order" * turned
            hint = "call the whole model" if h0 is None else "leave what reads other tokens than block 0 out of sibo_at"
            raise RuntimeError(f"{self.name}: expected h0 {shape}, got {got}; {hint}")
        return h0

    def mix(self, h: Tensor, *read: Tensor) -> Tensor:
        if not self.lam_start:
            return h
        h0, lam = self.require_h0(self.residual.h0, h.shape[-1], h, *read).to(h), self.lam()
        return torch.lerp(h, h0, lam if self.lam_logit is None else lam.to(h.dtype))  # h̃ = (1−λ)h + λh0


class Adapter(SIBOLayer):
    def adapt(self, h: Tensor, sub_layer: Callable) -> Tensor:
        side, f, read = self.settings.side, torch.tanh, h
        h = sub_layer(h) if side == "out" else h  # what the adapter reads
        mixed = self.mix(h, read)
        change = self.linear(f(self.linear(mixed, self.down)), self.up)
        skip = mixed if self.settings.skip == "mixed" else h
        out = (sub_layer(h) if side == "parallel" else skip) + change  # Eq. (4); λ = 0: Eq. (1); beside: He et al. 2022
        return sub_layer(out) if side == "in" else out


class LoRA(SIBOLayer):
    def adapt(self, h: Tensor, W: Callable) -> Tensor:
        mixed, s = self.mix(h), self.settings
        frozen = W(mixed if s.frozen_too else h)  # Table 6: should W see h̃ too?
        if self.up is None:
            return frozen  # h̃[W + sAB], merged
        low = self.linear(self.dropout(mixed, s.dropout, self.training), self.down)
        return frozen + s.alpha / s.rank * self.linear(low, self.up)  # Eq. (5); λ = 0: Eq. (2)


class FoldedLoRA(LoRA):
    """A merged LoRA-SIBO, as one product: [h | h0 A] · [W + s(1−λ)AB ; λsB], where A = W_down and B = W_up."""

    def adapt(self, h: Tensor, W: Callable) -> Tensor:
        lows = self.residual.low
        low = self.require_h0(None if lows is None else lows.index_select(-2, self.index)[..., 0, :],
                              self.settings.rank, h)
        return W(torch.cat((h, low.to(h)), -1))


def inject(m: nn.Module, method: str = "lora", lam: float = 0.2, **settings) -> nn.Module:
    """Freezes `m`, puts adapters or LoRA on it, in place, as `Settings` say (its keywords), and returns it. Heads that
    are known by name are trained whole. ValueError for what does not fit, before `m` is touched."""
    require_whole(m)
    wrap(uncompiled(m), place(uncompiled(m), Settings(method, lam, **settings)))
    return m


def wrap(m: nn.Module, placed: Placement) -> nn.Module:
    """`inject`, of settings that were placed, on a model that may be on the meta device."""
    s, modules, like, layers = placed.settings, dict(m.named_modules()), next(m.parameters()), {}
    m.sibo, m.sibo_before = s, Before.of(m, s.modules_to_save)
    residuals = {stack: InitialResidual() for stack in placed.mixed.values()}
    for name, (d_in, d_out) in placed.widths.items():
        base, residual = modules[name], residuals.get(placed.mixed.get(name))
        layers[base] = (LoRA if s.method == "lora" else Adapter)(
            name, base, d_in, d_out, s, residual, placed.shares.get(name, 0.0), next(base.parameters(), like)
        ).train(base.training)
        vars(layers[base]).update(getattr(type(m), "kernels", {}))  # a model may bring a faster dropout and linear
    swap(m.requires_grad_(False), layers)
    m.sibo_before.layers += layers.values()
    for stack, residual in residuals.items():
        residual.hook(m, stack)
    for name in s.modules_to_save:
        for head in find(modules, name):
            modules[head].requires_grad_(True)
    hugging_face.guard(m)
    m.sibo_before.hooks.append(m.register_load_state_dict_pre_hook(hugging_face.adopt))
    return m


@torch.no_grad()
def merge(m: nn.Module) -> nn.Module:
    """Folds LoRA and LoRA-SIBO into the weights, in place, exactly (dropout off); a second call changes nothing.

    s·h̃AB = h·[s(1−λ)AB] + λs(h0 A)B: the first term joins W in float32, rounded once; the second stays, with one
    product h0 A for all modules. λ = 0 leaves the plain nn.Linear. ValueError, before anything changes: adapters,
    weights that are quantised or computed, several devices."""
    layers = {n: x for n, x in injected(m).named_modules() if isinstance(x, SIBOLayer) and x.up is not None}
    require_foldable(layers)
    downs, plain = defaultdict(list), {}
    for x in layers.values():
        lam, s, W, r = float(x.lam()), x.settings, x.base.weight, x.settings.rank
        W = W if isinstance(x.base, nn.Linear) else W.T  # GPT-2's Conv1D
        folded = W.to(x.up.dtype) + s.alpha / r * (1 if s.frozen_too else 1 - lam) * x.up @ x.down
        if not lam:
            plain[x] = x.base
        elif not s.frozen_too:
            folded = torch.cat((folded, lam * s.alpha / r * x.up), 1)
            x.__class__ = FoldedLoRA  # a number in a tensor: blocks then share compiled code
            x.register_buffer("index", torch.tensor([len(downs[x.residual])], device=W.device), persistent=False)
            downs[x.residual].append(x.down.to(W.dtype))
        x.down, x.up, x.lam_logit, x.lam_start = None, None, None, lam
        x.base.in_features = folded.shape[1]
        folded = folded.to(W.dtype) if isinstance(x.base, nn.Linear) else folded.to(W.dtype).T.contiguous()
        x.base.weight = nn.Parameter(folded)
    swap(m, plain)
    for residual, down in downs.items():
        first = next(x for x in layers.values() if x.residual is residual)
        first.add_module("h0_down", residual.fold(torch.cat(down), r))
    m.sibo_before = None
    return m.requires_grad_(False)


def save(m: nn.Module, folder: str | Path) -> None:
    """Writes folder/adapter.safetensors: the settings and what is trained. ValueError where nothing is."""
    adapter_file.write(Path(folder, "adapter.safetensors"), injected(m))


def load(m: nn.Module, folder: str | Path) -> nn.Module:
    """Injects as folder/adapter.safetensors says (unless `m` is injected), loads it strictly, and returns `m`.
    ValueError names the file and the tensor, setting or backbone that does not fit."""
    file = Path(folder, "adapter.safetensors")
    settings, stored = adapter_file.read(file, injected(m))
    if not hasattr(m, "sibo"):
        m = inject(m, **vars(settings)) if settings else m.requires_grad_(True)
    files.assign(adapter_file.saved(injected(m)), stored, file)
    return m
