"""Write a complete model as a Hugging Face folder: safetensors beside the source's config and tokenizer files."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kubetune_trainer.lora import is_adapter, merge_adapters, whole_tensor
from kubetune_trainer.model.config import CONFIG_FILE, read_config, read_json
from kubetune_trainer.model.weights import INDEX_FILE, WEIGHTS_FILE, WeightFiles
from kubetune_trainer.trained_tokens import token_ids

OutputDtype = Literal["Source", "BF16", "FP32"]

MAX_SHARD_BYTES = 5_000_000_000
DTYPES = {"BF16": torch.bfloat16, "FP32": torch.float32}
COMPANION_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja|(LICENSE|NOTICE|USE_POLICY).*"
)
"""What goes with the weights, and what the model's licence asks to be passed on."""


def trained_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each trained weight whole, on CPU, one at a time; every rank must run through it at the same time.

    Whose trained rows of tokens are comes last.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, whole_tensor(parameter)
    yield from token_ids(model)


def complete_weights(
    trained: Iterable[tuple[str, Tensor]], *, source_dir: Path, lora_scale: float = 1.0, packed: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Put trained weights and the source's own together into one complete model; call it on one rank only.

    Frozen weights come from the source's files exactly as they stand there, and adapters are merged into them.

    Args:
        trained: What `trained_weights` yields.
        source_dir: The model folder that training began with.
        lora_scale: Scale of the adapters' updates, of no use where there are none.
        packed: Merge adapters into what the source's weights are in NF4, as QLoRA trains on.
    """
    adapters: dict[str, Tensor] = {}
    done: set[str] = set()
    for name, tensor in trained:
        if is_adapter(name):
            adapters[name] = tensor
        else:
            done.add(name)
            yield name, tensor
    with WeightFiles(source_dir, tied_embeddings=read_config(source_dir).tied_embeddings) as files:
        for name, tensor in files.items():
            if name not in done:
                yield name, merge_adapters(name, tensor, adapters, scale=lora_scale, packed=packed)


def save_huggingface(
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source_dir: Path,
    target_dir: Path,
    dtype: OutputDtype = "Source",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder, holding no more than one shard in memory.

    Args:
        tensors: Names and whole tensors of a complete model; a dict's `items()` will do.
        source_dir: The model folder that training began with; its config and tokenizer files are copied.
        target_dir: Made if it is not there.
        dtype: Source keeps the type that each tensor has in the source.
        max_shard_bytes: A new file is begun before this is exceeded.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    with WeightFiles(source_dir, tied_embeddings=read_config(source_dir).tied_embeddings) as files:
        typed = (
            (name, tensor.detach().to("cpu", files.dtype(name) if dtype == "Source" else DTYPES[dtype]).contiguous())
            for name, tensor in tensors
        )
        _save_shards(typed, target_dir=target_dir, max_shard_bytes=max_shard_bytes)
    copy_companions(source_dir, target_dir)
    if dtype != "Source":
        _write_config_dtype(target_dir / CONFIG_FILE, DTYPES[dtype])


def copy_companions(source_dir: Path, target_dir: Path) -> None:
    """Copy what goes with the weights of a model folder."""
    for file in sorted(source_dir.iterdir()):
        if file.is_file() and COMPANION_FILES.fullmatch(file.name):
            shutil.copyfile(file, target_dir / file.name)


def _save_shards(tensors: Iterable[tuple[str, Tensor]], *, target_dir: Path, max_shard_bytes: int) -> None:
    """Write the shards under passing names, and under their own once it is known how many there are."""
    shards: list[list[str]] = []
    total_bytes = 0
    for shard in _group(tensors, max_shard_bytes=max_shard_bytes):
        file = target_dir / f"shard-{len(shards)}.partial"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors lets the owner alone read it
        shards.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        name = WEIGHTS_FILE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (target_dir / f"shard-{number}.partial").replace(target_dir / name)
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (target_dir / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _group(tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > max_shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _write_config_dtype(file: Path, dtype: torch.dtype) -> None:
    """Make config.json say the type that the weights have now, under the key of transformers 4, 5, or both."""
    config = read_json(file)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    file.write_text(json.dumps(config | dict.fromkeys(keys, name), indent=2) + "\n")
