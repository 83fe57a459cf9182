"""How far a student's next-token distributions are from a teacher's, without ever holding all logits of either.

Forward and Reverse are the Kullback-Leibler divergences of Hinton et al. (arXiv 1503.02531) and of MiniLLM (arXiv
2306.08543), and the ends of GKD's generalized Jensen-Shannon divergence (arXiv 2306.13649); Symmetric is their mean.

Shapes: B batch, T tokens, D and E hidden_size of student and teacher, V vocab_size, N trained positions, C positions of
a chunk.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kubetune_trainer.loss import soft_capped
from kubetune_trainer.names import IGNORE_LABEL

CHUNK_TOKENS: Final = 128
"""Positions whose logits exist at once."""
CHUNK_COPIES: Final = 14
"""How many tensors as large as a chunk's logits in fp32 there are at the most, those for the gradient included: for a
vocabulary of 128k 0.9 GiB."""
Divergence = Literal["Forward", "Reverse", "Symmetric"]


class Scored(NamedTuple):
    """What a model's logits are made of, as `Decoder.forward` hands it to `score`."""

    hidden: Tensor
    head: Tensor
    softcap: float | None

    def logits(self, chunk: slice) -> Tensor:
        """The logits of some positions, in the type that the model computes in and without their bound."""
        return functional.linear(self.hidden[chunk], self.head)


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """How the loss is put together.

    Attributes:
        divergence: Forward is KL(teacher || student), Reverse KL(student || teacher), Symmetric the mean of both.
        temperature: Both models' logits are divided by it for the divergence, which is then scaled by its square.
        weight: Part of the divergence in the loss; the rest is the cross entropy.
    """

    divergence: Divergence
    temperature: float
    weight: float


class Distilled(NamedTuple):
    """Sums over the trained tokens of a micro batch, fp32 scalars."""

    loss: Tensor
    """What is minimised; the only one with a gradient."""
    divergence: Tensor
    """Of the two distributions, scaled by the temperature's square."""
    cross_entropy: Tensor
    """Of the student."""


def distill(
    student: Scored, teacher: Scored, labels_BT: Tensor, *, how: Distilling, chunk_tokens: int = CHUNK_TOKENS
) -> Distilled:
    """Compare a student with its teacher at the trained positions.

    The gradient is computed with the loss, chunk by chunk, so that the logits of both are made once and thrown away.

    Args:
        student: What its logits are made of: (B, T, D) and (V, D).
        teacher: The same of the teacher, (B, T, E). Its head may have another number of rows: what one of the two has
            more is padding that no token uses, and the divergence leaves it out.
        labels_BT: Target of each position, -100 where none is trained.
        how: The settings.
        chunk_tokens: Positions whose logits exist at once.
    """
    trained_BT = labels_BT != IGNORE_LABEL
    asked = Scored(teacher.hidden[trained_BT], teacher.head, teacher.softcap)
    hidden_ND, differentiate = student.hidden[trained_BT], torch.is_grad_enabled()
    wanted = (differentiate and hidden_ND.requires_grad, differentiate and student.head.requires_grad)
    labels_N = labels_BT[trained_BT].long()
    sums = _Chunked.apply(hidden_ND, student.head, student.softcap, asked, labels_N, how, chunk_tokens, wanted)
    return Distilled(*sums)


def divergence_of(student_CV: Tensor, teacher_CV: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence of log-probabilities, summed over positions."""
    difference_CV = teacher_CV - student_CV
    if divergence == "Forward":
        return (teacher_CV.exp() * difference_CV).sum()
    if divergence == "Reverse":
        return -(student_CV.exp() * difference_CV).sum()
    return ((teacher_CV.exp() - student_CV.exp()) * difference_CV).sum() / 2


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        softcap: float | None,
        teacher: Scored,
        labels_N: Tensor,
        how: Distilling,
        chunk_tokens: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = Scored(hidden_ND, head_VD, softcap)
        hidden_gradient = torch.empty_like(hidden_ND) if wanted[0] else None
        head_gradient = torch.zeros_like(head_VD) if wanted[1] else None
        sums = torch.zeros(3, dtype=torch.float64, device=hidden_ND.device)
        for start in range(0, len(labels_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            found, logits_gradient = _of_chunk(student, teacher, labels_N, chunk, how, differentiate=any(wanted))
            sums += found
            if hidden_gradient is not None:
                hidden_gradient[chunk] = logits_gradient @ head_VD
            if head_gradient is not None:
                head_gradient.addmm_(logits_gradient.T, hidden_ND[chunk])
        ctx.gradients = hidden_gradient, head_gradient
        loss, divergence, cross_entropy = sums.float()
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return loss, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("distill can be differentiated only once")
        # Scaled where they are: the head's gradient is as large as the head.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        return (*scaled, None, None, None, None, None, None)


def _of_chunk(
    student: Scored, teacher: Scored, labels_N: Tensor, chunk: slice, how: Distilling, *, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """The three sums of a chunk, fp64, and the gradient of the loss by the student's unbounded logits, (C, V)."""
    shared = min(len(student.head), len(teacher.head))
    taught_CV = soft_capped(teacher.logits(chunk), teacher.softcap).float()[:, :shared]
    taught_CV = functional.log_softmax(taught_CV / how.temperature, dim=-1)
    raw_CV = student.logits(chunk).requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        logits_CV = soft_capped(raw_CV, student.softcap).float()
        cross_entropy = functional.cross_entropy(logits_CV, labels_N[chunk], reduction="sum")
        told_CV = functional.log_softmax(logits_CV[:, :shared] / how.temperature, dim=-1)
        divergence = divergence_of(told_CV, taught_CV, how.divergence) * how.temperature**2
        loss = how.weight * divergence + (1 - how.weight) * cross_entropy
    (gradient,) = torch.autograd.grad(loss, raw_CV) if differentiate else (raw_CV,)
    return torch.stack([loss, divergence, cross_entropy]).detach().double(), gradient
