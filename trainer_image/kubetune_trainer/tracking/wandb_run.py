"""Weights & Biases: a run with the job's own identity, online, or offline as a folder for `wandb sync`.

The step is a metric of its own, the axis of all others, so that numbers of one step may come one after the other.
"""

import os
import struct
import time
from collections.abc import Iterator, Sequence
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
        self._told = self._logged = 0

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
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if asked.mode == "Online":
            self._told = int(self._run.summary.get("step") or 0)
        else:
            self._told = last_step_of(open_store(begun.folder, s3=begun.config.storage.s3), scratch=begun.scratch)

    def log(self, rows: Sequence[Row]) -> None:
        """As `Tracker.log`."""
        for row in rows:
            if row.step > self._told:
                self._run.log({"step": row.step, **row.numbers})
                self._logged = row.step

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
        while last_step(log) < self._logged and time.monotonic() < deadline:
            time.sleep(FLUSH_SECONDS / 5)
        return Path(self._run.settings.sync_dir)

    def close(self, state: str) -> None:
        """As `Tracker.close`."""
        self._run.summary["state"] = state
        if state in {"Preempted", "Interrupted"}:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "Complete" else 1)


def last_step_of(store: Store, *, scratch: Path) -> int:
    """Return the last step that earlier attempts have told, by their offline folders; 0 if there is none."""
    last = 0
    for info in store.list():
        if info.path.endswith(".wandb"):
            local = scratch / "earlier.wandb"
            store.download(info.path, local)
            last = max(last, last_step(local))
            local.unlink()
    return last


def last_step(path: Path) -> int:
    """Return the last step in a transaction log; 0 if there is none."""
    steps = [row["step"] for row in history(path) if "step" in row]
    return max(steps, default=0)


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
