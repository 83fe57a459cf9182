"""Merge a PEFT folder's adapters into the model that they belong to, in memory or as a new folder."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.export.huggingface import complete_weights, save_huggingface
from kubetune_trainer.export.peft import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BASE_FORM,
    NF4,
    PREFIX,
    TRAINED_IDS,
)
from kubetune_trainer.lora import A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX, apply_lora, merge_adapters, update_scale
from kubetune_trainer.model.config import ModelConfig, read_config, read_json
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import WeightFiles, build_model
from kubetune_trainer.tokenizer import TOKENIZER_FILE, read_backend
from kubetune_trainer.trained_tokens import IDS_SUFFIX, ROWS_SUFFIX, TABLES, token_adapters

BASE_UNCHANGED: Final = ("gaussian", "eva", "orthogonal", "mica")
"""Values of peft's `init_lora_weights`, beside true and false, that leave the base's weights as they are. The others
(pissa, olora, corda, lora_ga, loftq) change them, and the adapters are what is missing from the changed ones."""
MORE_THAN_LORA: Final = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "alora_invocation_tokens", "layer_replication", "arrow_config",
    "kasa_config", "lora_bias", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Settings of peft's with which an adapter is something else than one scaled product for each weight, where set."""


@dataclass(frozen=True, kw_only=True)
class Merging:
    """How a folder's adapters become part of the weights."""

    scale: float
    """What their updates are multiplied with."""
    packed: bool
    """Whether they belong to what the weights are in NF4."""


def merge_adapter(model: Decoder, folder: Path, *, source: Path) -> None:
    """Add the updates of a LoRA adapter to the weights that they belong to, in place.

    The merged weights are rounded to the type that the base has in its files, so that they are those of the complete
    model which the run that trained the adapter would have written.

    Args:
        model: The base model, with its weights loaded and not quantized.
        folder: A PEFT folder; the model has the tokens that its adapters were trained with, see `vocabulary`.
        source: The base model's folder.

    Raises:
        DataError: A file is missing or damaged, or the adapter does not fit the model.
    """
    adapters, how = read_adapter(folder, config=model.config)
    weights = dict(model.named_parameters())
    with torch.no_grad(), WeightFiles(source, tied_embeddings=model.config.tied_embeddings) as files:
        for name, tensor in merged_weights(adapters, files, how=how):
            weights[name].copy_(tensor)


def save_merged(source: Path, adapter: Path, target: Path) -> None:
    """Write the complete model that a base and an adapter are together, as a run's HuggingFace output would be.

    Args:
        source: The base model's folder, with the tokens that the adapters were trained with.
        adapter: A PEFT folder.
        target: Made if it is not there.

    Raises:
        DataError: A file is missing or damaged, or the adapter does not fit the model.
    """
    adapters, how = read_adapter(adapter, config=read_config(source))
    complete = complete_weights(adapters.items(), source_dir=source, lora_scale=how.scale, packed=how.packed)
    save_huggingface(complete, source_dir=source, target_dir=target)


def merged_weights(adapters: Mapping[str, Tensor], files: WeightFiles, *, how: Merging) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight that has an adapter, merged in fp32 and rounded to the type that it has in its file."""
    for name in adapters:
        if name.endswith((A_SUFFIX, ROWS_SUFFIX)):
            weight = f"{name.removesuffix(A_SUFFIX).removesuffix(ROWS_SUFFIX)}.weight"
            base = files.read(weight, rows=slice(None))
            merged = merge_adapters(weight, base, adapters, scale=how.scale, packed=how.packed)
            yield weight, merged.to(files.dtype(weight))


def read_first_adapters(
    folder: Path, *, config: FineTuneConfig, shape: ModelConfig, trained_ids: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Read the adapters that a run begins with.

    Args:
        folder: A PEFT folder.
        config: The run, whose settings have to be theirs.
        shape: The model's.
        trained_ids: The tokens that the run trains, of which they have to have the rows.

    Returns:
        The adapters under the model's own names.

    Raises:
        ConfigError: The settings are others.
        DataError: A file is missing or damaged, or the adapters do not fit the model.
    """
    assert config.lora is not None, "tuning Full has no adapters"
    given, lora = read_json(folder / ADAPTER_CONFIG_FILE), config.lora
    adapters, _ = read_adapter(folder, config=shape)
    model = build_model(shape)
    wanted = set(apply_lora(model, **(config.adapter_settings() | {"packs_base": False}), trained_ids=trained_ids))
    found = {name.removesuffix(A_SUFFIX) for name in adapters if name.endswith(A_SUFFIX)}
    is_dora = any(name.endswith(MAGNITUDE_SUFFIX) for name in adapters)
    rules: tuple[tuple[str, Any, Any], ...] = (
        ("lora.rank", lora.rank, given["r"]),
        ("lora.alpha", lora.alpha, given["lora_alpha"]),
        ("lora.rank_stabilized", lora.rank_stabilized, bool(given.get("use_rslora"))),
        ("tuning", config.tuning, "DoRA" if is_dora else "QLoRA" if config.tuning == "QLoRA" else "LoRA"),
    )
    for field, ours, theirs in rules:
        if ours != theirs:
            raise ConfigError(f"{config.title}: {field} must be that of lora.adapter, {theirs}, got {ours}")
    if different := sorted(wanted ^ found):
        side = "it lacks" if different[0] in wanted else "it also has"
        raise ConfigError(
            f"{config.title}: lora.target_modules must be the layers of lora.adapter, got "
            f"{', '.join(lora.target_modules)}: {side} {different[0]}"
        )
    return adapters | _rows_in_order(adapters, folder, config=config, tables=token_adapters(model), ids=trained_ids)


def _rows_in_order(
    adapters: Mapping[str, Tensor], folder: Path, *, config: FineTuneConfig, tables: Collection[str], ids: Sequence[int]
) -> dict[str, Tensor]:
    """Return the trained rows of each table in the order of these tokens, which have to be theirs."""
    assert config.lora is not None, "tuning Full has no adapters"
    theirs = {name.removesuffix(IDS_SUFFIX): of.tolist() for name, of in adapters.items() if name.endswith(IDS_SUFFIX)}
    given = next(iter(theirs.values()), [])
    if set(given) != set(ids):
        known = read_backend(folder).id_to_token if (folder / TOKENIZER_FILE).is_file() else str
        raise ConfigError(
            f"{config.title}: lora.train_tokens must be those of lora.adapter, "
            f"{', '.join(str(known(number)) for number in given) or 'none'}, "
            f"got {', '.join(config.lora.train_tokens) or 'none'}"
        )
    if theirs.keys() != set(tables):
        raise ConfigError(
            f"{config.title}: lora.adapter must have trained rows of {' and '.join(tables)}, got {' and '.join(theirs)}"
        )
    order = [given.index(number) for number in ids]
    return {table + ROWS_SUFFIX: adapters[table + ROWS_SUFFIX][order] for table in tables}


def read_adapter(folder: Path, *, config: ModelConfig) -> tuple[dict[str, Tensor], Merging]:
    """Read a PEFT folder.

    Args:
        folder: A PEFT folder.
        config: The shape of the model that it must fit.

    Returns:
        The adapters under the model's own names, as `lora_state_dict` has them, and how they are merged.

    Raises:
        DataError: A file is missing or damaged, or the adapter does not fit the model.
    """
    scale, config_ids = _scale(folder), read_json(folder / ADAPTER_CONFIG_FILE).get(TRAINED_IDS)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    except (FileNotFoundError, SafetensorError) as error:
        raise DataError(f"Adapter folder {folder}: {ADAPTER_WEIGHTS_FILE} cannot be read: {error}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}
    adapters = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    rows = {name: tensor for name, tensor in adapters.items() if name.endswith(ROWS_SUFFIX)}
    for name, tensor in adapters.items():
        if name in rows:
            continue
        layer = name.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX).removesuffix(MAGNITUDE_SUFFIX)
        shape = shapes.get(f"{layer}.weight")
        if layer == name or shape is None or not {layer + A_SUFFIX, layer + B_SUFFIX} <= adapters.keys():
            raise DataError(f"Adapter folder {folder}: {PREFIX}{name} belongs to no weight of the model")
        found = tuple(tensor.shape)
        if found != _shape(name, weight=shape, rank=len(adapters[layer + A_SUFFIX])):
            raise DataError(
                f"Adapter folder {folder}: {PREFIX}{name} must fit a weight of the shape {shape}, got {found}"
            )
    adapters |= _ids_of_rows(rows, config_ids, shapes=shapes, folder=folder)
    return adapters, Merging(scale=scale, packed=trained_beside_nf4(folder))


def _ids_of_rows(
    rows: Mapping[str, Tensor], told: Any, *, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, Tensor]:
    """Return whose the trained rows of tokens are, as adapter_config.json tells: one list, or one for each table."""
    lists = told if isinstance(told, dict) else {"embed_tokens": told or ()}
    found = {table: ids for table in TABLES for end, ids in lists.items() if f".{table}".endswith(f".{end}") and ids}
    if {table + ROWS_SUFFIX for table in found} != rows.keys():
        raise DataError(
            f"Adapter folder {folder}: {TRAINED_IDS} must tell whose the trained rows are that {ADAPTER_WEIGHTS_FILE} "
            f"has, of {' and '.join(rows) or 'none'}, got {told!r}"
        )
    for table, ids in found.items():
        vocab_size, width = shapes.get(f"{table}.weight", (0, 0))
        shape = tuple(rows[table + ROWS_SUFFIX].shape)
        if shape != (len(ids), width) or max(ids) >= vocab_size:
            raise DataError(
                f"Adapter folder {folder}: {PREFIX}{table}{ROWS_SUFFIX} must fit {len(ids)} of the model's "
                f"{vocab_size} rows of {width}, got {shape} up to row {max(ids)}",
                hint="Tokens that were added for the adapters are in tokenizer.json, which belongs into the folder.",
            )
    return {table + IDS_SUFFIX: torch.tensor(ids) for table, ids in found.items()}


def trained_beside_nf4(folder: Path) -> bool:
    """Whether a PEFT folder's adapters say that the base beside them was in NF4 (QLoRA)."""
    return _base_form(folder) == NF4


def _shape(name: str, *, weight: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """What an adapter's tensor must look like."""
    if name.endswith(MAGNITUDE_SUFFIX):
        return weight[:1]
    return (rank, weight[1]) if name.endswith(A_SUFFIX) else (weight[0], rank)


def _base_form(folder: Path) -> str | None:
    with safe_open(folder / ADAPTER_WEIGHTS_FILE, framework="pt") as file:
        return (file.metadata() or {}).get(BASE_FORM)


def _scale(folder: Path) -> float:
    """Return what the updates are multiplied with; refuse kinds of adapters that are more than that."""
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    for key in MORE_THAN_LORA:
        if config.get(key):
            raise DataError(f"Adapter folder {folder}: {key} is not supported, got {config[key]!r}")
    first = config.get("init_lora_weights")
    if not (first is None or isinstance(first, bool) or str(first).lower() in BASE_UNCHANGED):
        raise DataError(
            f"Adapter folder {folder}: init_lora_weights must be true, false, null, {', '.join(BASE_UNCHANGED)}, whose "
            f"adapters belong to the base as it is, got {first!r}",
            hint="peft saves adapters of PiSSA, CorDA, OLoRA and LoRA-GA as ordinary ones of the base with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…). Those of LoftQ belong to the weights that "
            "it quantized: merge them there, and give the complete model.",
        )
    if config.get("peft_type") != "LORA" or not config.get("r"):
        raise DataError(f"Adapter folder {folder}: peft_type must be LORA with a rank, got {config.get('peft_type')!r}")
    return update_scale(rank=config["r"], alpha=config["lora_alpha"], rank_stabilized=bool(config.get("use_rslora")))
