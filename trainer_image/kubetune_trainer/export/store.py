"""Bring a finished output from a local folder to its place in the workspace, or where its URI says."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubetune_trainer.config import JobConfig, OutputBase
from kubetune_trainer.export.digest import digest_of, file_digests
from kubetune_trainer.names import OUTPUTS_DIR
from kubetune_trainer.storage import open_store, upload_tree


@dataclass(frozen=True, kw_only=True)
class StoredOutput:
    """An output at its place."""

    name: str
    """Its name in the job."""
    type: str
    """Its format."""
    uri: str
    """Its folder."""
    digest: str
    """Digest of its files, `sha256:…`."""
    bytes: int
    """Their size together."""
    files: Mapping[str, str]
    """SHA-256 of each file, by its path in the folder."""
    merge_difference: str | None = None
    """How far its logits are from those of the adapters that were merged, beside the logits' size; a decimal number."""

    def told(self) -> dict[str, Any]:
        """What the status and the lineage say of it."""
        told = {name: getattr(self, name) for name in ("name", "type", "uri", "digest", "bytes")}
        return told if self.merge_difference is None else {**told, "mergeDifference": self.merge_difference}


def store_output(output: OutputBase, folder: Path, *, config: JobConfig) -> StoredOutput:
    """Copy an output's files to where it belongs."""
    uri = output.uri or f"{config.run.directory}/{OUTPUTS_DIR}/{output.name}"
    store = open_store(uri, s3=config.storage.s3)
    upload_tree(store, folder, "")
    files = file_digests(folder)
    return StoredOutput(
        name=output.name,
        type=output.type,
        uri=store.uri(),
        digest=digest_of(files),
        bytes=sum((folder / name).stat().st_size for name in files),
        files=files,
    )
