"""A frozen backbone in 8 or 4 bits per weight (`--base-bits`), with bitsandbytes' kernels; NF4: Dettmers et al. 2023.

The official code silently trains without h0 in 8 bits; here only the frozen weights change."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPS = torch.ops.bitsandbytes  # check_bits registers them


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear with its weight in 8 bits (even steps) or 4 (NF4), and a float32 scale per 64 weights; the
    product is computed in the precision of x.

    On the CPU bitsandbytes restores a weight in 1-2 ns, torchao 0.18 in 7-10; their own linear layers round x too, or
    keep each restored W."""

    block = 64

    def __init__(self, linear: nn.Linear, weight: Tensor, bits: int):
        nn.Module.__init__(self)
        check_bits(bits)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        steps = torch.linspace(-1, 1, 255, device=weight.device)  # sorted; 0 stays 0
        code = torch.cat((steps, steps[-1:])) if bits == 8 else None
        parts = [OPS.quantize_blockwise(part, code, self.block) if bits == 8 else
                 OPS.quantize_4bit(part, self.block, "nf4", torch.uint8)
                 for part in weight.reshape(-1).split(1 << 22)]  # all at once take six times the weight
        data, scales = map(torch.cat, zip(*parts, strict=True))
        self.weight = nn.Parameter(data.view(weight.shape) if bits == 8 else data, requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_buffer("code", code, persistent=False)

    def parts(self) -> tuple:
        return self.weight, self.scales, self.code, (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        out = QuantizedProduct.apply(x, *self.parts())
        return out if self.bias is None else out + self.bias


def dequantize(data, scales, code, shape, dtype) -> Tensor:
    if code is None:  # flat: its CPU kernel begins a new block with each row, where quantize_4bit does not
        flat = 1, shape[0] * shape[1]
        return OPS.dequantize_4bit(data, scales, QuantizedLinear.block, "nf4", flat, dtype).view(shape)
    return OPS.dequantize_blockwise(data, scales, code, QuantizedLinear.block, dtype)


class QuantizedProduct(torch.autograd.Function):
    """x Wᵀ. The backward pass restores W again: kept, it would take 16 bits after all."""

    @staticmethod
    def forward(ctx, x, data, scales, code, shape):
        ctx.save_for_backward(data, scales, code)
        ctx.shape = shape
        return F.linear(x, dequantize(data, scales, code, shape, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize(*ctx.saved_tensors, ctx.shape, grad.dtype), None, None, None, None


def check_bits(bits: int) -> None:
    """ValueError unless `bits` is 8 or 4 and bitsandbytes is installed."""
    if bits not in (8, 4):
        raise ValueError(f"base_bits: expected 8, 4, or None for the weights as they are, got {bits}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(f"--base-bits {bits} needs bitsandbytes: pip install bitsandbytes==0.50.2") from None


def parameters(m: nn.Module) -> int:
    """The number of parameters of `m`, of which 4 bits pack two in a byte."""
    packed = sum(x.in_features * x.out_features - x.weight.numel() for x in m.modules()
                 if isinstance(x, QuantizedLinear))
    return sum(p.numel() for p in m.parameters()) + packed
