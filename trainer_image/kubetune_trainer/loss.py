"""Cross entropy over the trained positions only, without ever holding all logits.

Shapes: B batch, T tokens, D hidden_size, V vocab_size, N trained positions.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kubetune_trainer.names import IGNORE_LABEL

CHUNK_TOKENS = 256
"""Positions whose logits exist at once: 256 of a vocabulary of 128k are 128 MiB in fp32."""


def sum_cross_entropy(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    labels_BT: Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    softcap: float | None = None,
) -> Tensor:
    """Return the sum of the cross entropy over all labels that are not -100, an fp32 scalar.

    The gradient is computed with the loss, chunk by chunk, so that the logits are made once and thrown away. That of
    the head is summed over chunks in the head's type. In bf16 it is 0.36 % off the exact one at 2,048 positions and
    0.94 % at 16,384, where plain cross entropy, which sums once, is 0.20 % off.

    Args:
        hidden_BTD: The normalised residual stream.
        head_VD: The output head.
        labels_BT: Target of each position, -100 where none is trained.
        chunk_tokens: Positions whose logits exist at once.
        softcap: Bound of the logits, see `soft_capped`.
    """
    trained_BT = labels_BT != IGNORE_LABEL
    hidden_ND, labels_N = hidden_BTD[trained_BT], labels_BT[trained_BT].long()
    differentiate = torch.is_grad_enabled()
    wanted = (differentiate and hidden_ND.requires_grad, differentiate and head_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, labels_N, chunk_tokens, wanted, softcap)


def soft_capped(x: Tensor, bound: float | None) -> Tensor:
    """Keep numbers within a bound that they approach as tanh does; None changes nothing."""
    return x if bound is None else (x / bound).tanh() * bound


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        wanted: tuple[bool, bool],
        softcap: float | None,
    ) -> Tensor:
        hidden_gradient = torch.empty_like(hidden_ND) if wanted[0] else None
        head_gradient = torch.zeros_like(head_VD) if wanted[1] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        for start in range(0, len(labels_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            loss, logits_gradient = _loss_of(
                hidden_ND[chunk], head_VD, labels_N[chunk], softcap=softcap, differentiate=any(wanted)
            )
            total += loss
            if hidden_gradient is not None:
                hidden_gradient[chunk] = logits_gradient @ head_VD
            if head_gradient is not None:
                head_gradient.addmm_(logits_gradient.T, hidden_ND[chunk])
            del logits_gradient  # as large as the next chunk's logits
        ctx.gradients = hidden_gradient, head_gradient
        return total.float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("sum_cross_entropy can be differentiated only once")
        # Scaled where they are: the head's gradient is as large as the head.
        hidden_gradient, head_gradient = ctx.gradients
        ctx.gradients = None
        return (
            None if hidden_gradient is None else hidden_gradient.mul_(scale),
            None if head_gradient is None else head_gradient.mul_(scale),
            None,
            None,
            None,
            None,
        )


def _loss_of(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, softcap: float | None, differentiate: bool
) -> tuple[Tensor, Any]:
    """Return a chunk's summed loss and, where it is wanted, its gradient with respect to the logits, (N, V)."""
    logits_NV = soft_capped(functional.linear(hidden_ND, head_VD), softcap).float()
    # In place where the logits are not asked for again, and where we know that the kernel reads a row before it writes.
    is_in_place = softcap is None and logits_NV.device.type == "cpu"
    log_probabilities_NV = torch.log_softmax(logits_NV, dim=-1, out=logits_NV if is_in_place else None)
    loss = functional.nll_loss(log_probabilities_NV, labels_N, reduction="sum")
    if not differentiate:
        return loss, None
    if softcap is None:
        del logits_NV
    gradient_NV = log_probabilities_NV.exp_()
    gradient_NV[torch.arange(len(labels_N), device=labels_N.device), labels_N] -= 1
    if softcap is not None:
        gradient_NV *= 1 - (logits_NV / softcap).square()
    return loss, gradient_NV.to(head_VD.dtype)
