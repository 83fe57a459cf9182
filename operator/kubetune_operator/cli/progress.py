"""The trainer's events as people read them: a line each, and on a terminal a bar."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from kubetune_operator.api.jobs import duration

Event = Mapping[str, Any]


def parse_event(line: str) -> Event | None:
    """The event on a line, None if the line is something else."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def describe(event: Event) -> str:
    """One event as a sentence; its fields as they are where it is of another kind."""
    if sentence := _SENTENCES.get(event["event"]):
        with suppress(TypeError, ValueError):  # of somebody's own script, with fields of its own
            return sentence(event)
    told = (f"{key}={value}" for key, value in event.items() if key not in {"event", "time", "attempt"})
    return " ".join([event["event"], *told])


def _step(event: Event) -> str:
    parts = [
        f"step {event.get('step')}/{event.get('totalSteps')}",
        f"loss {_number(event.get('loss'))}",
        f"{_number(event.get('tokensPerSecond'))} tokens/s",
    ]
    if (eta := event.get("etaSeconds")) is not None:
        parts.append(f"ETA {duration(int(eta))}")
    return "  ".join(parts)


def _start(event: Event) -> str:
    """What an attempt is about to do; recipes that do not train have other fields."""
    if "trainableParameters" in event:
        return (
            f"{event['trainableParameters']:,} of {event.get('parameters'):,} parameters are trained, from step "
            f"{event.get('step')} to {event.get('totalSteps')}, by {event.get('worldSize')} x {event.get('device')}"
        )
    return f"started: {_listed(event, but='attempt')}"


def _progress(event: Event) -> str:
    """How far an evaluation or a quantization is."""
    parts = [f"{event.get('done')}/{event.get('total')}"]
    parts += [f"{_number(speed)} tokens/s"] if (speed := event.get("tokensPerSecond")) is not None else []
    parts += [f"ETA {duration(int(eta))}"] if (eta := event.get("etaSeconds")) is not None else []
    return "  ".join(parts)


def _result(event: Event) -> str:
    error = f" ± {_number(event['stderr'])}" if event.get("stderr") is not None else ""
    samples = f" on {event['samples']} samples" if event.get("samples") is not None else ""
    return f"{event.get('task')} {event.get('metric')}: {_number(event.get('value'))}{error}{samples}"


def _gate(event: Event) -> str:
    verdict = "passed" if event.get("passed") else "failed"
    message = f": {event['message']}" if event.get("message") else ""
    return f"gate {event.get('name')} {verdict}{message}"


def _prepare(event: Event) -> str:
    """What prepare is at; at its end, what the data turned out to be."""
    return ": ".join(part for part in (str(event.get("stage")).lower(), _listed(event, but="stage")) if part)


def _listed(event: Event, *, but: str) -> str:
    """The fields of an event with their names, but one."""
    return ", ".join(f"{value} {_words(key)}" for key, value in event.items() if key not in {"event", "time", but})


def _words(key: str) -> str:
    """The words of a camelCase key."""
    return re.sub(r"[A-Z]", lambda letter: f" {letter[0].lower()}", key)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(value: Any) -> str:
    if not isinstance(value, int):
        return "size unknown"
    size, units = float(value), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


_SENTENCES: dict[str, Callable[[Event], str]] = {
    "step": _step,
    "progress": _progress,
    "result": _result,
    "gate": _gate,
    "validation": lambda event: (
        f"validation after step {event.get('step')}: loss {_number(event.get('validationLoss'))}"
    ),
    "earlyStop": lambda event: (
        f"training ends early, after step {event.get('step')}: no validation was better than that after step "
        f"{event.get('bestValidationStep')}"
    ),
    "checkpoint": lambda event: f"checkpoint of step {event.get('step')}: {event.get('uri')}",
    "checkpointFailed": lambda event: (
        f"warning: no checkpoint of step {event.get('step')}, training goes on: {event.get('message')}"
    ),
    "resume": lambda event: f"resumed after step {event.get('step')} from {event.get('uri')}",
    "output": lambda event: (
        f"output {event.get('name')} ({event.get('type')}): {event.get('uri')}, {_size(event.get('bytes'))}"
    ),
    "warning": lambda event: f"warning: {event.get('message')}",
    "error": lambda event: f"error: {event.get('message')}",
    "phase": lambda event: str(event.get("phase")).lower(),
    "prepare": _prepare,
    "start": _start,
    "done": lambda event: f"done after step {event['step']}" if "step" in event else "done",
}


class Display:
    """Shows events as they come: lines where nobody looks, lines over a bar on a terminal.

    Attributes:
        last_checkpoint: URI of the last checkpoint that was complete, None before the first.
        step: The last step that was done.
        measured: What was measured last, by the names that `status.progress` has.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last_checkpoint: str | None = None
        self.step = 0
        self.measured: dict[str, Any] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show_lines(self, lines: Iterable[str]) -> None:
        """Show what a trainer writes until it stops writing."""
        for line in lines:
            event = parse_event(line)
            if event is not None:
                self.show(event)
            elif line.strip():
                self.say(line.rstrip("\n"))

    def show(self, event: Event) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "checkpoint":
            self.last_checkpoint = str(event.get("uri"))
        if kind == "step":
            self.step = int(event.get("step", self.step))
        if kind in {"step", "validation"}:
            self.measured |= {key: value for key, value in event.items() if key not in {"event", "time", "attempt"}}
        if kind in {"step", "progress"} and self.console.is_terminal:
            self._advance(event)
            return
        self.say(describe(event))

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def _advance(self, event: Event) -> None:
        training = event["event"] == "step"
        done, total = (
            int(event.get(name) or 0) for name in (("step", "totalSteps") if training else ("done", "total"))
        )
        if self._task is None:
            self._task = self._bar.add_task("training" if training else "working", total=total, detail="")
        detail = describe(event).partition("  ")[2]
        self._bar.update(self._task, completed=done, total=total, detail=escape(detail))
