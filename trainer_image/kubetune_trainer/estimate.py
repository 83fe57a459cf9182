"""What a run needs in memory, computed from the model's shape before any accelerator is used.

The largest parts, rather too high than too low: weights, gradients and optimizer state as FSDP shards them, what is
gathered for one block at a time, activations of one micro batch, a chunk of logits, and the runtime itself.
"""

from collections.abc import Mapping
from typing import Final

import torch
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from torch import nn

from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.lora import apply_lora, packed_layers
from kubetune_trainer.loss import CHUNK_TOKENS
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoder import NORMS, Decoder
from kubetune_trainer.model.weights import build_model
from kubetune_trainer.parallel import held_bytes, stays_whole

FP32: Final = 4
BF16: Final = 2
RUNTIME_BYTES: Final = 700 * 2**20
"""Python, torch and its kernels or the device's context."""
GATHERED_BLOCKS: Final = 2
"""FSDP gathers the next block while one computes."""


class Estimate(BaseModel):
    """The memory of one device, or of one process on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    memory_per_device_bytes: int
    """All parts together."""
    message: str
    """The parts by name."""


def count_parameters(shape: ModelConfig) -> int:
    """Returns how many parameters a model has, a tied output head counted once."""
    return _count(build_model(shape))


def estimate_memory(
    config: FineTuneConfig, shape: ModelConfig, *, others: Mapping[str, ModelConfig] | None = None
) -> Estimate:
    """Estimates what one rank needs at its peak.

    Args:
        config: The run; its number of nodes and processes says over how many ranks the weights are spread.
        shape: The model.
        others: The models that are asked beside it, by field.
    """
    model = build_model(shape)
    if config.lora is not None:
        apply_lora(model, **config.adapter_settings())
    ranks = config.run.num_nodes * config.run.processes_per_node
    trained = _count_trained(model)
    kept_trained = BF16 if config.training.precision == "BF16" else FP32
    frozen = sum(held_bytes(weight, _compute_type(config)) for weight in model.parameters() if not weight.requires_grad)
    parts = {
        "weights": trained * kept_trained // ranks + (frozen if _whole(model, config) else frozen // ranks),
        "gradients": trained * kept_trained // ranks,
        "optimizer": 2 * trained * kept_trained // ranks,
        "gathered weights": _gathered(model, config),
        "activations": activation_bytes(config, shape),
        "logits": CHUNK_TOKENS * shape.vocab_size * (2 * FP32 + _compute_bytes(config)),
        "runtime": RUNTIME_BYTES,
    }
    if config.qat is not None:
        parts["rounded weights"] = _rounded(model, config)
    asked = dict(others or {})
    for block, settings in (("dpo", config.dpo), ("kto", config.kto)):
        if settings is not None and settings.reference is None and config.lora is None:
            asked[f"{block}.reference"] = shape
    for field, other in asked.items():
        frozen_model = build_model(other).requires_grad_(requires_grad=False)
        held = _count(frozen_model) * _compute_bytes(config)
        parts[field.rpartition(".")[2]] = held if _whole(frozen_model, config) else held // ranks
    message = ", ".join(f"{name} {_readable(size)}" for name, size in parts.items())
    return Estimate(memory_per_device_bytes=sum(parts.values()), message=message)


def _gathered(model: Decoder, config: FineTuneConfig) -> int:
    """Returns the bytes of what FSDP has gathered: blocks in flight and the root's, or all that a small model trains.

    Whole gradients of a block come on top while it goes backward, and those of all adapters until the last micro batch.
    """
    blocks = [_bytes(block, config) for block in model.model.layers]
    root = _bytes(model, config) - sum(blocks)
    trained = _count_trained(model) * _compute_bytes(config)
    gradients = root + max(blocks) if config.lora is None else trained
    held = trained if _whole(model, config) else root + GATHERED_BLOCKS * max(blocks)
    return held + gradients + _unpacked(model, config)


def _unpacked(model: Decoder, config: FineTuneConfig) -> int:
    """Returns the bytes of the largest weight in NF4 while it is used, as numbers of the type that is computed in."""
    largest = max((layer.in_features * layer.out_features for layer in packed_layers(model).values()), default=0)
    return largest * _compute_bytes(config)


def _rounded(model: Decoder, config: FineTuneConfig) -> int:
    """Returns the bytes of the rounded weights that backward needs, and of which of them lay out of range."""
    blocks = [
        sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
        for block in model.model.layers
    ]
    kept = sum(blocks) if config.training.activation_checkpointing == "None" else max(blocks)
    return kept * (_compute_bytes(config) + 1)


def _whole(model: Decoder, config: FineTuneConfig) -> bool:
    return stays_whole(model, _compute_type(config))


def activation_bytes(config: FineTuneConfig, shape: ModelConfig) -> int:
    """Returns the bytes that the backward pass of one micro batch needs.

    Per token and block: of each norm the input in fp32, the scaled input and the output; queries, keys, values and the
    attention's output in fp32, the latter once more for the output projection, and a row of the mask; four times the
    inner width of the feed-forward block, or of the experts that a token passes, and the token's copies for each of
    them; where attention has a soft bound, two rows of its products in place of the mask's. Recomputation keeps the
    blocks' inputs and has one block whole at a time.
    """
    compute, length = _compute_bytes(config), config.dataset.max_sequence_length
    norm = shape.hidden_size * (FP32 + 2 * compute)
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * FP32
    output = shape.num_heads * shape.head_dim * compute
    # In fp32 a mask; with a soft bound, of each head the bounded products and their softmax.
    rows = length * FP32 * (1 if shape.attention_softcap is None else 2 * shape.num_heads)
    block = len(NORMS[shape.norm_places]) * norm + heads + output + rows + 4 * shape.token_width * compute
    if shape.experts is not None:
        block += shape.experts.num_chosen * shape.hidden_size * (2 * compute + FP32)
    root = 2 * norm
    if config.training.activation_checkpointing == "Full":
        blocks = shape.num_layers * shape.hidden_size * compute + block
    elif config.training.activation_checkpointing == "Selective":
        # What projections and attention return, and the copy of it that attention computes with.
        products = (
            2 * shape.token_width + 2 * shape.hidden_size + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        )
        blocks = (
            shape.num_layers * ((shape.hidden_size + products) * compute + shape.num_heads * shape.head_dim * FP32)
            + block
        )
    else:
        blocks = shape.num_layers * block
    sequences = config.training.micro_batch_size * (2 if config.rows == "Pairs" else 1)
    return sequences * length * (blocks + root)


def _compute_bytes(config: FineTuneConfig) -> int:
    return _compute_type(config).itemsize


def _compute_type(config: FineTuneConfig) -> torch.dtype:
    return torch.float32 if config.training.precision == "FP32" else torch.bfloat16


def _bytes(module: nn.Module, config: FineTuneConfig) -> int:
    return sum(held_bytes(weight, _compute_type(config)) for weight in module.parameters())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _readable(size: int) -> str:
    gibibytes = size / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{size / 2**20:.0f} MiB"
