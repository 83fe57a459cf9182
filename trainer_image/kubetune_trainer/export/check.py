"""Whether a merged model computes what the model with its adapters beside it does, before an output is called good.

Both sides run block by block in fp32 on the CPU, over the first tokens of a few rows: the sources' files with adapters
beside the layers on one side, the files that were written on the other. Neither model is ever in memory as a whole.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from kubetune_trainer.data.sampler import Batch, collate
from kubetune_trainer.data.store import DataStore
from kubetune_trainer.errors import DataError
from kubetune_trainer.lora import A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX, LoRALinear, QLoRALinear
from kubetune_trainer.model.blockwise import BlockwiseLogits
from kubetune_trainer.model.config import read_config
from kubetune_trainer.model.decoder import Block
from kubetune_trainer.model.weights import WeightFiles
from kubetune_trainer.names import PADDING_DOCUMENT
from kubetune_trainer.trained_tokens import rows_by_token

NUM_ROWS: Final = 4
NUM_TOKENS: Final = 128
"""How much is compared: the first tokens of the first rows."""
BOUNDS: Final = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""How large the difference of the logits may be beside the logits, by the type that merged weights are rounded to."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two models' logits are from each other."""

    relative: float
    """Root mean square of the differences, divided by that of the logits, each less the mean of its position."""
    largest: float
    """The largest difference of two logits."""
    bound: float
    """What `relative` may be at most."""


class MergeCheck:
    """Compares merged folders with the source and its adapters.

    Args:
        source: Folder of the model that the adapters were trained on.
        adapters: What `lora_state_dict` gathered.
        scale: What updates are multiplied with.
        packed: Whether they are merged into what the weights are in NF4.
        batches: What both sides compute.
    """

    def __init__(
        self, source: Path, adapters: Mapping[str, Tensor], *, scale: float, packed: bool, batches: Sequence[Batch]
    ) -> None:
        self._batches = batches
        self._weight = next(name.removesuffix(A_SUFFIX) for name in adapters if name.endswith(A_SUFFIX)) + ".weight"

        def adapt(name: str, block: Block, _passes: Iterable[Batch]) -> None:
            for inner, layer in list(block.named_modules()):
                full = f"{name}.{inner}"
                if full + A_SUFFIX in adapters:
                    parent, _, last = inner.rpartition(".")
                    adapted = _beside(layer, full, adapters, scale=scale, packed=packed)
                    setattr(block.get_submodule(parent), last, adapted)

        self._wanted = BlockwiseLogits(source, batches, visit=adapt, rows=rows_by_token(adapters))

    def difference(self, merged: Path) -> Difference:
        """Return how far a folder is from the model with adapters.

        Raises:
            DataError: It is farther than rounding can bring it, or computes something that is no number.
        """
        found, squares, reference, largest = BlockwiseLogits(merged, self._batches), 0.0, 0.0, 0.0
        for batch in self._batches:
            is_real = batch.documents != PADDING_DOCUMENT
            wanted, given = _centred(self._wanted(batch)[is_real]), _centred(found(batch)[is_real])
            squares += (given - wanted).square().sum().item()
            reference += wanted.square().sum().item()
            largest = max(largest, (given - wanted).abs().max().item())
        with WeightFiles(merged, tied_embeddings=read_config(merged).tied_embeddings) as files:
            dtype = files.dtype(self._weight)
        result = Difference(relative=math.sqrt(squares / reference), largest=largest, bound=BOUNDS[dtype])
        if not result.relative <= result.bound:
            raise DataError(
                f"merged weights must compute what the adapters do: their logits may differ by {result.bound:g} of the "
                f"logits' size in {str(dtype).removeprefix('torch.')}, and differ by {result.relative:.3g}",
                hint="The checkpoints are sound; an output of type PEFT needs no merging.",
            )
        return result


def rows_to_check(data: DataStore, *, pad_id: int) -> list[Batch]:
    """Return the rows that are compared, each by itself, cut to few tokens."""
    rows = [data[number] for number in range(min(NUM_ROWS, len(data)))]
    return [collate([row.part(0, min(NUM_TOKENS, len(row.tokens)))], pad_id=pad_id) for row in rows]


def _centred(logits_NV: Tensor) -> Tensor:
    """Take away what all logits of a position have in common, which no probability depends on."""
    return logits_NV - logits_NV.mean(dim=-1, keepdim=True)


def _beside(layer: nn.Linear, name: str, adapters: Mapping[str, Tensor], *, scale: float, packed: bool) -> LoRALinear:
    """Return a layer with its adapter beside it, in fp32."""
    lora_a, lora_b = adapters[name + A_SUFFIX], adapters[name + B_SUFFIX]
    magnitude = adapters.get(name + MAGNITUDE_SUFFIX)
    if packed:
        adapted: LoRALinear = QLoRALinear(layer, rank=len(lora_a), scale=scale, dropout=0.0)
    else:
        has_magnitude = magnitude is not None
        adapted = LoRALinear(layer, rank=len(lora_a), scale=scale, dropout=0.0, has_magnitude=has_magnitude)
    adapted.lora_A.weight.copy_(lora_a)
    adapted.lora_B.weight.copy_(lora_b)
    if adapted.lora_magnitude_vector is not None and magnitude is not None:
        adapted.lora_magnitude_vector.copy_(magnitude)
    return adapted.eval()
