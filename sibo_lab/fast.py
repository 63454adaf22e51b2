"""Operations that PyTorch has too, but slower on CPUs or with more memory."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mixed_linear(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ in the precision of x, for W (out, in) as nn.Linear stores it."""
    if x.numel() <= 64 * x.shape[-1]:  # few rows: converting x is cheaper than converting W
        return F.linear(x.to(W.dtype), W).to(x.dtype)
    return F.linear(x, W.to(x.dtype))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout for p in [0, 1). On CPUs it draws the gaps between dropped elements: at p = 0.05 a thirteenth of the
    time."""
    if not (training and p):
        return x
    return _drop(x, p)[0] if x.device.type == "cpu" else F.dropout(x, p)


@torch.library.custom_op("sibo::zero", mutates_args=())  # opaque to torch.compile, which draws slowly
def _zero(x: Tensor, places: Tensor, p: float) -> Tensor:
    """x / (1 − p), but 0 at the places. Linear in x and its own transpose: the backward pass is the same call."""
    y = torch.div(x, 1 - p, out=_like(x))
    y.as_strided((x.numel() + 1,), (1,)).index_fill_(0, places, 0)
    return y


def _like(x: Tensor) -> Tensor:
    """Empty, of x's shape; one element after it takes places past the end."""
    return x.new_empty(x.numel() + 1)[:-1].view(x.shape)


def _draws(n: int, p: float) -> int:
    """Gaps to draw for n elements: at least 7 standard deviations more than needed."""
    return n * math.ceil(1.2 * 1024 * p) // 1024 + 64


@torch.library.custom_op("sibo::drop", mutates_args=())
def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    u = torch.rand(_draws(x.numel(), p))
    gaps = u.neg_().log1p_().div_(math.log(1 - p)).long() + 1  # geometric: P(gap = k) = (1 − p)^(k−1) p
    places = (gaps.cumsum(0) - 1).clamp_(max=x.numel())
    return _zero(x.contiguous(), places, p), places


_zero.register_fake(lambda x, places, p: _like(x))
_drop.register_fake(lambda x, p: (_like(x), torch.empty(_draws(x.numel(), p), dtype=torch.int64)))


def _keep_places(ctx, inputs, output):
    ctx.p = inputs[1]
    ctx.save_for_backward(output[1])


_drop.register_autograd(lambda ctx, g, _: (_zero(g.contiguous(), *ctx.saved_tensors, ctx.p), None),
                        setup_context=_keep_places)


@torch.library.custom_op("sibo::pack", mutates_args=())  # opaque to torch.compile, which is ready 20 s sooner
def pack(x: Tensor, rows: int, common: int, own: int, shared: bool = False) -> Tensor:
    """Rows (B, P + own, ·) as one, (1, P + B·own, ·): the `common` P tokens of the first row (`shared`: of all rows,
    added up), then each row's own."""
    first = x[:, :common].sum(0, keepdim=True) if shared else x[:1, :common]
    return torch.cat((first, x[:, common:].flatten(0, 1)[None]), 1)


@torch.library.custom_op("sibo::unpack", mutates_args=())
def unpack(x: Tensor, rows: int, common: int, own: int, shared: bool = True) -> Tensor:
    """One row (1, P + B·own, ·) as B, (B, P + own, ·), each with the common tokens (not `shared`: the first alone; the
    others have zeros). The transpose of `pack`, as that is of this: each is the other's backward pass."""
    out = x.new_zeros(rows, common + own, *x.shape[2:])
    out[:rows if shared else 1, :common] = x[:, :common]
    out[:, common:] = x[0, common:].unflatten(0, (rows, own))
    return out


def _keep_shape(ctx, inputs, output):
    ctx.shape = inputs[1:]


pack.register_fake(lambda x, rows, common, own, shared=False: x.new_empty(1, common + rows * own, *x.shape[2:]))
unpack.register_fake(lambda x, rows, common, own, shared=True: x.new_empty(rows, common + own, *x.shape[2:]))
pack.register_autograd(lambda ctx, g: (unpack(g, *ctx.shape), *[None] * 4), setup_context=_keep_shape)
unpack.register_autograd(lambda ctx, g: (pack(g, *ctx.shape), *[None] * 4), setup_context=_keep_shape)


def cross_entropy(h: Tensor, W: Tensor, b: Tensor | None, labels: Tensor, weight: Tensor, chunk: int = 256) -> Tensor:
    """Weighted mean over n rows of the cross-entropy of softmax(h Wᵀ + b) with labels (n,), in float32 or wider:
    h (n, d), W (V, d), weight (n,). Each chunk's gradient is taken with its logits: 256 rows of 50,000 fill 50 MB."""
    return _CrossEntropy.apply(h, W, b, labels, weight.double() / weight.sum(), chunk)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, b, labels, weight, chunk):
        wide = torch.promote_types(h.dtype, torch.float32)
        loss, labels, weight = h.new_zeros((), dtype=wide), labels[:, None], weight[:, None].to(wide)
        dh, dW, db = (torch.zeros_like(x) if need else None
                      for x, need in zip((h, W, b), ctx.needs_input_grad, strict=False))
        for start in range(0, len(h), chunk):
            at = slice(start, start + chunk)
            log_p = F.linear(h[at], W, b).log_softmax(-1, wide)  # (chunk, V)
            loss -= (weight[at] * log_p.gather(1, labels[at])).sum()
            if any(ctx.needs_input_grad):  # ∂loss/∂logits = weight · (softmax − one-hot)
                d = log_p.exp_().scatter_add_(1, labels[at], -torch.ones_like(weight[at])).mul_(weight[at]).to(h.dtype)
                if dh is not None:
                    torch.mm(d, W, out=dh[at])
                if dW is not None:
                    dW += d.T @ h[at]
                if db is not None:
                    db += d.sum(0)
        ctx.save_for_backward(dh, dW, db)
        return loss

    @staticmethod
    def backward(ctx, g):
        return *(x if x is None else x * g.to(x.dtype) for x in ctx.saved_tensors), None, None, None


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this type here: of bfloat16 on CPUs with AVX512 or more."""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


_ops = torch.library.Library("sibo", "FRAGMENT")  # torch.compile cannot look into packed weights
_ops.define("packed_linear(Tensor x, Tensor W, Tensor? b) -> Tensor")


def _packed_linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b, with W.packed instead of W."""
    if W.dtype == torch.float32 and x.numel() > 128 * x.shape[-1]:  # as of prompts: MKL is faster with many rows
        return F.linear(x, W, b)
    return torch.ops.mkldnn._linear_pointwise(x, W.packed, b, "none", [], "")


_ops.impl("packed_linear", _packed_linear, "CPU")
_ops.impl("packed_linear", lambda x, W, b: x.new_empty(*x.shape[:-1], len(W)), "Meta")


def compiled(m: nn.Module) -> nn.Module:
    """`m` with its blocks compiled in place, to shared code. Not the first: in training its input often needs no
    gradient, which would take another minute. All that the process compiles later takes numbers as constants: else the
    compiler tries a dropout's p as an input, and starts over after ten seconds."""
    torch._dynamo.config.specialize_float = True
    cpu = next(m.parameters()).device.type == "cpu"  # kernels called from C++: a step in a tenth less time
    for block in m.blocks[1:]:
        block.compile(dynamic=True, options={"cpp_wrapper": cpu})
    return m


def is_compiled(m: nn.Module) -> bool:
    return any(x._compiled_call_impl for x in getattr(m, "blocks", ()))


def compiled_where(asked: bool, m: nn.Module) -> AbstractContextManager:
    """Inside, the blocks of `m` that were compiled run so if `asked`, else as they are written: prompts come in too
    many shapes."""
    return torch.compiler.set_stance("default" if asked else "force_eager") if is_compiled(m) else nullcontext()


class PackedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.sibo.packed_linear(x, self.weight, self.bias)


@contextmanager
def packed_weights(m: nn.Module, most: int = 2**30) -> Iterator[None]:
    """Inside, each nn.Linear of a CPU model multiplies few rows with a copy of its weight in oneDNN's layout, in less
    time: PyTorch packs the weight in every call. Not for more than `most` bytes; a context within another uses its
    copies."""
    linears = [x for x in m.modules() if type(x) is nn.Linear and type(x.weight) is nn.Parameter
               and x.weight.device.type == "cpu" and packs(x.weight.dtype)]
    if sum(x.weight.nbytes for x in linears) > most:
        linears = []
    try:
        for x in linears:
            x.__class__ = PackedLinear
            x.weight.packed = torch.ops.mkldnn._reorder_linear_weight(x.weight.detach())
        yield
    finally:
        for x in linears:
            x.__class__ = nn.Linear
            vars(x.weight).pop("packed", None)  # another module may have had the same weight


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    """softmax(q kᵀ / √D) v for q (B, H, T, D) and k, v (B, H, S, D); `mask` (bool) is True where a query may look."""
    B, H, T, _ = q.shape
    if causal and q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled() and T <= 256:
        # the plain formula: PyTorch's fused kernel takes three times as long, mostly in the backward pass
        later = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(later, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        return (F.dropout(scores.softmax(-1), dropout) @ v).unflatten(0, (B, H))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
