"""Weights & Biases: a run with the job's own identity, online, or offline as a folder for `wandb sync`.

The step is a metric of its own, the axis of all others, so that numbers of one step may come one after the other. A
validation comes after its step and may be cut off from it: it has a hidden number beside, by which its last is known.
"""

import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from kubetune_trainer.config import Wandb
from kubetune_trainer.storage import Store, open_store, read_secret
from kubetune_trainer.tracking import Artifact, Begun, Row

INIT_SECONDS: Final = 30
FINISH_SECONDS: Final = 20
FLUSH_SECONDS: Final = 0.5
"""How often what was logged is written to the transaction log."""
FLUSH_LIMIT_SECONDS: Final = 5.0
HEADER: Final = b":W&B"
HEADER_BYTES: Final = 7
BLOCK_BYTES: Final = 32768
FULL, FIRST, LAST = 1, 2, 4
STEP: Final = "step"
VALIDATION_STEP: Final = "validation_step"


class WandbRun:
    """One run of W&B's."""

    def __init__(self, settings: Wandb) -> None:
        """Begins without a connection.

        Args:
            settings: Where it is, and what it is called there.
        """
        self._settings = settings
        self._run: Any = None
        self._id = ""
        self._told: dict[str, int] = {}
        self._logged: dict[str, int] = {}

    def open(self, begun: Begun) -> None:
        """As `Tracker.open`."""
        import wandb  # noqa: PLC0415 (only where it is asked for)

        asked, run = self._settings, begun.config.run
        self._id = begun.run_id
        key = (read_secret(asked.api_key_secret) if asked.api_key_secret else None) or os.environ.get("WANDB_API_KEY")
        settings: dict[str, Any] = {
            "mode": asked.mode.lower(),
            "silent": True,  # stdout and stderr are the trainer's own
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "x_save_requirements": False,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
            **({"api_key": key} if key and asked.mode == "Online" else {}),
            **({"base_url": asked.base_url} if asked.base_url else {}),
        }
        self._run = wandb.init(
            project=asked.project,
            entity=asked.entity,
            group=asked.group,
            tags=list(asked.tags) or None,
            name=run.name,
            id=begun.run_id,
            resume="allow",
            dir=str(begun.scratch),
            config=begun.config.model_dump(mode="json", exclude_none=True),
            settings=wandb.Settings(**settings),
        )
        self._run.define_metric(STEP)
        self._run.define_metric(VALIDATION_STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        if asked.mode == "Online":
            self._told = {kind: int(self._run.summary.get(kind) or 0) for kind in (STEP, VALIDATION_STEP)}
        else:
            self._told = last_steps_of(open_store(begun.folder, s3=begun.config.storage.s3), scratch=begun.scratch)

    def log(self, rows: Sequence[Row]) -> None:
        """As `Tracker.log`."""
        for row in rows:
            kind = kind_of(row.numbers)
            if row.step > self._told.get(kind, 0):
                self._run.log({STEP: row.step, kind: row.step, **row.numbers})
                self._logged[kind] = row.step

    def refer(self, artifact: Artifact) -> None:
        """As `Tracker.refer`: an artifact that refers to the place, of which nothing is uploaded."""
        import wandb  # noqa: PLC0415

        made = wandb.Artifact(f"{self._id}-{artifact.name}", type=artifact.kind, metadata=dict(artifact.facts))
        made.add_reference(artifact.uri, name=artifact.name, checksum=False)
        self._run.log_artifact(made)

    def files(self) -> Path | None:
        """As `Tracker.files`; online, the service has it all."""
        if self._settings.mode == "Online":
            return None
        log, deadline = Path(self._run.settings.sync_file), time.monotonic() + FLUSH_LIMIT_SECONDS
        while self._is_behind(log) and time.monotonic() < deadline:
            time.sleep(FLUSH_SECONDS / 5)
        return Path(self._run.settings.sync_dir)

    def _is_behind(self, log: Path) -> bool:
        """Whether something of what was logged is not in the transaction log yet."""
        written = last_steps(log)
        return any(written.get(kind, 0) < step for kind, step in self._logged.items())

    def close(self, state: str) -> None:
        """As `Tracker.close`."""
        self._run.summary["state"] = state
        if state in {"Preempted", "Interrupted"}:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "Complete" else 1)


def kind_of(numbers: Iterable[str]) -> str:
    """Return what counts the rows with these numbers: STEP, or VALIDATION_STEP where they are a validation's."""
    return VALIDATION_STEP if any(name.startswith("validation_") for name in numbers) else STEP


def last_steps_of(store: Store, *, scratch: Path) -> dict[str, int]:
    """Return the last step of each kind of row that earlier attempts have told, by their offline folders."""
    last: dict[str, int] = {}
    for info in store.list():
        if info.path.endswith(".wandb"):
            local = scratch / "earlier.wandb"
            store.download(info.path, local)
            last = {kind: max(step, last.get(kind, 0)) for kind, step in (last | last_steps(local)).items()}
            local.unlink()
    return last


def last_steps(path: Path) -> dict[str, int]:
    """Return the last step of each kind of row in a transaction log; kinds of which it has none are left out."""
    last: dict[str, int] = {}
    for row in history(path):
        if STEP in row:
            kind = kind_of(row)
            last[kind] = max(row[STEP], last.get(kind, 0))
    return last


def history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a transaction log, as they were logged."""
    import json  # noqa: PLC0415

    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415

    for content in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def records(log: bytes) -> Iterator[bytes]:
    """Yield the whole records of a transaction log; the last one may still be in the middle of being written.

    The format is that of LevelDB's log behind a header: blocks of 32 KiB, in them fragments, each with checksum, length
    and whether it is a whole record, its first, a middle or its last part (leveldb, doc/log_format.md).
    """
    position, parts = HEADER_BYTES if log.startswith(HEADER) else len(log), b""
    while position + HEADER_BYTES <= len(log):
        if (left := BLOCK_BYTES - position % BLOCK_BYTES) < HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        position += HEADER_BYTES
        if kind == 0 or position + length > len(log):
            return
        parts = (b"" if kind in {FULL, FIRST} else parts) + log[position : position + length]
        position += length
        if kind in {FULL, LAST}:
            yield parts
