"""The log of an attempt, which stays in the run's folder when its pod is gone."""

from pathlib import Path

from kubetune_trainer.config import JobConfig
from kubetune_trainer.errors import TrainerError
from kubetune_trainer.names import LOGS_DIR
from kubetune_trainer.report import attempt, report
from kubetune_trainer.storage import open_store


def keep_log(config: JobConfig, log: Path) -> None:
    """Puts this attempt's progress into the run's folder; a store that fails now must not hide why the run ends."""
    try:
        open_store(f"{config.run.directory}/{LOGS_DIR}", s3=config.storage.s3).upload(log, log.name)
    except TrainerError as error:
        report("warning", message=f"the log of attempt {attempt()} could not be kept: {error}")
