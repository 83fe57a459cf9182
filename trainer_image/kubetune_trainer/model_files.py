"""The model's folder: found and checked by its small files before anything is spent, then brought to each node."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from kubetune_trainer.config import FirstAdapters, JobConfig, Model, S3Storage
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.export.peft import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, TRAINED_IDS
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.hub import HubRepo, find_repo
from kubetune_trainer.model.adapter import save_merged
from kubetune_trainer.model.config import CONFIG_FILE
from kubetune_trainer.model.weights import GGUF_FILE, INDEX_FILE, WEIGHTS_FILE, has_gguf_alone, no_weights
from kubetune_trainer.names import COMPLETE_MARKER
from kubetune_trainer.report import Report
from kubetune_trainer.storage import ObjectInfo, Store, open_store, scratch_dir
from kubetune_trainer.tokenizer import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, TOKENIZER_FILES, Tokenizer, load_tokenizer
from kubetune_trainer.vocabulary import grown, growth_by_adapter

WEIGHT_SUFFIXES = frozenset(
    {
        ".safetensors", ".bin", ".pt", ".pth", ".pte", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".tflite",
        ".ot",
    }
)  # fmt: skip
HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format allows a header to have."""


class FoundModel(BaseModel):
    """A model folder as it was when the run was prepared; every attempt trains this one or none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    """URI of the folder."""
    commit: str | None = None
    """Commit of the Hub, where it came from there."""
    etags: Mapping[str, str]
    """ETag of each of its files that are used, by path."""

    def told(self) -> dict[str, str]:
        """What a termination message says of it."""
        told = {"location": self.location, "commit": self.commit, "etag": self.digest}
        return {name: value for name, value in told.items() if value}

    @property
    def digest(self) -> str:
        """One short name for all of it."""
        return fingerprint(self.model_dump(), length=32)


def model_s3(config: JobConfig) -> S3Storage | None:
    """Returns how to reach the S3 service of the model, where it lies in one."""
    uri = config.model.uri
    return (uri.s3 if uri else None) or config.storage.s3


def locate_model(config: JobConfig, *, report: Report, takes_gguf: bool = False) -> FoundModel:
    """Finds the run's model; one of the Hub is brought into the workspace's cache first, once for all runs.

    Args:
        config: The run.
        report: Told how far a download is.
        takes_gguf: Whether its weights may be a GGUF output.

    Raises:
        DataError: A file is missing, or a weight file is shorter than its own header says.
        ConfigError: The Hub has no such repository.
    """
    if config.model.hub is None:
        return find_model(config.model.uri.location.rstrip("/"), s3=model_s3(config), takes_gguf=takes_gguf)
    repo = find_repo(config.model.hub, kind="model")
    key = f"{repo.repo.replace('/', '--')}-{repo.commit[:12]}"
    cache = open_store(f"{config.run.cache}/models/{key}", s3=config.storage.s3)
    if not cache.exists(COMPLETE_MARKER):
        _copy_from_hub(repo, cache, report=report)
    return find_model(cache.uri(), s3=config.storage.s3, commit=repo.commit)


def find_model(
    location: str, *, s3: S3Storage | None, commit: str | None = None, takes_gguf: bool = False
) -> FoundModel:
    """Looks at a model folder without reading its weights.

    Args:
        location: URI of the folder.
        s3: How to reach the S3 service.
        commit: Commit of the Hub, where it came from there.
        takes_gguf: Whether its weights may be a GGUF output.

    Raises:
        DataError: A file is missing, or a weight file is shorter than its own header says.
    """
    store = open_store(location, s3=s3)
    files = {info.path: info for info in store.list()}
    if not files:
        raise DataError(f"Model folder {location}: there is no such folder, or it is empty")
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        if name not in files:
            raise DataError(
                f"Model folder {location}: {name} is missing",
                hint="It must be a folder in Hugging Face format: config.json, tokenizer.json and *.safetensors.",
            )
    if takes_gguf and has_gguf_alone(files):
        weights = [GGUF_FILE]  # whether it is whole is seen when it is loaded: its header may be megabytes long
    else:
        weights = _weight_files(store, files)
        for name in weights:
            _check_weights(store, files[name])
    used = [*(path for path in files if is_small(path)), *weights]
    return FoundModel(location=location, commit=commit, etags={path: files[path].etag for path in sorted(used)})


def locate_adapter(config: JobConfig) -> FoundModel | None:
    """Finds the adapter that belongs to the run's model; None where there is none.

    Raises:
        DataError: A file is missing.
    """
    adapter = config.model.adapter
    return find_adapter(adapter.location, s3=adapter.s3 or config.storage.s3) if adapter else None


def first_adapters_s3(source: FirstAdapters, config: JobConfig) -> S3Storage | None:
    """Returns how to reach the S3 service of adapters to begin with, where they lie in one."""
    return (source.uri.s3 if source.uri else None) or config.storage.s3


def locate_first_adapters(source: FirstAdapters, config: JobConfig, *, report: Report) -> FoundModel:
    """Finds the adapters that a run begins with; those of the Hub are brought into the workspace's cache first.

    Raises:
        DataError: A file is missing or cut off.
        ConfigError: The Hub has no such repository.
    """
    if source.hub is None:
        return find_adapter(source.uri.location, s3=first_adapters_s3(source, config))
    repo = find_repo(source.hub, kind="model")
    cache = open_store(
        f"{config.run.cache}/models/{repo.repo.replace('/', '--')}-{repo.commit[:12]}", s3=config.storage.s3
    )
    if not cache.exists(COMPLETE_MARKER):
        _copy_from_hub(repo, cache, report=report)
    return find_adapter(cache.uri(), s3=config.storage.s3).model_copy(update={"commit": repo.commit})


def find_adapter(location: str, *, s3: S3Storage | None) -> FoundModel:
    """Looks at a PEFT folder without reading its weights.

    Raises:
        DataError: A file is missing.
    """
    store = open_store(location.rstrip("/"), s3=s3)
    files = {info.path: info for info in store.list()}
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        if name not in files:
            raise DataError(
                f"Adapter folder {location}: {name} is missing",
                hint="It must be a PEFT folder: adapter_config.json and adapter_model.safetensors.",
            )
    _check_weights(store, files[ADAPTER_WEIGHTS_FILE])
    used = [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE]
    told = _parse(store.read_bytes(ADAPTER_CONFIG_FILE), what=f"Adapter folder {location}: {ADAPTER_CONFIG_FILE}")
    brought = TOKENIZER_FILES if told.get(TRAINED_IDS) else (CHAT_TEMPLATE_FILE,)
    used += [name for name in brought if name in files]
    return FoundModel(location=store.uri(), etags={path: files[path].etag for path in used})


def fetch_model(model: FoundModel, *, s3: S3Storage | None, only_small: bool = False) -> Path:
    """Returns a local folder with the model, downloaded once per node unless it is local already.

    Args:
        model: What was found.
        s3: How to reach the S3 service.
        only_small: Everything but the weights, which is enough for the tokenizer.

    Raises:
        DataError: A file has changed since the model was found.
    """
    store = open_store(model.location, s3=s3)
    local = store.local_path()
    if local is not None:
        _check_unchanged(model, store.list())
        return local
    folder = scratch_dir() / "models" / (f"{model.digest}-small" if only_small else model.digest)
    if not (folder / COMPLETE_MARKER).exists():
        shutil.rmtree(folder, ignore_errors=True)
        for path, etag in model.etags.items():
            if is_small(path) or not only_small:
                store.download(path, folder / path, etag=etag)
        (folder / COMPLETE_MARKER).touch()
    return folder


def fetch_merged(model: FoundModel, adapter: FoundModel | None, *, config: JobConfig) -> tuple[Path, Path | None, Path]:
    """Brings a model and its adapter to this machine and merges them, once per node.

    Tokens and the chat template that the adapter was trained with become the model's first.

    Returns:
        The folders of the model, of the adapter, and of the two as one; the first and the last are the same without an
        adapter.

    Raises:
        DataError: A file has changed since the model was found, or the adapter does not fit the model.
    """
    base_dir = fetch_model(model, s3=model_s3(config))
    if adapter is None or config.model.adapter is None:
        return base_dir, None, base_dir
    adapter_dir = fetch_model(adapter, s3=config.model.adapter.s3 or config.storage.s3)
    merged_dir = scratch_dir() / "models" / f"{model.digest}-{adapter.digest}"
    if not (merged_dir / COMPLETE_MARKER).exists():
        shutil.rmtree(merged_dir, ignore_errors=True)
        save_merged(with_adapters_tokens(base_dir, adapter_dir, key=model.digest), adapter_dir, merged_dir)
        (merged_dir / COMPLETE_MARKER).touch()
    return base_dir, adapter_dir, merged_dir


def with_adapters_tokens(base_dir: Path, adapter_dir: Path, *, key: str, with_weights: bool = True) -> Path:
    """Returns a model's folder with the tokens and the chat template of an adapter; the model's own if it has them."""
    growth = growth_by_adapter(base_dir, adapter_dir)
    return grown(base_dir, growth, below=scratch_dir() / "models", key=key, with_weights=with_weights)


def fetch_small(model: FoundModel, adapter: FoundModel | None, *, config: JobConfig) -> Path:
    """Returns a local folder with all of a model but its weights, with the tokens and the template of its adapter.

    Raises:
        DataError: A file has changed since the model was found.
    """
    folder = fetch_model(model, s3=model_s3(config), only_small=True)
    if adapter is None or config.model.adapter is None:
        return folder
    adapter_dir = fetch_model(adapter, s3=config.model.adapter.s3 or config.storage.s3)
    return with_adapters_tokens(folder, adapter_dir, key=model.digest, with_weights=False)


class FoundOther(BaseModel):
    """A model that a run uses beside its own, as it was when the run was prepared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: FoundModel
    """The model."""
    adapter: FoundModel | None = None
    """The adapter that is merged into it."""

    def told(self, field: str) -> dict[str, str]:
        """What a termination message says of it."""
        adapter = {"adapter": self.adapter.location} if self.adapter else {}
        return {"field": field, **self.model.told(), **adapter}


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A model on this machine."""

    model_dir: Path
    """Its folder, with its adapter merged."""
    base_dir: Path
    """Its folder as it was found."""
    adapter_dir: Path | None
    """Folder of the adapter, if any."""


def locate_others(config: JobConfig, *, tokenizer: Tokenizer, report: Report) -> dict[str, tuple[FoundOther, Path]]:
    """Finds the models that a run uses beside its own, by field.

    Args:
        config: The run.
        tokenizer: Its model's; the others have to read the same tokens.
        report: Told how far a download is.

    Returns:
        Each with a folder that has its files but the weights.

    Raises:
        DataError: A file is missing or cut off.
        ConfigError: The Hub has no such repository, or the model has another tokenizer.
    """
    found = {}
    for field, named in config.other_models.items():
        alone = config.model_copy(update={"model": named})
        model, adapter = locate_model(alone, report=report), locate_adapter(alone)
        folder = fetch_small(model, adapter, config=alone)
        if problem := tokenizer.differs_from(load_tokenizer(folder)):
            raise ConfigError(
                f"{config.title}: {field} must have the tokenizer of the model, got {problem}",
                hint=f"The model is {_place(config.model)}, {field} is {_place(named)}.",
            )
        found[field] = FoundOther(model=model, adapter=adapter), folder
    return found


def _place(model: Model) -> str:
    """Where a config says that a model is."""
    return f"{model.hub.repo} at {model.hub.revision}" if model.hub else model.uri.location


def fetch_others(found: Mapping[str, FoundOther], *, config: JobConfig) -> dict[str, LocalModel]:
    """Brings the models that a run uses beside its own to this machine.

    Raises:
        DataError: A file has changed since they were found.
    """
    local = {}
    for field, other in found.items():
        alone = config.model_copy(update={"model": config.other_models[field]})
        base_dir, adapter_dir, model_dir = fetch_merged(other.model, other.adapter, config=alone)
        local[field] = LocalModel(model_dir=model_dir, base_dir=base_dir, adapter_dir=adapter_dir)
    return local


def is_small(path: str) -> bool:
    """Whether a file of a model folder belongs to the model and is no weights: configuration, tokenizer, license."""
    return not (
        "/" in path or path.startswith(".") or path == COMPLETE_MARKER or PurePosixPath(path).suffix in WEIGHT_SUFFIXES
    )


def _copy_from_hub(repo: HubRepo, cache: Store, *, report: Report) -> None:
    """Copies what a model folder needs, one file at a time, so that no disk has to hold all of it."""
    wanted = [path for path in repo.paths if "/" not in path and (is_small(path) or path.endswith(".safetensors"))]
    folder = scratch_dir() / "hub"
    for number, path in enumerate(wanted):
        report("prepare", stage=f"Downloading {repo.repo}", done=number, total=len(wanted))
        if cache.exists(path):
            continue
        local = repo.download(path, folder)
        # The folder is of one commit, and another run, which copies it too, may use this file already.
        cache.upload(local, path, replace=False)
        local.unlink()
    cache.write_bytes(COMPLETE_MARKER, b"")


def _check_unchanged(model: FoundModel, files: Sequence[ObjectInfo]) -> None:
    now = {info.path: info.etag for info in files}
    for path, etag in model.etags.items():
        if now.get(path) != etag:
            what = "has changed since the run was prepared" if path in now else "is gone since the run was prepared"
            raise DataError(
                f"Model folder {model.location}: {path} {what}", hint="Restore the file, or start a new job."
            )


def _weight_files(store: Store, files: Mapping[str, ObjectInfo]) -> list[str]:
    """Returns which weight files the loader will read: those of the index, or the only one."""
    if INDEX_FILE not in files:
        if WEIGHTS_FILE not in files:
            raise no_weights(store.uri(), files)
        return [WEIGHTS_FILE]
    weight_map = _parse(store.read_bytes(INDEX_FILE), what=f"Model folder {store.uri()}: {INDEX_FILE}").get(
        "weight_map"
    )
    if not isinstance(weight_map, dict):
        raise DataError(f"Model folder {store.uri()}: {INDEX_FILE} has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name not in files:
            raise DataError(f"Model folder {store.uri()}: {name} is missing, and {INDEX_FILE} names it")
    return names


def _check_weights(store: Store, file: ObjectInfo) -> None:
    """Compares a file's size with what its header says; a copy that broke off is found without reading it."""
    what = f"Model folder {store.uri()}: {file.path}"
    hint = "The file may have been cut off while it was copied; copy it again."
    if file.size <= HEADER_LENGTH_BYTES:
        raise DataError(f"{what} is not a whole safetensors file: it has {file.size} bytes", hint=hint)
    header_bytes = int.from_bytes(store.read_bytes(file.path, length=HEADER_LENGTH_BYTES), "little")
    begin = HEADER_LENGTH_BYTES + header_bytes
    if header_bytes > MAX_HEADER_BYTES or begin > file.size:
        raise DataError(
            f"{what} is not a whole safetensors file: its header must have {header_bytes} bytes, it has {file.size}",
            hint=hint,
        )
    header = _parse(store.read_bytes(file.path, length=begin)[HEADER_LENGTH_BYTES:], what=f"{what}'s header")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = begin + max(ends, default=0)
    if file.size != expected:
        raise DataError(
            f"{what} is not a whole safetensors file: by its header it must have {expected} bytes, it has {file.size}",
            hint=hint,
        )


def _parse(content: bytes, *, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise DataError(f"{what} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{what} must hold an object, got {type(parsed).__name__}")
    return parsed
