"""Datasets of tasks in the workspace: from the Hub once, then from there; or put there by hand where there is no Hub.

<cache>/datasets/<owner>--<name>/                        a copy of the repository, put there by hand
<cache>/datasets/<owner>--<name>-<commit>/<config>/      what was fetched, complete when it holds COMPLETE
"""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ConfigDict

from kubetune_trainer.config import EvalConfig, HubSource
from kubetune_trainer.data.read import SUFFIXES
from kubetune_trainer.errors import DataError, TrainerError
from kubetune_trainer.hub import HubRepo, find_repo
from kubetune_trainer.names import COMPLETE_MARKER
from kubetune_trainer.report import Report
from kubetune_trainer.storage import Store, download_tree, open_store, scratch_dir

DATASETS_DIR: Final = "datasets"
_SUFFIXES: Final = (*SUFFIXES, ".csv", ".tsv", ".txt", ".arrow", ".zip", ".gz", ".zst", ".xz", ".bz2")


class FoundDataset(BaseModel):
    """A dataset as it was when the run was prepared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Its path on the Hub."""
    config: str | None
    """Its configuration; None is the only or default one."""
    location: str
    """Where the workspace has it."""
    commit: str | None
    """Commit of the Hub; None where the copy was put there by hand."""


def find_dataset(name: str, dataset_config: str | None, *, config: EvalConfig, report: Report) -> FoundDataset:
    """Find a dataset in the workspace, or bring it there from the Hub.

    Raises:
        ConfigError: The Hub has no such dataset.
        StorageError: The Hub does not answer, and the workspace has no copy.
    """
    root, flat = f"{config.run.cache}/{DATASETS_DIR}", name.replace("/", "--")
    by_hand = open_store(f"{root}/{flat}", s3=config.storage.s3)
    if by_hand.list():
        return FoundDataset(name=name, config=dataset_config, location=by_hand.uri(), commit=None)
    try:
        repo = find_repo(HubSource(repo=name), kind="dataset")
    except TrainerError as error:
        hint = f"Where there is no Hub, put a copy of the dataset's repository into {by_hand.uri()}."
        raise type(error)(f"{config.title}: {error}", hint=f"{error.hint} {hint}".strip()) from error
    place = open_store(f"{root}/{flat}-{repo.commit[:12]}/{dataset_config or 'default'}", s3=config.storage.s3)
    if not place.exists(COMPLETE_MARKER):
        _copy(repo, dataset_config, place, report=report)
    return FoundDataset(name=name, config=dataset_config, location=place.uri(), commit=repo.commit)


def fetch_dataset(found: FoundDataset, *, config: EvalConfig) -> Path:
    """Return a local folder with a dataset."""
    store = open_store(found.location, s3=config.storage.s3)
    local = store.local_path()
    if local is None:
        local = scratch_dir() / DATASETS_DIR / found.location.partition("://")[2].replace("/", "--")
        if not (local / f"{COMPLETE_MARKER}.fetched").exists():
            download_tree(store, "", local)
            (local / f"{COMPLETE_MARKER}.fetched").touch()
    return local


def _copy(repo: HubRepo, dataset_config: str | None, place: Store, *, report: Report) -> None:
    """Copy the files of one configuration, and a README that knows of this one alone."""
    entry, wanted = _chosen(repo, dataset_config)
    folder = scratch_dir() / "hub"
    for number, path in enumerate(wanted):
        report("prepare", stage=f"Downloading {repo.repo}", done=number, total=len(wanted))
        local = repo.download(path, folder)
        place.upload(local, path)
        local.unlink()
    if entry is not None:
        head = yaml.safe_dump({"configs": [entry]}, sort_keys=False)
        place.write_bytes("README.md", f"---\n{head}---\n".encode())
    place.write_bytes(COMPLETE_MARKER, b"")


def _chosen(repo: HubRepo, dataset_config: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Return a configuration's entry in the README, where there are any, and its files."""
    files = [path for path in repo.paths if path.endswith(_SUFFIXES)]
    known = [dict(entry) for entry in repo.card.get("configs") or ()]
    entries = [entry for entry in known if entry.get("data_files") or entry.get("data_dir")]
    if not entries:
        return None, _there(files, repo, dataset_config)
    named = [entry for entry in entries if entry.get("config_name", "default") == (dataset_config or "default")]
    marked = [entry for entry in entries if entry.get("default")] or (entries if len(entries) == 1 else [])
    chosen = named or ([] if dataset_config else marked)
    if not chosen:
        names = ", ".join(str(entry.get("config_name", "default")) for entry in entries)
        raise DataError(f"dataset {repo.repo} on the Hub has the configs {names}, and a task asks for {dataset_config}")
    patterns = _patterns(chosen[0]["data_files"]) if chosen[0].get("data_files") else ["*"]
    if folder := str(chosen[0].get("data_dir") or "").strip("./"):
        patterns = [f"{folder}/{pattern}" for pattern in patterns]
    matching = [path for path in files if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]
    return chosen[0], _there(matching, repo, dataset_config)


def _patterns(data_files: Any) -> list[str]:
    """Return all file patterns of a configuration, whatever its splits are called."""
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, dict):
        return _patterns(data_files["path"] if "path" in data_files else list(data_files.values()))
    return [pattern for entry in data_files for pattern in _patterns(entry)]


def _there(files: Sequence[str], repo: HubRepo, dataset_config: str | None) -> list[str]:
    if not files:
        raise DataError(
            f"dataset {repo.repo} on the Hub has no data files for the config {dataset_config or 'default'}",
            hint="Datasets that are made by a script cannot be loaded; find a copy with parquet or json files.",
        )
    return list(files)
