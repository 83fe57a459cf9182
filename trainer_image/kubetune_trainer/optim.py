"""Optimizer, learning-rate schedule and gradient clipping."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from kubetune_trainer.compact_adamw import Bits, CompactAdamW
from kubetune_trainer.distributed import local_part
from kubetune_trainer.lora import B_SUFFIX

if TYPE_CHECKING:
    from kubetune_trainer.config import Training


BITS: Final[dict[str, Bits | None]] = {"AdamW": None, "AdamW8bit": 8, "AdamW4bit": 4}
"""In how many bits each `training.optimizer` keeps its moments; None is the weights' own type."""

PIECE_NUMBERS: Final = 2**22
"""So many numbers of a gradient are in fp64 at once: 32 MiB."""


def build_optimizer(
    model: nn.Module,
    training: "Training",
    *,
    learning_rate_ratio: float = 1.0,
    bits: Bits | None = None,
    rounding_seed: int | None = None,
) -> torch.optim.Optimizer:
    """Build AdamW over the trained weights; norms, biases and magnitudes are not decayed.

    Args:
        model: Its weights that require gradients are trained.
        training: Learning rate and weight decay.
        learning_rate_ratio: What the learning rate of the adapters' B is multiplied with (LoRA+, arXiv 2402.12354);
            each group says its own, for whoever changes learning rates.
        bits: Of the moments, see `CompactAdamW`; None keeps them in the weights' type.
        rounding_seed: Decides how weights in bf16 are rounded, see `CompactAdamW`; None rounds to the nearest.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    faster = [p for name, p in trained if name.endswith(B_SUFFIX)] if learning_rate_ratio != 1 else []
    others = [p for name, p in trained if not (faster and name.endswith(B_SUFFIX))]
    decay = training.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": decay, "learning_rate_ratio": 1.0},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "learning_rate_ratio": 1.0},
        {"params": faster, "weight_decay": decay, "learning_rate_ratio": learning_rate_ratio},
    ]
    for group in groups:
        group["lr"] = training.learning_rate * group["learning_rate_ratio"]
    used = [group for group in groups if group["params"]]
    if bits is None and rounding_seed is None:
        return ShardedAdamW(used, lr=training.learning_rate, fused=True)
    return CompactAdamW(used, lr=training.learning_rate, bits=bits, rounding_seed=rounding_seed)


class ShardedAdamW(torch.optim.AdamW):
    """AdamW that computes on each rank's own shards, which is all that an elementwise update needs.

    Left to DTensor, the fused update of several hundred weights is planned as if it could need communication: 20 s
    before the first step of 420 adapters, and on every resume (torch 2.14). Parameters and state stay DTensors.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local_part(tensor) for tensor in tensors]
        return has_complex


def sharing(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the groups of ranks of which each holds another part of a tensor; those with copies are left out."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    return tuple(mesh.get_group(axis) for axis in range(mesh.ndim) if not placements[axis].is_replicate())


def learning_rate_factor(step: int, *, scheduler: str, warmup_steps: int, total_steps: int) -> float:
    """Return what the learning rate is multiplied with in a step, counted from 0.

    It rises in equal parts to 1 in the last warm-up step, then stays (Constant), or falls towards 0, which it would
    reach in the step after the last (Linear, Cosine).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match scheduler:
        case "Constant":
            return 1.0
        case "Linear":
            return 1.0 - progress
        case "Cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise AssertionError(f"unknown scheduler {scheduler}")


class StepInBackward:
    """Takes the step of each weight as soon as backward has its gradient, and frees the gradient (arXiv 2306.09782).

    There are never more gradients than those of one block. Nothing can be clipped, since the norm is known at the end.

    Args:
        optimizer: Takes the steps; it passes over weights without a gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.divisor = 1.0
        """What gradients are divided by before the step; set before backward."""
        self._optimizer = optimizer
        self._squares: list[tuple[tuple[ProcessGroup, ...], Tensor]] = []
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.register_post_accumulate_grad_hook(self._step)

    @torch.no_grad()
    def _step(self, weight: Tensor) -> None:
        assert weight.grad is not None, "the hook of a gradient"
        part = local_part(weight.grad).div_(self.divisor)
        self._squares.append((sharing(weight.grad), square_of(part)))
        self._optimizer.step()
        weight.grad = None

    def grad_norm(self) -> float:
        """Return the norm over all ranks of what was divided and stepped since the last call."""
        squares, self._squares = self._squares, []
        return norm_over_ranks(squares).item()


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their norm over all ranks is at most `max_norm`.

    Squares are summed in fp64, so that the norm does not depend on how the gradients are sharded.

    Returns:
        The norm before clipping, an fp64 scalar on the gradients' device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [local_part(gradient) for gradient in gradients]
    norm = norm_over_ranks(
        (sharing(gradient), square_of(part)) for gradient, part in zip(gradients, local, strict=True)
    )
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local, scale.to(local[0].dtype))
    return norm


def square_of(part: Tensor) -> Tensor:
    """Return the square of a gradient's norm, summed in fp64, in pieces: torch sums a copy that it makes in fp64."""
    pieces = part.flatten().split(PIECE_NUMBERS)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).square().sum()


def norm_over_ranks(squares: Iterable[tuple[tuple[ProcessGroup, ...], Tensor]]) -> Tensor:
    """Return the norm of what has these squares on this rank, each with the groups that hold its other parts."""
    by_groups: dict[tuple[ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for groups, square in squares:
        by_groups[groups].append(square)
    totals = []
    for groups, those in by_groups.items():
        total = torch.stack(those).sum()
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum().sqrt()
