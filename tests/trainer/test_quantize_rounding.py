"""Rounding weights to integers with scales."""

import pytest
import torch

from kubetune_trainer.quantize.rounding import integer_range, round_to_nearest


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_no_weight_moves_by_more_than_half_a_step(bits: int, group_size: int | None) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, bits=bits, group_size=group_size)
    assert rounded.scales.shape == (48, 128 // (group_size or 128))
    steps = rounded.scales.repeat_interleave(group_size or 128, dim=1)
    assert ((rounded.dequantized() - weight).abs() <= steps / 2 * 1.0001).all()
    smallest, largest = integer_range(bits)
    assert rounded.values.min() >= smallest
    assert rounded.values.max() == largest or rounded.values.min() == -largest


def test_the_largest_weight_of_a_group_and_zero_are_exact() -> None:
    weight = torch.tensor([[0.0, 0.5, -2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    rounded = round_to_nearest(weight, bits=8, group_size=None)
    assert rounded.dequantized()[0, 2] == -2.0
    assert torch.equal(rounded.dequantized()[1], torch.zeros(4))
    assert rounded.dequantized(torch.bfloat16).dtype == torch.bfloat16


def test_a_row_that_is_no_whole_number_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="48 inputs cannot be cut into groups of 32"):
        round_to_nearest(torch.ones(2, 48), bits=4, group_size=32)
