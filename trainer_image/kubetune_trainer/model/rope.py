"""Rotary position embedding in Hugging Face's half-split layout, with the scalings that Llama models use.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); dynamic NTK and YaRN (arXiv 2309.00071);
llama3 as published with Llama 3.1. Shapes: B batch, T tokens, H head_dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kubetune_trainer.errors import DataError

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn the heads of queries and keys."""

    kind: RopeKind = "default"
    """The scaling of the context length."""
    theta: float = 10000.0
    """Base of the wavelengths."""
    factor: float = 1.0
    """By how much the context is stretched."""
    original_max_positions: int = 0
    """Context length before stretching, in tokens."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_max_positions / this are stretched by the whole factor."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_max_positions / this are left alone."""
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this within the original context are left alone."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this within the original context are stretched by the whole factor."""
    truncate: bool = True
    """yarn: whether the bounds between the two are rounded to whole dimensions."""
    attention_scaling: float = 1.0
    """yarn: multiplies cosine and sine."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, max_positions: int) -> "Rope":
        """Read `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (transformers 4).

        Raises:
            DataError: The kind is not supported or one of its parameters is missing.
        """
        given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in get_args(RopeKind):
            raise DataError(f"config.json: rope_type must be one of {', '.join(get_args(RopeKind))}, got {kind!r}")
        rotated_part = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if rotated_part not in (None, 1):
            raise DataError(f"config.json: partial_rotary_factor must be 1, got {rotated_part!r}")
        theta = _number(given, "rope_theta", default=_number(config, "rope_theta", default=10000.0))
        if kind == "default":
            return cls(theta=theta)
        original = config.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
        scaled = cls(
            kind=kind,
            theta=theta,
            factor=_number(given, "factor", default=max_positions / original if kind == "yarn" and original else None),
            original_max_positions=original if original and kind != "dynamic" else max_positions,
        )
        return scaled._with_parameters(given)

    def _with_parameters(self, given: Mapping[str, Any]) -> "Rope":
        """Add what only one kind has."""
        if self.kind == "llama3":
            return replace(
                self,
                low_frequency_factor=_number(given, "low_freq_factor"),
                high_frequency_factor=_number(given, "high_freq_factor"),
            )
        if self.kind == "yarn":
            return replace(
                self,
                beta_fast=_number(given, "beta_fast", default=32.0),
                beta_slow=_number(given, "beta_slow", default=1.0),
                truncate=bool(given.get("truncate", True)),
                attention_scaling=_yarn_attention_scaling(given, self.factor),
            )
        return self

    def inverse_frequencies(self, *, head_dim: int, length: int, device: torch.device) -> Tensor:
        """Return the angle per position of each pair of dimensions, fp32, shape (H/2,).

        Args:
            head_dim: Width of a head.
            length: Tokens in the longest sequence; only the dynamic kind looks at it.
            device: Where the result is wanted.
        """
        theta = self._stretched_theta(head_dim=head_dim, length=length) if self.kind == "dynamic" else self.theta
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / head_dim
        wavelengths = theta**exponents  # divided by 2 pi
        if self.kind == "linear":
            return 1.0 / wavelengths / self.factor
        if self.kind == "llama3":
            return self._llama3(1.0 / wavelengths)
        if self.kind == "yarn":
            return self._yarn(wavelengths, head_dim=head_dim)
        return 1.0 / wavelengths

    def _stretched_theta(self, *, head_dim: int, length: int) -> float:
        length = max(length, self.original_max_positions)
        stretch = self.factor * length / self.original_max_positions - (self.factor - 1)
        return self.theta * stretch ** (head_dim / (head_dim - 2))

    def _llama3(self, frequencies: Tensor) -> Tensor:
        wavelengths = 2 * math.pi / frequencies
        longest = self.original_max_positions / self.low_frequency_factor
        shortest = self.original_max_positions / self.high_frequency_factor
        smooth = self.original_max_positions / wavelengths - self.low_frequency_factor
        smooth = smooth / (self.high_frequency_factor - self.low_frequency_factor)
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        stretched = torch.where(wavelengths > longest, frequencies / self.factor, between)
        return torch.where(wavelengths < shortest, frequencies, stretched)

    def _yarn(self, wavelengths: Tensor, *, head_dim: int) -> Tensor:
        def dimension_with(rotations: float) -> float:
            turns = math.log(self.original_max_positions / (rotations * 2 * math.pi))
            return head_dim * turns / (2 * math.log(self.theta))

        low, high = dimension_with(self.beta_fast), dimension_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        dimensions = torch.arange(head_dim // 2, dtype=torch.float32, device=wavelengths.device)
        stretched_part = ((dimensions - low) / (high - low)).clamp(0, 1)
        return stretched_part / (self.factor * wavelengths) + (1 - stretched_part) / wavelengths


def rotary_tables(rope: Rope, positions_BT: Tensor, *, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position, each (B, 1, T, H), computed in fp32 and cast to `dtype`."""
    length = int(positions_BT.max()) + 1 if rope.kind == "dynamic" else 0
    frequencies = rope.inverse_frequencies(head_dim=head_dim, length=length, device=positions_BT.device)
    angles = positions_BT[:, None, :, None].float() * frequencies
    cos, sin = angles.cos() * rope.attention_scaling, angles.sin() * rope.attention_scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (B, heads, T, H) by their positions; dimension i pairs with i + H/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _yarn_attention_scaling(given: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return _number(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(_number(given, "mscale")) / scale(_number(given, "mscale_all_dim"))
    return scale(1.0)


def _number(given: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    value = given.get(key)
    if value is None:
        value = default
    if value is None:
        raise DataError(f"config.json: rope parameter {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise DataError(f"config.json: rope parameter {key} must be a positive number, got {value!r}")
    return float(value)
