"""Write and load models in torchao's formats. The only file that knows torchao 0.18's quantization.

A quantized weight `a.weight` is stored as `a._weight_qdata`, `a._weight_scale` and so on; each file's metadata says how
they become a tensor again, and config.json which scheme it is, so that transformers loads the folder. NF4 has no place
in torchao's safetensors: such a folder has the same form, but only `load_model` reads it.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kubetune_trainer.errors import DataError, DoesNotFitError
from kubetune_trainer.export.huggingface import copy_companions
from kubetune_trainer.export.shards import MAX_SHARD_BYTES, Planned, ShardWriter
from kubetune_trainer.model.config import CONFIG_FILE, read_config, read_json
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import WeightFiles, build_model
from kubetune_trainer.quantize import nf4
from kubetune_trainer.quantize.layers import KEPT, check_groups, linear_layers

PARTS: Final = "_tensor_data_names"
NF4: Final = "NF4"
GROUPED: Final = ("Int4WeightOnly", "Int8DynamicActivationInt4Weight")
NF4_PARTS: Final = ("quantized_data", "scaler_mean", "quantization_factor", "quantized_scalers", "nf4")
FLOAT8_CAPABILITY: Final = (8, 9)
"""The oldest CUDA devices that multiply float8."""


def check_torchao(folder: Path, *, scheme: str, group_size: int) -> None:
    """Refuse what cannot be written; needs the model's config.json alone.

    Raises:
        ConfigError: The group size does not divide the rows of a layer.
    """
    if scheme in GROUPED:
        check_groups(folder, group_size=group_size)
    if scheme == NF4:
        check_groups(folder, group_size=nf4.BLOCK)


def check_device(scheme: str | None) -> None:
    """Refuse a scheme that this machine cannot compute.

    Raises:
        DoesNotFitError: It needs an accelerator that is not there.
    """
    if scheme != "Float8DynamicActivation":
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise DoesNotFitError(
            "scheme Float8DynamicActivation needs a CUDA device of capability 8.9 (Ada) or newer, and there is none",
            hint="Run it on such a device, or choose Float8WeightOnly.",
        )


def save_torchao(
    source: Path,
    target: Path,
    *,
    scheme: str,
    group_size: int,
    done: Callable[[], object] = lambda: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder with quantized linear layers, holding one tensor at a time.

    Args:
        source: Complete model in Hugging Face format.
        target: Made if it is not there.
        scheme: One of those that an output of type TorchAO may have.
        group_size: Weights that share a scale, for 4 bits.
        done: Called after each tensor of the source.
        max_shard_bytes: A new file is begun before this is exceeded.

    Raises:
        ConfigError: The group size does not divide the rows of a layer.
        DoesNotFitError: The scheme needs an accelerator that is not there.
    """
    check_torchao(source, scheme=scheme, group_size=group_size)
    check_device(scheme)
    target.mkdir(parents=True, exist_ok=True)
    config = read_config(source)
    quantized = {f"{name}.weight" for name in linear_layers(config)}
    like: dict[tuple[Any, ...], tuple[dict[str, Tensor], str]] = {}  # layers of one shape have one form
    planned, metadata = [], {}
    with WeightFiles(source, tied_embeddings=config.tied_embeddings) as files:
        files.check({name: tuple(weight.shape) for name, weight in build_model(config).named_parameters()})
        for name in files.names:
            shape, dtype = files.shape(name), files.dtype(name)
            if name not in quantized:
                planned.append(Planned(name, dtype, shape))
                metadata[name] = json.dumps({"_type": "Tensor"})
                continue
            if (shape, dtype) not in like:
                like[shape, dtype] = _flat(torch.ones(shape, dtype=dtype), scheme=scheme, group_size=group_size)
            parts, metadata[name] = like[shape, dtype]
            planned += [Planned(_part(name, part), each.dtype, tuple(each.shape)) for part, each in parts.items()]
        like.clear()
        metadata["tensor_names"] = json.dumps(files.names)
        with ShardWriter(target, planned, metadata=metadata, max_shard_bytes=max_shard_bytes) as writer:
            for name in files.names:
                weight = files.read(name, rows=slice(None))
                if name in quantized:
                    parts, told = _flat(weight, scheme=scheme, group_size=group_size)
                    assert told == metadata[name], f"{name} is {told}, planned as {metadata[name]}"
                    for part, tensor in parts.items():
                        writer.write(_part(name, part), tensor)
                else:
                    writer.write(name, weight)
                done()
    copy_companions(source, target)
    described = read_json(source / CONFIG_FILE) | {"quantization_config": _describe(scheme, group_size=group_size)}
    (target / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")


def load_torchao(model: Decoder, folder: Path, *, dtype: torch.dtype, device: str | torch.device) -> Decoder:
    """Fill a model without memory with a folder's weights; quantized ones stay as they are.

    Raises:
        DataError: A tensor is missing or unexpected, or of a form that is not known.
    """
    with WeightFiles(folder, tied_embeddings=model.config.tied_embeddings) as files:
        metadata = _read_metadata(folder)
        wanted = dict(model.named_parameters())
        told = json.loads(metadata.get("tensor_names", "[]"))
        differing = sorted(wanted.keys() ^ set(told))
        if differing:
            raise DataError(
                f"Model folder {folder}: its weights are not those of the model: {', '.join(differing[:5])}"
            )
        for name, parameter in wanted.items():
            form = json.loads(metadata[name])
            tensors = _read_parts(files, name, form, device=device)
            weight = _restore(form, name, tensors, dtype=dtype)
            if weight.shape != parameter.shape:
                raise DataError(
                    f"Model folder {folder}: {name} must have the shape {tuple(parameter.shape)} that config.json asks "
                    f"for, got {tuple(weight.shape)}"
                )
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent).register_parameter(last, nn.Parameter(weight, requires_grad=False))
    return model


def _part(name: str, part: str) -> str:
    layer, _, weight = name.rpartition(".")
    return f"{layer}._{weight}_{part}"


def _read_parts(
    files: WeightFiles, name: str, form: Mapping[str, Any], *, device: str | torch.device
) -> dict[str, Tensor]:
    """Read a weight's parts by their names, or the weight itself under no name."""
    stored = {"": name} if form["_type"] == "Tensor" else {part: _part(name, part) for part in form[PARTS]}
    missing = [each for each in stored.values() if each not in files.names]
    if missing:
        raise DataError(f"Model folder {files.folder} is missing tensors: {', '.join(missing)}")
    return {part: files.read(each, rows=slice(None)).to(device) for part, each in stored.items()}


def _flat(weight: Tensor, *, scheme: str, group_size: int) -> tuple[dict[str, Tensor], str]:
    """Quantize a weight; return its parts and what the metadata says of it."""
    if scheme == NF4:
        return _flat_nf4(weight)
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict  # noqa: PLC0415
    from torchao.quantization import quantize_  # noqa: PLC0415

    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, torchao_config(scheme, group_size=group_size))
    tensors, metadata = flatten_tensor_state_dict({"layer.weight": layer.weight.detach()})
    return {name.removeprefix("layer._weight_"): tensor for name, tensor in tensors.items()}, metadata["layer.weight"]


def _flat_nf4(weight: Tensor) -> tuple[dict[str, Tensor], str]:
    from torchao.quantization import to_nf4  # noqa: PLC0415 (slow, and only where it is asked for)

    tensor = to_nf4(weight, nf4.BLOCK, nf4.num_scalers(weight.numel()))
    sizes = {name: getattr(tensor, name) for name in ("block_size", "n_blocks", "scaler_block_size")}
    form = {"_type": "NF4Tensor", "_data": {**sizes, "shape": list(weight.shape)}, PARTS: NF4_PARTS}
    return {part: torch.atleast_1d(getattr(tensor, part)) for part in NF4_PARTS}, json.dumps(form)


def _restore(form: dict[str, Any], name: str, tensors: dict[str, Tensor], *, dtype: torch.dtype) -> Tensor:
    """Make a weight of its parts, which computes in another type than it was made from, if need be."""
    if form["_type"] == "Tensor":
        return tensors[""].to(dtype)
    if form["_type"] == "NF4Tensor":
        return _restore_nf4(form["_data"], tensors, dtype=dtype)
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict  # noqa: PLC0415

    if form["_type"] != "IntxUnpackedToInt8Tensor":  # which can be turned into another type, as the others cannot
        form["_data"]["dtype"]["_data"] = str(dtype).removeprefix("torch.")
    stored = {_part(name, part): tensor for part, tensor in tensors.items()}
    found, _ = unflatten_tensor_state_dict(stored, {name: json.dumps(form), "tensor_names": json.dumps([name])})
    return found[name].to(dtype)


def _restore_nf4(sizes: dict[str, Any], tensors: dict[str, Tensor], *, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import NF4Tensor  # noqa: PLC0415 (slow, and only where it is asked for)
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs  # noqa: PLC0415

    shape = torch.Size(sizes.pop("shape"))
    device = tensors["quantized_data"].device
    args = SubclassTensorArgs(shape, (shape[1], 1), 0, dtype, device, requires_grad=False)
    table = {"nf4": tensors.pop("nf4").to(dtype), "scaler_mean": tensors.pop("scaler_mean")[0].to(dtype)}
    factor = tensors.pop("quantization_factor").to(dtype)
    return NF4Tensor(args, **sizes, **tensors, **table, quantization_factor=factor)


def torchao_config(scheme: str, *, group_size: int) -> Any:
    """Return what torchao calls a scheme; not for NF4, which is none of its configs."""
    from torchao import quantization as ao  # noqa: PLC0415 (slow, and only where it is asked for)

    groups = ao.PerGroup(group_size)
    match scheme:
        case "Int8WeightOnly":
            return ao.Int8WeightOnlyConfig()
        case "Int8DynamicActivation":
            return ao.Int8DynamicActivationInt8WeightConfig()
        case "Int4WeightOnly":
            return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
        case "Int8DynamicActivationInt4Weight":
            return ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=groups)
        case "Float8WeightOnly":
            return ao.Float8WeightOnlyConfig()
        case "Float8DynamicActivation":  # never run by this tree's tests, which have no such device
            return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    raise AssertionError(f"{scheme} is no scheme of torchao")


def _describe(scheme: str, *, group_size: int) -> dict[str, Any]:
    """Return what config.json says of the quantized layers."""
    told: dict[str, Any] = {"quant_method": "torchao", "modules_to_not_convert": [KEPT]}
    if scheme == NF4:
        return {**told, "quant_type": {"default": {"_type": "NF4", "_data": {"block_size": nf4.BLOCK}}}}
    from torchao.core.config import config_to_dict  # noqa: PLC0415 (slow, and only where it is asked for)

    return {**told, "quant_type": {"default": config_to_dict(torchao_config(scheme, group_size=group_size))}}


def _read_metadata(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    with ExitStack() as stack:
        for file in sorted(folder.glob("*.safetensors")):
            found |= stack.enter_context(safe_open(file, framework="pt")).metadata() or {}
    return found
