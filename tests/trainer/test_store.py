"""What is written comes back, labels point at the next token, positions begin again with each sample."""

from pathlib import Path

import numpy as np
import pytest

from kubetune_trainer.data.store import DataStore, DataWriter, Row
from kubetune_trainer.errors import DataError

FIRST = Row.of([1, 2, 3], [False, False, True])
SECOND = Row.of([5, 6], [False, True])


def write(folder: Path) -> Path:
    with DataWriter(folder) as writer:
        writer.append([FIRST, SECOND, FIRST])
        writer.append([SECOND])
    return folder


def test_a_label_is_the_next_token_where_that_is_trained() -> None:
    row = Row.of([1, 2, 3, 4], [True, False, True, True])
    assert row.labels.tolist() == [-100, 3, 4, -100]
    assert row.trained_tokens == 2


def test_a_row_comes_back_as_it_was_packed(tmp_path: Path) -> None:
    store = DataStore.open(write(tmp_path))
    assert (len(store), store.num_tokens) == (2, 10)
    assert store[0].tokens.tolist() == [1, 2, 3, 5, 6, 1, 2, 3]
    assert store[0].labels.tolist() == [-100, 3, -100, 6, -100, -100, 3, -100]
    assert store[0].documents.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert store[0].positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert store[1].tokens.tolist() == store[-1].tokens.tolist() == [5, 6]


def test_rows_are_read_from_the_disk_and_not_into_memory(tmp_path: Path) -> None:
    assert isinstance(DataStore.open(write(tmp_path))[0].tokens, np.memmap)


def test_a_row_that_is_not_there_is_an_index_error(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        DataStore.open(write(tmp_path))[2]


def test_a_part_keeps_the_label_that_would_have_followed() -> None:
    part = Row.of([1, 2, 3, 4], [False, True, True, True]).part(0, 2)
    assert part.tokens.tolist() == [1, 2]
    assert part.labels.tolist() == [2, 3]


def test_a_store_without_rows_can_be_opened(tmp_path: Path) -> None:
    with DataWriter(tmp_path):
        pass
    assert len(DataStore.open(tmp_path)) == 0


def test_a_store_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttributeError), DataWriter(tmp_path) as writer:
        writer.append([FIRST, None])
    with pytest.raises(DataError, match="COMPLETE is missing"):
        DataStore.open(tmp_path)


def test_writing_a_store_again_makes_it_incomplete_first(tmp_path: Path) -> None:
    write(tmp_path)
    writer = DataWriter(tmp_path)
    with pytest.raises(DataError, match="COMPLETE is missing"):
        DataStore.open(tmp_path)
    with writer:
        pass


def test_a_file_that_was_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "labels.bin").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(DataError, match=r"labels\.bin must hold 10 items, got 2"):
        DataStore.open(tmp_path)
