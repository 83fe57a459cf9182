"""Bring a finished output from a local folder to its place in the workspace, or where its URI says.

Where an earlier output lies there, this one takes its place: of the files that an output may have, none is left that
this one has not. The earlier lineage and configuration go first, and the new configuration comes last, so that what an
interruption leaves is no model to any loader rather than a mixture of two.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubetune_trainer.config import FineTuneConfig, JobConfig, OutputBase, QuantizeConfig
from kubetune_trainer.errors import ConfigError
from kubetune_trainer.export.digest import digest_of, file_digests
from kubetune_trainer.export.output_files import FIRST_READ, is_output_file
from kubetune_trainer.names import LINEAGE_FILE, OUTPUTS_DIR
from kubetune_trainer.storage import Store, open_store, upload_tree


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
    """Copy an output's files to where it belongs, in the place of an earlier output's."""
    store = open_store(_place(output, config), s3=config.storage.s3)
    files = file_digests(folder)
    _remove_earlier(store, but=files)
    upload_tree(store, folder, "", last=FIRST_READ)
    return StoredOutput(
        name=output.name,
        type=output.type,
        uri=store.uri(),
        digest=digest_of(files),
        bytes=sum((folder / name).stat().st_size for name in files),
        files=files,
    )


def check_places(config: FineTuneConfig | QuantizeConfig) -> None:
    """Refuse outputs that would take the place of each other, or of what the run reads.

    Raises:
        ConfigError: Two of these are the same folder.
    """
    taken = dict(_places_read(config))
    for output in config.outputs:
        place = _place(output, config).rstrip("/")
        if place in taken:
            raise ConfigError(
                f"{config.title}: output {output.name}: uri must be a folder of its own, got {place} of {taken[place]}",
                hint="An output takes the place of the model that lies in its folder.",
            )
        taken[place] = f"output {output.name}"


def _places_read(config: FineTuneConfig | QuantizeConfig) -> Iterator[tuple[str, str]]:
    for field, model in {"model": config.model, **config.other_models}.items():
        for name, source in ((field, model.uri), (f"{field}.adapter", model.adapter)):
            if source is not None:
                yield source.location.rstrip("/"), name
    lora = config.lora if isinstance(config, FineTuneConfig) else None
    if lora is not None and lora.adapter is not None and lora.adapter.uri is not None:
        yield lora.adapter.uri.location.rstrip("/"), "lora.adapter"


def _place(output: OutputBase, config: JobConfig) -> str:
    return output.uri or f"{config.run.directory}/{OUTPUTS_DIR}/{output.name}"


def _remove_earlier(store: Store, *, but: Collection[str]) -> None:
    """Remove what an earlier output has left, but for files that are written over; that by which it is known first."""
    there = [info.path for info in store.list() if is_output_file(info.path)]
    known_by = [path for path in (LINEAGE_FILE, *FIRST_READ) if path in there]
    for path in (*known_by, *(path for path in there if path not in known_by and path not in but)):
        store.delete(path)
