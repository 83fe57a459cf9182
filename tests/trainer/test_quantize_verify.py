"""What two models say of the same data, measured."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.errors import DataError
from kubetune_trainer.names import IGNORE_LABEL
from kubetune_trainer.quantize.verify import Comparison, Logits, compare

VOCAB = 11


def batch(labels: list[list[int]]) -> Batch:
    labels_BT = torch.tensor(labels)
    zeros = torch.zeros_like(labels_BT)
    trained = int((labels_BT != IGNORE_LABEL).sum())
    return Batch(
        tokens=zeros,
        labels=labels_BT,
        documents=zeros,
        positions=zeros,
        num_tokens=labels_BT.numel(),
        trained_tokens=trained,
    )


BATCHES = [batch([[3, IGNORE_LABEL, 1], [0, 2, 10]]), batch([[IGNORE_LABEL, 5, 7, 7]])]


def logits(*, seed: int) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {id(each): torch.randn(*each.labels.shape, VOCAB, generator=draw) for each in BATCHES}


def test_each_number_is_what_its_name_says() -> None:
    source, artifact = logits(seed=0), logits(seed=1)
    found = compare(lambda each: source[id(each)], lambda each: artifact[id(each)], BATCHES)
    keep = [each.labels != IGNORE_LABEL for each in BATCHES]
    ours = torch.cat([source[id(each)][mask] for each, mask in zip(BATCHES, keep, strict=True)])
    theirs = torch.cat([artifact[id(each)][mask] for each, mask in zip(BATCHES, keep, strict=True)])
    labels = torch.cat([each.labels[mask] for each, mask in zip(BATCHES, keep, strict=True)])
    p, q = ours.softmax(-1), theirs.softmax(-1)
    assert found.tokens == 8
    assert found.source_perplexity == pytest.approx(math.exp(functional.cross_entropy(ours, labels)), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(functional.cross_entropy(theirs, labels)), rel=1e-5)
    assert found.mean_kl == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-5)
    assert found.top_token_agreement_percent == 100 * float((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert found.max_logit_difference == pytest.approx(float((ours - theirs).abs().max()))
    assert found.perplexity_increase_percent == pytest.approx(100 * (found.perplexity / found.source_perplexity - 1))


def test_a_model_is_no_way_off_itself() -> None:
    source = logits(seed=0)
    found = compare(lambda each: source[id(each)], lambda each: source[id(each)].clone(), BATCHES)
    assert (found.mean_kl, found.top_token_agreement_percent, found.max_logit_difference) == (0.0, 100.0, 0.0)
    assert found.perplexity == found.source_perplexity
    assert found.perplexity_increase_percent == 0.0


def test_many_positions_are_summed_as_exactly_as_few() -> None:
    """More than are compared at once, of small differences."""
    labels = torch.randint(0, VOCAB, (4, 700), generator=torch.Generator().manual_seed(0)).tolist()
    many, draw = batch(labels), torch.Generator().manual_seed(1)
    ours = torch.randn(4, 700, VOCAB, generator=draw)
    theirs = ours + 1e-2 * torch.randn(4, 700, VOCAB, generator=draw)
    found = compare(lambda _: ours, lambda _: theirs, [many])
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.perplexity == pytest.approx(float(functional.nll_loss(q.flatten(0, 1), many.labels.flatten()).exp()))


def test_batches_are_asked_for_one_at_a_time_and_let_go() -> None:
    alive: list[int] = []

    def stream() -> Iterator[Batch]:
        for each in BATCHES:
            alive.append(len(asked))
            yield each

    asked: list[str] = []

    def side(name: str, found: dict[int, Tensor]) -> Logits:
        def run(each: Batch) -> Tensor:
            asked.append(name)
            return found[id(each)]

        return run

    compare(side("source", logits(seed=0)), side("artifact", logits(seed=1)), stream())
    assert asked == ["source", "artifact"] * 2
    assert alive == [0, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    source, broken = logits(seed=0), logits(seed=0)
    broken[id(BATCHES[1])][0, 1, 0] = value
    with pytest.raises(DataError, match="the output's logits must be finite numbers"):
        compare(lambda each: source[id(each)], lambda each: broken[id(each)], BATCHES)
    with pytest.raises(DataError, match="the source's logits must be finite numbers"):
        compare(lambda each: broken[id(each)], lambda each: source[id(each)], BATCHES)


def test_positions_without_a_label_may_be_anything() -> None:
    source, artifact = logits(seed=0), logits(seed=0)
    artifact[id(BATCHES[0])][0, 1] = math.nan
    found = compare(lambda each: source[id(each)], lambda each: artifact[id(each)], BATCHES)
    assert found.max_logit_difference == 0.0


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError, match="no token to compare"):
        compare(lambda _: torch.zeros(1, 2, VOCAB), lambda _: torch.zeros(1, 2, VOCAB), [batch([[IGNORE_LABEL] * 2])])


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    sure = torch.zeros(1, 1, VOCAB)
    sure[..., 0] = 1e4
    found = compare(lambda _: torch.zeros(1, 1, VOCAB), lambda _: sure, [batch([[1]])])
    assert isinstance(found, Comparison)
    assert (found.source_perplexity, found.perplexity) == (pytest.approx(VOCAB), math.inf)
    assert found.perplexity_increase_percent == math.inf
