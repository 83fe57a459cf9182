"""The kinds of jobs, each with its models, names and columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kubetune_operator.api.evaljob import EvalJob, EvalJobStatus
from kubetune_operator.api.finetunejob import FineTuneJob, FineTuneJobStatus
from kubetune_operator.api.jobs import Job, JobStatus, called, parse_as
from kubetune_operator.api.quantizejob import QuantizeJob, QuantizeJobStatus
from kubetune_operator.errors import SpecError

Column = tuple[str, str, str, int]
"""Name, type, JSON path and priority; a column above 0 is shown by `kubectl get -o wide` only."""

_STATE: Final = ("State", "string", ".status.state", 0)
_GATE: Final = ("Gate", "string", '.status.conditions[?(@.type=="GatePassed")].status', 0)
_PROGRESS: Final = ("Progress", "string", ".status.progress.ofTotal", 0)
_ETA: Final = ("ETA", "string", ".status.progress.eta", 0)
_RESTARTS: Final = ("Restarts", "integer", ".status.restarts", 0)
_AGE: Final = ("Age", "date", ".metadata.creationTimestamp", 0)
_REASON: Final = ("Reason", "string", '.status.conditions[?(@.type=="Running")].reason', 1)
_QUEUE: Final = ("Queue", "string", ".spec.queue.name", 1)
_OUTPUT: Final = ("Output", "string", ".status.outputs[0].uri", 1)


@dataclass(frozen=True, kw_only=True)
class KindModels:
    """What the API server is told about a kind.

    Attributes:
        job: The model of the whole object.
        status: The model of its status.
        short_name: As in `kubectl get ftj`.
        columns: What `kubectl get` prints.
    """

    job: type[Job]
    status: type[JobStatus]
    short_name: str
    columns: tuple[Column, ...]


MODELS: Final[Mapping[str, KindModels]] = {
    "FineTuneJob": KindModels(
        job=FineTuneJob,
        status=FineTuneJobStatus,
        short_name="ftj",
        columns=(
            _STATE,
            ("Step", "string", ".status.progress.steps", 0),
            ("Loss", "string", ".status.progress.loss", 0),
            ("Tokens/s", "string", ".status.progress.tokensPerSecond", 0),
            _ETA,
            _RESTARTS,
            _AGE,
            _REASON,
            _QUEUE,
            _OUTPUT,
        ),
    ),
    "EvalJob": KindModels(
        job=EvalJob,
        status=EvalJobStatus,
        short_name="evj",
        columns=(
            _STATE,
            _PROGRESS,
            _GATE,
            _ETA,
            _RESTARTS,
            _AGE,
            _REASON,
            _QUEUE,
            ("Results", "string", ".status.artifacts.results", 1),
        ),
    ),
    "QuantizeJob": KindModels(
        job=QuantizeJob,
        status=QuantizeJobStatus,
        short_name="qj",
        columns=(_STATE, _PROGRESS, _GATE, _ETA, _RESTARTS, _AGE, _REASON, _QUEUE, _OUTPUT),
    ),
}


def parse_job(manifest: Mapping[str, Any], *, is_stored: bool = False) -> Job:
    """Check a manifest of any kind as the API server would and return it with defaults filled in.

    Args:
        manifest: The object.
        is_stored: Whether the API server has it already. Fields that a newer version of the CRD has are passed over
            then: the server fills in their defaults, and an older operator has to go on.

    Raises:
        SpecError: The manifest breaks rules, or is of no kind of ours.
    """
    kind = manifest.get("kind")
    if not isinstance(kind, str) or kind not in MODELS:
        supported = ", ".join(f'"{name}"' for name in MODELS)
        raise SpecError(
            called(manifest), problems=[f'kind: Unsupported value: "{kind}": supported values: {supported}']
        )
    return parse_as(MODELS[kind].job, manifest, is_stored=is_stored)
