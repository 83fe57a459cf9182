"""What a training step is a function of, so that a resumed run needs no state but the weights and the optimizer's."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch.distributed.fsdp import FSDPModule

from kubetune_trainer.data.sampler import Batch, rows_for_step
from kubetune_trainer.distributed import gather_vector, local_part
from kubetune_trainer.errors import NonFiniteLossError, listed
from kubetune_trainer.optim import clip_grad_norm, learning_rate_factor
from kubetune_trainer.report import last_step
from kubetune_trainer.training.job import Job

ROWS_IN_MESSAGE = 16


def global_rows(job: Job, step: int) -> list[int]:
    """All ranks' rows of a step, counted from 1. Which they are does not depend on the number of ranks."""
    training = job.config.training
    return rows_for_step(
        step - 1, num_rows=len(job.local.train_data), global_batch_size=training.global_batch_size, seed=training.seed
    )


def micro_batch_rows(job: Job, step: int) -> list[list[int]]:
    """This rank's rows of a step, a list for each micro batch."""
    world, size = job.world, job.config.training.micro_batch_size
    mine = global_rows(job, step)[world.data_rank :: world.data_size]
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def validation_rows(job: Job, num_rows: int) -> list[range]:
    """This rank's rows of the held-out data, a range for each round; a rank with nothing left has an empty one."""
    world, size = job.world, job.config.training.micro_batch_size
    return [
        range(start + world.data_rank, min(start + world.data_size * size, num_rows), world.data_size)
        for start in range(0, num_rows, world.data_size * size)
    ]


def seed_dropout(*what: int) -> None:
    """Makes dropout a function of (seed, step, micro batch, rank)."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def set_learning_rate(job: Job, step: int) -> None:
    """Sets what the schedule says for a step."""
    training = job.config.training
    factor = learning_rate_factor(
        step - 1, scheduler=training.scheduler, warmup_steps=training.warmup_steps, total_steps=job.total_steps
    )
    for group in job.optimizer.param_groups:
        group["lr"] = training.learning_rate * group["learning_rate_ratio"] * factor


def count_trained_tokens(job: Job, batches: Sequence[Batch]) -> None:
    """Tells who steps in backward the trained tokens of a step over all ranks; elsewhere the exchange is soon enough.

    Belongs before the first backward pass of losses that are summed over tokens.
    """
    if job.in_backward is not None:
        trained_tokens = gather_vector([sum(batch.trained_tokens for batch in batches)]).sum().item()
        job.in_backward.divisor = max(1, trained_tokens)


def share_gradients(job: Job, *, is_last: bool) -> None:
    """Says when ranks add up their gradients: after the step's last micro batch, or, with all weights, after each.

    Those of adapters are small enough to be kept whole until then.
    """
    if isinstance(job.model, FSDPModule):
        job.model.set_requires_gradient_sync(is_last or job.config.tuning == "Full")


def divide_gradients(job: Job, trained_tokens: float) -> None:
    """Makes gradients of sums those of means; with training.optimizer_in_backward they were that at their step."""
    if job.in_backward is None:
        for weight in job.weights:
            local_part(weight.grad).div_(max(1, trained_tokens))


def clipped_grad_norm(job: Job) -> float:
    """Clips the gradient to training.max_grad_norm and tells its norm before that.

    With training.optimizer_in_backward its parts are gone already, unclipped, and only the norm is told.
    """
    if job.in_backward is not None:
        return job.in_backward.grad_norm()
    assert job.config.training.max_grad_norm is not None, "filled in unless optimizer_in_backward"
    return clip_grad_norm(job.weights, job.config.training.max_grad_norm).item()


def check_finite(job: Job, step: int, *, loss: float, grad_norm: float) -> None:
    """Keeps a step that went wrong out of the weights.

    Raises:
        NonFiniteLossError: The loss or the gradient norm is NaN or infinite; names the rows of the batch.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        rows = listed(sorted(global_rows(job, step)), most=ROWS_IN_MESSAGE)
        raise NonFiniteLossError(
            f"{job.config.title}: step {step} has loss {loss} and gradient norm {grad_norm}, over rows {rows}",
            hint="Lower training.learning_rate or look for broken samples; the last checkpoint is sound.",
        )


def validation_due(job: Job, step: int) -> bool:
    """Whether the held-out data is due after a step: every so many, and after the last."""
    return step == job.total_steps or step % (job.config.training.validate_every_steps or job.total_steps) == 0


def validation_left(job: Job, first_step: int) -> bool:
    """Whether an attempt that was stopped in the last step, and had no time for it, has left the validation to this."""
    return first_step == job.total_steps and last_step().get("validationStep") != first_step


def check_validation(job: Job, step: int, *, loss: float) -> None:
    """Keeps a run whose validation went wrong from being saved or exported.

    Raises:
        NonFiniteLossError: The loss over the held-out data is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"{job.config.title}: validation after step {step} has loss {loss}",
            hint="Lower training.learning_rate or look for broken samples in dataset.validation.",
        )


def check_weights(job: Job, step: int) -> None:
    """Keeps weights that went wrong out of checkpoints and outputs: a loss would show them one step later.

    Every rank looks at its own parts, once and without copies.

    Raises:
        NonFiniteLossError: A trained weight of some rank is NaN or infinite.
    """
    parts = [local_part(weight.detach()) for weight in job.weights]
    ends = [end.float() for part in parts if part.numel() for end in part.aminmax()]  # both are NaN where a number is
    is_finite = not ends or bool(torch.stack(ends).isfinite().all())
    if gather_vector([float(is_finite)]).min().item() == 0:
        raise NonFiniteLossError(
            f"{job.config.title}: after step {step} trained weights are NaN or infinite",
            hint="Lower training.learning_rate or look for broken samples; the last checkpoint is sound.",
        )
