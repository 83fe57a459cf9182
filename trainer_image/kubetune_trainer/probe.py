"""Reach for everything that a config names, before anything is started: model, data, workspace, outputs.

    python -m kubetune_trainer.probe --config FILE

Prints one JSON line per place: the field, where it leads, the problem or null, and whether it merely did not answer.
What is found is what a run would find, in the same words: the functions are the same. Nothing is downloaded.
"""

import argparse
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from kubetune_trainer.config import FineTuneConfig, HubModel, S3Storage, Source, load_config
from kubetune_trainer.data.sources import open_source
from kubetune_trainer.errors import StorageError, TrainerError
from kubetune_trainer.hub import find_repo
from kubetune_trainer.model_files import find_model, model_s3
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
    for place in places(load_config(parser.parse_args().config)):
        found: dict[str, object] = {"field": place.field, "uri": place.uri, "problem": None, "unreachable": False}
        try:
            place.check()
        except TrainerError as error:
            problem = f"{error}. {error.hint}" if error.hint else str(error)
            found |= {"problem": problem, "unreachable": isinstance(error, StorageError)}
        sys.stdout.write(json.dumps(found) + "\n")
    return 0


def places(config: FineTuneConfig) -> Iterator[Place]:
    """Every place that a run of this config needs."""
    yield _model(config)
    for index, source in enumerate(config.dataset.sources):
        yield _source(source, config, field=f"spec.dataset.sources[{index}]")
    held_out = config.dataset.validation.sources if config.dataset.validation is not None else None
    for index, source in enumerate(held_out or ()):
        yield _source(source, config, field=f"spec.dataset.validation.sources[{index}]")
    s3 = config.storage.s3
    yield Place("spec.workspace.uri", config.workspace.uri, partial(_write, config.workspace.uri, s3))
    for index, output in enumerate(config.outputs):
        if output.uri is not None:
            yield Place(f"spec.outputs[{index}].uri", output.uri, partial(_write, output.uri, s3))


def _model(config: FineTuneConfig) -> Place:
    if config.model.hub is not None:
        hub = config.model.hub
        return Place("spec.model.hub", _repository(hub), partial(find_repo, hub, kind="model"))
    uri = config.model.uri
    assert uri is not None
    return Place("spec.model.uri.location", uri.location, partial(find_model, uri.location, s3=model_s3(config)))


def _source(source: Source, config: FineTuneConfig, *, field: str) -> Place:
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
