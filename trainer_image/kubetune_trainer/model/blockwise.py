"""Run a stored model over batches with the weights of one block in memory at a time.

For work that needs a model's activations and not its speed, on machines that the whole model does not fit on. The
residual streams of all batches are kept instead, which is little for the few rows that calibration and verification
look at.

Shapes: B batch, T tokens, D hidden_size, V vocab_size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.loss import soft_capped
from kubetune_trainer.model.attention import LayerInputs, attention_mask
from kubetune_trainer.model.config import ModelConfig, read_config
from kubetune_trainer.model.decoder import Block
from kubetune_trainer.model.weights import WeightFiles, build_model

Module = TypeVar("Module", bound=nn.Module)
BlockVisitor = Callable[[str, Block, Iterable[Batch]], None]
"""Called with a block's name, the block with its weights, and what sends each batch through it and yields it then."""
Rows = Mapping[str, Mapping[int, Tensor]]
"""Rows of tables by the table's name and the token."""


class BlockwiseLogits:
    """The logits of a stored model for batches that are known beforehand.

    Args:
        source: Complete model in Hugging Face format, not quantized.
        batches: What it will be asked for, these very objects.
        device: Where it computes, in fp32.
        visit: As in `pass_blocks`.
        rows: As in `pass_blocks`, and of the output head.

    Raises:
        DataError: The folder is incomplete or damaged.
    """

    def __init__(
        self,
        source: Path,
        batches: Sequence[Batch],
        *,
        device: torch.device | str = "cpu",
        visit: BlockVisitor = lambda *_: None,
        rows: Rows = MappingProxyType({}),
    ) -> None:
        config = read_config(source)
        streams = pass_blocks(source, batches, device=device, visit=visit, rows=rows)
        model = build_model(config)
        with WeightFiles(source, tied_embeddings=config.tied_embeddings) as files, torch.inference_mode():
            norm = _load(model.model.norm, "model.norm", files, device=device)
            self._streams = {id(batch): norm(x_BTD) for batch, x_BTD in zip(batches, streams, strict=True)}
            head = "model.embed_tokens" if config.tied_embeddings else "lm_head"
            self._head = _load(model.get_submodule(head), head, files, device=device).weight
            for token, row in rows.get(head, {}).items():
                self._head[token].copy_(row)
        self._softcap = config.logit_softcap
        self._batches = batches  # kept, so that no other object can get the id of one of them

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits of one of the batches, (B, T, V)."""
        return soft_capped(functional.linear(self._streams[id(batch)], self._head), self._softcap)


@torch.inference_mode()
def pass_blocks(
    source: Path,
    batches: Sequence[Batch],
    *,
    device: torch.device | str = "cpu",
    visit: BlockVisitor = lambda *_: None,
    rows: Rows = MappingProxyType({}),
) -> list[Tensor]:
    """Send batches through the embedding and all blocks, one block after the other.

    Args:
        source: Complete model in Hugging Face format, not quantized.
        batches: The data.
        device: Where it computes, in fp32.
        visit: May look at each block's activations and change its weights before the batches pass through it.
        rows: Rows of the embedding, by its name and token, in the place of those in the files.

    Returns:
        The residual stream of each batch behind the last block, (B, T, D).

    Raises:
        DataError: The folder is incomplete or damaged.
    """
    config = read_config(source)
    model = build_model(config)
    with WeightFiles(source, tied_embeddings=config.tied_embeddings) as files:
        files.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
        given = rows.get("model.embed_tokens", {})
        streams = [model.model.embed_tokens.scaled(x_BTD).to(device) for x_BTD in _embed(files, batches, given)]
        for number, block in enumerate(model.model.layers):
            name = f"model.layers.{number}"
            _load(block, name, files, device=device)
            visit(name, block, _passes(block, batches, streams, config))
            for at, batch in enumerate(batches):
                streams[at] = _run(block, batch, streams[at], config)
            block.to("meta")
    return streams


def _embed(files: WeightFiles, batches: Sequence[Batch], given: Mapping[int, Tensor]) -> list[Tensor]:
    """Look tokens up, reading only the rows that are asked for: the whole embedding may be larger than a block."""
    ids = torch.cat([batch.tokens.flatten() for batch in batches]).unique()
    rows = [
        given[token] if token in given else files.read("model.embed_tokens.weight", rows=slice(token, token + 1))[0]
        for token in ids.tolist()
    ]
    table = torch.stack([row.float() for row in rows])
    return [table[torch.searchsorted(ids, batch.tokens)] for batch in batches]


def _passes(block: Block, batches: Sequence[Batch], streams: Sequence[Tensor], config: ModelConfig) -> Iterator[Batch]:
    for batch, x_BTD in zip(batches, streams, strict=True):
        _run(block, batch, x_BTD, config)
        yield batch


def _run(block: Block, batch: Batch, x_BTD: Tensor, config: ModelConfig) -> Tensor:
    mask = attention_mask(batch.tokens, batch.documents, None)
    mask = None if mask is None else mask.to(x_BTD.device)
    inputs = LayerInputs(config, batch.positions.to(x_BTD.device), mask=mask, dtype=torch.float32)
    return block(x_BTD, *inputs.of(block.self_attn.layer), None)


def _load(module: Module, name: str, files: WeightFiles, *, device: torch.device | str) -> Module:
    module.float().to_empty(device=device)
    for inner, parameter in module.named_parameters():
        parameter.data.copy_(files.read(f"{name}.{inner}", rows=slice(None)))
    return module
