"""The one way out: progress as JSON lines, Prometheus metrics, the termination message and the exit code.

Only global rank 0 reports; on the other ranks `report` does nothing, so callers need not ask. Stdout carries JSON lines
and nothing else: `claim_stdout` sends whatever else is printed to stderr.
"""

import bisect
import errno
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from kubetune_trainer.errors import DoesNotFitError, OutOfMemoryError, TrainerError, is_out_of_memory
from kubetune_trainer.names import (
    DEFAULT_TERMINATION_LOG,
    ENV_ATTEMPT,
    ENV_METRICS_PORT,
    ENV_TERMINATION_LOG,
    TERMINATION_MESSAGE_BYTES,
    ExitCode,
)


class Report(Protocol):
    """What takes `report` as an argument."""

    def __call__(self, event: str, **fields: Any) -> None:
        """Reports one event."""


_GAUGES: dict[str, dict[str, tuple[str, str]]] = {
    "start": {"total_steps": ("total_steps", "Optimizer steps of the whole run")},
    "step": {
        "step": ("step", "Optimizer steps done"),
        "epoch": ("epoch", "Passes over the data done"),
        "loss": ("loss", "Mean loss over the trained tokens of the last step"),
        "learning_rate": ("learning_rate", "Learning rate of the last step"),
        "grad_norm": ("grad_norm", "Global gradient norm of the last step, before clipping"),
        "tokens_per_second": ("tokens_per_second", "Tokens per second, over all ranks"),
        "peak_memory_bytes": ("peak_memory_bytes", "Peak memory of rank 0"),
    },
    "progress": {
        "done": ("work_done", "Requests or tensors done"),
        "total": ("work_total", "Requests or tensors of the whole run"),
        "tokens_per_second": ("tokens_per_second", "Tokens per second, over all ranks"),
    },
    "validation": {"validation_loss": ("validation_loss", "Mean loss over the held-out trained tokens")},
    "checkpoint": {
        "step": ("checkpoint_step", "Step of the last complete checkpoint"),
        "seconds": ("checkpoint_seconds", "From the save's beginning until the checkpoint was complete"),
    },
}
_VALIDATION = ("validationLoss", "bestValidationLoss", "bestValidationStep")
"""What a validation tells that a step remembers."""
_COUNTERS = {
    "checkpointFailed": ("checkpoint_failures", "Checkpoints that were given up"),
    "warning": ("warnings", "Warnings reported"),
}


class _Reporter:
    """The state behind `report`: where lines go, and which metrics they set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claimed: IO[str] | None = None
        self._log: IO[str] | None = None
        self._metrics: dict[str, Any] = {}
        self.last_step: dict[str, Any] = {}
        self.listeners: list[Callable[[str, Mapping[str, Any]], None]] = []

    def claim_stdout(self) -> None:
        with self._lock:
            sys.stdout.flush()
            self._claimed = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def open_log(self, path: Path) -> None:
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path.open("a", buffering=1, encoding="utf-8")

    def serve_metrics(self, port: int) -> None:
        from prometheus_client import Counter, Gauge, start_http_server  # noqa: PLC0415 (only where it is asked for)

        for gauges in _GAUGES.values():
            for name, help_text in gauges.values():
                if name not in self._metrics:  # two kinds of work may have the same measure
                    self._metrics[name] = Gauge(f"kubetune_trainer_{name}", help_text)
        for name, help_text in _COUNTERS.values():
            self._metrics[name] = Counter(f"kubetune_trainer_{name}", help_text)
        start_http_server(port)

    def emit(self, event: str, fields: Mapping[str, Any]) -> None:
        record = {"time": round(time.time(), 3), **{_camel(key): _json_safe(value) for key, value in fields.items()}}
        # On every rank: any of them may have to say how far it came.
        if event == "step":
            self.last_step = {**_chosen(self.last_step, *_VALIDATION, "validationStep"), **record}
        elif event == "validation":
            told = {**_chosen(record, *_VALIDATION), "validationStep": record.get("step")}
            self.last_step = {**self.last_step, **told}
        if not is_reporting_rank():
            return
        line = json.dumps({"event": event, **record}, ensure_ascii=False, allow_nan=False)
        with self._lock:
            print(line, file=self._claimed or sys.stdout, flush=True)
            self._write_log(line)
            self._measure(event, fields)
        for listener in self.listeners:
            listener(event, fields)

    def _write_log(self, line: str) -> None:
        """Writes a line into the copy of the log, which is given up where its disk is full: training matters more."""
        if self._log is None:
            return
        try:
            print(line, file=self._log, flush=True)
        except OSError as error:
            sys.stderr.write(f"the log is no longer kept: {error}\n")
            self._log = None

    def _measure(self, event: str, fields: Mapping[str, Any]) -> None:
        if not self._metrics:
            return
        for field, (name, _) in _GAUGES.get(event, {}).items():
            if fields.get(field) is not None:
                self._metrics[name].set(fields[field])
        if event in _COUNTERS:
            self._metrics[_COUNTERS[event][0]].inc()


_reporter = _Reporter()


def is_reporting_rank() -> bool:
    """Whether this process is global rank 0, whose stdout carries the progress."""
    return os.environ.get("RANK", "0") == "0"


def attempt() -> int:
    """Which attempt of the job this is, from 1."""
    return int(os.environ.get(ENV_ATTEMPT) or "1")


def claim_stdout() -> None:
    """Keeps stdout for JSON lines: what anything else prints there goes to stderr from now on."""
    _reporter.claim_stdout()


def open_log(path: Path) -> None:
    """Writes every reported line to this file as well, on the reporting rank."""
    if is_reporting_rank():
        _reporter.open_log(path)


@contextmanager
def listen(listener: Callable[[str, Mapping[str, Any]], None]) -> Iterator[None]:
    """Calls `listener` with each event and its fields while the block runs, on the reporting rank."""
    _reporter.listeners.append(listener)
    try:
        yield
    finally:
        _reporter.listeners.remove(listener)


def serve_metrics() -> None:
    """Serves Prometheus metrics from the reporting rank, if KUBETUNE_METRICS_PORT is set; a taken port only warns."""
    port = os.environ.get(ENV_METRICS_PORT)
    if not port or not is_reporting_rank():
        return
    try:
        _reporter.serve_metrics(int(port))
    except OSError as error:
        report("warning", message=f"no metrics are served on port {port}: {error}")


def report(event: str, **fields: Any) -> None:
    """Reports one event as a JSON line, from global rank 0 only.

    Args:
        event: Its kind, as `step`, `phase` or `checkpoint`.
        fields: In snake_case; they are written in camelCase. A number that is not finite becomes a string.
    """
    _reporter.emit(event, fields)


def last_step() -> dict[str, Any]:
    """The last step's record as it was reported, with the last validation's loss and step; empty before the first."""
    return dict(_reporter.last_step)


def set_last_step(record: Mapping[str, Any]) -> None:
    """Takes over the last step of an earlier attempt, as a checkpoint remembers it."""
    _reporter.last_step = dict(record)


def write_termination_message(result: str, **fields: Any) -> None:
    """Writes the message that Kubernetes takes into the container's status; without a file for it, does nothing.

    Args:
        result: Complete, Prepared, Preempted or Failed.
        fields: In snake_case; they are written in camelCase, and those that are None or empty are left out.
    """
    told = {_camel(key): _json_safe(value) for key, value in fields.items() if value not in (None, "")}
    write_termination_record({"result": result, **told})


def write_termination_record(record: Mapping[str, Any]) -> None:
    """Writes a message whose keys are final, cut to the size that Kubernetes keeps."""
    configured = os.environ.get(ENV_TERMINATION_LOG)
    # Outside a pod nobody made the default file, and it is not ours to make.
    flags = os.O_WRONLY | os.O_TRUNC | (os.O_CREAT if configured else 0)
    try:
        descriptor = os.open(configured or DEFAULT_TERMINATION_LOG, flags, 0o644)
    except OSError:
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(fit(record))


def run(main: Callable[[Sequence[str]], object]) -> None:
    """Runs a recipe's main so that whoever started the process can read how it ended.

    Stdout is kept for JSON lines; an error ends the process with its exit code, an `error` event and a termination
    message.

    Args:
        main: Takes the command line's arguments.
    """
    claim_stdout()
    try:
        main(sys.argv[1:])
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 (whatever it is, it must reach the job's status)
        end_with(error)


def end_with(error: BaseException) -> NoReturn:
    """Tells why this process ends, and ends it without waiting for threads or peers."""
    known = _known(error)
    if known is None:
        traceback.print_exception(error)
        known = TrainerError(f"{type(error).__name__}: {error}")
    else:
        sys.stderr.write(f"error: {known}\n" + (f"hint: {known.hint}\n" if known.hint else ""))
    rank = int(os.environ.get("RANK", "0"))
    told = {"exit_code": int(known.exit_code), "reason": known.reason, "message": str(known), "hint": known.hint}
    report("error", **told, rank=rank)
    result = "Preempted" if known.exit_code == ExitCode.PREEMPTED else "Failed"
    write_termination_message(result, **told, rank=rank, step=last_step().get("step"))
    sys.stderr.flush()
    os._exit(known.exit_code)


def _known(error: BaseException) -> TrainerError | None:
    """The error as one of ours; None when it is a bug or an accident without a name."""
    if isinstance(error, TrainerError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f" for {error.filename}" if error.filename else ""
        return DoesNotFitError(f"no space left on the disk{place}", hint="Give the pod or the volume more space.")
    if is_out_of_memory(error):
        hint = "Give the process more memory, or let it compute less at a time: smaller batches, shorter sequences."
        return OutOfMemoryError(f"out of memory: {error}", hint=hint)
    return None


def fit(record: Mapping[str, Any], *, limit: int = TERMINATION_MESSAGE_BYTES) -> bytes:
    """The record as JSON of at most `limit` bytes: the log's tail loses its beginning first, then texts their end."""
    for key in ("logTail", "hint", "message"):
        if len(_encode(record)) > limit and isinstance(record.get(key), str):
            record = _cut(record, key, limit=limit)
    if len(_encode(record)) > limit:  # what remains are lists of outputs and the like
        record = {key: value for key, value in record.items() if not isinstance(value, list | dict)}
    return _encode(record)


def _cut(record: Mapping[str, Any], key: str, *, limit: int) -> dict[str, Any]:
    """Keeps as much of one text as fits; JSON's escapes make its size known only once it is written."""
    text = record[key]

    def shortened(keep: int) -> dict[str, Any]:
        return {**record, key: text[len(text) - keep :] if key == "logTail" else text[:keep]}

    sizes = range(len(text) + 1)
    keep = bisect.bisect_right(sizes, limit, key=lambda size: len(_encode(shortened(size)))) - 1
    return shortened(max(0, keep))


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _chosen(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys if key in record}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _json_safe(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(inner) for inner in value]
    return value
