"""What a run needs in memory, computed from the model's shape before any accelerator is used.

Weights, gradients and optimizer state as FSDP shards them, what is gathered of them for a moment, activations of one
micro batch, a chunk of logits, and the runtime itself, at that moment of a step at which most is held.
`benchmarks/estimate.py` holds all but the runtime against what real steps take on a CPU.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from torch import nn

from kubetune_trainer import distillation
from kubetune_trainer.compact_adamw import BLOCKS, CHUNK_NUMBERS
from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.lora import LoRALinear, apply_lora, packed_layers
from kubetune_trainer.loss import CHUNK_TOKENS
from kubetune_trainer.model.config import ModelConfig
from kubetune_trainer.model.decoder import NORMS, Decoder
from kubetune_trainer.model.recompute import is_worth_keeping
from kubetune_trainer.model.weights import build_model
from kubetune_trainer.optim import BITS, PIECE_NUMBERS
from kubetune_trainer.parallel import held_bytes, stays_whole
from kubetune_trainer.tensor_parallel import shape_of_rank

FP32: Final = 4
BF16: Final = 2
FP64: Final = 8
RUNTIME_BYTES: Final = 700 * 2**20
"""Python, torch and its kernels or the device's context."""
KERNEL_BYTES: Final = 24 * 2**20
"""What libraries take for themselves once they work: threads, kernels made at run time, buffers between ranks."""
GATHERED_BLOCKS: Final = 2
"""FSDP gathers the next block while one computes."""
OFFLOADED_BLOCKS: Final = 2
"""With training.activation_offload, blocks whose activations are on the device: one computes, one is on its way."""


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
    """Estimates what one rank needs at its peak; takes what `estimate_parts` does."""
    parts = estimate_parts(config, shape, others=others)
    message = ", ".join(f"{name} {_readable(size)}" for name, size in parts.items() if size)
    if host := host_bytes(config, shape, others=others):
        message += f"; {_readable(host)} in the host's memory"
    return Estimate(memory_per_device_bytes=sum(parts.values()), message=message)


def estimate_parts(
    config: FineTuneConfig, shape: ModelConfig, *, others: Mapping[str, ModelConfig] | None = None
) -> dict[str, int]:
    """Returns the bytes that one rank holds at the moment of a step at which it holds most, by part.

    Args:
        config: The run; its number of nodes and processes, and `training.parallelism`, say over how many ranks the
            weights are spread.
        shape: The model.
        others: The models that are asked beside it, by field.
    """
    shape, model, asked = _models(config, shape, others)
    beside = {field.rpartition(".")[2]: _asked_bytes(other, config) for field, other in asked.items()}
    if _keeps_first_adapters(config) and not config.training.cpu_offload:
        beside["reference"] = _first_adapters_bytes(config, model)
    moments = (moment | beside | {"runtime": RUNTIME_BYTES} for moment in _moments(config, shape, model))
    return max(moments, key=lambda moment: sum(moment.values()))


def host_bytes(config: FineTuneConfig, shape: ModelConfig, *, others: Mapping[str, ModelConfig] | None = None) -> int:
    """Returns what one rank keeps in the host's memory in place of the device's; takes what `estimate_parts` does."""
    training = config.training
    # Compiled, since a compiler leaves nothing to be made again either.
    here = training.model_copy(update={"activation_offload": False, "cpu_offload": False, "compile": "Blocks"})
    on_device, away = config.model_copy(update={"training": here}), 0
    if training.activation_offload:
        tokens, kept, _ = _activations(on_device, shape_of_rank(shape, training.parallelism.tensor))
        away += tokens * kept
    if training.cpu_offload:
        shape, model, asked = _models(config, shape, others)
        at_its_end = _moments(on_device, shape, model)[-1]
        away += sum(at_its_end[name] for name in ("weights", "gradients", "optimizer"))
        away += sum(_asked_bytes(other, on_device) for other in asked.values())
        away += _first_adapters_bytes(config, model) if _keeps_first_adapters(config) else 0
    return away


def _models(
    config: FineTuneConfig, shape: ModelConfig, others: Mapping[str, ModelConfig] | None
) -> tuple[ModelConfig, Decoder, dict[str, ModelConfig]]:
    """Returns a rank's part of the model that is trained, its shape, and those of models that are only asked."""
    tensor = config.training.parallelism.tensor
    shape = shape_of_rank(shape, tensor)
    model = build_model(shape)
    if config.lora is not None:
        apply_lora(model, **config.adapter_settings(), trained_ids=range(len(config.lora.train_tokens)))
    asked = {field: shape_of_rank(other, tensor) for field, other in (others or {}).items()}
    for block, settings in (("dpo", config.dpo), ("kto", config.kto)):
        if settings is not None and settings.reference is None and config.lora is None:
            asked[f"{block}.reference"] = shape
    return shape, model, asked


def _keeps_first_adapters(config: FineTuneConfig) -> bool:
    """Returns whether the reference is the trained model with the adapters that training began with."""
    begins = config.lora is not None and config.lora.adapter is not None
    return begins and any(block is not None and block.reference is None for block in (config.dpo, config.kto))


def _first_adapters_bytes(config: FineTuneConfig, model: Decoder) -> int:
    """Returns what a rank holds of a copy of the adapters."""
    return _count_trained(model) * _kept_bytes(config) // _ranks(config)


def _asked_bytes(shape: ModelConfig, config: FineTuneConfig) -> int:
    """Returns what a rank holds of a model that is only asked."""
    model = build_model(shape).requires_grad_(requires_grad=False)
    if config.training.cpu_offload:
        return _flying(model, config)
    held = _count(model) * _compute_bytes(config)
    return held if _whole(model, config) else held // _ranks(config)


def _moments(config: FineTuneConfig, shape: ModelConfig, model: Decoder) -> list[dict[str, int]]:
    """Returns what is held at the moments of a step of which one is the peak: the parts by name.

    At the loss all activations wait for their gradients. The first block that goes backward has temporaries beside
    them. At the end of backward, FSDP copies and reduces the gradients of embedding and output head; without FSDP those
    of one that is both are added up. Clipping squares pieces of a gradient in fp64, and an optimizer of few bits
    unpacks pieces of its state. Gradients lie beside activations only where an earlier micro batch left them. With
    cpu_offload weights, gradients and optimizer are in the host's memory, and nothing but what is gathered is here.
    """
    ranks, compute, kept_trained = _ranks(config), _compute_bytes(config), _kept_bytes(config)
    trained, whole = _count_trained(model), _whole(model, config)
    frozen = sum(held_bytes(weight, _compute_type(config)) for weight in model.parameters() if not weight.requires_grad)
    here = 0 if config.training.cpu_offload else 1
    gradients = here * trained * kept_trained // ranks
    left = 0 if config.training.optimizer_in_backward else gradients
    earlier = gradients if _adds_up(config) else 0
    always = {
        "weights": gradients + here * (frozen if whole else frozen // ranks),
        "optimizer": here * int(2 * trained * _moment_bytes(config)) // ranks,
    }
    brief = (_brief_alone if _is_alone(config) else _brief_sharded)(config, shape, model)
    held = brief.weights + _unpacked(model, config)
    in_root = _root(model) * kept_trained // ranks if config.lora is None else 0
    largest = max(weight.numel() for weight in model.parameters() if weight.requires_grad)
    tokens, kept, again = _activations(config, shape)
    temporary = (4 * shape.token_width + shape.hidden_size) * compute
    logits = _logits(config, shape, tokens)
    rows, updates = tokens * shape.hidden_size * compute, _updates(model, config)
    # With trained tokens the output head as it is with their rows, and its gradient.
    replaced = 2 * shape.vocab_size * shape.hidden_size * compute if config.lora and config.lora.train_tokens else 0
    rounded = {"rounded weights": _rounded(model, config)} if config.qat is not None else {}
    varying = [
        rounded
        | {
            "gradients": earlier,
            "gathered": held + brief.of_head + replaced,
            "activations": tokens * kept + rows + updates,
            "logits": logits,
        },
        rounded
        | {
            "gradients": earlier,
            "gathered": held + brief.of_head + brief.of_block,
            "activations": tokens * (kept + again + temporary) + updates,
        },
        {
            "gradients": earlier or max(0, left - in_root),
            "gathered": brief.at_end,
        },
        {"gradients": left, "gathered": here * min(largest // ranks, PIECE_NUMBERS) * FP64},
        {"gradients": left, "gathered": here * min(largest // ranks, CHUNK_NUMBERS) * _step_bytes(config)},
    ]
    names = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", *rounded)
    return [{name: (always | each).get(name, 0) for name in names} | {"kernels": KERNEL_BYTES} for each in varying]


class Brief(NamedTuple):
    """Bytes of weights and gradients that are there for a part of a step, beside what is kept."""

    weights: int
    """Copies in the type that is computed in, gathered or not, while blocks compute."""
    of_head: int
    """The output head's gradient, which is there while all blocks go backward; of adapters what waits like it."""
    of_block: int
    """The gradients of the block that goes backward."""
    at_end: int
    """What is there when embedding and output head have their gradients."""


def _brief_alone(config: FineTuneConfig, shape: ModelConfig, model: Decoder) -> Brief:
    """Returns it without FSDP: copies of adapters wait for backward, those of a block are made again."""
    compute, kept_trained, is_full = _compute_bytes(config), _kept_bytes(config), config.lora is None
    head, block = shape.vocab_size * shape.hidden_size, max(map(_count, model.model.layers))
    converted = head + block if is_full else _count_trained(model)
    weights = converted * compute if compute != kept_trained else 0
    of_head = head * kept_trained if is_full else 0
    of_block = block * kept_trained if is_full else 0
    return Brief(weights, of_head, of_block, at_end=2 * of_head)


def _brief_sharded(config: FineTuneConfig, shape: ModelConfig, model: Decoder) -> Brief:
    """Returns it with FSDP, which reduces the gradients of adapters together, when all are there."""
    compute, whole, is_full = _compute_bytes(config), _whole(model, config), config.lora is None
    trained, root = _count_trained(model), _root(model)
    weights = trained * compute if whole else _flying(model, config)
    of_head = (shape.vocab_size * shape.hidden_size if is_full else trained) * compute
    of_block = max(map(_count, model.model.layers)) * compute if is_full else 0
    reduced = root * (compute + FP32 + (FP32 if _adds_up(config) else 0)) if is_full else of_head
    gathered = root * compute if is_full or not whole else 0
    return Brief(weights, of_head, of_block, at_end=gathered + reduced)


def _adds_up(config: FineTuneConfig) -> bool:
    """Returns whether gradients of earlier micro batches wait on the device while another goes backward."""
    return config.accumulation_steps(_world(config)) > 1 and not config.training.cpu_offload


def _world(config: FineTuneConfig) -> int:
    return config.run.num_nodes * config.run.processes_per_node


def _ranks(config: FineTuneConfig) -> int:
    """Returns over how many ranks a copy of the weights, or of a tensor group's part of them, is sharded."""
    shared = config.training.parallelism
    return max(1, _world(config) // (shared.replicate * shared.tensor))


def _is_alone(config: FineTuneConfig) -> bool:
    """Returns whether the run is one rank that goes without FSDP: see `parallelize`."""
    training = config.training
    converts = config.lora is None and training.precision == "BF16Mixed"
    keeps_copies = config.qat is not None or training.compile == "Blocks" or training.activation_offload
    return _world(config) == 1 and not training.cpu_offload and not (converts and keeps_copies)


def _flying(model: Decoder, config: FineTuneConfig) -> int:
    """Returns the bytes that FSDP has gathered of a model while its blocks compute."""
    in_blocks = [_bytes(block, config) for block in model.model.layers]
    return _bytes(model, config) - sum(in_blocks) + GATHERED_BLOCKS * max(in_blocks)


def _logits(config: FineTuneConfig, shape: ModelConfig, tokens: int) -> int:
    """Returns the bytes of the logits of a chunk and of what is made of them."""
    if config.distillation is not None:
        rows = min(distillation.CHUNK_TOKENS, tokens)
        return rows * shape.vocab_size * distillation.CHUNK_COPIES * FP32
    return min(CHUNK_TOKENS, tokens) * shape.vocab_size * _logit_copies(config, shape) * FP32


def _logit_copies(config: FineTuneConfig, shape: ModelConfig) -> int:
    """Returns how many numbers there are of a logit at once: itself, its logarithm, gradients, and what bounds it."""
    if config.rows != "Samples":  # whose log-probabilities are summed by answer, by autograd
        return 4 if shape.logit_softcap is None else 5
    return 2 if shape.logit_softcap is None else 4


def _unpacked(model: Decoder, config: FineTuneConfig) -> int:
    """Returns the bytes of the largest weight in NF4 while it is used, as numbers of the type that is computed in."""
    largest = max((layer.in_features * layer.out_features for layer in packed_layers(model).values()), default=0)
    return largest * _compute_bytes(config)


def _rounded(model: Decoder, config: FineTuneConfig) -> int:
    """Returns the bytes of the rounded weights that backward needs, and of which of them lay out of range.

    With adapters also those of the layer whose weight, update and sum, or their gradients, are there in fp32.
    """
    blocks = [
        sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
        for block in model.model.layers
    ]
    num_kept = _blocks_kept(config, len(blocks)) if config.training.activation_checkpointing == "None" else 1
    kept = sum(blocks) if num_kept == len(blocks) else num_kept * max(blocks)
    largest = max(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, nn.Linear))
    return kept * (_compute_bytes(config) + 1) + (3 * largest * FP32 if config.lora is not None else 0)


def _updates(model: Decoder, config: FineTuneConfig) -> int:
    """Returns the bytes of adapters' whole updates, which DoRA and QAT make in fp32 and Selective keeps if worth it."""
    lora, makes_whole = config.lora, config.tuning == "DoRA" or config.qat is not None
    if lora is None or not makes_whole or config.training.activation_checkpointing != "Selective":
        return 0
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, LoRALinear)]
    return FP32 * sum(layer.weight.numel() for layer in layers if is_worth_keeping(lora.rank, layer.in_features))


def _blocks_kept(config: FineTuneConfig, num_blocks: int) -> int:
    """Returns of how many blocks the device keeps activations at once: of one, and one whose own come or go."""
    return min(OFFLOADED_BLOCKS, num_blocks) if config.training.activation_offload else num_blocks


def _whole(model: Decoder, config: FineTuneConfig) -> bool:
    return stays_whole(model, _compute_type(config)) and not config.training.cpu_offload


def activation_bytes(config: FineTuneConfig, shape: ModelConfig) -> int:
    """Returns the bytes that the backward pass of one micro batch needs.

    Recomputation keeps the blocks' inputs, Selective their products too, and has one block whole at a time. Offloading
    has two blocks' at a time, of what is kept.
    """
    tokens, kept, again = _activations(config, shape)
    return tokens * (kept + again)


def _activations(config: FineTuneConfig, shape: ModelConfig) -> tuple[int, int, int]:
    """Returns the tokens of a micro batch; per token, the bytes that are kept, and those of a block made again.

    Per token and block: of each norm the input, and the scaled input if its weight is trained; queries, keys, values
    and the attention's output (in fp32 on a CPU that has bf16 but no AMX, which is passed over); twice the inner width
    of the feed-forward block, or of the experts that a token passes, and the token's copies for each of them; where
    attention has a soft bound, two rows of its products. Where nothing of a block is made again by itself, also the
    norms' outputs and the inner width once more. A row of each mask once for all blocks.
    """
    compute, length = _compute_bytes(config), config.dataset.max_sequence_length
    num_norms = len(NORMS[shape.norm_places])
    scaled = 0 if config.lora is not None else compute if shape.norm_style == "Llama" else FP32
    norm = shape.hidden_size * (compute + scaled)
    num_kv_heads = shape.num_kv_heads if shape.attention_softcap is None else shape.num_heads  # they are copied there
    heads = 2 * (shape.num_heads + num_kv_heads) * shape.head_dim * compute
    # A mask for all blocks of a window; with a soft bound, of each head the bounded products and their softmax in fp32.
    within = {window for window in shape.windows if window is not None and window < length}
    masks = len(within) + (config.dataset.packing == "BestFit" and None in shape.windows)
    mask = masks * length * compute if shape.attention_softcap is None else 0
    rows = 0 if shape.attention_softcap is None else length * FP32 * 2 * shape.num_heads
    block = num_norms * norm + heads + rows + 2 * shape.token_width * compute
    if shape.experts is not None:
        block += shape.experts.num_chosen * shape.hidden_size * 2 * compute
    # What projections and attention return, and the copy of it that attention computes with.
    width = 2 * shape.token_width + 2 * shape.hidden_size + (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    beside, products = _beside_layers(config, shape)
    block += beside
    whole = block + (num_norms * shape.hidden_size + shape.token_width) * compute
    if shape.attention_softcap is not None and is_worth_keeping(shape.head_dim, length):
        products += shape.num_heads * length * compute
    training = config.training
    each = {
        "None": whole if training.activation_offload or training.compile == "Blocks" else block,
        "Selective": (shape.hidden_size + width) * compute + shape.num_heads * shape.head_dim * compute + products,
        "Full": shape.hidden_size * compute,
    }[training.activation_checkpointing]
    again = whole - each if training.activation_checkpointing == "None" else whole
    sequences = training.micro_batch_size * (2 if config.rows == "Pairs" else 1)
    around = 6 * shape.hidden_size * compute + mask  # of the last norm, and of the embedding
    return sequences * length, _blocks_kept(config, shape.num_layers) * each + around, again


def _beside_layers(config: FineTuneConfig, shape: ModelConfig) -> tuple[int, int]:
    """Returns what the linear layers of a block keep of a token beside their inputs, and what Selective does of it.

    DoRA keeps each adapted layer's output and its update; dropout the mask and what it leaves of the input; activations
    in int8 are kept as numbers, rounded, and with which were out of range. Of a product with adapters Selective keeps
    the inner one, and the update where it is worth it.
    """
    compute, lora, qat = _compute_bytes(config), config.lora, config.qat
    rounds_inputs = qat is not None and qat.scheme == "Int8DynamicActivationInt4Weight"
    if lora is None and not rounds_inputs:
        return 0, 0
    model = build_model(shape)
    if lora is not None:
        apply_lora(model, **config.adapter_settings())
    most, most_kept = 0.0, 0.0
    for block in model.model.layers:
        beside = kept = 0.0
        for name, layer in block.named_modules():
            is_adapted = isinstance(layer, LoRALinear)
            if not is_adapted and not (rounds_inputs and isinstance(layer, nn.Linear) and "lora_" not in name):
                continue
            # Of a mixture, the experts that a token passes.
            part = shape.experts.num_chosen / shape.experts.num_experts if shape.experts and ".experts." in name else 1
            if rounds_inputs:
                beside += part * layer.in_features * (2 * compute + 1)
            if is_adapted and lora is not None and qat is None:
                update = layer.out_features if is_worth_keeping(lora.rank, layer.out_features) else 0
                kept += part * (lora.rank + update) * compute
                beside += part * 2 * layer.out_features * compute if config.tuning == "DoRA" else 0
                beside += part * 2 * layer.in_features * compute if lora.dropout else 0
        most, most_kept = max(most, beside), max(most_kept, kept)
    return int(most), int(most_kept)


def _moment_bytes(config: FineTuneConfig) -> float:
    """Returns the bytes of a number of one of the optimizer's moments, its share of a scale included."""
    bits = BITS[config.training.optimizer]
    if bits is None:
        return BF16 if config.training.precision == "BF16" else FP32
    return bits / 8 + FP32 / BLOCKS[bits]


def _step_bytes(config: FineTuneConfig) -> int:
    """Returns the bytes that the optimizer's step takes for each number of the chunk that it has at once."""
    return 8 * FP32 if BITS[config.training.optimizer] is not None else 0


def _kept_bytes(config: FineTuneConfig) -> int:
    """Returns the bytes of a trained weight, and of its gradient, as they are kept."""
    return BF16 if config.training.precision == "BF16" else FP32


def _compute_bytes(config: FineTuneConfig) -> int:
    return _compute_type(config).itemsize


def _compute_type(config: FineTuneConfig) -> torch.dtype:
    return torch.float32 if config.training.precision == "FP32" else torch.bfloat16


def _bytes(module: nn.Module, config: FineTuneConfig) -> int:
    return sum(held_bytes(weight, _compute_type(config)) for weight in module.parameters())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _root(model: Decoder) -> int:
    """Returns how many weights are not in blocks."""
    return _count(model) - sum(map(_count, model.model.layers))


def _count_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _readable(size: int) -> str:
    gibibytes = size / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{size / 2**20:.0f} MiB"
