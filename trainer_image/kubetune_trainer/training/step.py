"""What a training step is a function of, so that a resumed run needs no state but the weights and the optimizer's."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.distributed.fsdp import FSDPModule

from kubetune_trainer.data.sampler import Batch, rows_for_step
from kubetune_trainer.distributed import gather_vector, local_part
from kubetune_trainer.errors import NonFiniteLossError, listed
from kubetune_trainer.heartbeat import sign_of_life
from kubetune_trainer.optim import clip_grad_norm, learning_rate_factor
from kubetune_trainer.report import last_step, report
from kubetune_trainer.training.job import Job

ROWS_IN_MESSAGE = 16
_T = TypeVar("_T")


def steps_left(job: Job, first_step: int) -> Iterator[int]:
    """The steps that are still to do, in order; with training.early_stopping, none once training has ended early."""
    for step in range(first_step + 1, job.total_steps + 1):
        if ends_early(job):
            report("earlyStop", step=step - 1, best_validation_step=last_step()["bestValidationStep"])
            return
        yield step


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

    Those of adapters are small enough to be kept whole until then. Belongs before each micro batch, which is a sign of
    life too.
    """
    sign_of_life()
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
    """Whether the attempt before was told to stop where a validation was due, and has left it to this one."""
    return first_step > 0 and validation_due(job, first_step) and last_step().get("validationStep") != first_step


def stop_requested(job: Job) -> bool:
    """Whether some rank was told to stop; the same on every rank, which all have to ask."""
    return bool(gather_vector([float(job.stop.requested)]).any())


def until_stopped(job: Job, rounds: Iterable[_T]) -> Iterator[_T]:
    """What is in rounds, until some rank is told to stop: a pod has no time for a long validation then."""
    for each in rounds:
        if stop_requested(job):
            return
        sign_of_life()
        yield each


def report_validation(job: Job, step: int, *, loss: float, **measures: float) -> None:
    """Tells the loss over the held-out data, and with training.early_stopping the lowest so far.

    Args:
        job: The run.
        step: After which step.
        loss: The mean.
        measures: What else the recipe tells.

    Raises:
        NonFiniteLossError: The loss is NaN or infinite, and such a run must not be saved or exported.
    """
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"{job.config.title}: validation after step {step} has loss {loss}",
            hint="Lower training.learning_rate or look for broken samples in dataset.validation.",
        )
    best: dict[str, float] = {}
    if (stopping := job.config.training.early_stopping) is not None:
        told = last_step()
        lowest = told.get("bestValidationLoss", math.inf)
        is_better = loss < lowest - stopping.min_delta
        best["best_validation_loss"] = loss if is_better else lowest
        best["best_validation_step"] = step if is_better else told["bestValidationStep"]
    report("validation", step=step, validation_loss=loss, **best, **measures)


def ends_early(job: Job) -> bool:
    """Whether as many validations in a row as training.early_stopping allows were no better than the best before."""
    training, told = job.config.training, last_step()
    if training.early_stopping is None or "bestValidationStep" not in told:
        return False
    assert training.validate_every_steps is not None, "the config has seen to it"
    steps = told["validationStep"] - told["bestValidationStep"]
    return bool(steps >= training.early_stopping.patience * training.validate_every_steps)


def save_due(job: Job, step: int) -> bool:
    """Whether a checkpoint belongs after a step whatever its settings say: the last one, or the best by validation."""
    return step == job.total_steps or ends_early(job) or last_step().get("bestValidationStep") == step


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
