"""Rounding one matrix by what goes through it."""

import itertools

import pytest
import torch
from torch import Tensor

from kubetune_trainer.quantize.gptq import gptq
from kubetune_trainer.quantize.rounding import Rounded, integer_range, round_to_nearest


def correlated_inputs(count: int, size: int, *, seed: int = 0, rank: int = 8) -> Tensor:
    """Inputs as layers have them: few directions carry most, and channels differ in size."""
    directions = torch.randn(rank, size, generator=torch.Generator().manual_seed(100))
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, rank, generator=draw) @ directions
    return (mixed + 0.3 * torch.randn(count, size, generator=draw)) * torch.logspace(-1, 0.5, size)


def output_error(weight: Tensor, rounded: Rounded, inputs: Tensor) -> float:
    return float((inputs @ (weight - rounded.dequantized()).T).square().mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("columns", [64, 160, 320])
def test_outputs_change_less_than_with_the_nearest_values(bits: int, group_size: int | None, columns: int) -> None:
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(1))
    inputs = correlated_inputs(512, columns)
    rounded = gptq(weight, inputs.T @ inputs, bits=bits, group_size=group_size)
    nearest = round_to_nearest(weight, bits=bits, group_size=group_size)
    unseen = correlated_inputs(1024, columns, seed=1)
    assert output_error(weight, rounded, inputs) < 0.6 * output_error(weight, nearest, inputs)
    assert output_error(weight, rounded, unseen) < output_error(weight, nearest, unseen)
    assert torch.equal(rounded.scales, nearest.scales)
    assert (rounded.values.min() >= integer_range(bits)[0]) & (rounded.values.max() <= integer_range(bits)[1])


def test_no_choice_of_neighbouring_values_is_far_better() -> None:
    """Against the best of all 2^8 ways to round a row up or down, on 16 rows."""
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    inputs = correlated_inputs(64, 8, rank=3)
    hessian = inputs.T @ inputs
    rounded = gptq(weight, hessian, bits=4, group_size=None)
    nearest = round_to_nearest(weight, bits=4, group_size=None)

    def row_errors(dequantized: Tensor) -> Tensor:
        lost = weight - dequantized
        return torch.einsum("oi,ij,oj->o", lost, hessian, lost)

    down = (weight / nearest.scales).floor()
    ways = [row_errors((down + torch.tensor(up)) * nearest.scales) for up in itertools.product([0, 1], repeat=8)]
    best = torch.stack(ways).amin(0).sum()
    ours, theirs = row_errors(rounded.dequantized()).sum(), row_errors(nearest.dequantized()).sum()
    assert best < theirs
    assert (ours - best) < 0.25 * (theirs - best)


@pytest.mark.parametrize("group_size", [None, 32])
def test_inputs_that_have_nothing_in_common_leave_the_nearest_values(group_size: int | None) -> None:
    weight = torch.randn(8, 192, generator=torch.Generator().manual_seed(3))
    nearest = round_to_nearest(weight, bits=4, group_size=group_size)
    for hessian in (torch.eye(192), torch.diag(torch.rand(192)), torch.zeros(192, 192)):
        assert torch.equal(gptq(weight, hessian, bits=4, group_size=group_size).values, nearest.values)


def test_weights_that_integers_can_say_stay_as_they_are() -> None:
    values = torch.randint(-7, 8, (8, 64), generator=torch.Generator().manual_seed(4))
    values[:, ::32] = 7
    inputs = correlated_inputs(128, 64)
    rounded = gptq(values * 0.25, inputs.T @ inputs, bits=4, group_size=32)
    assert torch.equal(rounded.values.long(), values)


def test_inputs_that_repeat_each_other_or_never_come_do_no_harm() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    inputs = correlated_inputs(16, 64, rank=2)  # fewer samples than columns
    inputs[:, 1::2] = inputs[:, ::2] * 1e3
    inputs[:, 5] = 0
    rounded = gptq(weight, inputs.T @ inputs, bits=4, group_size=32)
    nearest = round_to_nearest(weight, bits=4, group_size=32)
    assert output_error(weight, rounded, inputs) <= output_error(weight, nearest, inputs)
    assert torch.equal(rounded.values[:, 5], nearest.values[:, 5])


def test_more_damping_is_taken_where_there_is_not_enough() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    almost = torch.ones(32, 32) - 0.5 * torch.eye(32)  # not positive definite: its smallest eigenvalue is -0.5
    assert torch.equal(
        gptq(weight, almost, bits=8, group_size=None).scales,
        gptq(weight, torch.eye(32), bits=8, group_size=None).scales,
    )
    with pytest.raises(ValueError, match="finite numbers"):
        gptq(weight, torch.full((32, 32), torch.nan), bits=8, group_size=None)
