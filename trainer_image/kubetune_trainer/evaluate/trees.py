"""Requests that begin alike share their beginning: sequences as trees, so that no common token is computed twice.

The answers of a multiple-choice question share the question, and questions with the same solved examples share those.
A tree lies in one row of a batch, parents before children. A token sees itself and its ancestors, which the two numbers
`place <= query < end` say: the descendants of a token stand behind it without a gap.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from kubetune_trainer.generation import angles_by
from kubetune_trainer.model.config import ModelConfig

ROW_TOKENS: Final = 2048
"""Trees do not grow beyond this, or beyond the longest sequence: a row's mask is the square of its length."""
ATTENTION_FACTOR: Final = 2.0
"""An operation of masked attention counts as so many of a matrix product: it is less efficient, and so is padding."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What a request asks: how likely the last tokens are, after those before them."""

    index: int
    """Which request it is."""
    tokens: tuple[int, ...]
    """Context and continuation."""
    num_scored: int
    """Length of the continuation."""

    def __post_init__(self) -> None:
        assert 0 < self.num_scored < len(self.tokens), (  # the first token has none before it that predicts it
            f"request {self.index} scores {self.num_scored} of {len(self.tokens)} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Path:
    """A request's place in a tree."""

    index: int
    """Which request it is."""
    places: tuple[int, ...]
    """Where the tokens lie that predict the continuation."""
    targets: tuple[int, ...]
    """The continuation."""


@dataclass
class Tree:
    """Several sequences in one row."""

    tokens: list[int] = field(default_factory=list)
    """Every distinct beginning's last token, parents first."""
    positions: list[int] = field(default_factory=list)
    """Each token's position in its sequence."""
    ends: list[int] = field(default_factory=list)
    """The place behind each token's last descendant."""
    paths: list[Path] = field(default_factory=list)
    """The requests."""


def grow_trees(sequences: Sequence[Continuation], *, shape: ModelConfig) -> list[Tree]:
    """Put sequences into trees wherever sharing saves more than the larger row's attention costs.

    Args:
        sequences: In any order.
        shape: The model's; says what a token and what a pair of tokens costs.

    Returns:
        The trees, the largest first: neighbours need little padding, and memory runs out early or never.
    """
    token_cost, pair_cost = _costs(shape)
    ordered = sorted(sequences, key=lambda sequence: (sequence.tokens, sequence.num_scored))
    limit = max([ROW_TOKENS, *(len(sequence.tokens) for sequence in ordered)])
    trees: list[Tree] = []
    branch: list[int] = []
    before: tuple[int, ...] = ()
    for sequence in ordered:
        inputs = sequence.tokens[:-1]
        shared, length = _common(before, inputs), len(trees[-1].tokens) if trees else 0
        new = len(inputs) - shared
        saved = shared * token_cost + pair_cost * (len(inputs) ** 2 - (length + new) ** 2 + length**2)
        if not trees or saved <= 0 or length + new > limit:
            trees.append(Tree())
            branch, shared = [], 0
        branch = branch[:shared]
        _add(trees[-1], branch, inputs, shared)
        before = inputs
        scored = sequence.tokens[-sequence.num_scored :]
        places = tuple(branch[-sequence.num_scored :])
        trees[-1].paths.append(Path(index=sequence.index, places=places, targets=scored))
    return sorted(trees, key=lambda tree: -len(tree.tokens))


def batches(sequences: Sequence[Continuation], *, shape: ModelConfig, rows: int) -> list[list[Tree]]:
    """Put sequences into trees, and so many trees that are neighbours into a batch.

    Where a text's length decides about the angles of its positions, texts with other angles share neither a tree nor a
    batch: the longest would decide for all.

    Args:
        sequences: In any order.
        shape: The model's.
        rows: Trees of a batch, at most.

    Returns:
        The batches, that with the largest tree first.
    """
    found: list[list[Tree]] = []
    for group in _of_like_angles(sequences, shape):
        trees = grow_trees(group, shape=shape)
        found += [trees[start : start + rows] for start in range(0, len(trees), rows)]
    return sorted(found, key=lambda batch: -len(batch[0].tokens))


def _of_like_angles(sequences: Sequence[Continuation], shape: ModelConfig) -> Iterable[list[Continuation]]:
    """Put sequences together that may share a batch."""
    angles = {length: angles_by(shape, length - 1) for length in {len(sequence.tokens) for sequence in sequences}}
    groups: dict[tuple[int, ...], list[Continuation]] = {}
    for sequence in sequences:
        groups.setdefault(angles[len(sequence.tokens)], []).append(sequence)
    return groups.values()


def _add(tree: Tree, branch: list[int], inputs: tuple[int, ...], shared: int) -> None:
    """Append what a sequence has of its own, below the branch that it shares."""
    for position in range(shared, len(inputs)):
        branch.append(len(tree.tokens))
        tree.tokens.append(inputs[position])
        tree.positions.append(position)
        tree.ends.append(0)
    for place in branch:
        tree.ends[place] = len(tree.tokens)


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Return how many tokens two sequences begin with together."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))


def _costs(shape: ModelConfig) -> tuple[float, float]:
    """Return the operations of one layer for one token and, in attention, for one pair of tokens."""
    projections = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    token_cost = 2.0 * (projections + 3 * shape.hidden_size * shape.token_width)
    return token_cost, ATTENTION_FACTOR * 4.0 * shape.num_heads * shape.head_dim
