"""Which samples share a row: best-fit decreasing, a classic of bin packing with good results in a single pass.

Packing only decides who sits beside whom; attention and positions never cross from one sample to the next.
"""

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], *, row_length: int) -> list[list[int]]:
    """Fills rows with samples, longest first, each into the fullest row that still takes it.

    The result depends on the lengths alone; samples of one length keep their order.

    Args:
        lengths: Length of each sample, none above row_length.
        row_length: What a row holds.

    Returns:
        The samples of each row, as indexes into lengths.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, ascending
    for sample in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[sample]
        if length > row_length:
            raise ValueError(f"sample {sample} must not be longer than a row of {row_length}, got {length}")
        fitting = bisect.bisect_left(rooms, length)
        if fitting == len(rooms):
            row, room = len(rows), row_length
            rows.append([])
        else:
            room = rooms[fitting]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room]
                rooms.pop(fitting)
        rows[row].append(sample)
        left = room - length
        if left not in rows_by_room:
            rows_by_room[left] = []
            bisect.insort(rooms, left)
        rows_by_room[left].append(row)
    return rows
