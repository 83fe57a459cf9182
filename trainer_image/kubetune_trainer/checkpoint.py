"""Checkpoints: the trained state of all ranks in a store, complete or not there at all.

A checkpoint is a folder `step-<N>` that torch's distributed checkpoint (DCP) can load into any number of ranks: trained
parameters and optimizer state, keyed by parameter name, plus trainer.json. Frozen weights are not in it; they come from
the base model. Every rank uploads its own files, because pods share no disk, and rank 0 writes COMPLETE when all have.
Without COMPLETE a folder is no checkpoint. The way of one:

    copied to memory -> written to scratch -> uploaded by each rank -> COMPLETE by rank 0 -> older ones pruned

COMPLETE names every file and its size. Who resumes compares them and passes over what was damaged since.

Only the first happens while training waits. That all ranks have uploaded shows in the exchange that they have every
step anyway. One checkpoint is under way at a time; one that becomes due meanwhile is taken when the way is free.
"""

import json
import pickle
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from kubetune_trainer.distributed import World, broadcast_object, gather_vector
from kubetune_trainer.errors import ConfigError, DataError, StorageError, TrainerError, is_out_of_memory
from kubetune_trainer.heartbeat import unwatched
from kubetune_trainer.names import COMPLETE_MARKER
from kubetune_trainer.report import end_with, last_step, report, set_last_step
from kubetune_trainer.storage import open_store

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from kubetune_trainer.config import Checkpoint, FineTuneConfig
    from kubetune_trainer.storage import Store

TRAINER_FILE: Final = "trainer.json"
_METADATA_FILE: Final = ".metadata"
_OPTIONS: Final = StateDictOptions(ignore_frozen_params=True, strict=False)
_STEP_FOLDER: Final = re.compile(r"^step-(\d+)$")
UPLOAD_ATTEMPTS: Final = 8
"""How often an upload is tried, beyond the retries that a store makes itself; with the pauses, some minutes."""
_LONGEST_PAUSE_SECONDS: Final = 30.0


class Checkpointer:
    """Saves one run's checkpoints. Every rank has one, and all call the same methods in the same steps."""

    def __init__(
        self,
        store: "Store",
        *,
        settings: "Checkpoint",
        world: World,
        scratch: Path,
        record: Mapping[str, Any],
        before_complete: Callable[[], object] = lambda: None,
    ) -> None:
        """Begins with no checkpoint under way.

        Args:
            store: The run's folder of checkpoints.
            settings: When to save and how many to keep.
            world: This rank among the others.
            scratch: A local folder of this rank's own.
            record: What trainer.json says beside the step and its progress.
            before_complete: What has to be stored before a checkpoint counts; rank 0 calls it in a thread.
        """
        self.settings = settings
        self.in_flight: int | None = None
        self.saved_step = 0
        self._store = store
        self._world = world
        self._scratch = scratch
        self._before_complete = before_complete
        self._record = {**record, "torchVersion": torch.__version__}
        self._saved_at = time.monotonic()
        self._uploaded_step = 0
        self._completed_step = 0
        self._abandoned_step: int | None = None
        self._best_step: int | None = None
        self._written: Future[Any] | None = None
        # A group of its own: DCP plans a save with collectives, in a thread, beside those of training.
        self._group = dist.new_group(backend="gloo")
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        threading.Thread(target=self._work, name="checkpoint", daemon=True).start()

    @property
    def uploaded_step(self) -> int:
        """The newest checkpoint whose files of this rank are up, negative if they were given up: for the exchange."""
        return self._uploaded_step

    def due(self, step: int) -> bool:
        """Whether rank 0 wants a checkpoint after this step."""
        if self.in_flight is not None or step == self.saved_step:
            return False
        every = self.settings.every_steps
        seconds = self.settings.every_seconds
        by_step = every is not None and step // every > self.saved_step // every
        return by_step or (seconds is not None and time.monotonic() - self._saved_at >= seconds)

    def start_from(self, resumed: "Resumed") -> None:
        """Counts from the step of a loaded checkpoint; newer ones of this run, which were passed over, are none now."""
        self.saved_step = self._completed_step = resumed.step
        set_last_step(resumed.record["progress"])
        if self._world.is_first:
            discard_newer(self._store, than=resumed.step)

    @unwatched()
    def save(self, step: int, model: "nn.Module", optimizer: "Optimizer", *, hurry: bool = False) -> None:
        """Copies the state and begins to write it; in mode Sync, waits until it is complete or given up.

        Args:
            step: The step that is done.
            model: Its trained parameters are saved.
            optimizer: Its state is saved.
            hurry: Give up a checkpoint that is still under way, as on a stop, which may have no time for two; that of
                the best validation is waited for all the same.
        """
        if self.in_flight is not None and not (hurry and self.in_flight != last_step().get("bestValidationStep")):
            self.wait()
        began = time.monotonic()
        if self._written is not None:
            wait([self._written])  # two saves in the same group must not mix their collectives
        self._abandoned_step = self.in_flight
        self.in_flight, self.saved_step, self._saved_at = step, step, began
        folder = self._scratch / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
        state = {"model": model_state, "optimizer": optimizer_state["state"]}
        writer = _Writer(folder, device=self._world.device)
        written = self._written = dcp.async_save(state, storage_writer=writer, process_group=self._group)
        record = {"step": step, **self._record, "progress": last_step()}
        self._best_step = record["progress"].get("bestValidationStep")
        self._jobs.put(lambda: self._upload(record, folder, written, began))
        if self.settings.mode == "Sync":
            self.wait()

    def advance(self, uploaded_step: int) -> None:
        """Takes note of what all ranks have uploaded, as their exchange told; rank 0 then completes the checkpoint."""
        step = self.in_flight
        if step is None or uploaded_step not in (step, -step):
            return
        self.in_flight = None
        if uploaded_step < 0:
            report("checkpointFailed", step=step, message=f"checkpoint {self._store.uri(f'step-{step}')} was given up")
        elif self._world.is_first:
            began, best = self._saved_at, self._best_step
            self._jobs.put(lambda: self._complete(step, began, best))

    @unwatched()
    def wait(self) -> bool:
        """Waits until the newest checkpoint is complete or given up, and tells which; the same on every rank."""
        self._jobs.join()
        self.advance(int(gather_vector([float(self._uploaded_step)]).min().item()))
        self._jobs.join()
        return broadcast_object(self._completed_step) == self.saved_step

    def finish(self) -> None:
        """Waits until the newest checkpoint is complete.

        Raises:
            StorageError: It was given up, on some rank.
        """
        if not self.wait():
            raise StorageError(
                f"checkpoint {self._store.uri(f'step-{self.saved_step}')} could not be completed",
                hint="Check that the workspace's object store answers; the run goes on from the checkpoint before.",
            )

    def restore(self, step: int, model: "nn.Module", optimizer: "Optimizer") -> bool:
        """Loads an earlier checkpoint of this run, and tells whether it was there, complete and not damaged.

        Raises:
            DataError: A file of it has its size and cannot be read.
        """
        folder = f"step-{step}"
        is_whole = broadcast_object(_is_whole(self._store, folder) if self._world.is_first else False)
        if is_whole:
            load_checkpoint(self._store, folder, model=model, optimizer=optimizer, scratch=self._scratch)
        return is_whole

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except BaseException as error:  # noqa: BLE001 (without this thread, everybody would wait for it for ever)
                end_with(error)
            finally:
                self._jobs.task_done()

    def _upload(self, record: Mapping[str, Any], folder: Path, written: "Future[Any]", began: float) -> None:
        """Uploads this rank's files of a checkpoint, unless a newer one has taken its place."""
        step = int(record["step"])
        try:
            written.result()
            if self._world.is_first:
                (folder / TRAINER_FILE).write_text(json.dumps(record, indent=1))
            for path in sorted(folder.iterdir()):
                upload = partial(self._store.upload, path, f"step-{step}/{path.name}")
                self._persist(step, f"upload of {path.name}", upload)
            self._uploaded_step = step
        # Training goes on without this checkpoint, whatever befell it. DCP's own error is no Exception.
        except (Exception, CheckpointException) as error:  # noqa: BLE001
            self._uploaded_step = -step
            seconds, cause = time.monotonic() - began, _first_cause(error)
            report("warning", message=f"checkpoint of step {step} was given up after {seconds:.0f} s: {cause}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _complete(self, step: int, began: float, best: int | None) -> None:
        """Makes a checkpoint of a folder whose files are all there, and removes those that are too many by now."""
        try:
            self._before_complete()
            self._persist(step, "completion", lambda: complete(self._store, step))
        except Exception as error:  # noqa: BLE001 (as above)
            report("checkpointFailed", step=step, message=str(error))
            return
        self._completed_step = step
        report("checkpoint", step=step, uri=self._store.uri(f"step-{step}"), seconds=round(time.monotonic() - began, 3))
        try:
            prune(self._store, keep=self.settings.keep, best=best)
        except (TrainerError, OSError) as error:
            report("warning", message=f"old checkpoints could not be removed: {error}")

    def _persist(self, step: int, what: str, action: Callable[[], object]) -> None:
        """Tries an action on the store until it works, with pauses; permanent errors and the last one are raised."""
        for attempt in range(1, UPLOAD_ATTEMPTS + 1):
            if self._abandoned_step == step:
                raise StorageError(f"one of step {self.saved_step} took its place")
            try:
                action()
            except (StorageError, OSError) as error:
                if attempt == UPLOAD_ATTEMPTS:
                    raise
                pause = min(2.0**attempt, _LONGEST_PAUSE_SECONDS)
                report("warning", message=f"checkpoint of step {step}: {what} failed, again in {pause:.0f} s: {error}")
                time.sleep(pause)
            else:
                return


@dataclass(frozen=True)
class Resumed:
    """Where a run begins, and what the checkpoint's trainer.json says."""

    step: int
    uri: str
    record: Mapping[str, Any]

    def without_validation(self) -> "Resumed":
        """The same for another run, which has held-out data of its own, or none."""
        progress = {key: value for key, value in self.record["progress"].items() if key != "validationLoss"}
        told = {**progress, "validationStep": self.step}
        return replace(self, record={**self.record, "progress": told}).without_best()

    def without_best(self) -> "Resumed":
        """The same for a run that goes back to no step."""
        progress = {key: value for key, value in self.record["progress"].items() if not key.startswith("best")}
        return replace(self, record={**self.record, "progress": progress})


def find_checkpoint(store: "Store") -> str | None:
    """The newest complete checkpoint that is not damaged; call it on one rank, and tell the others.

    Returns:
        Its folder, relative to the store; "" if the store is one itself, None if there is none that is complete.

    Raises:
        DataError: There are complete ones, and all of them are damaged.
    """
    sizes = {info.path: info.size for info in store.list()}
    folders = [f"step-{step}" for step in reversed(complete_steps(set(sizes)))]
    problem = ""
    for folder in [""] if COMPLETE_MARKER in sizes else folders:
        problem = _damage(store, folder, sizes)
        if not problem:
            return folder
        report("warning", message=f"checkpoint {store.uri(folder)} is damaged and passed over: {problem}")
    if problem:
        raise DataError(
            f"no checkpoint in {store.uri()} can be used: all are damaged, the oldest because {problem}",
            hint="Restore the files, or remove the folder to begin anew.",
        )
    return None


def check_resumable(config: "FineTuneConfig", *, total_steps: int | None = None) -> None:
    """Looks for the checkpoint that a run is to begin with, if it names one.

    Args:
        config: The run.
        total_steps: Of the whole run, where that is known.

    Raises:
        ConfigError: There is none that is complete, or one after which the run has no step left.
    """
    first = config.checkpoint.resume_from
    if first is None:
        return
    store = open_store(first.uri, s3=config.storage.s3)
    if (folder := find_checkpoint(store)) is None:
        raise ConfigError(
            f"{config.title}: checkpoint.resume_from.uri must hold a complete checkpoint, got {first.uri}"
        )
    prefix, uri = f"{folder}/" if folder else "", store.uri(folder)
    with _reading(uri, TRAINER_FILE):
        step = int(json.loads(store.read_bytes(f"{prefix}{TRAINER_FILE}"))["step"])
    if total_steps is not None:
        check_steps_left(config, step=step, uri=uri, total_steps=total_steps)


def check_steps_left(config: "FineTuneConfig", *, step: int, uri: str, total_steps: int) -> None:
    """Refuses another run's checkpoint that leaves this run nothing to train.

    Raises:
        ConfigError: It does.
    """
    if step >= total_steps:
        raise ConfigError(
            f"{config.title}: checkpoint.resume_from must be of a step below the run's total of {total_steps}, "
            f"got step {step} of {uri}",
            hint="The other run's steps count: raise training.max_steps or training.epochs, or begin with its outputs.",
        )


def _is_whole(store: "Store", folder: str) -> bool:
    """Whether a folder of the store is a complete checkpoint that is not damaged."""
    sizes = {info.path: info.size for info in store.list()}
    return f"{folder}/{COMPLETE_MARKER}" in sizes and not _damage(store, folder, sizes)


def _damage(store: "Store", folder: str, sizes: Mapping[str, int]) -> str:
    """What shows, without reading them, that a checkpoint's files are not those that it was complete with; else "".

    Args:
        store: Holds the checkpoint.
        folder: Its folder in the store.
        sizes: Of all that is in the store, by path.
    """
    prefix = f"{folder}/" if folder else ""
    try:
        marker = json.loads(store.read_bytes(f"{prefix}{COMPLETE_MARKER}"))
        recorded: dict[str, int] = marker.get("files", {})  # early versions recorded none
    except (ValueError, AttributeError):
        return f"{COMPLETE_MARKER} is not what was written"
    for name, size in recorded.items():
        found = sizes.get(f"{prefix}{name}")
        if found != size:
            return f"{name} has {found} bytes of {size}" if found is not None else f"{name} is missing"
    return ""


def complete_steps(names: set[str]) -> list[int]:
    """The steps that have a COMPLETE marker, in order."""
    folders = (name.removesuffix(f"/{COMPLETE_MARKER}") for name in names if name.endswith(f"/{COMPLETE_MARKER}"))
    return sorted(int(match[1]) for folder in folders if (match := _STEP_FOLDER.match(folder)))


def load_checkpoint(
    store: "Store", folder: str, *, model: "nn.Module", optimizer: "Optimizer", scratch: Path
) -> Resumed:
    """Loads a checkpoint into the model and the optimizer; the number of ranks may differ from that which saved it.

    Args:
        store: Holds the checkpoint.
        folder: Its folder in the store, as `find_checkpoint` told; the same on every rank.
        model: Takes the trained parameters.
        optimizer: Takes its state.
        scratch: A local folder of this rank's own.

    Raises:
        DataError: A file of it cannot be read, or it is of another model.
    """
    prefix, uri = f"{folder}/" if folder else "", store.uri(folder)
    with _reading(uri, TRAINER_FILE):
        record = json.loads(store.read_bytes(f"{prefix}{TRAINER_FILE}"))
        step = int(record["step"])
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_OPTIONS)
    # Without the optimizer's groups: their settings come from the config, and follow the step.
    state = {"model": model_state, "optimizer": optimizer_state["state"]}
    local = scratch / "resume"
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir(parents=True)
    try:
        dcp.load(state, storage_reader=_StoreReader(store, folder, local))
    except CheckpointException as error:
        raise _cause_of(error, uri) from error
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=_OPTIONS)
    shutil.rmtree(local, ignore_errors=True)
    return Resumed(step=step, uri=uri, record=record)


def complete(store: "Store", step: int) -> None:
    """Writes COMPLETE, once more making sure that every file that the checkpoint refers to is there in full.

    Raises:
        StorageError: A file is missing or too short.
    """
    folder = f"step-{step}"
    sizes = {info.path.removeprefix(f"{folder}/"): info.size for info in store.list(f"{folder}/")}
    described = store.read_bytes(f"{folder}/{_METADATA_FILE}")
    metadata: Metadata = pickle.loads(described)  # noqa: S301 (this run wrote it)
    for info in (metadata.storage_data or {}).values():
        if sizes.get(info.relative_path, 0) < info.offset + info.length:
            raise StorageError(f"checkpoint {store.uri(folder)} lacks {info.relative_path}")
    marker = {"step": step, "time": round(time.time(), 3), "files": sizes}
    store.write_bytes(f"{folder}/{COMPLETE_MARKER}", json.dumps(marker).encode())


def prune(store: "Store", *, keep: int, best: int | None = None) -> None:
    """Removes all but the newest complete checkpoints, and the remains of incomplete ones older than those.

    Args:
        store: The run's folder of checkpoints.
        keep: How many stay.
        best: A step whose checkpoint stays as well.
    """
    names = {info.path for info in store.list()}
    steps = complete_steps(names)
    kept = sorted({*steps[-keep:], *(step for step in steps if step == best)})
    folders = {match[0]: int(match[1]) for name in names if (match := _STEP_FOLDER.match(name.split("/")[0]))}
    for folder, step in sorted(folders.items()):
        if kept and step < kept[-1] and step not in kept:
            if f"{folder}/{COMPLETE_MARKER}" in names:
                store.delete_tree(f"{folder}/{COMPLETE_MARKER}")  # first, so that a half removed one is none
            store.delete_tree(folder)


def discard_newer(store: "Store", *, than: int) -> None:
    """Makes checkpoints beyond a step incomplete: training writes them again, and half of each would be no checkpoint.

    Their files stay until a newer checkpoint is complete.
    """
    for step in complete_steps({info.path for info in store.list()}):
        if step > than:
            store.delete_tree(f"step-{step}/{COMPLETE_MARKER}")


@contextmanager
def _reading(uri: str, name: str) -> Iterator[None]:
    """Names the checkpoint and its file in whatever reading that file raises, where that is not an error of ours."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TrainerError | OSError) or is_out_of_memory(error):
            raise
        raise DataError(
            f"checkpoint {uri} cannot be read: {name} is damaged ({type(error).__name__}: {error})",
            hint=f"Restore the file, or remove {COMPLETE_MARKER} beside it to go on from the checkpoint before.",
        ) from error


def _cause_of(error: CheckpointException, uri: str) -> Exception:
    """What befell a rank's load: DCP wraps the ranks' errors, ours among them, in one of its own."""
    causes = [failure[0] for failure in error.failures.values()]
    for cause in causes:
        if isinstance(cause, TrainerError | OSError) or is_out_of_memory(cause):
            return cause
    return DataError(f"checkpoint {uri} does not fit this run: {causes[0]}", hint="Was the run's config changed?")


def _first_cause(error: BaseException) -> BaseException:
    """What befell the first rank whose part could not be written; otherwise the error itself."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next((failure[0] for failure in failures.values()), error)


class _Writer(FileSystemWriter):
    """Writes in a thread of DCP's, which on CUDA begins on the first device, where it would take memory for nothing."""

    def __init__(self, folder: Path, *, device: torch.device) -> None:
        super().__init__(folder, sync_files=False)
        self._device = device

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        if self._device.type == "cuda":  # not run by us
            torch.cuda.set_device(self._device)
        return super().write_data(plan, planner)


class _StoreReader(FileSystemReader):
    """Reads a checkpoint from a store, fetching only the files that this rank's part lies in."""

    def __init__(self, store: "Store", folder: str, local: Path) -> None:
        super().__init__(local)
        self._store, self._local = store, local
        self._prefix, self._uri = f"{folder}/" if folder else "", store.uri(folder)
        # Not when DCP asks for it: of what goes wrong then it keeps only the words.
        self._fetch(_METADATA_FILE)
        with _reading(self._uri, _METADATA_FILE):
            self._metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 (as the base class has it)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name in sorted(files):
            self._fetch(name)
            with _reading(self._uri, name):
                super().read_data(replace(plan, items=files[name]), planner).wait()
        return super().read_data(replace(plan, items=[]), planner)  # what DCP waits for

    def _fetch(self, name: str) -> None:
        self._store.download(f"{self._prefix}{name}", self._local / name)
