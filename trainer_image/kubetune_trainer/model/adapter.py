"""Merge a PEFT folder's adapters into the model that they belong to, in memory or as a new folder."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kubetune_trainer.errors import DataError
from kubetune_trainer.export.huggingface import complete_weights, save_huggingface
from kubetune_trainer.export.peft import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PREFIX
from kubetune_trainer.lora import merge_update
from kubetune_trainer.model.config import ModelConfig, read_config, read_json
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import WeightFiles, build_model

A: Final = ".lora_A.weight"
B: Final = ".lora_B.weight"


def merge_adapter(model: Decoder, folder: Path, *, source: Path) -> None:
    """Add the updates of a LoRA adapter to the weights that they belong to, in place.

    The merged weights are rounded to the type that the base has in its files, so that they are those of the complete
    model which the run that trained the adapter would have written.

    Args:
        model: The base model, with its weights loaded and not quantized.
        folder: A PEFT folder.
        source: The base model's folder.

    Raises:
        DataError: A file is missing or damaged, or the adapter does not fit the model.
    """
    adapters, scale = read_adapter(folder, config=model.config)
    weights = dict(model.named_parameters())
    with torch.no_grad(), WeightFiles(source, tied_embeddings=model.config.tied_embeddings) as files:
        for name, tensor in merged_weights(adapters, files, scale=scale):
            weights[name].copy_(tensor)


def save_merged(source: Path, adapter: Path, target: Path) -> None:
    """Write the complete model that a base and an adapter are together, as a run's HuggingFace output would be.

    Args:
        source: The base model's folder.
        adapter: A PEFT folder.
        target: Made if it is not there.

    Raises:
        DataError: A file is missing or damaged, or the adapter does not fit the model.
    """
    adapters, scale = read_adapter(adapter, config=read_config(source))
    complete = complete_weights(adapters.items(), source_dir=source, lora_scale=scale)
    save_huggingface(complete, source_dir=source, target_dir=target)


def merged_weights(adapters: Mapping[str, Tensor], files: WeightFiles, *, scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight that has an adapter, merged in fp32 and rounded to the type that it has in its file."""
    for name, lora_a in adapters.items():
        if name.endswith(A):
            weight = f"{name.removesuffix(A)}.weight"
            merged = merge_update(files.read(weight, rows=slice(None)), lora_a, adapters[_partner(name)], scale=scale)
            yield weight, merged.to(files.dtype(weight))


def read_adapter(folder: Path, *, config: ModelConfig) -> tuple[dict[str, Tensor], float]:
    """Read a PEFT folder.

    Args:
        folder: A PEFT folder.
        config: The shape of the model that it must fit.

    Returns:
        The adapters under the model's own names, as `lora_state_dict` has them, and the scale of their updates.

    Raises:
        DataError: A file is missing or damaged, or the adapter does not fit the model.
    """
    scale = _scale(folder)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    except (FileNotFoundError, SafetensorError) as error:
        raise DataError(f"Adapter folder {folder}: {ADAPTER_WEIGHTS_FILE} cannot be read: {error}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}
    adapters = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    for name in adapters:
        layer = name.removesuffix(A).removesuffix(B)
        shape = shapes.get(f"{layer}.weight")
        if layer == name or shape is None or _partner(name) not in adapters:
            raise DataError(f"Adapter folder {folder}: {PREFIX}{name} belongs to no weight of the model")
        lora_a, lora_b = adapters[layer + A], adapters[layer + B]
        if (len(lora_b), lora_a.shape[-1], len(lora_a)) != (*shape, lora_b.shape[-1]):
            raise DataError(
                f"Adapter folder {folder}: {PREFIX}{name} must fit a weight of the shape {shape}, "
                f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
    return adapters, scale


def _partner(name: str) -> str:
    return name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A


def _scale(folder: Path) -> float:
    """Return what the updates are multiplied with; refuse kinds of adapters that are more than that."""
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise DataError(f"Adapter folder {folder}: {key} is not supported, got {config[key]!r}")
    if config.get("peft_type") != "LORA" or not config.get("r"):
        raise DataError(f"Adapter folder {folder}: peft_type must be LORA with a rank, got {config.get('peft_type')!r}")
    rank = config["r"]
    return float(config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))
