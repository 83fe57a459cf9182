"""MLflow: a run that is found again by a tag, with the config as parameters and every number as a metric."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kubetune_trainer.config import Mlflow
from kubetune_trainer.storage import read_secret
from kubetune_trainer.tracking import Artifact, Begun, Row

TAG: Final = "kubetune.run"
STATUSES: Final = {"Complete": "FINISHED", "Failed": "FAILED", "Preempted": "KILLED", "Interrupted": "KILLED"}
BATCH: Final = {"metrics": 1000, "params": 100}
"""What the server takes in one request."""
VALUE_LENGTH: Final = 500
"""The longest parameter that every version of the server takes."""
REQUESTS: Final = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""How long one request may take: the library's own defaults are minutes."""


class MlflowRun:
    """One run of MLflow's."""

    def __init__(self, settings: Mlflow) -> None:
        """Begins without a connection.

        Args:
            settings: Where it is.
        """
        self._settings = settings
        self._client: Any = None
        self._id = ""
        self._told: dict[str, int] | None = None

    def open(self, begun: Begun) -> None:
        """As `Tracker.open`."""
        for name, value in REQUESTS.items():
            os.environ.setdefault(name, value)
        if self._settings.tracking_uri.startswith("file://"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        if token := self._settings.token_secret and read_secret(self._settings.token_secret):
            os.environ["MLFLOW_TRACKING_TOKEN"] = token
        from mlflow.tracking import MlflowClient  # noqa: PLC0415 (only where it is asked for)

        self._client = MlflowClient(tracking_uri=self._settings.tracking_uri)
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{begun.run_id}'", max_results=1)
        if found:
            self._id, self._told = found[0].info.run_id, {}
            self._client.update_run(self._id, status="RUNNING")
        else:
            run = begun.config.run
            tags = {
                TAG: begun.run_id,
                "kubetune.job": f"{run.namespace}/{run.name}",
                "kubetune.directory": run.directory,
            }
            self._id = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        # Once more in every attempt: one that was killed between the two would have left the run without.
        self._log_params(flat(begun.config.model_dump(mode="json", exclude_none=True)))

    def log(self, rows: Sequence[Row]) -> None:
        """As `Tracker.log`."""
        from mlflow.entities import Metric  # noqa: PLC0415

        metrics = [
            Metric(name, value, round(row.time * 1000), row.step)
            for row in rows
            for name, value in row.numbers.items()
            if row.step > self._last_told(name)
        ]
        for start in range(0, len(metrics), BATCH["metrics"]):
            self._client.log_batch(self._id, metrics=metrics[start : start + BATCH["metrics"]])

    def refer(self, artifact: Artifact) -> None:
        """As `Tracker.refer`; the places are tags, since MLflow keeps no references."""
        self._client.set_tag(self._id, f"kubetune.{artifact.kind}.{artifact.name}", artifact.uri)
        for name, value in artifact.facts.items():
            self._client.set_tag(self._id, f"kubetune.{artifact.kind}.{artifact.name}.{name}", str(value))

    def files(self) -> Path | None:
        """As `Tracker.files`."""
        return None

    def close(self, state: str) -> None:
        """As `Tracker.close`."""
        self._client.set_tag(self._id, "kubetune.state", state)
        self._client.set_terminated(self._id, status=STATUSES[state])

    def _experiment(self) -> str:
        name = self._settings.experiment
        found = self._client.get_experiment_by_name(name)
        identity: str = found.experiment_id if found else self._client.create_experiment(name)
        return identity

    def _log_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param  # noqa: PLC0415

        known = self._client.get_run(self._id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(new), BATCH["params"]):
            self._client.log_batch(self._id, params=new[start : start + BATCH["params"]])

    def _last_told(self, name: str) -> int:
        """The last step that an earlier attempt has told of a metric."""
        if self._told is None:
            return -1
        if name not in self._told:
            history = self._client.get_metric_history(self._id, name)
            self._told[name] = max((metric.step for metric in history), default=-1)
        return self._told[name]


def flat(values: Any, name: str = "") -> dict[str, str]:
    """Return the leaves of nested values, each under its path."""
    return dict(_leaves(values, name))


def _leaves(values: Any, name: str) -> Iterator[tuple[str, str]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        yield name, str(values)[:VALUE_LENGTH]
        return
    for key, value in items:
        yield from _leaves(value, f"{name}.{key}" if name else str(key))
