"""Load a folder with quantized weights into a model that keeps them as they are stored."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kubetune_trainer.errors import DataError
from kubetune_trainer.export.compressed_tensors import PACKED, SCHEMES, Scheme, packed_columns, unpack
from kubetune_trainer.model.config import CONFIG_FILE, quantization_method, read_config, read_json
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import WeightFiles, build_model
from kubetune_trainer.quantize.layers import KEPT, ROUTERS, linear_layers
from kubetune_trainer.quantize.linear import IntegerLinear


def load_quantized(folder: Path, *, dtype: torch.dtype, device: str | torch.device) -> Decoder:
    """Load a model whose linear layers are quantized, in one of the formats that this package writes.

    Args:
        folder: Its config.json has a quantization_config.
        dtype: Type of all that is not quantized, and of what is computed.
        device: Where the model goes.

    Returns:
        The model, in evaluation mode.

    Raises:
        DataError: The folder is incomplete, damaged, or quantized in a way that is not supported.
    """
    model = build_model(read_config(folder, allow_quantized=True)).to(dtype)
    if quantization_method(folder) == "torchao":
        from kubetune_trainer.export.torchao import load_torchao  # noqa: PLC0415 - slow, and only where it is asked for

        return load_torchao(model, folder, dtype=dtype, device=device).eval()
    scheme = _scheme(folder)
    with WeightFiles(folder, tied_embeddings=model.config.tied_embeddings) as files:
        for name, layer in linear_layers(model.config).items():
            with torch.device("meta"):
                groups = _groups(files, name)
                stand_in = IntegerLinear(
                    layer,
                    num_groups=groups,
                    bits=scheme.bits,
                    rounds_activations=scheme.rounds_activations,
                    dtype=dtype,
                )
            replace(model, name, stand_in)
        model.to_empty(device=device)
        _fill(model, files, scheme=scheme)
    return model.eval()


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in the place of the one that has this name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _fill(model: Decoder, files: WeightFiles, *, scheme: Scheme) -> None:
    """Read every tensor; packed integers are unpacked to one each byte."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    integers = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    packed = integers if scheme.format == PACKED else set()
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if name in packed:
            outputs, inputs = tensor.shape
            expected |= {
                f"{name}_packed": (outputs, packed_columns(inputs, bits=scheme.bits)),
                f"{name}_shape": (2,),
            }
        else:
            expected[name] = tuple(tensor.shape)
    files.check(expected)
    with torch.no_grad():
        for name, tensor in tensors.items():
            stored = f"{name}_packed" if name in packed else name
            if name in integers and files.dtype(stored).is_floating_point:
                raise DataError(f"Model folder {files.folder}: {stored} must be integers, got {files.dtype(stored)}")
            values = files.read(stored, rows=slice(None))
            tensor.copy_(unpack(values, bits=scheme.bits, columns=tensor.shape[1]) if name in packed else values)


def _groups(files: WeightFiles, layer: str) -> int:
    name = f"{layer}.weight_scale"
    if name not in files.names:
        raise DataError(f"Model folder {files.folder}: {name} is missing, and {CONFIG_FILE} says it is quantized")
    return files.shape(name)[-1]


def _scheme(folder: Path) -> Scheme:
    """Return what config.json says of the linear layers, where it says one thing of all of them."""
    told: dict[str, Any] = read_json(folder / CONFIG_FILE)["quantization_config"]
    for scheme in SCHEMES.values():
        if _same(told, scheme):
            return scheme
    raise DataError(
        f"Model folder {folder}: {CONFIG_FILE}'s quantization_config is none of those that can be loaded: "
        f"{', '.join(SCHEMES)}"
    )


def _same(told: dict[str, Any], scheme: Scheme) -> bool:
    groups = list(told.get("config_groups", {}).values())
    if len(groups) != 1 or told.get("format") != scheme.format:
        return False
    weights, activations = groups[0].get("weights") or {}, groups[0].get("input_activations")
    return (
        groups[0].get("targets") == ["Linear"]
        and set(told.get("ignore", ())) <= {KEPT, ROUTERS}
        and (weights.get("num_bits"), weights.get("type"), weights.get("symmetric")) == (scheme.bits, "int", True)
        and weights.get("strategy") == ("group" if scheme.grouped else "channel")
        and bool(activations) == scheme.rounds_activations
    )
