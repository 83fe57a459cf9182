"""The two ways in which families scale: their norms and their embeddings. Shapes: B batch, T tokens, D hidden_size."""

import torch
from torch import Tensor, nn

from kubetune_trainer.model.config import NormStyle


class Embedding(nn.Embedding):
    """A table of embeddings, multiplied with a number that is rounded to their type first, as Gemma is trained."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look tokens up."""
        return self.scaled(super().forward(tokens_BT))

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
        x32 = x_BTD.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.style == "Gemma":
            return (normed * (1.0 + self.weight.float())).to(x_BTD.dtype)
        if self.style == "OLMo":
            return (self.weight * normed).to(x_BTD.dtype)
        return self.weight * normed.to(x_BTD.dtype)
