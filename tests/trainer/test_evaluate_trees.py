"""Scores do not depend on what shares a row, and what begins alike is computed once."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from kubetune_trainer import load_model
from kubetune_trainer.evaluate.score import score
from kubetune_trainer.evaluate.trees import Continuation, Tree, batches, grow_trees
from kubetune_trainer.model import Decoder
from kubetune_trainer.model.config import ModelConfig, read_config
from tests.trainer.tiny import make_folder, random_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("model")
    make_folder(folder)
    return load_model(folder, dtype=torch.float32)


def continuations(*sequences: tuple[list[int], int]) -> list[Continuation]:
    return [
        Continuation(index=index, tokens=tuple(tokens), num_scored=scored)
        for index, (tokens, scored) in enumerate(sequences)
    ]


def random_continuations(seed: int) -> list[Continuation]:
    """Few contexts with several continuations each, some inside others, and some that stand alone."""
    draw = random.Random(seed)  # noqa: S311 (test data)
    tokens = lambda number: [draw.randint(3, 90) for _ in range(number)]  # noqa: E731
    common = tokens(12)
    contexts = [common + tokens(draw.randint(1, 15)) for _ in range(5)] + [tokens(1), tokens(40), common]
    found = []
    for context in contexts:
        long = tokens(6)
        found += [(context + long[:length], length) for length in (1, 3, 6)]
        found += [(context + tokens(length), length) for length in (1, 1, 2)]
    return continuations(*found)


@torch.no_grad()
def alone(model: Decoder, asked: Continuation) -> tuple[float, bool]:
    """The score as its definition says."""
    logits = model(torch.tensor([asked.tokens[:-1]]))[0, -asked.num_scored :]
    targets = torch.tensor(asked.tokens[-asked.num_scored :])
    chosen = functional.log_softmax(logits, dim=-1).gather(1, targets[:, None])
    return float(chosen.sum()), bool((logits.argmax(dim=-1) == targets).all())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_every_continuation_has_the_score_that_it_has_alone(model: Decoder, seed: int, rows: int) -> None:
    asked = random_continuations(seed)
    found = {}
    for batch in batches(asked, shape=model.config, rows=rows):
        found |= score(model, batch)
    assert found.keys() == {one.index for one in asked}
    for one in asked:
        expected = alone(model, one)
        assert found[one.index][0] == pytest.approx(expected[0], abs=1e-4)
        assert found[one.index][1] == expected[1]


def test_the_likeliest_continuation_is_told_from_others(model: Decoder) -> None:
    context = [5, 6, 7]
    with torch.no_grad():
        first = int(model(torch.tensor([context]))[0, -1].argmax())
    asked = continuations((([*context, first]), 1), ([*context, (first + 1) % 90], 1))
    answers = score(model, grow_trees(asked, shape=model.config))
    assert [answers[0][1], answers[1][1]] == [True, False]
    assert answers[0][0] > answers[1][0]


def test_choices_of_one_question_share_it(model: Decoder) -> None:
    question = list(range(3, 33))
    asked = continuations(*(([*question, choice, choice + 1], 2) for choice in range(40, 44)))
    (tree,) = grow_trees(asked, shape=model.config)
    assert len(tree.tokens) == len(question) + 4
    same = continuations(*(([*question, choice], 1) for choice in range(40, 44)))
    (tree,) = grow_trees(same, shape=model.config)
    assert tree.tokens == question, "the last token is never an input"


def test_what_hardly_begins_alike_stays_apart(model: Decoder) -> None:
    asked = continuations(([1, *range(3, 60)], 2), ([1, *range(60, 90)], 2))
    trees = grow_trees(asked, shape=model.config)
    assert [len(tree.tokens) for tree in trees] == [57, 30], "the largest first"


def test_trees_have_a_limit(model: Decoder) -> None:
    prefix = list(range(3, 90)) * 11
    asked = continuations(*(([*prefix, *[3 + number % 80] * 40, number % 80], 1) for number in range(80)))
    trees = grow_trees(asked, shape=model.config)
    assert len(trees) > 1
    assert max(len(tree.tokens) for tree in trees) <= 2048
    assert sum(len(tree.paths) for tree in trees) == 80


def test_texts_whose_lengths_decide_about_angles_share_nothing_with_texts_of_others(tmp_path: Path) -> None:
    longrope = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    stretched = read_stretched(tmp_path / "longrope", {**longrope, "original_max_position_embeddings": 32})
    dynamic = read_stretched(tmp_path / "dynamic", {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=32)
    plain = read_stretched(tmp_path / "plain", {"rope_type": "default"})
    text = list(range(3, 63))
    asked = continuations(*((text[:length], 1) for length in (40, 33, 20, 34, 50)))  # 33 tokens are read as 32
    lengths = {
        shape: sorted(sorted(len(asked[index].tokens) for index in indexes_of(batch)) for batch in found)
        for shape in (stretched, dynamic, plain)
        for found in [batches(asked, shape=shape, rows=8)]
    }
    assert lengths[stretched] == [[20, 33], [34, 40, 50]]
    assert lengths[dynamic] == [[20, 33], [34], [40], [50]]
    assert lengths[plain] == [[20, 33, 34, 40, 50]]


def test_the_batch_with_the_largest_tree_comes_first(tmp_path: Path) -> None:
    shape = read_stretched(tmp_path, {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=32)
    asked = continuations(*((random_tokens(length, seed=length).tolist(), 1) for length in (8, 50, 9, 40)))
    found = batches(asked, shape=shape, rows=1)
    assert [len(tree.tokens) for batch in found for tree in batch] == [49, 39, 8, 7]


def read_stretched(folder: Path, rope: dict[str, Any], **changes: Any) -> ModelConfig:
    make_folder(folder, rope_parameters={"rope_theta": 10000.0, **rope}, **changes)
    return read_config(folder)


def indexes_of(batch: list[Tree]) -> list[int]:
    return [path.index for tree in batch for path in tree.paths]


@pytest.mark.parametrize("scored", [0, 3, 4])
def test_only_tokens_that_others_stand_before_can_be_scored(scored: int) -> None:
    with pytest.raises(AssertionError, match=f"request 0 scores {scored} of 3 tokens"):
        continuations(([3, 4, 5], scored))


def test_places_that_are_not_one_for_each_scored_token_are_refused(model: Decoder) -> None:
    trees = grow_trees(continuations(([3, 4, 5, 6], 2), ([7, 8, 9], 2)), shape=model.config)
    trees[0].paths[0] = replace(trees[0].paths[0], targets=(6,))
    with pytest.raises(AssertionError, match="4 places predict 3 tokens"):
        score(model, trees)


def sees(tree: Tree, query: int) -> list[int]:
    return [place for place in range(len(tree.tokens)) if place <= query < tree.ends[place]]


def test_a_token_sees_itself_and_its_ancestors(model: Decoder) -> None:
    long = list(range(3, 23))
    asked = continuations(([*long, 30, 31, 32], 2), ([*long, 40, 41, 42], 2), (long, 1))
    (tree,) = grow_trees(asked, shape=model.config)
    for path in tree.paths:
        last = path.places[-1]
        expected = asked[path.index].tokens[:-1]
        assert tuple(tree.tokens[place] for place in sees(tree, last)) == expected
        assert [tree.positions[place] for place in sees(tree, last)] == list(range(len(expected)))
