"""What a training step's report says."""

import time

from kubetune_trainer.heartbeat import sign_of_step
from kubetune_trainer.memory import peak_memory_bytes
from kubetune_trainer.report import attempt, report
from kubetune_trainer.training.job import Job
from kubetune_trainer.training.profiler import StepProfiler


class Progress:
    """Turns what a step found into its report.

    Args:
        job: The run.
        first_step: The step that was done when this attempt began.
    """

    def __init__(self, job: Job, first_step: int) -> None:
        self._job, self._first_step = job, first_step
        self._profiler = StepProfiler(job.config, job.world, last_step=job.total_steps)
        self._profiler.after(first_step)
        self._began = self._step_began = time.monotonic()

    def report_step(self, step: int, *, loss: float, tokens: int, grad_norm: float, **measures: float) -> None:
        """Reports a step, which is a sign of life too; the time that is left follows from the steps of this attempt.

        Args:
            step: Its number.
            loss: Its mean loss.
            tokens: Tokens of all ranks but padding.
            grad_norm: Norm of the gradient before clipping.
            measures: What else the recipe tells.
        """
        job, now = self._job, time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        per_step = (now - self._began) / (step - self._first_step)
        report(
            "step",
            attempt=attempt(),
            step=step,
            total_steps=job.total_steps,
            epoch=round(step * job.config.training.global_batch_size / len(job.local.train_data), 4),
            loss=loss,
            learning_rate=job.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm,
            tokens_per_second=round(tokens / seconds, 1),
            peak_memory_bytes=peak_memory_bytes(job.world.device),
            eta_seconds=round(per_step * (job.total_steps - step)),
            **measures,
        )
        self._profiler.after(step)
        sign_of_step()
