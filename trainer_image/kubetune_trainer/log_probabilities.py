"""How probable a model finds given tokens, without ever holding all logits.

Shapes: B sequences, T tokens, D hidden_size, V vocab_size, N trained positions, C positions of a chunk.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.loss import CHUNK_TOKENS, soft_capped
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.names import IGNORE_LABEL


def label_log_probabilities(model: Decoder, batch: Batch, labels_BT: Tensor) -> Tensor:
    """Return the log-probability that a model gives each label of a batch, fp32 (B, T), 0 where there is none."""
    score = partial(token_log_probabilities, labels_BT=labels_BT)
    return model(batch.tokens, positions_BT=batch.positions, documents_BT=batch.documents, score=score)  # type: ignore[no-any-return]


def token_log_probabilities(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    softcap: float | None,
    *,
    labels_BT: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Return the log-probability of each label, fp32 (B, T), 0 where there is none.

    Logits exist for one chunk of positions at a time, and once more in the backward pass.

    Args:
        hidden_BTD: The normalised residual stream.
        head_VD: The output head.
        softcap: Bound of the logits, see `soft_capped`.
        labels_BT: Target of each position, already shifted, -100 where there is none.
        chunk_tokens: Positions of a chunk.
    """
    scored_BT = labels_BT != IGNORE_LABEL
    hidden_ND, labels_N = hidden_BTD[scored_BT], labels_BT[scored_BT]
    chunks = [
        checkpoint(
            _of_chunk, hidden_CD, head_VD, softcap, labels_C, use_reentrant=False, preserve_rng_state=False
        )
        for hidden_CD, labels_C in zip(hidden_ND.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True)
    ]  # fmt: skip
    found_BT = torch.zeros(labels_BT.shape, dtype=torch.float32, device=hidden_BTD.device)
    return found_BT.masked_scatter(scored_BT, torch.cat(chunks))


def _of_chunk(hidden_CD: Tensor, head_VD: Tensor, softcap: float | None, labels_C: Tensor) -> Tensor:
    logits_CV = soft_capped(functional.linear(hidden_CD, head_VD), softcap).float()
    return logits_CV.gather(1, labels_C[:, None]).squeeze(1) - logits_CV.logsumexp(1)
