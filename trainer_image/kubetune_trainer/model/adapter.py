"""Merge a PEFT folder's adapters into a model in memory."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kubetune_trainer.errors import DataError
from kubetune_trainer.export.peft import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PREFIX
from kubetune_trainer.lora import merge_update
from kubetune_trainer.model.config import read_json
from kubetune_trainer.model.decoder import Decoder


@torch.no_grad()
def merge_adapter(model: Decoder, folder: Path) -> None:
    """Add the updates of a LoRA adapter to the weights that they belong to, in place.

    Args:
        model: The base model, with its weights loaded and not quantized.
        folder: A PEFT folder.

    Raises:
        DataError: A file is missing or damaged, or the adapter does not fit the model.
    """
    scale = _scale(folder)
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    except (FileNotFoundError, SafetensorError) as error:
        raise DataError(f"Adapter folder {folder}: {ADAPTER_WEIGHTS_FILE} cannot be read: {error}") from error
    weights = dict(model.named_parameters())
    for name, lora_a in tensors.items():
        if name.endswith(".lora_B.weight") and name.replace("lora_B", "lora_A") in tensors:
            continue
        layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        weight, lora_b = weights.get(f"{layer}.weight"), tensors.get(name.replace("lora_A", "lora_B"))
        if not name.endswith(".lora_A.weight") or weight is None or lora_b is None:
            raise DataError(f"Adapter folder {folder}: {name} belongs to no weight of the model")
        if (len(lora_b), lora_a.shape[-1]) != tuple(weight.shape):
            raise DataError(
                f"Adapter folder {folder}: {name} must fit a weight of the shape {tuple(weight.shape)}, "
                f"got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
        merged = merge_update(weight, lora_a.to(weight.device), lora_b.to(weight.device), scale=scale)
        weight.copy_(merged)


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
