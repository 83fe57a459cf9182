"""A linear layer that keeps its weight as integers and makes numbers of them when it is used."""

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        if self.weight_scale.shape[1] == 1:  # a row's scale can wait until the row is summed up
            out = functional.linear(x, self.weight.to(x.dtype)) * self.weight_scale.T.to(x.dtype)
            return out if self.bias is None else out + self.bias
        groups = self.weight.reshape(*self.weight_scale.shape, -1).to(x.dtype)
        return functional.linear(x, (groups * self.weight_scale.to(x.dtype).unsqueeze(-1)).flatten(1), self.bias)


def round_tokens(x: Tensor) -> Tensor:
    """Round each token's activations to 8 bits, (…, inputs), as the compressed-tensors package does."""
    x32 = x.float()
    scale = (x32.abs().amax(dim=-1, keepdim=True) / 127.5).clamp_min(torch.finfo(torch.float32).tiny)
    return ((x32 / scale).round().clamp_(-128, 127) * scale).to(x.dtype)
