"""Rounds one weight matrix to integers with scales.

Symmetric: a weight is an integer times its scale, zero stays zero. A scale belongs to a row (an output channel), or to
a group of neighbours within a row. Legend: O outputs, I inputs, G groups of a row, g weights of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounded:
    """A weight matrix as integers and scales."""

    values: Tensor
    """int8 (O, I), within the range of `bits`."""
    scales: Tensor
    """fp32 (O, G), G = I / group_size; (O, 1) without groups."""
    group_size: int | None
    """Weights of a row that share a scale; None means all of them."""
    bits: int
    """Bits of each integer: 4 or 8."""

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that a layer computes with, (O, I)."""
        groups_OGg = self.values.reshape(*self.scales.shape, -1).float()
        return (groups_OGg * self.scales.float().unsqueeze(-1)).flatten(1).to(dtype)


def integer_range(bits: int) -> tuple[int, int]:
    """The smallest and largest integer of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def symmetric_scales(weight: Tensor, *, bits: int, group_size: int | None) -> Tensor:
    """Scales with which the largest magnitude of each group lands on the largest integer.

    Args:
        weight: (O, I).
        bits: Bits of each integer.
        group_size: Weights of a row that share a scale; None means all of them.

    Returns:
        fp32 (O, G), numbers that the weight's own type can hold, so that storing them in it loses nothing; a group of
        zeros has the scale 1, so that nothing divides by zero.

    Raises:
        ValueError: The rows are not a whole number of groups.
    """
    columns = weight.shape[1]
    if group_size is not None and columns % group_size:
        raise ValueError(f"a weight with {columns} inputs cannot be cut into groups of {group_size}")
    groups_OGg = weight.float().reshape(len(weight), columns // (group_size or columns), -1)
    largest_OG = groups_OGg.abs().amax(dim=-1)
    scales_OG = (largest_OG / integer_range(bits)[1]).to(weight.dtype).float()
    return torch.where(scales_OG > 0, scales_OG, 1.0)


def round_to_nearest(weight: Tensor, *, bits: int, group_size: int | None) -> Rounded:
    """Rounds every weight to the nearest integer, independently of the others.

    Args:
        weight: (O, I), any floating type.
        bits: 4 or 8.
        group_size: Weights of a row that share a scale; None means all of them.

    Raises:
        ValueError: The rows are not a whole number of groups.
    """
    scales_OG = symmetric_scales(weight, bits=bits, group_size=group_size)
    groups_OGg = weight.float().reshape(*scales_OG.shape, -1) / scales_OG.unsqueeze(-1)
    values_OI = groups_OGg.round_().clamp_(*integer_range(bits)).flatten(1).to(torch.int8)
    return Rounded(values=values_OI, scales=scales_OG, group_size=group_size, bits=bits)
