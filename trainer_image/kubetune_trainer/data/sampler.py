"""Which rows make up a step, and how rows become the tensors of a micro batch.

The rows of a step are a function of the step alone: a resumed run asks for step 341 and gets what the interrupted one
would have had.

Shapes: B rows, T tokens of the longest row, rounded up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kubetune_trainer.data.store import Row
from kubetune_trainer.names import IGNORE_LABEL, PADDING_DOCUMENT


def total_steps(num_rows: int, *, global_batch_size: int, epochs: int | None, max_steps: int | None) -> int:
    """Returns how many optimizer steps a run has; with epochs, the last batch is filled up from the next pass.

    Args:
        num_rows: Rows of the training data.
        global_batch_size: Rows per step, over all ranks.
        epochs: Passes over the data, where max_steps is not given.
        max_steps: The number of steps itself.
    """
    if max_steps is not None:
        return max_steps
    if epochs is None:
        raise ValueError("a run has either epochs or max_steps, got neither")
    return math.ceil(epochs * num_rows / global_batch_size)


def rows_for_step(step: int, *, num_rows: int, global_batch_size: int, seed: int) -> list[int]:
    """Returns the rows of one optimizer step. Each pass has an order of its own; a batch may reach into the next pass.

    Args:
        step: Counted from 0.
        num_rows: Rows of the training data.
        global_batch_size: Rows per step, over all ranks.
        seed: Decides the order of every pass.
    """
    begin = step * global_batch_size
    return [
        int(_order(at // num_rows, num_rows, seed)[at % num_rows]) for at in range(begin, begin + global_batch_size)
    ]


@lru_cache(maxsize=2)
def _order(epoch: int, num_rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows side by side, filled up at the end to one length."""

    tokens: Tensor
    """Token ids, int64 (B, T)."""
    labels: Tensor
    """The next token where it is trained, IGNORE_LABEL elsewhere, int64 (B, T)."""
    documents: Tensor
    """Which sample of its row a token belongs to, PADDING_DOCUMENT for none, int64 (B, T)."""
    positions: Tensor
    """Place of a token in its sample, int64 (B, T)."""
    num_tokens: int
    """Tokens that are not padding."""
    trained_tokens: int
    """Labels that carry loss."""

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            documents=self.documents.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            num_tokens=self.num_tokens,
            trained_tokens=self.trained_tokens,
        )


def collate(rows: Sequence[Row], *, pad_id: int, multiple: int = 8) -> Batch:
    """Puts rows side by side.

    Args:
        rows: At least one.
        pad_id: The token that fills up; where it stands no position is trained or seen.
        multiple: T is a multiple of this, which matrix units like.
    """
    length = math.ceil(max(len(row.tokens) for row in rows) / multiple) * multiple
    labels = _stack([row.labels for row in rows], length=length, fill=IGNORE_LABEL)
    return Batch(
        tokens=_stack([row.tokens for row in rows], length=length, fill=pad_id),
        labels=labels,
        documents=_stack([row.documents for row in rows], length=length, fill=PADDING_DOCUMENT),
        positions=_stack([row.positions for row in rows], length=length, fill=0),
        num_tokens=sum(len(row.tokens) for row in rows),
        trained_tokens=int((labels != IGNORE_LABEL).sum()),
    )


def _stack(arrays: Sequence[np.ndarray], *, length: int, fill: int) -> Tensor:
    stacked = np.full((len(arrays), length), fill, dtype=np.int64)
    for target, array in zip(stacked, arrays, strict=True):
        target[: len(array)] = array
    return torch.from_numpy(stacked)
