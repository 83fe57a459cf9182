"""What a run needs in memory, and what it would need with other settings; of the models only config.json is read.

    python -m kubetune_trainer.fit --config FILE [--suggest [--offload]]

Prints JSON lines: the run as the config has it, and with --suggest each change that needs less, the mildest first; with
--offload also those that need another memory beside the device's.
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
from kubetune_trainer.estimate import estimate_parts, host_bytes
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
    parser.add_argument("--offload", action="store_true", help="what is suggested may use the host's memory")
    options = parser.parse_args()
    try:
        config = load_config(options.config)
        shape = read_shape(config)
        alone = {field: config.model_copy(update={"model": named}) for field, named in config.other_models.items()}
        others = {field: read_shape(each) for field, each in alone.items()}
        own = 0
        for changes in [{}, *(milder(config, offload=options.offload) if options.suggest else ())]:
            overrides = [f"{field}={value}" for field, value in changes.items()]
            try:
                changed = load_config(options.config, overrides=overrides)
                parts = estimate_parts(changed, shape, others=others)
            except ConfigError:
                if not changes:
                    raise
                continue  # the recipe has no such form, or the ranks cannot share the batch then
            size = sum(parts.values())
            own = own or size
            if changes and size >= own:  # as recomputing some, where adapters' products would be kept
                continue
            host = host_bytes(changed, shape, others=others)
            told = {"changes": changes, "bytes": size, "hostBytes": host, "parts": parts}
            sys.stdout.write(json.dumps(told) + "\n")
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


def milder(config: FineTuneConfig, *, offload: bool) -> Iterator[dict[str, Any]]:
    """Changes that need less memory.

    First what costs time alone; of all weights then an optimizer with less state; then adapters, on packed weights at
    last. What the recipe or other settings do not allow is among them.
    """
    training = config.training
    levels = ["None", "Selective", "Full"]
    stronger = levels[levels.index(training.activation_checkpointing) + 1 :]
    slower: list[dict[str, Any]] = [{"training.activation_checkpointing": level} for level in stronger]
    if training.micro_batch_size > 1:
        one = {"training.micro_batch_size": 1}
        slower = [one, *slower, *({**each, **one} for each in slower)]
    most = slower[-1] if slower else {}
    if offload and not training.activation_offload:
        slower += [{**each, "training.activation_offload": "true"} for each in ({}, *slower[-1:])]
    yield from slower
    if config.tuning == "Full":
        yield from ({**most, **each} for each in less_state(config))
    if offload and not training.cpu_offload:
        yield {**most, "training.cpu_offload": "true"}
    further = {"Full": ("LoRA", "QLoRA"), "LoRA": ("QLoRA",), "DoRA": ("QLoRA",)}.get(config.tuning, ())
    for tuning in further:
        yield from ({"tuning": tuning, **each} for each in ({}, *slower))


def less_state(config: FineTuneConfig) -> Iterator[dict[str, Any]]:
    """Changes of the optimizer that need less memory."""
    training = config.training
    smaller = {"training.optimizer": "AdamW8bit"} if training.optimizer == "AdamW" else {}
    if smaller:
        yield smaller
    if not training.optimizer_in_backward:
        unclipped = {"training.optimizer_in_backward": "true", "training.max_grad_norm": "null"}
        yield unclipped
        if smaller:
            yield {**smaller, **unclipped}


if __name__ == "__main__":
    sys.exit(main())
