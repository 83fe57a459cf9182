"""Trackers: what a run reports, told to Weights & Biases, MLflow and TensorBoard as well.

They stand behind `report`, so a recipe knows nothing of them:

    report -> take -> one outbox per tracker, each with a thread of its own -> the tracker's library

Training never waits for a tracker and never ends because of one: what cannot be told is kept and told later, a failure
warns once, and the end of the run waits for a bounded time. Trackers that write files have them in the run's folder
before a checkpoint counts as complete, so that a resumed run finds all steps up to the one that it goes on from; steps
that were told already are not told again. A tracker's library is imported only where the config names it.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import uuid4

from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.errors import PeerLostError, PreemptedError
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.report import listen, report
from kubetune_trainer.storage import open_store, scratch_dir, upload_tree

SETTLE_SECONDS: Final = 20.0
"""How long a checkpoint waits until the files that go with it are in the run's folder."""
CLOSE_SECONDS: Final = 30.0
"""How long the end of a run waits for its trackers, all of them together."""
RETRY_SECONDS: Final = 30.0
"""Between the tries to tell what could not be told."""
MAX_TRIES: Final = 20
"""After so many failures one after the other, a tracker is left alone for the rest of the attempt."""
ID_FILE: Final = "tracking.id"
NOT_NUMBERS: Final = frozenset(
    {"attempt", "step", "total_steps", "eta_seconds", "best_validation_loss", "best_validation_step"}
)
"""Fields of a step's or a validation's report that make no curve."""
_marking: Final = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Row:
    """Numbers of one step."""

    step: int
    """The optimizer step."""
    time: float
    """When they were reported."""
    numbers: Mapping[str, float]
    """What was measured, by its name."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Something in storage that the run has written."""

    name: str
    """Its name in the run."""
    kind: str
    """`checkpoint`, or `model` for an output."""
    uri: str
    """Its folder."""
    facts: Mapping[str, Any]
    """What else is known of it."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What a tracker is told first."""

    run_id: str
    """Identity of the run, the same for all its attempts."""
    step: int
    """The step that is done already."""
    config: FineTuneConfig
    """The whole config."""
    scratch: Path
    """A local folder of this tracker's own."""
    folder: str
    """URI of its folder in the run's folder."""


class Tracker(Protocol):
    """One tracker's library. All methods are called from one thread; whatever they raise is dealt with there."""

    def open(self, begun: Begun) -> None:
        """Begin the run, or go on with the one that an earlier attempt began."""

    def log(self, rows: Sequence[Row]) -> None:
        """Tell numbers, in order; those that an earlier attempt told are passed over."""

    def refer(self, artifact: Artifact) -> None:
        """Tell where something lies."""

    def files(self) -> Path | None:
        """The folder of what was told so far, written out; None if nothing of it stays here."""

    def close(self, state: str) -> None:
        """End the run as Complete, Preempted, Interrupted or Failed."""


@contextmanager
def tracked(config: FineTuneConfig, *, is_first: bool) -> Iterator[Callable[[], None]]:
    """Tell the config's trackers what is reported while the block runs, and at its end how it ended.

    Args:
        config: The run.
        is_first: Whether this rank reports.

    Yields:
        What brings the trackers' files into the run's folder; it waits for a bounded time.
    """
    outboxes = [Outbox(name, tracker, config=config) for name, tracker in trackers(config)] if is_first else []
    state = "Failed"
    taker = Taker(outboxes)
    with listen(taker.take) if outboxes else _nothing():
        try:
            yield taker.settle
            state = "Complete"
        except PreemptedError:
            state = "Preempted"
            raise
        except PeerLostError:
            state = "Interrupted"
            raise
        finally:
            taker.close(state)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def trackers(config: FineTuneConfig) -> Iterator[tuple[str, Tracker]]:
    """Yield the trackers that a config names; no library is imported yet."""
    tracking = config.tracking
    if tracking is None:
        return
    if tracking.wandb is not None:
        from kubetune_trainer.tracking.wandb_run import WandbRun  # noqa: PLC0415

        yield "wandb", WandbRun(tracking.wandb)
    if tracking.mlflow is not None:
        from kubetune_trainer.tracking.mlflow_run import MlflowRun  # noqa: PLC0415

        yield "mlflow", MlflowRun(tracking.mlflow)
    if tracking.tensorboard is not None:
        from kubetune_trainer.tracking.event_files import EventFiles  # noqa: PLC0415

        yield "tensorboard", EventFiles()


@dataclass
class Taker:
    """Makes of events what trackers are told."""

    outboxes: Sequence["Outbox"]
    """One for each tracker."""
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """The last complete checkpoint and the outputs: told at the end, when they are what they will be."""

    def take(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take note of a reported event; returns at once."""
        for outbox in self.outboxes:
            if event == "start":
                outbox.begin(step=fields["step"])
            elif event in {"step", "validation"}:
                outbox.put(Row(step=fields["step"], time=time.time(), numbers=numbers_of(event, fields)))
        if event == "output":
            facts = {key: fields[key] for key in ("type", "digest", "bytes")}
            self._keep(Artifact(name=fields["name"], kind="model", uri=fields["uri"], facts=facts))
        elif event in {"checkpoint", "resume"}:
            facts = {"step": fields["step"]}
            self._keep(Artifact(name="checkpoint", kind="checkpoint", uri=fields["uri"], facts=facts))

    def _keep(self, artifact: Artifact) -> None:
        self.artifacts[f"{artifact.kind}/{artifact.name}"] = artifact

    def settle(self) -> None:
        """Bring all files into the run's folder, as far as that can be had in time."""
        waiting = [outbox.ask(outbox.settle) for outbox in self.outboxes if outbox.has_files]
        _wait(waiting, seconds=SETTLE_SECONDS)

    def close(self, state: str) -> None:
        """End all trackers, as far as that can be had in time."""
        for outbox in self.outboxes:
            for artifact in self.artifacts.values():
                outbox.put(artifact)
        waiting = {outbox.name: outbox.ask(lambda box=outbox: box.close(state)) for outbox in self.outboxes}
        if not _wait(list(waiting.values()), seconds=CLOSE_SECONDS):
            late = ", ".join(name for name, done in waiting.items() if not done.is_set())
            report("warning", message=f"tracking by {late} did not end within {CLOSE_SECONDS:.0f} s and is left behind")


def numbers_of(event: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a step or a validation; those of a validation have names that say so."""
    head = "validation_"
    return {
        name if event == "step" or name.startswith(head) else f"{head}{name}": float(value)
        for name, value in fields.items()
        if name not in NOT_NUMBERS and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _wait(events: Sequence[threading.Event], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    return all(event.wait(max(0.0, deadline - time.monotonic())) for event in events)


class Outbox:
    """What one tracker is still to be told, and the thread that tells it."""

    def __init__(self, name: str, tracker: Tracker, *, config: FineTuneConfig) -> None:
        """Begins with nothing to tell.

        Args:
            name: The tracker's block in the config.
            tracker: Its library.
            config: The run.
        """
        self.name = name
        self._tracker, self._config = tracker, config
        self._rows: list[Row] = []
        self._artifacts: list[Artifact] = []
        self._has_warned = False
        tracking = config.tracking
        offline = tracking is not None and tracking.wandb is not None and tracking.wandb.mode == "Offline"
        self.has_files = name == "tensorboard" or (name == "wandb" and offline)
        self._begun: Begun | None = None
        self._is_open = False
        self._failures, self._not_before = 0, 0.0
        self._inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True).start()

    def begin(self, *, step: int) -> None:
        """Say what is done already, before anything else is told."""
        self._inbox.put(lambda: self._begin(step))

    def put(self, item: Row | Artifact) -> None:
        """Tell something, as soon as that can be done."""
        self._inbox.put(lambda: self._rows.append(item) if isinstance(item, Row) else self._artifacts.append(item))

    def ask(self, what: Callable[[], None]) -> threading.Event:
        """Have something done after all that was put before; returns what is set when it is done."""
        done = threading.Event()
        self._inbox.put(what)
        self._inbox.put(done.set)  # behind it, so that a failure is told before anyone who waits ends the process
        return done

    def settle(self) -> None:
        """Tell everything, and bring the tracker's files into the run's folder."""
        self._deliver()
        if self._is_open and (files := self._tracker.files()) is not None and self._begun is not None:
            store = open_store(self._begun.folder, s3=self._config.storage.s3)
            upload_tree(store, files, "" if files == self._begun.scratch else files.name)

    def close(self, state: str) -> None:
        """Tell everything and how the run ended."""
        if self._begun is None:
            return
        self._not_before = 0.0
        self._deliver()
        if self._is_open:
            self._tracker.close(state)
            self.settle()

    def _work(self) -> None:
        while True:
            act = self._inbox.get()
            try:
                act()
                if self._inbox.empty():
                    self._deliver()
            except Exception as error:  # noqa: BLE001 (whatever befalls a tracker, training goes on)
                self._failed(error)

    def _begin(self, step: int) -> None:
        run = self._config.run
        self._begun = Begun(
            run_id=run_id(self._config),
            step=step,
            config=self._config,
            scratch=scratch_dir() / "tracking" / self.name,
            folder=f"{run.directory}/{self.name}",
        )

    def _deliver(self) -> None:
        """Tell what there is to tell, unless the last try failed just now."""
        if self._begun is None or self._failures >= MAX_TRIES or time.monotonic() < self._not_before:
            return
        if not self._is_open:
            self._begun.scratch.mkdir(parents=True, exist_ok=True)
            self._tracker.open(self._begun)
            self._is_open = True
        if self._rows:
            self._tracker.log(self._rows)
            self._rows.clear()
        while self._artifacts:
            self._tracker.refer(self._artifacts[0])
            self._artifacts.pop(0)
        self._failures = 0

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._not_before = time.monotonic() + RETRY_SECONDS
        if not self._has_warned:
            self._has_warned = True
            text = " ".join(str(error).split())[:500]
            report("warning", message=f"tracking.{self.name} cannot be told: {type(error).__name__}: {text}")


def run_id(config: FineTuneConfig) -> str:
    """Return the identity of a run for all its attempts: of the job's uid, or of a mark in the folder of a local run.

    A local run has no uid of its own; the mark goes with its folder, so a fresh run is another one.
    """
    run = config.run
    if run.uid != "local":
        return fingerprint({"uid": run.uid}, length=16)
    store = open_store(run.directory, s3=config.storage.s3)
    with _marking:  # all trackers ask at the same time
        if not store.exists(ID_FILE):
            store.write_bytes(ID_FILE, uuid4().hex[:16].encode())
        return store.read_bytes(ID_FILE).decode()
