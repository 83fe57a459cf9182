"""Reach for everything that a config names, before anything is started: model, data, workspace, outputs.

    python -m kubetune_trainer.probe --config FILE

Prints one JSON line per place: the field, its URI, the problem or null, and whether the place merely did not answer.
"""

import argparse
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kubetune_trainer.config import FineTuneConfig, S3Storage, Source, UriSource, load_config
from kubetune_trainer.errors import DataError, StorageError, TrainerError
from kubetune_trainer.storage import open_store


@dataclass(frozen=True)
class Place:
    """Something that a run reads or writes.

    Attributes:
        field: The field of the manifest that names it.
        uri: Where it is.
        check: Raises a TrainerError if it is not what it should be.
    """

    field: str
    uri: str
    check: Callable[[], None]


def main() -> int:
    """Look at every place of a config; returns 0 whatever is found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file")
    for place in places(load_config(parser.parse_args().config)):
        found: dict[str, object] = {"field": place.field, "uri": place.uri, "problem": None, "unreachable": False}
        try:
            place.check()
        except TrainerError as error:
            problem = f"{error} {error.hint}".strip()
            found |= {"problem": problem, "unreachable": isinstance(error, StorageError)}
        sys.stdout.write(json.dumps(found) + "\n")
    return 0


def places(config: FineTuneConfig) -> Iterator[Place]:
    """Every place in storage that a run of this config needs."""
    s3 = config.storage.s3
    if config.model.uri is not None:
        yield _model(config.model.uri, s3)
    for index, source in enumerate(config.dataset.sources):
        yield from _source(source, s3, field=f"spec.dataset.sources[{index}]")
    held_out = config.dataset.validation.sources if config.dataset.validation is not None else None
    for index, source in enumerate(held_out or ()):
        yield from _source(source, s3, field=f"spec.dataset.validation.sources[{index}]")
    yield _writable("spec.workspace.uri", config.workspace.uri, s3)
    for index, output in enumerate(config.outputs):
        if output.uri is not None:
            yield _writable(f"spec.outputs[{index}].uri", output.uri, s3)


def _model(source: UriSource, s3: S3Storage | None) -> Place:
    def check() -> None:
        store = open_store(source.location, s3=source.s3 or s3)
        if not store.exists("config.json"):
            raise DataError(f"{store.uri('config.json')} is missing: a model folder must hold config.json")

    return Place("spec.model.uri.location", source.location, check)


def _source(source: Source, s3: S3Storage | None, *, field: str) -> Iterator[Place]:
    if source.uri is None:
        return
    location, own = source.uri.location, source.uri.s3

    def check() -> None:
        if not open_store(location, s3=own or s3).list():
            raise DataError(f"{location}: there is no file")

    yield Place(f"{field}.uri.location", location, check)


def _writable(field: str, uri: str, s3: S3Storage | None) -> Place:
    def check() -> None:
        store, name = open_store(uri, s3=s3), f".kubetune-probe-{uuid.uuid4().hex}"
        store.write_bytes(name, b"kubetune looked whether it may write here\n")
        store.delete_tree(name)

    return Place(field, uri, check)


if __name__ == "__main__":
    sys.exit(main())
