"""A frozen backbone in 8 or 4 bits a weight, for machines that cannot hold it in 16: `--base-bits`.

Scales, steps and kernels are bitsandbytes' (Dettmers et al. 2023 for NF4). The official code, told to load in 8 bits,
silently trains without h0; here nothing changes but the frozen weights' values."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear whose weight is kept in 8 bits (256 even steps) or 4 (NF4, Dettmers et al. 2023), with a
    float32 scale for each 64 weights; weight-only: the product itself is taken in the precision of x.

    bitsandbytes and not torchao 0.18: its kernels restore a weight on the CPU in 1-2 ns, in 8 and 4 bits alike, and
    without intermediates (there: 7 and 10 ns and up to seven times the weight), and its operators compile. Of both
    libraries' own linears none would do: 8 bits rounds x too in the one, and keeps each restored W in the other."""

    block = 64

    def __init__(self, linear: nn.Linear, weight: Tensor, bits: int):
        nn.Module.__init__(self)
        check_bits(bits)
        self.in_features, self.out_features, self.bias, self.bits = *linear.weight.shape[::-1], linear.bias, bits
        ops = torch.ops.bitsandbytes
        steps = torch.linspace(-1, 1, 255, device=weight.device)  # symmetric, so that 0 stays 0; as sorted as theirs
        code = torch.cat((steps, steps[-1:])) if bits == 8 else None
        parts = [ops.quantize_blockwise(part, code, self.block) if bits == 8 else
                 ops.quantize_4bit(part, self.block, "nf4", torch.uint8)
                 for part in weight.reshape(-1).split(1 << 22)]  # at once, NF4 takes six times a 16-bit weight's memory
        data, scales = map(torch.cat, zip(*parts, strict=True))
        self.weight = nn.Parameter(data.view(weight.shape) if bits == 8 else data, requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_buffer("code", code, persistent=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the product is taken with."""
        return dequantize(self.weight, self.scales, self.code, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        out = TimesQuantized.apply(x, self.weight, self.scales, self.code, (self.out_features, self.in_features))
        return out if self.bias is None else out + self.bias


def dequantize(data: Tensor, scales: Tensor, code: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    ops = torch.ops.bitsandbytes
    if code is None:  # flat: its CPU kernel begins a new block with each row, where quantize_4bit runs on
        flat = shape[0] * shape[1]
        return ops.dequantize_4bit(data, scales, QuantizedLinear.block, "nf4", (1, flat), dtype).view(shape)
    return ops.dequantize_blockwise(data, scales, code, QuantizedLinear.block, dtype)


class TimesQuantized(torch.autograd.Function):
    """x Wᵀ. The backward restores W once more: kept from the forward, all layers' would stand there in 16 bits."""

    @staticmethod
    def forward(ctx, x: Tensor, data: Tensor, scales: Tensor, code: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(data, scales, code)
        ctx.shape = shape
        return F.linear(x, dequantize(data, scales, code, shape, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad @ dequantize(*ctx.saved_tensors, ctx.shape, grad.dtype), None, None, None, None


def check_bits(bits: int) -> None:
    """ValueError unless `bits` are 8 or 4 and the library for them is there."""
    if bits not in (8, 4):
        raise ValueError(f"base_bits: found {bits}, expected 8, 4 or None for the weights as they are")
    try:
        import bitsandbytes  # noqa: F401  (its operators register themselves)
    except ImportError:
        raise ValueError(f"--base-bits {bits} needs bitsandbytes: pip install bitsandbytes==0.50.2") from None


def parameters(m: nn.Module) -> int:
    """How many numbers `m` has, those counted that two to a byte stand for."""
    packed = sum(x.in_features * x.out_features - x.weight.numel() for x in m.modules()
                 if isinstance(x, QuantizedLinear))
    return sum(p.numel() for p in m.parameters()) + packed
