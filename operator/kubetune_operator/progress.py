"""From the tail of rank 0's log to `status.progress`, `status.checkpoint` and long results."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeGuard, TypeVar

from kubetune_operator.api.finetunejob import LastCheckpoint, Progress
from kubetune_operator.api.jobs import WorkProgress

Json = dict[str, Any]
P = TypeVar("P", bound=WorkProgress)

FORMATS: Final = {
    "epoch": "{:.2f}",
    "loss": "{:.4f}",
    "validation_loss": "{:.4f}",
    "best_validation_loss": "{:.4f}",
    "learning_rate": "{:.3g}",
    "tokens_per_second": "{:.1f}",
}
"""How numbers stand in the status, where floats have no place."""

PHASES: Final = (
    "Downloading", "Loading", "Training", "Exporting", "Evaluating", "Judging", "Calibrating", "Quantizing",
    "Storing", "Verifying", "Pushing",
)  # fmt: skip
"""What a trainer may be doing; the reason of the Running condition."""

STEP_FIELDS: Final = {
    "epoch": "epoch",
    "loss": "loss",
    "learningRate": "learning_rate",
    "tokensPerSecond": "tokens_per_second",
}
STEP_COUNTS: Final = {
    "step": "step", "totalSteps": "total_steps", "peakMemoryBytes": "peak_memory_bytes", "etaSeconds": "eta_seconds",
    "bestValidationStep": "best_validation_step",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The newest event of each kind in a piece of log.

    Attributes:
        start: What the attempt began with.
        step: The last training step.
        validation: The last validation.
        checkpoint: The last complete checkpoint, or the one that was resumed from.
        work: The last progress of a job that does not train.
        phase: What the trainer is doing, one of `PHASES`.
    """

    start: Json | None = None
    step: Json | None = None
    validation: Json | None = None
    checkpoint: Json | None = None
    work: Json | None = None
    phase: str = ""


def read_tail(text: str) -> Tail:
    """Find the newest events in a piece of log; lines that are no events, or are cut, are passed over."""
    newest: dict[str, Json] = {}
    for event in _events(text):
        name = "checkpoint" if event["event"] == "resume" else event["event"]
        newest[name] = event
    return Tail(
        start=newest.get("start"),
        step=newest.get("step"),
        validation=newest.get("validation"),
        checkpoint=newest.get("checkpoint"),
        work=newest.get("progress"),
        phase=phase if (phase := newest.get("phase", {}).get("phase")) in PHASES else "",
    )


def events_named(text: str, name: str) -> list[Json]:
    """All events of a name in a piece of log."""
    return [event for event in _events(text) if event["event"] == name]


def _events(text: str) -> Iterator[Json]:
    for line in text.split("\n"):  # splitlines would split at what stands in texts too
        if not line.startswith('{"event"'):
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event


def update_progress(before: Progress | None, *, tail: Tail, now: datetime) -> Progress | None:
    """Bring the progress up to date; the same object comes back when the log says nothing new."""
    fields: Json = {}
    if tail.start is not None:
        fields |= _counts({key: tail.start.get(key) for key in ("step", "totalSteps")})
    if tail.step is not None:
        fields |= step_fields(tail.step)
    if tail.validation is not None:
        fields |= _validation_fields(tail.validation)
    known = before.model_dump() if before is not None else {}
    if all(known.get(key) == value for key, value in fields.items()):
        return before
    return (before or Progress()).model_copy(update=fields | {"updated_at": timestamp(now)})


def step_fields(event: Json) -> Json:
    """The fields of the status that a step event carries."""
    fields = _counts(event)
    for key, field in STEP_FIELDS.items():
        fields |= _formatted(field, event.get(key))
    return fields | _validation_fields(event)


def _validation_fields(event: Json) -> Json:
    return {
        **_formatted("validation_loss", event.get("validationLoss")),
        **_formatted("best_validation_loss", event.get("bestValidationLoss")),
        **_counts({"bestValidationStep": event.get("bestValidationStep")}),
    }


def update_work(before: P | None, *, model: type[P], tail: Tail, now: datetime) -> P | None:
    """Bring the progress of a job that does not train up to date; the same object comes back when nothing is new."""
    fields = work_fields(tail.work, model=model) if tail.work is not None else {}
    known = before.model_dump() if before is not None else {}
    if all(known.get(key) == value for key, value in fields.items()):
        return before
    return (before or model()).model_copy(update=fields | {"updated_at": timestamp(now)})


def work_fields(event: Json, *, model: type[WorkProgress]) -> Json:
    """The fields of the status that a progress event carries, as far as the kind has them."""
    counts = {"done": event.get("done"), "total": event.get("total"), "eta_seconds": event.get("etaSeconds")}
    fields: Json = {field: int(value) for field, value in counts.items() if _is_number(value) and value >= 0}
    fields |= _formatted("tokens_per_second", event.get("tokensPerSecond"))
    if isinstance(event.get("phase"), str):
        fields["phase"] = event["phase"][:32]
    return {field: value for field, value in fields.items() if field in model.model_fields}


def update_checkpoint(before: LastCheckpoint | None, *, tail: Tail, now: datetime) -> LastCheckpoint | None:
    """Bring the last checkpoint up to date; the same object comes back when it is still the last one."""
    event = tail.checkpoint
    if event is None or not isinstance(event.get("step"), int) or not event.get("uri"):
        return before
    if before is not None and (before.step, before.uri) == (event["step"], event["uri"]):
        return before
    written = event.get("time")
    time = datetime.fromtimestamp(written, tz=now.tzinfo) if isinstance(written, int | float) else now
    return LastCheckpoint(step=event["step"], uri=str(event["uri"]), time=timestamp(time))


def timestamp(time: datetime) -> str:
    """A time as Kubernetes writes it, in UTC and to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _formatted(field: str, value: Any) -> Json:
    if not _is_number(value):
        return {}
    return {field: FORMATS[field].format(value)}


def _counts(event: Json) -> Json:
    values = {field: event.get(key) for key, field in STEP_COUNTS.items()}
    return {field: int(value) for field, value in values.items() if _is_number(value) and value >= 0}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
