"""A frozen backbone in 8 or 4 bits per weight, for machines that cannot hold it in 16: `--base-bits`.

Scales, steps and kernels are bitsandbytes' (NF4: Dettmers et al. 2023). The official code, asked for 8 bits, silently
trains without h0; here nothing changes but the values of the frozen weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear with its weight in 8 bits (256 even steps) or 4 (NF4), and a float32 scale per 64 weights; the
    product is computed in the precision of x.

    On the CPU bitsandbytes restores a weight in 1-2 ns without intermediates (torchao 0.18: 7-10 ns and up to seven
    times the memory). But its own linear layer rounds x too in 8 bits, and torchao's keeps each restored W."""

    block = 64

    def __init__(self, linear: nn.Linear, weight: Tensor, bits: int):
        nn.Module.__init__(self)
        check_bits(bits)
        self.in_features, self.out_features, self.bias, self.bits = *linear.weight.shape[::-1], linear.bias, bits
        ops = torch.ops.bitsandbytes
        steps = torch.linspace(-1, 1, 255, device=weight.device)  # sorted; 0 stays 0
        code = torch.cat((steps, steps[-1:])) if bits == 8 else None
        parts = [ops.quantize_blockwise(part, code, self.block) if bits == 8 else
                 ops.quantize_4bit(part, self.block, "nf4", torch.uint8)
                 for part in weight.reshape(-1).split(1 << 22)]  # all at once takes six times the weight
        data, scales = map(torch.cat, zip(*parts, strict=True))
        self.weight = nn.Parameter(data.view(weight.shape) if bits == 8 else data, requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_buffer("code", code, persistent=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that x is multiplied with."""
        return dequantize(self.weight, self.scales, self.code, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = QuantizedProduct.apply(x, self.weight, self.scales, self.code, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


def dequantize(data: Tensor, scales: Tensor, code: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    ops = torch.ops.bitsandbytes
    if code is None:  # flat: its CPU kernel begins a new block with each row, where quantize_4bit does not
        flat = shape[0] * shape[1]
        return ops.dequantize_4bit(data, scales, QuantizedLinear.block, "nf4", (1, flat), dtype).view(shape)
    return ops.dequantize_blockwise(data, scales, code, QuantizedLinear.block, dtype)


class QuantizedProduct(torch.autograd.Function):
    """x Wᵀ. The backward pass restores W again: kept, all layers' W would take 16 bits after all."""

    @staticmethod
    def forward(ctx, x: Tensor, data: Tensor, scales: Tensor, code: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(data, scales, code)
        ctx.shape = shape
        return F.linear(x, dequantize(data, scales, code, shape, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad @ dequantize(*ctx.saved_tensors, ctx.shape, grad.dtype), None, None, None, None


def check_bits(bits: int) -> None:
    """ValueError unless `bits` is 8 or 4 and bitsandbytes is installed."""
    if bits not in (8, 4):
        raise ValueError(f"base_bits: expected 8, 4, or None for the weights as they are, got {bits}")
    try:
        import bitsandbytes  # noqa: F401  (registers its operators)
    except ImportError:
        raise ValueError(f"--base-bits {bits} needs bitsandbytes: pip install bitsandbytes==0.50.2") from None


def parameters(m: nn.Module) -> int:
    """The number of parameters of `m`, of which 4 bits pack two in a byte."""
    packed = sum(x.in_features * x.out_features - x.weight.numel() for x in m.modules()
                 if isinstance(x, QuantizedLinear))
    return sum(p.numel() for p in m.parameters()) + packed
