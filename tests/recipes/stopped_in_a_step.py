"""A run that is told to stop in step TEST_STOP_AT and whose validations take long; see `Gang.start(before=…)`.

TEST_VALIDATION_SECONDS says how long.
"""

import os
import signal
import time
from typing import Any

from kubetune_trainer import distributed
from kubetune_trainer.training import step
from kubetune_trainer.training.job import Job

VALIDATION_SECONDS = 20.0


def before() -> None:
    """The signal comes right before the ranks tell each other of it."""
    exchange, validation_rows, steps = distributed.exchange, step.validation_rows, iter(range(1, 1000))

    def exchange_and_stop(**told: Any) -> distributed.StepTotals:
        if next(steps) == int(os.environ["TEST_STOP_AT"]):
            os.kill(os.getpid(), signal.SIGTERM)
            told["stop"] = True
        return exchange(**told)

    def slow_rows(job: Job, num_rows: int) -> list[range]:
        time.sleep(float(os.environ.get("TEST_VALIDATION_SECONDS", VALIDATION_SECONDS)))
        return validation_rows(job, num_rows)

    distributed.exchange, step.validation_rows = exchange_and_stop, slow_rows
