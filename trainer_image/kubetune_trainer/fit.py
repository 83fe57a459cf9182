"""What a run needs in memory, and what it would need with other settings; of the models only config.json is read.

    python -m kubetune_trainer.fit --config FILE [--suggest]

Prints JSON lines: the run as the config has it, and with --suggest each change that needs less, the mildest first.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kubetune_trainer.config import FineTuneConfig, load_config
from kubetune_trainer.errors import ConfigError, TrainerError
from kubetune_trainer.estimate import estimate_parts
from kubetune_trainer.hub import find_repo
from kubetune_trainer.model.config import ModelConfig, read_config
from kubetune_trainer.model_files import model_s3
from kubetune_trainer.model_json import CONFIG_FILE
from kubetune_trainer.storage import open_store


def main() -> int:
    """Prints the estimates; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file")
    parser.add_argument("--suggest", action="store_true", help="also estimate what needs less")
    options = parser.parse_args()
    try:
        config = load_config(options.config)
        shape = read_shape(config)
        alone = {field: config.model_copy(update={"model": named}) for field, named in config.other_models.items()}
        others = {field: read_shape(each) for field, each in alone.items()}
        for changes in [{}, *(milder(config) if options.suggest else ())]:
            overrides = [f"{field}={value}" for field, value in changes.items()]
            try:
                changed = load_config(options.config, overrides=overrides)
            except ConfigError:
                if not changes:
                    raise
                continue  # the recipe has no such form
            parts = estimate_parts(changed, shape, others=others)
            sys.stdout.write(json.dumps({"changes": changes, "bytes": sum(parts.values()), "parts": parts}) + "\n")
    except TrainerError as error:
        sys.stderr.write(f"{error}\n{error.hint}\n")
        return error.exit_code
    return 0


def read_shape(config: FineTuneConfig) -> ModelConfig:
    """Returns the shape of the run's model, from a folder, S3 or the Hub; nothing else of it has to be there.

    Raises:
        DataError: There is no config.json, or it describes no model that is supported.
        ConfigError: The Hub has no such repository.
        StorageError: The Hub or the store does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="kubetune-fit-") as name:
        folder = Path(name)
        if config.model.hub is not None:
            find_repo(config.model.hub, kind="model").download(CONFIG_FILE, folder)
        else:
            store = open_store(config.model.uri.location, s3=model_s3(config))
            (folder / CONFIG_FILE).write_bytes(store.read_bytes(CONFIG_FILE))
        return read_config(folder)


def milder(config: FineTuneConfig) -> Iterator[dict[str, Any]]:
    """Changes that need less memory: first what costs time alone, then adapters, on packed weights at last."""
    training = config.training
    levels = ["None", "Selective", "Full"]
    stronger = levels[levels.index(training.activation_checkpointing) + 1 :]
    slower: list[dict[str, Any]] = [{"training.activation_checkpointing": level} for level in stronger]
    if training.micro_batch_size > 1:
        one = {"training.micro_batch_size": 1}
        slower = [one, *slower, *({**each, **one} for each in slower)]
    yield from slower
    further = {"Full": ("LoRA", "QLoRA"), "LoRA": ("QLoRA",), "DoRA": ("QLoRA",)}.get(config.tuning, ())
    for tuning in further:
        yield from ({"tuning": tuning, **each} for each in ({}, *slower))


if __name__ == "__main__":
    sys.exit(main())
