"""Where an output comes from: lineage.json, beside each output and in the run's folder.

    {"kind": "FineTuneJob", "name": …, "model": {"location": …, "digest": …}, "sources": […], "parents": […],
     "outputs": [{"name": "merged", "digest": "sha256:…", …}], "output": "merged", "files": {"config.json": …}}

`output` and `files` say which of the outputs the folder is, and are only there. A parent stands in it with its own
lineage where that is at hand, beside the model or in the run's folder of a job that was compared with, so that one file
tells the whole way back to the first model and data. An evaluation has no outputs: it says its tasks and its gates.
"""

import datetime as dt
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kubetune_trainer.config import JobConfig, Source
from kubetune_trainer.data.sources import FoundSource
from kubetune_trainer.export.digest import digest_of
from kubetune_trainer.export.store import StoredOutput
from kubetune_trainer.model_files import FoundModel, FoundOther, LocalModel
from kubetune_trainer.names import ABOUT_FILES, ENV_IMAGE, LINEAGE_FILE
from kubetune_trainer.software import software_digest
from kubetune_trainer.storage import open_store

Lineage = dict[str, Any]


def record_lineage(
    config: JobConfig,
    *,
    model: FoundModel,
    model_dir: Path,
    adapter: FoundModel | None = None,
    adapter_dir: Path | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
    outputs: Sequence[StoredOutput] = (),
    parents: Sequence[Lineage] = (),
    judged: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Lineage:
    """Write a finished run's lineage into each of its outputs and into its folder; call it on one rank.

    Args:
        config: The run.
        model: The model that it began with.
        model_dir: That model's files, here.
        adapter: The adapter that was merged into it, if any.
        adapter_dir: The adapter's files, here.
        sources: What `lineage_sources` returns, or the like: name, and location, commit, etag or digest.
        outputs: What it leaves behind, stored already.
        parents: Lineages of jobs that it used, beside those that lie in the folders.
        judged: Of an evaluation, its `tasks` and `gates`.
    """
    lineage = make_lineage(
        config,
        model=model,
        model_dir=model_dir,
        adapter=adapter,
        adapter_dir=adapter_dir,
        sources=sources,
        outputs=outputs,
        parents=parents,
        judged=judged,
    )
    store_lineage(lineage, outputs, config=config)
    return lineage


def make_lineage(
    config: JobConfig,
    *,
    model: FoundModel,
    model_dir: Path,
    adapter: FoundModel | None = None,
    adapter_dir: Path | None = None,
    others: Mapping[str, tuple[FoundOther, LocalModel]] | None = None,
    first_adapters: tuple[FoundModel, Path] | None = None,
    script: Path | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
    outputs: Sequence[StoredOutput] = (),
    parents: Sequence[Lineage] = (),
    judged: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Lineage:
    """Return a finished run's lineage.

    The arguments are those of `record_lineage`, and `others`: the models that it used beside its own, by field, as they
    were found and where they are here. `first_adapters` are those that it trained on, and `script` is somebody's own.
    """
    inputs = [_input(model, model_dir)]
    if adapter is not None and adapter_dir is not None:
        inputs.append(_input(adapter, adapter_dir))
    asked = [_other(field, *other) for field, other in (others or {}).items()]
    if first_adapters is not None:
        asked.append({"field": "lora.adapter", **_input(*first_adapters)})
    beside = [folder for _, local in (others or {}).values() for folder in (local.base_dir, local.adapter_dir)]
    beside.append(first_adapters[1] if first_adapters is not None else None)
    folders = [folder for folder in (model_dir, adapter_dir, *beside) if folder is not None]
    known = [*(found for folder in folders if (found := read_lineage(folder)) is not None), *parents]
    lineage: Lineage = {
        "apiVersion": config.api_version,
        "kind": config.kind,
        "namespace": config.run.namespace,
        "name": config.run.name,
        "uid": config.run.uid,
        "image": os.environ.get(ENV_IMAGE),
        "softwareDigest": software_digest(),
        "configDigest": f"sha256:{config.digest()}",
        "scriptDigest": f"sha256:{hashlib.sha256(script.read_bytes()).hexdigest()}" if script is not None else None,
        "model": inputs[0],
        "adapter": inputs[1] if len(inputs) > 1 else None,
        "otherModels": asked or None,
        "sources": [dict(source) for source in sources],
        **(judged or {}),
        "parents": list(_parents(config, known)),
        "outputs": [output.told() for output in outputs],
        "finishedAt": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return _given(lineage)


def store_lineage(lineage: Lineage, outputs: Sequence[StoredOutput], *, config: JobConfig) -> None:
    """Write a lineage into each of a run's outputs and, when all of them are whole, into its folder."""
    for output in outputs:
        # Nothing is written there after this, so what a killed attempt has left in the middle of a file goes.
        open_store(output.uri, s3=config.storage.s3).delete_partial()
        _write({**lineage, "output": output.name, "files": dict(output.files)}, output.uri, config=config)
    _write(lineage, config.run.directory, config=config)


def lineage_sources(sources: Sequence[Source], found: Sequence[FoundSource]) -> list[Lineage]:
    """Return what a lineage says of datasets: what the config calls them, and what they were when they were read."""
    locations = {
        source.name: source.hub.repo if source.hub else source.uri.location if source.uri else None
        for source in sources
    }
    return [
        {"name": each.name, **_given({"location": locations.get(each.name), **each.model_dump(exclude={"name"})})}
        for each in found
    ]


def read_lineage(folder: Path) -> Lineage | None:
    """Return the lineage that lies in a model folder; None where there is none that can be read."""
    try:
        return _parsed((folder / LINEAGE_FILE).read_bytes())
    except OSError:
        return None


def stored_lineage(directory: str, *, config: JobConfig) -> Lineage | None:
    """Return the lineage in the folder of another run; None where there is none that can be read."""
    store = open_store(directory, s3=config.storage.s3)
    return _parsed(store.read_bytes(LINEAGE_FILE)) if store.exists(LINEAGE_FILE) else None


def _parsed(content: bytes) -> Lineage | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _input(model: FoundModel, folder: Path) -> Lineage:
    """Say what a model folder was: its digest is the one that the job which wrote it has in its outputs."""
    hashes = {}
    for path in model.etags:
        if path not in ABOUT_FILES:
            with (folder / path).open("rb") as stream:
                hashes[path] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _given({"location": model.location, "commit": model.commit, "digest": digest_of(hashes)})


def _other(field: str, found: FoundOther, local: LocalModel) -> Lineage:
    adapter = _input(found.adapter, local.adapter_dir) if found.adapter and local.adapter_dir else None
    return _given({"field": field, **_input(found.model, local.base_dir), "adapter": adapter})


def _parents(config: JobConfig, known: Sequence[Lineage]) -> Iterator[Lineage]:
    found = {}
    for lineage in known:
        told = {key: value for key, value in lineage.items() if key not in {"files", "output"}}
        found[lineage.get("kind"), lineage.get("name"), lineage.get("uid")] = told
    for parent in config.run.parents:
        yield found.pop((parent.kind, parent.name, parent.uid), None) or parent.model_dump(
            include={"kind", "name", "uid"}
        )
    yield from found.values()


def _write(lineage: Lineage, uri: str, *, config: JobConfig) -> None:
    content = json.dumps(lineage, indent=2, ensure_ascii=False) + "\n"
    open_store(uri, s3=config.storage.s3).write_bytes(LINEAGE_FILE, content.encode())


def _given(values: Mapping[str, Any]) -> Lineage:
    return {key: value for key, value in values.items() if value is not None}
