"""What else is said to help against over-smoothing, to compare with h0; none of it is part of SIBO."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def stochastic_depth(m: nn.Module, rate: float) -> None:
    """In training, a sequence skips block l of L with probability rate · l / L (Huang et al. 2016), the others unscaled
    (as in LayerDrop, Fan et al. 2020)."""
    m.share_prefix = False  # each row draws for itself, also over what all begin with
    for l, block in enumerate(m.blocks, 1):  # noqa: E741
        block.register_forward_hook(partial(_pass_by, rate * l / len(m.blocks)))


def _pass_by(p: float, block: nn.Module, inputs: tuple, out: Tensor) -> Tensor:  # (B, T, d)
    if not block.training:
        return out
    keep = torch.rand(len(out), 1, 1) >= p
    return torch.where(keep.to(out.device), out, inputs[0])  # computed all the same: no tensor misses its gradient


class SimilarityLoss:
    """Adds `weight` times the mean over blocks of Eq. (3), `similarities` (B,), to the loss of a training pass. For
    models whose blocks see whole sentences: a BERT, or a causal model whose rows have neither padding nor a common
    beginning; RuntimeError for others."""

    def __init__(self, m: nn.Module, weight: float, similarities: Callable[[Tensor, Tensor], Tensor]):
        self.weight, self.similarities, self.found = weight, similarities, []
        m.register_forward_pre_hook(lambda *_: self.found.clear())  # of a pass that failed
        for block in m.blocks:
            block.register_forward_hook(self.collect)
        m.register_forward_hook(self.add)

    def collect(self, block: nn.Module, inputs: tuple, out: Tensor) -> None:
        if block.training:
            mask, shared = inputs[1].mask, inputs[1].shared
            if shared or mask is not None and mask.shape[2] > 1:
                raise RuntimeError("similarity loss: expected rows without padding or a common beginning, got others")
            mask = torch.ones(out.shape[:2], device=out.device) if mask is None else mask[:, 0, 0]  # of (B, 1, 1, T)
            self.found.append(self.similarities(out, mask).mean())

    def add(self, m: nn.Module, inputs: tuple, out: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        found, self.found = self.found, []
        if not found or isinstance(out, list) or out.ndim:  # not a training pass's loss
            return out
        return out + self.weight * torch.stack(found).mean().to(out.dtype)


class InitialTokens(nn.Module):
    """For models trained from nothing: each block but the first reads (1−λ)h + λh0, with a λ of its own, fixed or
    learned, as nanochat's blocks have two scalars. Hooks `m`, and becomes its part `initial_tokens`."""

    def __init__(self, m: nn.Module, lam: float, learned: bool):
        super().__init__()
        self.lam_logit = nn.Parameter(torch.full((len(m.blocks) - 1,), lam).logit(), requires_grad=learned)
        m.initial_tokens = self
        for l, block in enumerate(m.blocks):  # noqa: E741
            block.register_forward_pre_hook(partial(self.mix, l - 1))
        self.h0 = None

    def mix(self, i: int, block: nn.Module, inputs: tuple) -> tuple | None:
        h, *rest = inputs
        if i < 0:
            self.h0 = h
            return None
        return torch.lerp(h, self.h0, self.lam_logit[i].sigmoid()), *rest
