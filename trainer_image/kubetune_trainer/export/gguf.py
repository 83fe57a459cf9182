"""Write a model as one GGUF file, which llama.cpp and what is built on it load, and read such a file back.

llama.cpp keeps the rows of the query and key projections in another order than Hugging Face: it turns neighbouring
dimensions of a head together, where Hugging Face turns a dimension of the first half with its like in the second.
Everything else is a matter of names. Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's Llama graph.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, get_args

import gguf
import numpy as np
import torch
from torch import Tensor

from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.export.gguf_tokenizer import tokenizer_metadata
from kubetune_trainer.export.huggingface import COMPANION_FILES
from kubetune_trainer.model.config import ModelConfig, read_config
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import GGUF_FILE, WeightFiles, build_model

GGUFType = Literal["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
Metadata = Mapping[str, Any]

ARCHITECTURE: Final = "llama"
ROPE_FACTORS: Final = "rope_freqs.weight"
FOUR_BIT: Final = ("Q4_0", "Q4_1")
CHUNK_ELEMENTS: Final = 4_000_000
"""Weights that are converted at once, so that memory does not grow with a tensor's size."""

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(source: Path, target: Path, *, type: GGUFType = "F16", name: str = "") -> None:  # noqa: A002 (the spec's word)
    """Write a Hugging Face folder as a GGUF file beside its configuration and tokenizer, a part of a tensor at a time.

    Norms and biases stay fp32, as llama.cpp wants them. With a 4-bit type the output head, which every token passes
    last (the embedding where the two are one), gets Q8_0.

    Args:
        source: Folder of a Llama-architecture model in Hugging Face format.
        target: Made if it is not there.
        type: How the weights are stored.
        name: How the file calls the model; empty takes the folder's name.

    Raises:
        DataError: The model or its tokenizer has something that llama.cpp has no word for; nothing is written then.
        ConfigError: The weights' rows cannot be cut into the type's blocks; nothing is written then.
    """
    config = read_config(source)
    metadata, types = check_gguf(source, type=type)
    shapes = _shapes(config)
    with WeightFiles(source, tied_embeddings=config.tied_embeddings) as files:
        files.check(shapes)
        target.mkdir(parents=True, exist_ok=True)
        partial = target / f"{GGUF_FILE}.partial"
        writer = gguf.GGUFWriter(partial, ARCHITECTURE)
        try:
            writer.add_name(name or source.name)
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type}"])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_metadata(writer, metadata)
            _write_tensors(writer, files, shapes=shapes, types=types, config=config)
            writer.close()
            partial.replace(target / GGUF_FILE)
        finally:
            writer.close()
            partial.unlink(missing_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and COMPANION_FILES.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)


def check_gguf(source: Path, *, type: GGUFType) -> tuple[Metadata, Mapping[str, gguf.GGMLQuantizationType]]:  # noqa: A002
    """Return what the file will say of the model, and how each weight will be stored, without looking at any weight.

    Raises:
        DataError: The model or its tokenizer has something that llama.cpp has no word for.
        ConfigError: The weights' rows cannot be cut into the type's blocks.
    """
    config = read_config(source)
    if config.family != "llama":
        raise DataError(f"Model folder {source}: GGUF files are written of the family llama alone, not {config.family}")
    metadata = {**_model_metadata(config, source=source), **tokenizer_metadata(source, vocab_size=config.vocab_size)}
    return metadata, {
        name: _tensor_type(name, shape, config=config, wanted=type) for name, shape in _shapes(config).items()
    }


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
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model = build_model(config).to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors.get(gguf_name(name))
            if tensor is None or tuple(reversed(tensor.shape.tolist())) != tuple(parameter.shape):
                raise DataError(f"Model folder {folder}: {GGUF_FILE} has no {gguf_name(name)} of {parameter.shape}")
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(parameter.shape).copy())
            parameter.copy_(_half_split(values, head_dim=config.head_dim) if _is_rotated(name) else values)
    return model.eval()


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a parameter with a name of Hugging Face's."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{_IN_BLOCK[match[2]]}.{kind}"
    return f"{_TOP[module]}.{kind}"


def _is_rotated(name: str) -> bool:
    return ".q_proj." in name or ".k_proj." in name


def _neighbours(rows: Tensor, *, head_dim: int) -> Tensor:
    """Reorder rows of whole heads from halves (dimension i with i + H/2) to neighbours (2i with 2i + 1)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def _half_split(rows: Tensor, *, head_dim: int) -> Tensor:
    """Undo `_neighbours`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def _tensor_type(
    name: str, shape: tuple[int, ...], *, config: ModelConfig, wanted: GGUFType
) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    found = gguf.GGMLQuantizationType["Q8_0" if name == head and wanted in FOUR_BIT else wanted]
    block, _ = gguf.GGML_QUANT_SIZES[found]
    if shape[-1] % block:
        raise ConfigError(
            f"gguf.type {wanted} needs weights whose rows are a multiple of {block} long, got {shape[-1]} in {name}",
            hint=f"Choose one of {', '.join(each for each in get_args(GGUFType) if 'Q' not in each)}.",
        )
    return found


def _model_metadata(config: ModelConfig, *, source: Path) -> Metadata:
    """What llama.cpp must know of the model beside its weights."""
    return {
        f"{ARCHITECTURE}.{key}": value
        for key, value in {
            "vocab_size": config.vocab_size,
            "context_length": config.max_positions,
            "embedding_length": config.hidden_size,
            "block_count": config.num_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_heads,
            "attention.head_count_kv": config.num_kv_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.norm_eps,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": config.rope.theta,
            **_rope_metadata(config, source=source),
        }.items()
    }


def _rope_metadata(config: ModelConfig, *, source: Path) -> Metadata:
    rope = config.rope
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if rope.kind == "yarn":
        usual = 1.0 if rope.factor <= 1 else 0.1 * float(np.log(rope.factor)) + 1.0
        if not rope.truncate or abs(rope.attention_scaling - usual) > 1e-6:
            raise DataError(
                f"Model folder {source}: GGUF has no word for its rope parameters truncate or attention_factor"
            )
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_max_positions,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
    if rope.kind == "dynamic":
        raise DataError(f"Model folder {source}: GGUF has no word for rope_type dynamic")
    return {}


def _rope_factors(config: ModelConfig) -> Tensor | None:
    """By what llama.cpp divides each frequency: the whole of the llama3 scaling."""
    if config.rope.kind != "llama3":
        return None
    given = {"head_dim": config.head_dim, "length": 0, "device": torch.device("cpu")}
    plain = type(config.rope)(theta=config.rope.theta)
    return plain.inverse_frequencies(**given) / config.rope.inverse_frequencies(**given)


def _add_metadata(writer: gguf.GGUFWriter, metadata: Metadata) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        add.get(type(value), writer.add_array)(key, value)


def _write_tensors(
    writer: gguf.GGUFWriter,
    files: WeightFiles,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, gguf.GGMLQuantizationType],
    config: ModelConfig,
) -> None:
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes)
    for name, shape in shapes.items():
        stored = gguf.quant_shape_to_byte_shape(shape, types[name])
        size = int(np.prod(stored))
        writer.add_tensor_info(gguf_name(name), stored, np.dtype(np.uint8), size, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for name, shape in shapes.items():
        num_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, types[name])))
        stored = np.empty((shape[0], num_bytes // shape[0]), dtype=np.uint8)
        for rows, values in _chunks(name, shape, files=files, config=config):
            stored[rows] = gguf.quantize(values.numpy(), types[name]).view(np.uint8).reshape(len(values), -1)
        writer.write_tensor_data(stored)


def _chunks(
    name: str, shape: tuple[int, ...], *, files: WeightFiles, config: ModelConfig
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a tensor's rows in fp32 and llama.cpp's order, some heads at a time."""
    step = max(1, CHUNK_ELEMENTS * shape[0] // int(np.prod(shape)) // config.head_dim) * config.head_dim
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        values = files.read(name, rows=rows).float()
        if not values.isfinite().all():
            raise DataError(f"Model folder {files.folder}: {name} has values that are not finite")
        yield rows, _neighbours(values, head_dim=config.head_dim) if _is_rotated(name) else values


def _open(file: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(file)
    except FileNotFoundError as error:
        raise DataError(f"Model folder {file.parent}: {file.name} is missing") from error
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"Model folder {file.parent}: {file.name} is not a whole GGUF file: {error}") from error


def _check_metadata(reader: gguf.GGUFReader, config: ModelConfig, *, folder: Path) -> None:
    for key, wanted in _model_metadata(config, source=folder).items():
        field = reader.get_field(key)
        found = field.contents() if field is not None else None
        if found != (np.float32(wanted) if isinstance(wanted, float) else wanted):
            raise DataError(f"Model folder {folder}: {key} in {GGUF_FILE} must be {wanted} by config.json, got {found}")
