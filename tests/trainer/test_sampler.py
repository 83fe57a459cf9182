"""A step's rows follow from its number, whoever asks and whenever; padding is neither seen nor learned."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kubetune_trainer.data.sampler import collate, rows_for_step, total_steps
from kubetune_trainer.data.store import Row


@given(num_rows=st.integers(1, 50), batch=st.integers(1, 20), epochs=st.integers(1, 3), seed=st.integers(0, 1000))
def test_every_pass_has_each_row_once(num_rows: int, batch: int, epochs: int, seed: int) -> None:
    steps = total_steps(num_rows, global_batch_size=batch, epochs=epochs, max_steps=None)
    rows = [
        row
        for step in range(steps)
        for row in rows_for_step(step, num_rows=num_rows, global_batch_size=batch, seed=seed)
    ]
    assert len(rows) == steps * batch
    assert len(rows) - batch < epochs * num_rows <= len(rows)
    for begin in range(0, epochs * num_rows, num_rows):
        assert sorted(rows[begin : begin + num_rows]) == list(range(num_rows))


def test_the_order_differs_between_passes_and_seeds() -> None:
    orders = {
        tuple(rows_for_step(step, num_rows=40, global_batch_size=40, seed=seed))
        for step in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9


def test_the_order_is_the_one_that_earlier_versions_had() -> None:
    """A run that is resumed by a newer image must see the same rows."""
    assert rows_for_step(1, num_rows=5, global_batch_size=4, seed=1) == [3, 1, 4, 0]


@pytest.mark.parametrize(
    ("num_rows", "batch", "epochs", "max_steps", "expected"),
    [(10, 4, 1, None, 3), (10, 5, 1, None, 2), (10, 4, 3, None, 8), (3, 16, 1, None, 1), (10, 4, None, 7, 7)],
)
def test_steps_are_counted(num_rows: int, batch: int, epochs: int | None, max_steps: int | None, expected: int) -> None:
    assert total_steps(num_rows, global_batch_size=batch, epochs=epochs, max_steps=max_steps) == expected


def test_a_run_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="either epochs or max_steps"):
        total_steps(1, global_batch_size=1, epochs=None, max_steps=None)


def test_shorter_rows_are_filled_up_with_what_nobody_sees_or_learns() -> None:
    rows = [Row.of([1, 2, 3], [False, True, True]), Row.of(list(range(9)), [True] * 9)]
    batch = collate(rows, pad_id=7, multiple=4)
    assert batch.tokens.shape == batch.labels.shape == batch.documents.shape == batch.positions.shape == (2, 12)
    assert batch.tokens[0].tolist() == [1, 2, 3] + [7] * 9
    assert batch.labels[0].tolist() == [2, 3] + [-100] * 10
    assert batch.documents[0].tolist() == [0] * 3 + [-1] * 9
    assert batch.positions[1].tolist() == [*range(9), 0, 0, 0]
    assert (batch.num_tokens, batch.trained_tokens) == (12, 10)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def test_a_batch_moves_to_a_device_with_its_counts() -> None:
    batch = collate([Row.of([1, 2], [True, True])], pad_id=0).to(torch.device("meta"))
    assert {batch.tokens.device.type, batch.labels.device.type} == {"meta"}
    assert {batch.documents.device.type, batch.positions.device.type} == {"meta"}
    assert (batch.num_tokens, batch.trained_tokens) == (2, 1)
