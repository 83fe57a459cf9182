"""Reach for everything that a config names, before anything is started: model, data, workspace, outputs.

    python -m kubetune_trainer.probe --config FILE

Prints one JSON line per place: the field, where it leads, the problem or null, and whether it merely did not answer.
What is found is what a run would find, in the same words: the functions are the same. Nothing is downloaded.
"""

import argparse
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from kubetune_trainer.config import (
    EvalConfig,
    FineTuneConfig,
    FirstAdapters,
    HubModel,
    JobConfig,
    QuantizeConfig,
    S3Storage,
    Source,
    UriSource,
    load_config,
)
from kubetune_trainer.data.sources import open_source
from kubetune_trainer.errors import DataError, StorageError, TrainerError
from kubetune_trainer.hub import find_repo
from kubetune_trainer.model_files import find_adapter, find_model, first_adapters_s3, model_s3
from kubetune_trainer.storage import open_store


@dataclass(frozen=True)
class Place:
    """Something that a run reads or writes.

    Attributes:
        field: The field of the manifest that names it.
        uri: Where it leads.
        check: Raises a TrainerError if it is not what it should be.
    """

    field: str
    uri: str
    check: Callable[[], object]


def main() -> int:
    """Looks at every place of a config; returns 0 whatever is found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file")
    findings = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for what else is said, as warnings
    for place in places(load_config(parser.parse_args().config, expect=JobConfig)):
        found: dict[str, object] = {"field": place.field, "uri": place.uri, "problem": None, "unreachable": False}
        try:
            place.check()
        except TrainerError as error:
            problem = f"{error}. {error.hint}" if error.hint else str(error)
            found |= {"problem": problem, "unreachable": isinstance(error, StorageError)}
        # What was found counts, though time may run out over another place.
        print(json.dumps(found), file=findings, flush=True)
    return 0


def places(config: JobConfig) -> Iterator[Place]:
    """Every place that a run of this config needs."""
    for path, model in {"model": config.model, **config.other_models}.items():
        yield _model(config.model_copy(update={"model": model}), field=f"spec.{path}")
    if isinstance(config, FineTuneConfig) and config.lora is not None and config.lora.adapter is not None:
        yield _first_adapters(config.lora.adapter, config)
    for field, sources in _sources(config).items():
        for index, source in enumerate(sources or ()):
            yield _source(source, config, field=f"spec.{field}[{index}]")
    if isinstance(config, EvalConfig):
        yield from _task_files(config)
    s3 = config.storage.s3
    if isinstance(config, FineTuneConfig) and config.checkpoint.resume_from is not None:
        uri = config.checkpoint.resume_from.uri
        yield Place("spec.checkpoint.resumeFrom.uri", uri, partial(_look_for_checkpoint, config))
    yield Place("spec.workspace.uri", config.workspace.uri, partial(_write, config.workspace.uri, s3))
    for index, output in enumerate(getattr(config, "outputs", ())):
        if output.uri is not None:
            yield Place(f"spec.outputs[{index}].uri", output.uri, partial(_write, output.uri, s3))


def _sources(config: JobConfig) -> dict[str, Sequence[Source] | None]:
    """The data that a config names, by the field that names them."""
    match config:
        case FineTuneConfig(dataset=dataset):
            held_out = dataset.validation.sources if dataset.validation is not None else None
            return {"dataset.sources": dataset.sources, "dataset.validation.sources": held_out}
        case QuantizeConfig():
            rows = {"calibration": config.calibration, "verify": config.verify}
            return {
                f"{field}.dataset.sources": each.dataset.sources for field, each in rows.items() if each is not None
            }
    return {}


def _task_files(config: EvalConfig) -> Iterator[Place]:
    for index, files in enumerate(config.task_files):
        if files.uri is not None:
            check = partial(_look_for_tasks, files.uri, config=config, name=files.name)
            yield Place(f"spec.taskFiles[{index}].uri.location", files.uri.location, check)


def _look_for_tasks(folder: UriSource, *, config: EvalConfig, name: str) -> None:
    files = open_store(folder.location, s3=folder.s3 or config.storage.s3).list()
    if not any(file.path.endswith(".yaml") for file in files):
        raise DataError(f"task_files {name} has no .yaml files")


def _look_for_checkpoint(config: FineTuneConfig) -> None:
    from kubetune_trainer.checkpoint import check_resumable  # noqa: PLC0415 (slow, and only where it is asked for)

    check_resumable(config)


def _model(config: JobConfig, *, field: str) -> Place:
    if config.model.hub is not None:
        hub = config.model.hub
        return Place(f"{field}.hub", _repository(hub), partial(find_repo, hub, kind="model"))
    uri = config.model.uri
    assert uri is not None
    takes_gguf = isinstance(config, EvalConfig)
    check = partial(find_model, uri.location, s3=model_s3(config), takes_gguf=takes_gguf)
    return Place(f"{field}.uri.location", uri.location, check)


def _first_adapters(source: FirstAdapters, config: JobConfig) -> Place:
    if source.hub is not None:
        return Place("spec.lora.adapter.hub", _repository(source.hub), partial(find_repo, source.hub, kind="model"))
    assert source.uri is not None
    check = partial(find_adapter, source.uri.location, s3=first_adapters_s3(source, config))
    return Place("spec.lora.adapter.uri.location", source.uri.location, check)


def _source(source: Source, config: JobConfig, *, field: str) -> Place:
    check = partial(open_source, source, config=config)
    if source.hub is not None:
        return Place(f"{field}.hub", _repository(source.hub), check)
    if source.config_map is not None:
        return Place(f"{field}.configMap", f"{source.config_map.name}/{source.config_map.key}", check)
    assert source.uri is not None
    return Place(f"{field}.uri.location", source.uri.location, check)


def _repository(hub: HubModel) -> str:
    return f"{hub.repo} at {hub.revision}"


def _write(uri: str, s3: S3Storage | None) -> None:
    """Writes a small file and takes it away again."""
    store, name = open_store(uri, s3=s3), f".kubetune-probe-{uuid.uuid4().hex}"
    store.write_bytes(name, b"kubetune looked whether it may write here\n")
    store.delete_tree(name)


if __name__ == "__main__":
    sys.exit(main())
