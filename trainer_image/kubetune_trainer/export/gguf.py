"""Write a model as one GGUF file, which llama.cpp and what is built on it load, and read such a file back.

How a family is called there is gguf_model's matter. Source: the GGUF specification (ggml/docs/gguf.md).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, get_args

import gguf
import numpy as np
import torch
from torch import Tensor

from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.export.gguf_model import (
    ARCHITECTURES,
    Metadata,
    StoredTensor,
    model_metadata,
    rope_factors,
    stored_tensors,
)
from kubetune_trainer.export.gguf_sentencepiece import model_name
from kubetune_trainer.export.gguf_tokenizer import tokenizer_metadata
from kubetune_trainer.export.huggingface import copy_companions
from kubetune_trainer.model.config import ModelConfig, read_config
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import GGUF_FILE, WeightFiles, build_model
from kubetune_trainer.model_json import read_json
from kubetune_trainer.tokenizer import TOKENIZER_FILE

GGUFType = Literal["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
Types = Mapping[str, gguf.GGMLQuantizationType]

FOUR_BIT: Final = ("Q4_0", "Q4_1")
CHUNK_ELEMENTS: Final = 4_000_000
"""Weights that are converted at once, so that memory does not grow with a tensor's size."""


def save_gguf(source: Path, target: Path, *, type: GGUFType = "F16", name: str = "") -> None:  # noqa: A002 (the spec's word)
    """Write a Hugging Face folder as a GGUF file beside its configuration and tokenizer, a part of a tensor at a time.

    Norms, biases and routers stay fp32, as llama.cpp wants them. With a 4-bit type the output head, which every token
    passes last (the embedding where the two are one), gets Q8_0.

    Args:
        source: Folder of a model in Hugging Face format.
        target: Made if it is not there.
        type: How the weights are stored.
        name: How the file calls the model; empty takes the folder's name. See gguf_sentencepiece for Phi-3's.

    Raises:
        DataError: The model or its tokenizer has something that llama.cpp has no word for; nothing is written then.
        ConfigError: The weights' rows cannot be cut into the type's blocks; nothing is written then.
    """
    config = read_config(source)
    metadata, types = check_gguf(source, type=type)
    with WeightFiles(source, tied_embeddings=config.tied_embeddings) as files:
        files.check({each: tensor.shape for tensor in stored_tensors(config) for each in tensor.parameters})
        target.mkdir(parents=True, exist_ok=True)
        partial = target / f"{GGUF_FILE}.partial"
        writer = gguf.GGUFWriter(partial, ARCHITECTURES[config.family].name)
        try:
            writer.add_name(model_name(read_json(source / TOKENIZER_FILE), name=name or source.name))
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type}"])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_metadata(writer, metadata)
            _write_tensors(writer, files, types=types, config=config)
            writer.close()
            partial.replace(target / GGUF_FILE)
        finally:
            writer.close()
            partial.unlink(missing_ok=True)
    copy_companions(source, target)


def check_gguf(source: Path, *, type: GGUFType) -> tuple[Metadata, Types]:  # noqa: A002
    """Return what the file will say of the model, and how each tensor will be stored, without looking at any weight.

    Raises:
        DataError: The model or its tokenizer has something that llama.cpp has no word for.
        ConfigError: The weights' rows cannot be cut into the type's blocks.
    """
    config = read_config(source)
    metadata = {**model_metadata(config, source=source), **tokenizer_metadata(source, vocab_size=config.vocab_size)}
    return metadata, {tensor.name: _type_of(tensor, config=config, wanted=type) for tensor in stored_tensors(config)}


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """Load a folder that `save_gguf` wrote, with its weights as llama.cpp takes them: dequantized from the file.

    Args:
        path: The folder.
        dtype: Type of all weights in memory.
        device: Where they go.

    Raises:
        DataError: The file is damaged, or is not the model that the folder's config.json describes.
    """
    folder = Path(path)
    config = read_config(folder)
    reader = _open(folder / GGUF_FILE)
    _check_metadata(reader, config, folder=folder)
    found = {tensor.name: tensor for tensor in reader.tensors}
    model = build_model(config).to(dtype).to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for tensor in stored_tensors(config):
            stored = found.get(tensor.name)
            if stored is None or tuple(reversed(stored.shape.tolist())) != tensor.whole_shape:
                raise DataError(
                    f"Model folder {folder}: {GGUF_FILE} has no {tensor.name} of the shape {tensor.whole_shape}"
                )
            data = stored.data if tensor.is_stacked else stored.data[None]
            for name, part in zip(tensor.parameters, data, strict=True):
                values = gguf.dequantize(part, stored.tensor_type).reshape(tensor.shape)
                parameters[name].copy_(_from_stored(torch.from_numpy(values.copy()), tensor, head_dim=config.head_dim))
    return model.eval()


def _to_stored(values: Tensor, tensor: StoredTensor, *, head_dim: int) -> Tensor:
    """Bring a head's rows from halves (dimension i with i + H/2) to neighbours (2i with 2i + 1), where they are so."""
    if tensor.is_reordered:
        values = values.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(values.shape)
    return values + tensor.added


def _from_stored(values: Tensor, tensor: StoredTensor, *, head_dim: int) -> Tensor:
    """Undo `_to_stored`."""
    if tensor.is_reordered:
        values = values.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(values.shape)
    return values - tensor.added


def _type_of(tensor: StoredTensor, *, config: ModelConfig, wanted: GGUFType) -> gguf.GGMLQuantizationType:
    if tensor.stays_precise:
        return gguf.GGMLQuantizationType.F32
    name = tensor.parameters[0]
    head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    found = gguf.GGMLQuantizationType["Q8_0" if name == head and wanted in FOUR_BIT else wanted]
    block, _ = gguf.GGML_QUANT_SIZES[found]
    if tensor.shape[-1] % block:
        raise ConfigError(
            f"gguf.type {wanted} needs weights whose rows are a multiple of {block} long, got {tensor.shape[-1]} in "
            f"{name}",
            hint=f"Choose one of {', '.join(each for each in get_args(GGUFType) if 'Q' not in each)}.",
        )
    return found


def _add_metadata(writer: gguf.GGUFWriter, metadata: Metadata) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)


def _write_tensors(writer: gguf.GGUFWriter, files: WeightFiles, *, types: Types, config: ModelConfig) -> None:
    factors, tensors = rope_factors(config), stored_tensors(config)
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, np.dtype(np.float32), values.nbytes)
    for tensor in tensors:
        shape = gguf.quant_shape_to_byte_shape(tensor.whole_shape, types[tensor.name])
        size = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=types[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in factors.values():
        writer.write_tensor_data(values.numpy())
    for tensor in tensors:
        num_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, types[tensor.name])))
        stored = np.empty((len(tensor.parameters), tensor.shape[0], num_bytes // tensor.shape[0]), dtype=np.uint8)
        for place, rows, values in _chunks(tensor, files=files, config=config):
            quantized = gguf.quantize(values.numpy(), types[tensor.name])
            stored[place, rows] = quantized.view(np.uint8).reshape(len(values), -1)
        writer.write_tensor_data(stored)


def _chunks(tensor: StoredTensor, *, files: WeightFiles, config: ModelConfig) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield which parameter, which of its rows, and these in fp32 as llama.cpp keeps them, some heads at a time."""
    num_rows, head_dim = tensor.shape[0], config.head_dim
    step = max(1, CHUNK_ELEMENTS * num_rows // int(np.prod(tensor.shape)) // head_dim) * head_dim
    for place, name in enumerate(tensor.parameters):
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            values = files.read(name, rows=rows).float()
            if not values.isfinite().all():
                raise DataError(f"Model folder {files.folder}: {name} has values that are not finite")
            yield place, rows, _to_stored(values, tensor, head_dim=head_dim).contiguous()


def _open(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except FileNotFoundError as error:
        raise DataError(f"Model folder {file.parent}: {file.name} is missing") from error
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"Model folder {file.parent}: {file.name} is not a whole GGUF file: {error}") from error


def _check_metadata(reader: gguf.GGUFReader, config: ModelConfig, *, folder: Path) -> None:
    for key, wanted in model_metadata(config, source=folder).items():
        field = reader.get_field(key)
        found = field.contents() if field is not None else None
        if found != (np.float32(wanted) if isinstance(wanted, float) else wanted):
            raise DataError(f"Model folder {folder}: {key} in {GGUF_FILE} must be {wanted} by config.json, got {found}")
