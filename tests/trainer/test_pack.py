"""Packing loses nothing, never overfills a row, leaves little room, and is the same every time."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubetune_trainer.data.pack import pack


def rows_of(lengths: list[int], *, row_length: int) -> list[list[int]]:
    samples, begins = pack(np.array(lengths, dtype=np.int32), row_length=row_length)
    return [samples[begin:end].tolist() for begin, end in pairwise(begins.tolist())]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([], []),
        ([10], [[0]]),
        ([5, 5], [[0, 1]]),
        ([6, 5], [[0], [1]]),
        ([3, 7, 5, 5], [[1, 0], [2, 3]]),
        ([8, 6, 4, 2], [[0, 3], [1, 2]]),  # the fullest row that takes it, not the first
        ([1, 1, 1], [[0, 1, 2]]),
    ],
)
def test_each_sample_goes_into_the_fullest_row_that_takes_it(lengths: list[int], rows: list[list[int]]) -> None:
    assert rows_of(lengths, row_length=10) == rows


@given(st.lists(st.integers(min_value=1, max_value=64), max_size=200))
def test_every_sample_has_one_place_and_no_row_is_overfull(lengths: list[int]) -> None:
    rows = rows_of(lengths, row_length=64)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in row) <= 64 for row in rows)
    # Of two rows that are both at most half full, one would have taken the other's samples.
    assert sum(sum(lengths[sample] for sample in row) <= 32 for row in rows) <= 1
    assert rows == rows_of(lengths, row_length=64)


def test_a_sample_that_no_row_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1 must not be longer than a row of 10, got 11"):
        rows_of([3, 11], row_length=10)
