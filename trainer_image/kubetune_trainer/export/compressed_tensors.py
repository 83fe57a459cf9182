"""Write a model in the compressed-tensors format, which vLLM and transformers load.

A quantized layer has `weight` (int8) or `weight_packed` (int32 that hold eight 4-bit or four 8-bit integers, the first
in the lowest bits, made positive by adding half their range) and `weight_scale`; config.json says what they mean.
Engines expect packed weights where activations are not rounded. See https://github.com/vllm-project/compressed-tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from kubetune_trainer.export.huggingface import copy_companions
from kubetune_trainer.export.shards import MAX_SHARD_BYTES, Planned, ShardWriter
from kubetune_trainer.model.config import CONFIG_FILE, read_config, read_json
from kubetune_trainer.model.weights import WeightFiles, build_model
from kubetune_trainer.quantize.layers import check_groups, kept_layers, linear_layers
from kubetune_trainer.quantize.rounding import Rounded, integer_range, round_to_nearest

PACKED: Final = "pack-quantized"
WORD_BITS: Final = 32
CHUNK_ELEMENTS: Final = 1 << 19
"""Weights that are rounded at once, so that no whole matrix has to be in memory in fp32."""


@dataclass(frozen=True)
class Scheme:
    """What the format can say of a layer."""

    format: str
    """How integers are stored."""
    bits: int
    """Bits of a weight."""
    grouped: bool = False
    """Whether scales belong to groups; otherwise to rows."""
    rounds_activations: bool = False
    """Whether the layer's input is rounded to 8 bits too, with a scale for each token."""


SCHEMES: Final[Mapping[str, Scheme]] = {
    "Int8WeightOnly": Scheme(PACKED, bits=8),
    "Int8DynamicActivation": Scheme("int-quantized", bits=8, rounds_activations=True),
    "Int4WeightOnly": Scheme(PACKED, bits=4, grouped=True),
}


def check_compressed_tensors(folder: Path, *, scheme: str, group_size: int) -> None:
    """Refuse what the format cannot carry; needs the model's config.json alone.

    Raises:
        ConfigError: The group size does not divide the rows of a layer.
    """
    if SCHEMES[scheme].grouped:
        check_groups(folder, group_size=group_size)


def save_compressed_tensors(
    source: Path,
    target: Path,
    *,
    scheme: str,
    group_size: int,
    rounded: Mapping[str, Rounded] | None = None,
    done: Callable[[], object] = lambda: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder with rounded linear layers, reading and holding one tensor at a time.

    Args:
        source: Complete model in Hugging Face format.
        target: Made if it is not there.
        scheme: Int8WeightOnly, Int8DynamicActivation or Int4WeightOnly.
        group_size: Weights that share a scale, for 4 bits.
        rounded: Weights that are rounded already, by the names of their layers; the others are rounded to the nearest.
        done: Called after each tensor of the source.
        max_shard_bytes: A new file is begun before this is exceeded.

    Raises:
        ConfigError: The group size does not divide the rows of a layer.
    """
    check_compressed_tensors(source, scheme=scheme, group_size=group_size)
    target.mkdir(parents=True, exist_ok=True)
    chosen, config = SCHEMES[scheme], read_config(source)
    size = group_size if chosen.grouped else None
    layers = linear_layers(config)
    with WeightFiles(source, tied_embeddings=config.tied_embeddings) as files:
        files.check({name: tuple(weight.shape) for name, weight in build_model(config).named_parameters()})
        planned = [each for name in files.names for each in _plan(files, name, layers, chosen, group_size=size)]
        with ShardWriter(target, planned, max_shard_bytes=max_shard_bytes) as writer:
            for name in files.names:
                layer = _layer_of(name, layers)
                if layer is None:
                    writer.write(name, files.read(name, rows=slice(None)))
                else:
                    given = rounded.get(layer) if rounded else None
                    parts = _parts(given) if given else _round(files, name, bits=chosen.bits, group_size=size)
                    for first_row, part in parts:
                        for stored, tensor in _stored(layer, part, scheme=chosen, scale_dtype=files.dtype(name)):
                            writer.write(stored, tensor, first_row=first_row)
                    if chosen.format == PACKED:
                        writer.write(f"{layer}.weight_shape", torch.tensor(files.shape(name)))
                done()
    _write_companions(source, target, quantization=_describe(chosen, group_size=size, ignore=kept_layers(config)))


def pack(values: Tensor, *, bits: int) -> Tensor:
    """Pack integers, (O, I) int8, into int32 (O, ceil(I · bits / 32)); what is left of the last one is zero."""
    per_word = WORD_BITS // bits
    unsigned = functional.pad(values.to(torch.int32) - integer_range(bits)[0], (0, -values.shape[1] % per_word))
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    # The sum of disjoint bits is their union; one that reaches the int32's sign wraps around to the right bits.
    return (unsigned.reshape(len(values), -1, per_word) << shifts).sum(-1, dtype=torch.int32)


def unpack(packed: Tensor, *, bits: int, columns: int) -> Tensor:
    """Undo `pack`; the result has so many columns."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=packed.device)
    unsigned = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return (unsigned + integer_range(bits)[0]).to(torch.int8).flatten(1)[:, :columns]


def packed_columns(columns: int, *, bits: int) -> int:
    """Return how many int32 a packed row has."""
    return -(-columns * bits // WORD_BITS)


def _layer_of(name: str, layers: Mapping[str, Any]) -> str | None:
    layer = name.removesuffix(".weight")
    return layer if layer != name and layer in layers else None


def _plan(
    files: WeightFiles, name: str, layers: Mapping[str, Any], scheme: Scheme, *, group_size: int | None
) -> Iterator[Planned]:
    shape, dtype, layer = files.shape(name), files.dtype(name), _layer_of(name, layers)
    if layer is None:
        yield Planned(name, dtype, shape)
        return
    outputs, inputs = shape
    if scheme.format != PACKED:
        yield Planned(name, torch.int8, shape)
    else:
        words = packed_columns(inputs, bits=scheme.bits)
        yield Planned(f"{layer}.weight_packed", torch.int32, (outputs, words))
        yield Planned(f"{layer}.weight_shape", torch.int64, (2,))
    yield Planned(f"{layer}.weight_scale", dtype, (outputs, inputs // (group_size or inputs)))


def _round(files: WeightFiles, name: str, *, bits: int, group_size: int | None) -> Iterator[tuple[int, Rounded]]:
    """Round a stored weight, some rows at a time; yields the first row with each part."""
    for rows in _row_slices(*files.shape(name)):
        yield rows.start, round_to_nearest(files.read(name, rows=rows), bits=bits, group_size=group_size)


def _parts(rounded: Rounded) -> Iterator[tuple[int, Rounded]]:
    """Cut what is rounded already in the same way."""
    for rows in _row_slices(*rounded.values.shape):
        yield rows.start, replace(rounded, values=rounded.values[rows], scales=rounded.scales[rows])


def _row_slices(num_rows: int, columns: int) -> Iterator[slice]:
    at_once = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, num_rows, at_once):
        yield slice(first, min(first + at_once, num_rows))


def _stored(layer: str, rounded: Rounded, *, scheme: Scheme, scale_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    if scheme.format == PACKED:
        yield f"{layer}.weight_packed", pack(rounded.values, bits=rounded.bits)
    else:
        yield f"{layer}.weight", rounded.values
    yield f"{layer}.weight_scale", rounded.scales.to(scale_dtype)


def _describe(scheme: Scheme, *, group_size: int | None, ignore: list[str]) -> dict[str, Any]:
    """Return what config.json says of the quantized layers."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.grouped else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations if scheme.rounds_activations else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _write_companions(source: Path, target: Path, *, quantization: Mapping[str, Any]) -> None:
    copy_companions(source, target)
    config = read_json(source / CONFIG_FILE) | {"quantization_config": dict(quantization)}
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
