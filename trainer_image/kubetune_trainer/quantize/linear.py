"""A linear layer that keeps its weight as integers and makes numbers of them when it is used."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW_TOKENS: Final = 64
"""Up to so many tokens reading the weight takes longer than multiplying with it, on a CPU."""
CACHED_ELEMENTS: Final = 1 << 20
"""Weights that become numbers at once then, so that they are multiplied while they are in the CPU's cache."""


class IntegerLinear(nn.Module):
    """Stands in for `nn.Linear`; its weight is int8 with a scale for each row or group.

    Args:
        linear: The layer that it replaces; only its shape is looked at.
        num_groups: Scales of a row.
        rounds_activations: Whether the input is rounded to 8 bits too, with a scale for each token.
        dtype: Type of the scales and the bias.
    """

    def __init__(
        self, linear: nn.Linear, *, num_groups: int = 1, rounds_activations: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        outputs, inputs = linear.out_features, linear.in_features
        self.in_features, self.out_features = inputs, outputs
        self.rounds_activations = rounds_activations
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(outputs, num_groups, dtype=dtype))
        self.register_buffer("bias", None if linear.bias is None else torch.empty(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        if self.rounds_activations:
            x = round_tokens(x)
        num_tokens = x.numel() // self.in_features
        if x.device.type == "cpu" and num_tokens == 1 and x.dtype == torch.bfloat16 and self.weight_scale.shape[1] == 1:
            # torch 2.14's own kernel for int8 weights; with more tokens, or in fp32, it is the slower way.
            row = torch._weight_int8pack_mm(x.reshape(1, -1), self.weight, self.weight_scale[:, 0])  # noqa: SLF001
            out = row.reshape(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        at_once = self.out_features
        if x.device.type == "cpu" and num_tokens <= FEW_TOKENS:
            at_once = max(1, CACHED_ELEMENTS // self.in_features)
        parts = zip(self.weight.split(at_once), self.weight_scale.split(at_once), strict=True)
        outs = [multiply(x, weight, scale) for weight, scale in parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return out if self.bias is None else out + self.bias


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
