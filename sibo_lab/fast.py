"""Operations that PyTorch has too, but slower on CPUs or with more memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mixed_linear(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ in the precision of x, for W (out, in) as nn.Linear stores it."""
    if x.numel() <= 64 * x.shape[-1]:  # few rows: converting x is cheaper than converting W
        return F.linear(x.to(W.dtype), W).to(x.dtype)
    return F.linear(x, W.to(x.dtype))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout for p in [0, 1). On CPUs it draws the distances between dropped elements, not one number per element:
    at p = 0.05 a thirteenth of the time."""
    if not (training and p):
        return x
    return _drop(x, p)[0] if x.device.type == "cpu" else F.dropout(x, p)


@torch.library.custom_op("sibo::zero", mutates_args=())  # opaque to torch.compile, which draws slowly
def _zero(x: Tensor, places: Tensor, p: float) -> Tensor:
    """x / (1 − p), and 0 at the given places. Linear in x and its own transpose: the backward pass is the same call."""
    y = _like(x)
    torch.div(x, 1 - p, out=y)
    y.as_strided((x.numel() + 1,), (1,)).index_fill_(0, places, 0)
    return y


def _like(x: Tensor) -> Tensor:
    """Empty, of x's shape, with one more element after it, for the places past the end."""
    return x.new_empty(x.numel() + 1)[:-1].view(x.shape)


def _draws(n: int, p: float) -> int:
    """How many gaps to draw for n elements: 7 standard deviations more than needed, or more."""
    return n * math.ceil(1.2 * 1024 * p) // 1024 + 64


@torch.library.custom_op("sibo::drop", mutates_args=())
def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    u = torch.rand(_draws(x.numel(), p))
    gaps = u.neg_().log1p_().div_(math.log(1 - p)).long() + 1  # geometric: P(gap = k) = (1 − p)^(k−1) p
    places = (gaps.cumsum(0) - 1).clamp_(max=x.numel())
    return _zero(x.contiguous(), places, p), places


@_zero.register_fake
def _(x, places, p):
    return _like(x)


@_drop.register_fake
def _(x, p):
    return _like(x), torch.empty(_draws(x.numel(), p), dtype=torch.int64)


def _keep_places(ctx, inputs, output):
    ctx.p = inputs[1]
    ctx.save_for_backward(output[1])


_drop.register_autograd(lambda ctx, g, _: (_zero(g.contiguous(), *ctx.saved_tensors, ctx.p), None),
                        setup_context=_keep_places)


def cross_entropy(h: Tensor, W: Tensor, b: Tensor | None, labels: Tensor, weight: Tensor, chunk: int = 256) -> Tensor:
    """Weighted mean over n rows of the cross-entropy of softmax(h Wᵀ + b) with labels (n,), in float32 or wider:
    h (n, d), W (V, d), weight (n,). Each chunk's gradient is taken with its logits: 256 rows of 50,000 fill 50 MB."""
    return _CrossEntropy.apply(h, W, b, labels, weight.double() / weight.sum(), chunk)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, b, labels, weight, chunk):
        wide = torch.promote_types(h.dtype, torch.float32)
        loss, weight = h.new_zeros((), dtype=wide), weight[:, None].to(wide)
        dh, dW, db = (torch.zeros_like(x) if need else None
                      for x, need in zip((h, W, b), ctx.needs_input_grad, strict=False))
        for h_, labels_, weight_, dh_ in zip(h.split(chunk), labels[:, None].split(chunk), weight.split(chunk),
                                             (h if dh is None else dh).split(chunk), strict=True):
            log_p = F.linear(h_, W, b).log_softmax(-1, wide)  # (chunk, V)
            loss -= (weight_ * log_p.gather(1, labels_)).sum()
            if any(ctx.needs_input_grad):
                d = log_p.exp_().scatter_add_(1, labels_, torch.full_like(weight_, -1.0)).mul_(weight_).to(h.dtype)
                if dh is not None:  # ∂loss/∂logits = weight · (softmax − one-hot)
                    torch.mm(d, W, out=dh_)
                if dW is not None:
                    dW += d.T @ h_
                if db is not None:
                    db += d.sum(0)
        ctx.save_for_backward(dh, dW, db)
        return loss

    @staticmethod
    def backward(ctx, g):
        return *(x if x is None else x * g.to(x.dtype) for x in ctx.saved_tensors), None, None, None


@contextmanager
def prepacked_weights(m: nn.Module, most: int = 2**30) -> Iterator[None]:
    """While in it, each nn.Linear of a bfloat16 CPU model multiplies with a copy of its weight in oneDNN's layout, in
    half the time for few rows: PyTorch repacks the weight in every call. Not for models of more than `most` bytes."""
    linears = [x for x in m.modules() if type(x) is nn.Linear and type(x.weight) is nn.Parameter
               and x.weight.device.type == "cpu" and x.weight.dtype == torch.bfloat16]
    if sum(x.weight.numel() * 2 for x in linears) > most or not torch.backends.mkldnn.is_available():
        linears = []
    try:
        for x in linears:
            x.forward = partial(_linear, torch.ops.mkldnn._reorder_linear_weight(x.weight.detach()), x.bias)
        yield
    finally:
        for x in linears:
            del x.forward


def _linear(W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """softmax(q kᵀ / √D) v for q (B, H, T, D) and k, v (B, H, S, D); `mask` (bool) is True where a query may look."""
    B, H, T, _ = q.shape
    if causal and q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled() and T <= 256:
        # the plain formula: here PyTorch's fused kernel takes three times as long, mostly in the backward pass
        later = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        scores = torch.baddbmm(later.expand(len(q), T, T), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        return (F.dropout(scores.softmax(-1), dropout) @ v).unflatten(0, (B, H))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
