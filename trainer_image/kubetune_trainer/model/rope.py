"""Rotary position embedding in Hugging Face's half-split layout, with the scalings of longer contexts.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); dynamic NTK and YaRN (arXiv 2309.00071);
llama3 as published with Llama 3.1; LongRoPE (arXiv 2402.13753). Shapes: B batch, T tokens, H head_dim, R the rotated
part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from kubetune_trainer.errors import DataError
from kubetune_trainer.model.values import flag, is_positive, mapping, positive_number, whole_number

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
PARAMETERS: Final = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
    "mscale_all_dim", "short_factor", "long_factor", "finetuned",
}  # fmt: skip
"""What a file may say of a rotary position embedding; the last is a note that changes nothing."""
ORIGINAL: Final = "original_max_position_embeddings"
WITHIN: Final = "rope parameter "
"""How messages begin that name one of them."""

_number = partial(positive_number, within=WITHIN)


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
    """yarn and longrope: multiplies cosine and sine."""
    rotated_part: float = 1.0
    """Which part of each head is turned; the rest behind it stays as it is."""
    short_factors: tuple[float, ...] = ()
    """longrope: what divides the frequency of each pair of dimensions within the original context."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same where a sequence is longer than that."""

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        *,
        max_positions: int,
        head_dim: int,
        theta: float = 10000.0,
        may_be_partial: bool = False,
    ) -> "Rope":
        """Read `rope_scaling` and `rope_theta` (transformers 4) or `rope_parameters` (transformers 5).

        Args:
            config: The parsed `config.json`.
            max_positions: Longest context that the model was made for.
            head_dim: Width of a head.
            theta: Base of the wavelengths where the file does not say.
            may_be_partial: Whether the family may turn a part of each head only.

        Raises:
            DataError: The kind is not supported or one of its parameters is missing or impossible.
        """
        given = mapping(config, "rope_scaling") or mapping(config, "rope_parameters")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in get_args(RopeKind):
            raise DataError(f"config.json: rope_type must be one of {', '.join(get_args(RopeKind))}, got {kind!r}")
        for key, value in given.items():
            if key not in PARAMETERS and value not in (None, False):
                raise DataError(f"config.json: rope parameter {key} is not supported, got {value!r}")
        part = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        plain = cls(
            theta=_number(given, "rope_theta", default=_number(config, "rope_theta", default=theta)),
            rotated_part=_rotated_part(part, head_dim=head_dim, may_be_partial=may_be_partial),
        )
        if kind == "default":
            return plain
        written = config if config.get(ORIGINAL) is not None else given
        original = whole_number(written, ORIGINAL, default=max_positions, least=2, within=WITHIN)
        stretched = max_positions / original if kind in {"yarn", "longrope"} and written.get(ORIGINAL) else None
        scaled = cls(
            kind=kind,
            theta=plain.theta,
            rotated_part=plain.rotated_part,
            factor=_number(given, "factor", default=stretched),
            original_max_positions=max_positions if kind == "dynamic" else original,
        )
        return scaled._with_parameters(given, head_dim=head_dim)

    def _with_parameters(self, given: Mapping[str, Any], *, head_dim: int) -> "Rope":
        """Add what only one kind has."""
        if self.kind == "dynamic":
            _check(head_dim * self.rotated_part >= 4, "rope_type", "another where 2 dimensions turn", self.kind)
        if self.kind == "llama3":
            low, high = _number(given, "low_freq_factor"), _number(given, "high_freq_factor")
            _check(low < high, "high_freq_factor", f"more than low_freq_factor {low}", high)
            return replace(self, low_frequency_factor=low, high_frequency_factor=high)
        if self.kind == "yarn":
            _check(self.theta > 1, "rope_theta", "more than 1 with yarn", self.theta)
            return replace(
                self,
                beta_fast=_number(given, "beta_fast", default=32.0),
                beta_slow=_number(given, "beta_slow", default=1.0),
                truncate=flag({"truncate": True, **given}, "truncate", within=WITHIN),
                attention_scaling=_yarn_attention_scaling(given, self.factor),
            )
        if self.kind == "longrope":
            num_pairs = int(head_dim * self.rotated_part) // 2
            return replace(
                self,
                short_factors=_factors(given, "short_factor", length=num_pairs),
                long_factors=_factors(given, "long_factor", length=num_pairs),
                attention_scaling=_longrope_attention_scaling(given, self.factor, self.original_max_positions),
            )
        return self

    def inverse_frequencies(self, *, head_dim: int, length: int | Tensor, device: torch.device) -> Tensor:
        """Return the angle per position of each pair of dimensions, fp32, shape (R/2,).

        Args:
            head_dim: Width of a head.
            length: Tokens in the longest sequence; only the kinds dynamic and longrope look at it.
            device: Where the result is wanted.
        """
        rotated = int(head_dim * self.rotated_part)
        theta = self._stretched_theta(rotated=rotated, length=int(length)) if self.kind == "dynamic" else self.theta
        exponents = torch.arange(0, rotated, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / rotated
        wavelengths = theta**exponents  # divided by 2 pi
        if self.kind == "linear":
            return 1.0 / wavelengths / self.factor
        if self.kind == "llama3":
            return self._llama3(1.0 / wavelengths)
        if self.kind == "yarn":
            return self._yarn(wavelengths, rotated=rotated)
        if self.kind == "longrope":
            return 1.0 / (self._longrope_factors(length, device=device) * wavelengths)
        return 1.0 / wavelengths

    def _longrope_factors(self, length: int | Tensor, *, device: torch.device) -> Tensor:
        short, long = (torch.tensor(factors, device=device) for factors in (self.short_factors, self.long_factors))
        return torch.where(torch.as_tensor(length, device=device) > self.original_max_positions, long, short)

    def _stretched_theta(self, *, rotated: int, length: int) -> float:
        length = max(length, self.original_max_positions)
        stretch = self.factor * length / self.original_max_positions - (self.factor - 1)
        return self.theta * stretch ** (rotated / (rotated - 2))

    def _llama3(self, frequencies: Tensor) -> Tensor:
        wavelengths = 2 * math.pi / frequencies
        longest = self.original_max_positions / self.low_frequency_factor
        shortest = self.original_max_positions / self.high_frequency_factor
        smooth = self.original_max_positions / wavelengths - self.low_frequency_factor
        smooth = smooth / (self.high_frequency_factor - self.low_frequency_factor)
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        stretched = torch.where(wavelengths > longest, frequencies / self.factor, between)
        return torch.where(wavelengths < shortest, frequencies, stretched)

    def _yarn(self, wavelengths: Tensor, *, rotated: int) -> Tensor:
        def dimension_with(rotations: float) -> float:
            turns = math.log(self.original_max_positions / (rotations * 2 * math.pi))
            return rotated * turns / (2 * math.log(self.theta))

        low, high = dimension_with(self.beta_fast), dimension_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotated - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        dimensions = torch.arange(rotated // 2, dtype=torch.float32, device=wavelengths.device)
        stretched_part = ((dimensions - low) / (high - low)).clamp(0, 1)
        return stretched_part / (self.factor * wavelengths) + (1 - stretched_part) / wavelengths


def rotary_tables(rope: Rope, positions_BT: Tensor, *, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position for `rotate`, each (B, 1, T, R), computed in fp32 and cast to `dtype`.

    The first half of the sines is negative: what `rotate` multiplies with them it would have to negate otherwise.
    """
    length = positions_BT.max() + 1 if rope.kind in {"dynamic", "longrope"} else 0
    frequencies = rope.inverse_frequencies(head_dim=head_dim, length=length, device=positions_BT.device)
    angles = positions_BT[:, None, :, None].float() * frequencies
    cos, sin = angles.cos() * rope.attention_scaling, angles.sin() * rope.attention_scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (B, heads, T, H) by their positions; of R rotated dimensions i pairs with i + R/2."""
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)
    if x.requires_grad:
        turned: Tensor = _Rotated.apply(x, cos, sin)
        return turned
    return _rotated(x, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat((second, first), dim=-1).mul_(sin))


class _Rotated(torch.autograd.Function):
    """The same with the turn back as its backward pass, where autograd would put halves together from zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated_part(part: Any, *, head_dim: int, may_be_partial: bool) -> float:
    if part in (None, 1):
        return 1.0
    if not may_be_partial:
        raise DataError(f"config.json: partial_rotary_factor must be 1, got {part!r}")
    is_part = isinstance(part, float) and 0 < part < 1
    if not is_part or int(head_dim * part) % 2 or int(head_dim * part) < 1:
        raise DataError(
            f"config.json: partial_rotary_factor must give an even part of head_dim, got {part!r} of {head_dim}"
        )
    return float(part)


def _factors(given: Mapping[str, Any], key: str, *, length: int) -> tuple[float, ...]:
    factors = given.get(key)
    is_right = isinstance(factors, list) and len(factors) == length and all(map(is_positive, factors))
    _check(is_right, key, f"a list of {length} positive numbers, one for each pair of rotated dimensions", factors)
    return tuple(map(float, factors or ()))


def _check(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise DataError(f"config.json: {WITHIN}{key} must be {rule}, got {value!r}")


def _longrope_attention_scaling(given: Mapping[str, Any], factor: float, original: int) -> float:
    if given.get("attention_factor") is not None:
        return _number(given, "attention_factor")
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def yarn_attention_scaling(factor: float, *, weight: float = 1.0) -> float:
    """Return by what yarn multiplies cosine and sine, where a file does not say."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_scaling(given: Mapping[str, Any], factor: float) -> float:
    if given.get("attention_factor") is not None:
        return _number(given, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        every, all_dims = _number(given, "mscale"), _number(given, "mscale_all_dim")
        return yarn_attention_scaling(factor, weight=every) / yarn_attention_scaling(factor, weight=all_dims)
    return yarn_attention_scaling(factor)
