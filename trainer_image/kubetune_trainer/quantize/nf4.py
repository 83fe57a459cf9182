"""NF4 (arXiv 2305.14314): weights as indices of 16 quantiles of a normal distribution, 64 of them to a scale.

The numbers are those of torchao's NF4Tensor. But what is packed are plain tensors by rows, which FSDP shards and sends
as any other, and both ways go some rows at a time: without a tensor sixteen times the weight, and many times faster.
A matrix is packed as a whole, never a shard by itself: what a weight becomes does not depend on the number of ranks.

Shapes: O outputs, I inputs, F groups of scales that were rounded together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.nn import functional

BLOCK: Final = 64
"""Weights that share a scale."""
MAX_SCALERS: Final = 256
"""Scales that are rounded together, as many of them as divide a weight's scales."""
QUANTILES: Final = (
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
)  # fmt: skip
"""What the indices stand for, as torchao has them."""
CHUNK_ELEMENTS: Final = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Weights that are packed or made again at once: on a CPU as many as stay in its cache."""


def num_scalers(num_weights: int) -> int:
    """Return how many scales of a matrix are rounded together."""
    return next(size for size in range(MAX_SCALERS, 0, -1) if num_weights // BLOCK % size == 0)


@dataclass(frozen=True)
class Packed:
    """A matrix in NF4: 4 bits a weight, 8 bits for each 64, and little else."""

    codes: Tensor
    """uint8 (O, I / 2): of two neighbours, the first is in the higher bits."""
    scales: Tensor
    """int8 (O, I / 64)."""
    factors: Tensor
    """fp32 (F): what the scales were multiplied with."""
    mean: Tensor
    """fp32 (): what was taken from the scales first."""

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Pack a matrix whose rows are whole blocks, computing in fp32 whatever its type is."""
        weight = weight.detach()
        blocks = weight.reshape(len(weight), -1, BLOCK)
        largest = blocks.abs().amax(dim=2).float()
        mean = largest.mean()
        groups = (largest - mean).view(-1, num_scalers(weight.numel()))
        factors = 128 / groups.abs().amax(dim=1)
        scales = (groups * factors[:, None]).round().nan_to_num(0).clamp(-128, 127).to(torch.int8)
        table = torch.tensor(QUANTILES, device=weight.device)
        between = (table[1:] + table[:-1]) / 2
        codes = torch.empty(len(weight), weight.shape[1] // 2, dtype=torch.uint8, device=weight.device)
        divisors = largest.clamp(min=torch.finfo(torch.float32).tiny)[..., None]  # a block of zeros stays one
        for rows in _row_slices(*weight.shape, device=weight.device):
            nearest = torch.bucketize(blocks[rows].float() / divisors[rows], between, out_int32=True)
            nearest = nearest.to(torch.uint8).flatten(1)
            torch.bitwise_or(nearest[:, ::2] << 4, nearest[:, 1::2], out=codes[rows])
        return cls(codes=codes, scales=scales.view(len(weight), -1), factors=factors, mean=mean)

    @classmethod
    def empty(cls, shape: tuple[int, int], *, device: torch.device) -> Self:
        """Return what a matrix of this shape would become, without values."""
        outputs, inputs = shape
        groups = outputs * inputs // BLOCK // num_scalers(outputs * inputs)
        return cls(
            codes=torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device),
            scales=torch.empty(outputs, inputs // BLOCK, dtype=torch.int8, device=device),
            factors=torch.empty(groups, device=device),
            mean=torch.empty((), device=device),
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights, (O, I), computed in fp32 and rounded to the type once."""
        outputs, blocks = self.scales.shape
        scales = self.scales.view(len(self.factors), -1) / self.factors[:, None]
        scales = (scales + self.mean).view(outputs, blocks, 1)
        weight = torch.empty(outputs, blocks, BLOCK, dtype=dtype, device=self.codes.device)
        for rows in _row_slices(outputs, blocks * BLOCK, device=weight.device):
            values = _pairs(weight.device).index_select(0, self.codes[rows].flatten().int()).view(torch.float32)
            torch.mul(values.view(-1, blocks, BLOCK), scales[rows], out=weight[rows])
        return weight.flatten(1)


def rounded_to_nf4(weight: Tensor) -> Tensor:
    """Return what a matrix becomes that is packed and made again, fp32."""
    return Packed.of(weight).dequantized()


def linear(x: Tensor, packed: Packed) -> Tensor:
    """Multiply (…, I) with a frozen packed matrix: (…, O)."""
    return _Linear.apply(x, packed.codes, packed.scales, packed.factors, packed.mean)


class _Linear(torch.autograd.Function):
    """Keeps the packed matrix for backward and makes the weights of it a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *packed: Tensor) -> Tensor:
        ctx.save_for_backward(*packed)
        return functional.linear(x, Packed(*packed).dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        return grad @ Packed(*ctx.saved_tensors).dequantized(grad.dtype), None, None, None, None


def _row_slices(num_rows: int, columns: int, *, device: torch.device) -> Iterator[slice]:
    at_once = max(1, CHUNK_ELEMENTS[device.type] // columns)
    return (slice(first, first + at_once) for first in range(0, num_rows, at_once))


@cache
def _pairs(device: torch.device) -> Tensor:
    """What each byte stands for: two fp32 numbers, held as one integer so that they are copied at once."""
    table = torch.tensor(QUANTILES, device=device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).view(torch.int64).flatten()
