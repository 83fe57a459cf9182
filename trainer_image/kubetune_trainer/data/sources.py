"""The datasets of a run: which files each one means, what identifies them, and their records one after the other."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kubetune_trainer.config import HubSource, JobConfig, S3Storage, Source
from kubetune_trainer.data.read import Record, choose_files, read_records
from kubetune_trainer.data.splits import Split, split_files
from kubetune_trainer.errors import DataError
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.hub import find_repo
from kubetune_trainer.storage import config_map_file, open_store, scratch_dir

WILDCARDS = frozenset("*?[")


class FoundSource(BaseModel):
    """A dataset as it was when the run was prepared, for the status."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Its name in the config."""
    commit: str | None = None
    """Commit of the Hub, where it came from there."""
    etag: str | None = None
    """ETag of its file in storage, or a digest of those of its files."""
    digest: str | None = None
    """Digest of its content, where it is a key of a ConfigMap."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file of a dataset."""

    name: str
    """How messages call it; its suffix says how it is read."""
    fetch: Callable[[], Path]
    """Brings it to this machine."""
    is_temporary: bool
    """Whether what fetch brought is ours to delete."""


@dataclass(frozen=True, kw_only=True)
class OpenSource:
    """A dataset whose files are known and not yet read."""

    source: Source
    """Its block of the config."""
    found: FoundSource
    """What identifies it."""
    files: list[DataFile]
    """Its files, in order."""

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yields every record with its place."""
        return Split.parse(self.source.hub.split).cut(self._all_records) if self.source.hub else self._all_records()

    def _all_records(self) -> Iterator[tuple[str, Record]]:
        for file in self.files:
            local = file.fetch()
            yield from read_records(local, name=file.name)
            if file.is_temporary:
                local.unlink()


def open_source(source: Source, *, config: JobConfig) -> OpenSource:
    """Finds the files of a dataset.

    Raises:
        DataError: There are none.
    """
    if source.hub is not None:
        return _open_hub(source, source.hub)
    if source.config_map is not None:
        return _open_config_map(source)
    return _open_uri(source, s3=source.uri.s3 or config.storage.s3)


def _open_config_map(source: Source) -> OpenSource:
    path = config_map_file(source.config_map)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"ConfigMap {source.config_map.name} key {source.config_map.key}"
    return OpenSource(
        source=source,
        found=FoundSource(name=source.name, digest=f"sha256:{digest}"),
        files=[DataFile(name=name, fetch=lambda: path, is_temporary=False)],
    )


def _open_uri(source: Source, *, s3: S3Storage | None) -> OpenSource:
    location = source.uri.location
    base, pattern = _split_wildcards(location)
    store = open_store(base, s3=s3)
    etags = {info.path: info.etag for info in store.list()}
    paths = [""] if "" in etags else choose_files(list(etags), pattern)
    if not paths:
        raise DataError(
            f"dataset source {source.name}: {location} has no data files",
            hint="Give a .jsonl, .json, .csv or .parquet file, a folder of them, or wildcards as in part-*.jsonl.",
        )

    def file(path: str) -> DataFile:
        local = store.local_path(path)
        if local is not None:
            return DataFile(name=store.uri(path), fetch=lambda: local, is_temporary=False)
        target = scratch_dir() / "sources" / source.name / (path or "data")

        def download() -> Path:
            store.download(path, target, etag=etags[path])
            return target

        return DataFile(name=store.uri(path), fetch=download, is_temporary=True)

    etag = etags[paths[0]] if len(paths) == 1 else _digest({path: etags[path] for path in paths})
    return OpenSource(
        source=source, found=FoundSource(name=source.name, etag=etag), files=[file(path) for path in paths]
    )


def _open_hub(source: Source, hub: HubSource) -> OpenSource:
    split = Split.parse(hub.split)
    repo = find_repo(hub, kind="dataset")
    paths = split_files(repo.paths, card=repo.card, config=hub.config, split=split.name, repo=hub.repo)
    folder = scratch_dir() / "sources" / source.name
    return OpenSource(
        source=source,
        found=FoundSource(name=source.name, commit=repo.commit),
        files=[
            DataFile(name=f"{hub.repo}/{path}", fetch=partial(repo.download, path, folder), is_temporary=True)
            for path in paths
        ],
    )


def _split_wildcards(location: str) -> tuple[str, str]:
    """Splits a location into the folder before the first part with wildcards, and the rest."""
    scheme, _, path = location.partition("://")
    parts = path.split("/")
    plain = next((number for number, part in enumerate(parts) if WILDCARDS & set(part)), len(parts))
    return f"{scheme}://{'/'.join(parts[:plain])}", "/".join(parts[plain:])


def _digest(etags: dict[str, str]) -> str:
    return fingerprint(etags, length=32)
