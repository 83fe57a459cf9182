"""Which samples share a row: best-fit decreasing, a classic of bin packing with good results in a single pass.

Packing only decides who sits beside whom; attention and positions never cross from one sample to the next.
"""

import bisect
from array import array
from collections.abc import Iterator

import numpy as np

NONE = -1


def pack(lengths: np.ndarray, *, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Fills rows with samples, longest first, each into the fullest row that still takes it.

    The result depends on the lengths alone; samples of one length keep their order. Needs some 30 bytes per sample.

    Args:
        lengths: Length of each sample, at least 1 and none above row_length.
        row_length: What a row holds.

    Returns:
        The samples in the order of the rows, as indexes into lengths, and where each row begins and the last one ends.
    """
    if len(lengths) and lengths.max() > row_length:
        longest = int(lengths.argmax())
        raise ValueError(f"sample {longest} must not be longer than a row of {row_length}, got {lengths[longest]}")
    order = np.argsort(-lengths, kind="stable")
    rows = np.frombuffer(_rows(_in_blocks(lengths[order]), row_length), dtype=np.int32)
    samples = order[np.argsort(rows, kind="stable")]
    begins = np.zeros(rows.max(initial=NONE) + 2, dtype=np.int64)
    np.cumsum(np.bincount(rows), out=begins[1:])
    return samples, begins


def _rows(lengths: Iterator[int], row_length: int) -> "array[int]":
    """Returns the row of each sample. Rows with the same room lie on a pile; the topmost is filled first."""
    rows, beneath = array("i"), array("i")
    top: dict[int, int] = {}
    rooms: list[int] = []  # the keys of top, ascending
    for length in lengths:
        fitting = bisect.bisect_left(rooms, length)
        if fitting == len(rooms):
            row, room = len(beneath), row_length
            beneath.append(NONE)
        else:
            room = rooms[fitting]
            row = top[room]
            if beneath[row] == NONE:
                del top[room]
                rooms.pop(fitting)
            else:
                top[room] = beneath[row]
        rows.append(row)
        left = room - length
        if left not in top:
            bisect.insort(rooms, left)
        beneath[row] = top.get(left, NONE)
        top[left] = row
    return rows


def _in_blocks(values: np.ndarray, size: int = 65536) -> Iterator[int]:
    """Yields numbers as Python's own, which are faster one by one, without having all of them at once."""
    for begin in range(0, len(values), size):
        yield from values[begin : begin + size].tolist()
