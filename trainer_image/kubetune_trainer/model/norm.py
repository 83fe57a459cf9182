"""The two ways in which families scale: their norms and their embeddings. Shapes: B batch, T tokens, D hidden_size."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kubetune_trainer.model.config import NormStyle
from kubetune_trainer.model.recompute import made_again
from kubetune_trainer.trained_tokens import TokenAdapter


class Embedding(nn.Embedding):
    """A table of embeddings, multiplied with a number that is rounded to their type first, as Gemma is trained."""

    token_adapter: TokenAdapter | None
    """Rows that are trained beside it; see `trained_tokens`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale
        self.computes_in: torch.dtype | None = None
        """The type of what is returned, in which all behind it computes; None is the weight's. Set by `parallelize`."""
        self.register_module("token_adapter", None)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look tokens up."""
        x_BTD = self.converted(super().forward(tokens_BT))
        if self.token_adapter is not None:
            x_BTD = self.token_adapter.looked_up(x_BTD, tokens_BT)
        return self.scaled(x_BTD)

    def converted(self, numbers: Tensor) -> Tensor:
        """Return numbers of this table, or of the output head, in the type that the model computes in."""
        return numbers if self.computes_in is None else numbers.to(self.computes_in)

    def scaled(self, x_BTD: Tensor) -> Tensor:
        """Multiply what was looked up elsewhere."""
        return x_BTD if self.scale == 1.0 else x_BTD * torch.tensor(self.scale, dtype=x_BTD.dtype)


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32; `NormStyle` says when it is rounded."""

    def __init__(self, size: int, *, eps: float, style: NormStyle) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.style = style

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The same in one call, rounded to its input's type: of few tokens the calls take longer than the numbers.
            x = x_BTD if self.style == "Llama" else x_BTD.float()
            return self._scaled(functional.rms_norm(x, x.shape[-1:], None, self.eps), self.weight, x_BTD.dtype)
        normed: Tensor = _Normalized.apply(x_BTD, self.eps) if x_BTD.requires_grad else _normalized(x_BTD, self.eps)[0]
        out = self._scaled(normed, self.weight, x_BTD.dtype)
        return made_again(out, partial(self._again, x_BTD.detach(), self.weight.detach()))

    def _scaled(self, normed: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self.style == "Gemma":
            return (normed * (1.0 + weight.float())).to(dtype)
        if self.style == "OLMo":
            return (weight * normed).to(dtype)
        return weight.to(dtype) * normed.to(dtype)

    def _again(self, x_BTD: Tensor, weight: Tensor) -> Tensor:
        return self._scaled(_normalized(x_BTD, self.eps)[0], weight, x_BTD.dtype)


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return numbers over their root mean square, and what they were multiplied with, both fp32."""
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return x32 * inverse, inverse


class _Normalized(torch.autograd.Function):
    """The same with a backward pass that needs x alone; of the fp32 numbers in between autograd would keep three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        normed, inverse = _normalized(x, eps)
        ctx.save_for_backward(x, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        along = (gradient * normed).mean(-1, keepdim=True)
        return ((gradient - normed * along) * inverse).to(x.dtype), None
