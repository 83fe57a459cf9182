"""What happens once per evaluation, before an accelerator is used: find the model, the tasks and their data.

`prepare` leaves `prepared.json` in the run's folder; every attempt evaluates the model that it names, or refuses.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from kubetune_trainer.config import EvalConfig
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.estimate import count_parameters
from kubetune_trainer.evaluate.mirror import FoundDataset, fetch_dataset, find_dataset
from kubetune_trainer.evaluate.tasks import LoadedTasks, load_tasks
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.model.config import read_config
from kubetune_trainer.model_files import (
    FoundModel,
    fetch_model,
    fetch_small,
    locate_adapter,
    locate_model,
    model_s3,
    with_adapters_tokens,
)
from kubetune_trainer.prepared import read_prepared, write_prepared
from kubetune_trainer.report import Report
from kubetune_trainer.storage import open_store
from kubetune_trainer.tokenizer import load_tokenizer


class PreparedEval(BaseModel):
    """What a run evaluates; the content of prepared.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    asked: str
    """Digest of what the configuration asked for when it was prepared."""
    model: FoundModel
    """The model."""
    adapter: FoundModel | None
    """What is merged into it."""
    datasets: tuple[FoundDataset, ...]
    """Data of the tasks that come from the Hub."""
    parameters: int
    """Parameters of the model."""

    def message(self) -> dict[str, Any]:
        """Return the fields of the termination message."""
        sources = [{"name": found.name, "commit": found.commit} for found in self.datasets if found.commit]
        return {
            "model": self.model.told(),
            "sources": list({source["name"]: source for source in sources}.values()) or None,
            "parameters": self.parameters,
        }


def prepare(config: EvalConfig, *, report: Report) -> PreparedEval:
    """Find and check what an evaluation needs; one that was prepared before is only read again.

    Raises:
        ConfigError: There is no such model, task or dataset, or a gate asks for a task that is not among them.
        DataError: The model, a task file or its data is not what it should be.
    """
    directory = open_store(config.run.directory, s3=config.storage.s3)
    known = read_prepared(directory, PreparedEval)
    if known is not None and known.asked == _asked(config):
        return known
    report("prepare", stage="Checking the model")
    model = locate_model(config, report=report, takes_gguf=True)
    adapter = locate_adapter(config)
    folder = fetch_small(model, adapter, config=config)
    shape, tokenizer = read_config(folder, allow_quantized=True), load_tokenizer(folder)
    if config.max_sequence_length is not None and config.max_sequence_length > shape.max_positions:
        raise ConfigError(
            f"{config.title}: max_sequence_length must be at most the model's {shape.max_positions}, "
            f"got {config.max_sequence_length}"
        )
    if config.apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            f"{config.title}: apply_chat_template needs a model with a chat template, and {model.location} has none"
        )
    report("prepare", stage="Loading the tasks")
    found: dict[tuple[str, str | None], FoundDataset] = {}

    def find(name: str, dataset_config: str | None) -> Path:
        if (name, dataset_config) not in found:
            found[name, dataset_config] = find_dataset(name, dataset_config, config=config, report=report)
        return fetch_dataset(found[name, dataset_config], config=config)

    loaded = load_tasks(config, find_dataset=find, report=report)
    _check_gates(config, loaded)
    _check_lengths(config, loaded, max_length=config.max_sequence_length or shape.max_positions)
    prepared = PreparedEval(
        asked=_asked(config),
        model=model,
        adapter=adapter,
        datasets=tuple(found.values()),
        parameters=count_parameters(shape),
    )
    write_prepared(directory, prepared)
    report("prepare", stage="Prepared")
    return prepared


def fetch(prepared: PreparedEval, config: EvalConfig) -> tuple[Path, Path | None, Path]:
    """Bring the model, and the adapter where there is one, to this machine.

    Returns:
        The folders of the model as it was found, of the adapter, and of the model with the adapter's tokens.

    Raises:
        DataError: A file has changed since the run was prepared.
    """
    adapter, base_dir = config.model.adapter, fetch_model(prepared.model, s3=model_s3(config))
    if prepared.adapter is None or adapter is None:
        return base_dir, None, base_dir
    adapter_dir = fetch_model(prepared.adapter, s3=adapter.s3 or config.storage.s3)
    return base_dir, adapter_dir, with_adapters_tokens(base_dir, adapter_dir, key=prepared.model.digest)


def dataset_finder(prepared: PreparedEval, config: EvalConfig) -> Callable[[str, str | None], Path]:
    """Return what finds the datasets that `prepare` has found, and no others."""
    found = {(dataset.name, dataset.config): dataset for dataset in prepared.datasets}

    def find(name: str, dataset_config: str | None) -> Path:
        if (name, dataset_config) not in found:
            raise DataError(
                f"{config.title}: dataset {name} was not there when the run was prepared",
                hint="Start a new job, or remove prepared.json from the run's folder.",
            )
        return fetch_dataset(found[name, dataset_config], config=config)

    return find


def _check_gates(config: EvalConfig, loaded: LoadedTasks) -> None:
    known = [*loaded.tasks, *loaded.groups]
    for number, gate in enumerate(config.gates):
        if gate.compared_to is not None and gate.task in loaded.groups:
            raise ConfigError(
                f"{config.title}: gates[{number}].task must be a task with comparedTo, which goes sample by sample, "
                f"got the group {gate.task}"
            )
        if gate.task not in known:
            raise ConfigError(
                f"{config.title}: gates[{number}].task must be one of {', '.join(known[:20])}, got {gate.task}"
            )


def _check_lengths(config: EvalConfig, loaded: LoadedTasks, *, max_length: int) -> None:
    """Refuses tasks whose answers alone may be longer than the model's context."""
    for name, task in loaded.tasks.items():
        longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks")
        if task.OUTPUT_TYPE == "generate_until" and isinstance(longest, int) and longest >= max_length:
            raise ConfigError(
                f"{config.title}: task {name} asks for answers of {longest} tokens (generation_kwargs.max_gen_toks), "
                f"which must be less than the longest context, {max_length}"
            )


def _asked(config: EvalConfig) -> str:
    decide = {"model", "tasks", "task_files", "gates", "apply_chat_template", "max_sequence_length", "seed"}
    asked = config.model_dump(mode="json", include=decide)
    return fingerprint(asked, length=16)
