"""A linear layer that computes in the type of its input, whatever type its weight is kept in."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from kubetune_trainer.model.recompute import made_again


class Linear(nn.Linear):
    """A weight in fp32 is multiplied in bf16 where its input is bf16; backward converts it again and keeps no copy."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        if self.weight.dtype == x.dtype:
            return super().forward(x)
        weight = made_again(self.weight.to(x.dtype), partial(self.weight.detach().to, x.dtype))
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
