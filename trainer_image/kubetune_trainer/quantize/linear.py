"""A linear layer that keeps its weight as integers and makes numbers of them when it is used."""

from collections.abc import Sequence
from typing import Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW_TOKENS: Final = 64
"""Up to so many tokens reading the weight takes longer than multiplying with it, on a CPU."""
CACHED_ELEMENTS: Final = 1 << 20
"""Weights that become numbers at once then, so that they are multiplied while they are in the CPU's cache."""
QUICK_TOKENS: Final = 8
"""Up to so many tokens torch 2.14's own kernels for integer weights are the quickest, in bf16 on a CPU."""
PACKED_GROUPS: Final = (32, 64, 128, 256)
"""Sizes of groups that its kernel for 4 bits knows."""
PACKED_ROWS: Final = 64
"""Rows of a weight that it reads together: weights of so many, or a multiple, can be neighbours."""


class Packed(NamedTuple):
    """A 4-bit weight as torch's kernel reads it."""

    weight: Tensor
    """(O, I / 2), uint8."""
    scales: Tensor
    """(G, O, 2): a scale, and a zero point, which is 0."""


class IntegerLinear(nn.Module):
    """Stands in for `nn.Linear`; its weight is int8 with a scale for each row or group.

    Args:
        linear: The layer that it replaces; only its shape is looked at.
        num_groups: Scales of a row.
        bits: Of an integer.
        rounds_activations: Whether the input is rounded to 8 bits too, with a scale for each token.
        dtype: Type of the scales and the bias.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        num_groups: int = 1,
        bits: int = 8,
        rounds_activations: bool = False,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        outputs, inputs = linear.out_features, linear.in_features
        self.in_features, self.out_features = inputs, outputs
        self.bits, self.rounds_activations = bits, rounds_activations
        self.packed: Packed | None = None
        """The weight once more, for few tokens; see `pack`."""
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(outputs, num_groups, dtype=dtype))
        self.register_buffer("bias", None if linear.bias is None else torch.empty(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        if self.rounds_activations:
            x = round_tokens(x)
        num_tokens = x.numel() // self.in_features
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and 0 < num_tokens <= QUICK_TOKENS and self._is_quick():
            out = self._few(x.reshape(num_tokens, -1)).view(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        at_once = self.out_features
        if x.device.type == "cpu" and num_tokens <= FEW_TOKENS:
            at_once = max(1, CACHED_ELEMENTS // self.in_features)
        parts = zip(self.weight.split(at_once), self.weight_scale.split(at_once), strict=True)
        outs = [multiply(x, weight, scale) for weight, scale in parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return out if self.bias is None else out + self.bias

    @property
    def group_size(self) -> int:
        """Weights of a row that share a scale."""
        return self.in_features // self.weight_scale.shape[1]

    def _is_quick(self) -> bool:
        return self.packed is not None or self.weight_scale.shape[1] == 1

    def _few(self, x_TI: Tensor) -> Tensor:
        """Map few tokens by torch's own kernels."""
        if self.packed is None:
            return torch._weight_int8pack_mm(x_TI, self.weight, self.weight_scale[:, 0])  # noqa: SLF001
        return torch.ops.aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]  # noqa: SLF001
            x_TI, self.packed.weight, self.group_size, self.packed.scales
        )

    @torch.inference_mode(mode=False)
    def pack(self) -> None:
        """Keep a 4-bit weight packed too, half a byte each, where torch multiplies it so; else do nothing."""
        is_known = self.bits == 4 and self.group_size in PACKED_GROUPS and self.out_features % PACKED_ROWS == 0
        has_kernel = torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
        if self.packed is not None or not (is_known and has_kernel) or self.weight_scale.dtype != torch.bfloat16:
            return
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self.weight.int() + 8, 1)  # noqa: SLF001
        scales = self.weight_scale.T.unsqueeze(-1)
        self.packed = Packed(weight, torch.cat((scales, torch.zeros_like(scales)), dim=-1))

    @classmethod
    def joined(cls, layers: Sequence[Self]) -> Self:
        """Return layers that map the same input, and whose weights and scales are neighbours, as one without copies."""
        first = layers[0]
        outputs, has_bias = sum(layer.out_features for layer in layers), first.bias is not None
        whole = cls(
            nn.Linear(first.in_features, outputs, bias=has_bias, device="meta"),
            num_groups=first.weight_scale.shape[1],
            bits=first.bits,
            rounds_activations=first.rounds_activations,
            dtype=first.weight_scale.dtype,
        )
        whole.weight = together(first.weight, rows=outputs)
        whole.weight_scale = together(first.weight_scale, rows=outputs)
        whole.bias = torch.cat([layer.bias for layer in layers]) if has_bias else None
        packed = [layer.packed for layer in layers if layer.packed is not None]
        if packed:
            scales = torch.cat([each.scales for each in packed], dim=1)
            whole.packed = Packed(together(packed[0].weight, rows=outputs), scales)
        return whole


def together(first: Tensor, *, rows: int) -> Tensor:
    """Return the rows that begin with those of a matrix, whose neighbours in memory the others are."""
    return first.detach().as_strided((rows, first.shape[1]), first.stride())


def multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply (…, I) with int8 weights (O, I) that have a scale for each row or group, (O, G)."""
    if scale.shape[1] == 1:  # a row's scale can wait until the row is summed up
        return functional.linear(x, weight.to(x.dtype)) * scale.T.to(x.dtype)
    groups = weight.reshape(*scale.shape, -1).to(x.dtype)
    return functional.linear(x, (groups * scale.to(x.dtype).unsqueeze(-1)).flatten(1))


def round_tokens(x: Tensor) -> Tensor:
    """Round each token's activations to 8 bits, (…, inputs), as the compressed-tensors package does."""
    x32 = x.float()
    scale = (x32.abs().amax(dim=-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).tiny)
    return ((x32 / scale).round().clamp_(-128, 127) * scale).to(x.dtype)
