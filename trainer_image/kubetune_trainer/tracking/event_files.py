"""TensorBoard: event files in the run's folder, one for each attempt, which TensorBoard reads as one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kubetune_trainer.tracking import Artifact, Begun, Row


class EventFiles:
    """The event files of one attempt."""

    def __init__(self) -> None:
        """Begins without a file."""
        self._writer: Any = None
        self._folder: Path | None = None

    def open(self, begun: Begun) -> None:
        """As `Tracker.open`; steps that an earlier attempt told and that are done again are purged."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (only where it is asked for)

        self._folder = begun.scratch
        self._writer = SummaryWriter(str(begun.scratch), purge_step=begun.step + 1)  # type: ignore[no-untyped-call]
        text = yaml.safe_dump(begun.config.model_dump(mode="json", exclude_none=True), sort_keys=False)
        self._writer.add_text("config", f"```yaml\n{text}```", begun.step)

    def log(self, rows: Sequence[Row]) -> None:
        """As `Tracker.log`."""
        for row in rows:
            for name, value in row.numbers.items():
                self._writer.add_scalar(name, value, row.step, walltime=row.time)

    def refer(self, artifact: Artifact) -> None:
        """As `Tracker.refer`."""
        self._writer.add_text(f"{artifact.kind}/{artifact.name}", artifact.uri, artifact.facts.get("step"))

    def files(self) -> Path | None:
        """As `Tracker.files`."""
        self._writer.flush()
        return self._folder

    def close(self, state: str) -> None:
        """As `Tracker.close`."""
        self._writer.add_text("state", state)
        self._writer.flush()
