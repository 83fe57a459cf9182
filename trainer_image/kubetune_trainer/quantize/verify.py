"""How far a quantized model is from the one that it was made from: of both, what they say of the next token.

Knows no model and no format: both sides are functions from a batch to its logits, so that whatever runs a model can be
compared. Only the positions that carry a label count.

Shapes: B batch, T tokens, V vocab_size, N positions with a label.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.errors import DataError
from kubetune_trainer.names import IGNORE_LABEL

Logits = Callable[[Batch], Tensor]
"""Returns the logits of a batch, (B, T, V)."""
CHUNK_POSITIONS = 256
"""Positions that are compared at once: distributions over large vocabularies take much memory."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two models say of the same data."""

    tokens: int
    """Positions that were compared."""
    source_perplexity: float
    """Of the model that the other was made from."""
    perplexity: float
    """Of the other."""
    mean_kl: float
    """Mean Kullback-Leibler divergence from the source's distribution of the next token to the other's, in nats."""
    top_token_agreement_percent: float
    """Part of the positions at which both find the same token most likely."""
    max_logit_difference: float
    """Largest difference between two logits."""

    @property
    def perplexity_increase_percent(self) -> float:
        """How much higher the perplexity is than the source's."""
        return 100 * (self.perplexity / self.source_perplexity - 1)


@torch.inference_mode()
def compare(source_logits: Logits, artifact_logits: Logits, batches: Iterable[Batch]) -> Comparison:
    """Compare two models on data.

    Args:
        source_logits: The model that the other was made from.
        artifact_logits: The other.
        batches: The data; with a row each, least memory is needed.

    Raises:
        DataError: One of the models computes something that is no number, or there is nothing to compare.
    """
    tokens, agreed, largest = 0, 0, 0.0
    source_loss = loss = divergence = 0.0
    for batch in batches:
        has_label_BT = batch.labels != IGNORE_LABEL
        labels_N = batch.labels[has_label_BT]
        source_NV = _of_labels(source_logits(batch), has_label_BT, what="source")
        artifact_NV = _of_labels(artifact_logits(batch), has_label_BT, what="output")
        tokens += len(labels_N)
        for begin in range(0, len(labels_N), CHUNK_POSITIONS):
            part = slice(begin, begin + CHUNK_POSITIONS)
            ours, theirs, labels = source_NV[part].float(), artifact_NV[part].float(), labels_N[part]
            agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            largest = max(largest, (ours - theirs).abs().max().item())
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            source_loss += functional.nll_loss(ours, labels, reduction="sum").item()
            loss += functional.nll_loss(theirs, labels, reduction="sum").item()
            divergence += functional.kl_div(theirs, ours, log_target=True, reduction="sum").item()
    if not tokens:
        raise DataError("there is no token to compare the models on", hint="Look at verify.dataset.trainOn.")
    return Comparison(
        tokens=tokens,
        source_perplexity=_exp(source_loss / tokens),
        perplexity=_exp(loss / tokens),
        mean_kl=max(0.0, divergence / tokens),
        top_token_agreement_percent=100 * agreed / tokens,
        max_logit_difference=largest,
    )


def _of_labels(logits_BTV: Tensor, has_label_BT: Tensor, *, what: str) -> Tensor:
    logits_NV = logits_BTV.cpu()[has_label_BT]
    if not logits_NV.isfinite().all():
        raise DataError(f"the {what}'s logits must be finite numbers, and some are not")
    return logits_NV


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
