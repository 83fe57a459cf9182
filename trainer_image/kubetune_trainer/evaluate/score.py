"""How likely a model finds given continuations: one forward pass over trees of sequences.

Shapes: B trees, T tokens of the largest, D hidden_size, V vocab_size, P places whose logits are asked for, N scored
tokens of all requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kubetune_trainer.evaluate.trees import Tree
from kubetune_trainer.loss import CHUNK_TOKENS
from kubetune_trainer.model.decoder import Decoder

Score = tuple[float, bool]
"""The logarithm of a continuation's probability, and whether its tokens are the likeliest ones."""


@torch.inference_mode()
def score(model: Decoder, trees: Sequence[Tree]) -> dict[int, Score]:
    """Score every request of some trees, by its index.

    Logits exist for a chunk of the places that predict something, never for all tokens.
    """
    device = model.model.embed_tokens.weight.device
    length = max(len(tree.tokens) for tree in trees)
    tokens_BT = _padded([tree.tokens for tree in trees], length, device)
    positions_BT = _padded([tree.positions for tree in trees], length, device)
    x_BTD = model.hidden(tokens_BT, mask=_mask(trees, length, device), positions_BT=positions_BT)
    asked = sorted({(row, place) for row, tree in enumerate(trees) for path in tree.paths for place in path.places})
    number_of = {row_and_place: number for number, row_and_place in enumerate(asked)}
    rows_P, places_P = torch.tensor(asked, device=device).T
    paths = [(row, path) for row, tree in enumerate(trees) for path in tree.paths]
    numbers = [number_of[row, place] for row, path in paths for place in path.places]
    targets = [target for _, path in paths for target in path.targets]
    assert len(numbers) == len(targets), f"{len(numbers)} places predict {len(targets)} tokens"
    scores_N, likeliest_N = _token_scores(
        model,
        x_BTD[rows_P, places_P],
        torch.tensor(numbers, device=device),
        torch.tensor(targets, device=device),
    )
    answers: dict[int, Score] = {}
    start = 0
    for _, path in paths:
        end = start + len(path.targets)
        answers[path.index] = (float(scores_N[start:end].sum()), bool(likeliest_N[start:end].all()))
        start = end
    return answers


def _token_scores(model: Decoder, x_PD: Tensor, numbers_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's log probability at its place, in fp64, and whether it is the likeliest token there."""
    scores_N = torch.empty(len(targets_N), dtype=torch.float64)
    likeliest_N = torch.empty(len(targets_N), dtype=torch.bool)
    for start in range(0, len(x_PD), CHUNK_TOKENS):
        logits = model.logits(x_PD[start : start + CHUNK_TOKENS]).float()
        inside = ((numbers_N >= start) & (numbers_N < start + CHUNK_TOKENS)).nonzero()[:, 0]
        here, targets = numbers_N[inside] - start, targets_N[inside]
        scored = functional.log_softmax(logits, dim=-1)[here, targets]
        inside = inside.cpu()
        scores_N[inside] = scored.double().cpu()
        likeliest_N[inside] = (logits.argmax(dim=-1)[here] == targets).cpu()
    return scores_N, likeliest_N


def _mask(trees: Sequence[Tree], length: int, device: torch.device) -> Tensor | None:
    """Say which tokens each token sees, (B, 1, T, T); None where no tree branches, and order alone says it."""
    if all(end == len(tree.tokens) for tree in trees for end in tree.ends):
        return None
    places_T = torch.arange(length, device=device)
    ends_BT = _padded([tree.ends for tree in trees], length, device)
    ends_BT = torch.where(ends_BT == 0, places_T + 1, ends_BT)  # padding sees itself, so that it is a number
    return (places_T[:, None] >= places_T) & (places_T[:, None] < ends_BT[:, None, None, :])


def _padded(rows: Sequence[Sequence[int]], length: int, device: torch.device) -> Tensor:
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
