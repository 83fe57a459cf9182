"""Token rows on disk: written as a stream, read through memory maps, so that neither side holds a data set in memory.

A folder with four arrays: `offsets.bin` says where each row begins and ends in `tokens.bin`, `labels.bin` and
`documents.bin`. `COMPLETE`, written last, makes the folder count.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from kubetune_trainer.errors import DataError
from kubetune_trainer.names import COMPLETE_MARKER, IGNORE_LABEL

ARRAYS = ("tokens", "labels", "documents")
_OFFSETS = "offsets"
_ITEM = np.dtype("<i4")
_OFFSET = np.dtype("<i8")
_BLOCK_TOKENS = 2**22
"""How many tokens are looked at together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """What a model sees as one sequence: one sample, or several packed together. All arrays are int32 of one length."""

    tokens: np.ndarray
    """Token ids."""
    labels: np.ndarray
    """The target of each position, already shifted: the next token of the same sample, or IGNORE_LABEL."""
    documents: np.ndarray
    """Number of the sample within the row that a token belongs to, from 0."""

    @classmethod
    def of(cls, tokens: Sequence[int], trained: Sequence[bool]) -> "Row":
        """Returns a row of one sample.

        Args:
            tokens: Its token ids.
            trained: Whether the loss asks for each; nobody can ask for the first.
        """
        ids = np.asarray(tokens, dtype=_ITEM)
        labels = np.full(len(ids), IGNORE_LABEL, dtype=_ITEM)
        labels[:-1] = np.where(np.asarray(trained[1:], dtype=bool), ids[1:], IGNORE_LABEL)
        return cls(tokens=ids, labels=labels, documents=np.zeros_like(ids))

    def part(self, begin: int, end: int) -> "Row":
        """Returns some positions; the label of the last is the token that would have followed."""
        cut = slice(begin, end)
        return Row(tokens=self.tokens[cut], labels=self.labels[cut], documents=self.documents[cut])

    @property
    def trained_tokens(self) -> int:
        """Positions that carry loss."""
        return int(np.count_nonzero(self.labels != IGNORE_LABEL))

    @property
    def positions(self) -> np.ndarray:
        """Place of each token in its own sample."""
        places = np.arange(len(self.documents), dtype=_ITEM)
        begins = np.flatnonzero(np.diff(self.documents, prepend=-1))
        return places - np.repeat(begins, np.diff(begins, append=len(places))).astype(_ITEM)


class DataStore(Sequence[Row]):
    """The rows of a folder that `DataWriter` wrote."""

    def __init__(self, folder: Path, offsets: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        self.folder = folder
        self._offsets = offsets
        self._arrays = arrays

    @classmethod
    def open(cls, folder: str | Path) -> "DataStore":
        """Opens a folder without reading it.

        Raises:
            DataError: It is not there, was not written to its end, or its files do not belong together.
        """
        folder = Path(folder)
        if not (folder / COMPLETE_MARKER).is_file():
            raise DataError(f"data store {folder}: {COMPLETE_MARKER} is missing, so it was not written to its end")
        offsets = _map(folder / f"{_OFFSETS}.bin", dtype=_OFFSET)
        arrays = {name: _map(folder / f"{name}.bin") for name in ARRAYS}
        for name, items in arrays.items():
            if len(items) != offsets[-1]:
                raise DataError(f"data store {folder}: {name}.bin must hold {offsets[-1]} items, got {len(items)}")
        return cls(folder, offsets, arrays)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self._offsets[-1])

    @property
    def trained_tokens(self) -> int:
        """Positions of all rows that carry loss."""
        labels = self._arrays["labels"]
        blocks = range(0, len(labels), _BLOCK_TOKENS)
        return sum(int(np.count_nonzero(labels[at : at + _BLOCK_TOKENS] != IGNORE_LABEL)) for at in blocks)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Returns the tokens of some rows, int32."""
        ends, begins = self._offsets[rows + 1], self._offsets[rows]
        return np.subtract(ends, begins, dtype=np.int64).astype(np.int32)

    def gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of some rows, one row after the other."""
        lengths = self.lengths(rows)
        ends = np.cumsum(lengths, dtype=np.int64)
        places = np.arange(ends[-1]) + np.repeat(np.asarray(self._offsets[rows]) - ends + lengths, lengths)
        return {name: np.asarray(items[places]) for name, items in self._arrays.items()}

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Row:  # type: ignore[override] # rows are asked for one by one
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = slice(self._offsets[index], self._offsets[index + 1])
        return Row(**{name: items[part] for name, items in self._arrays.items()})


class DataWriter:
    """Writes rows one after the other; leaving the `with` block without an error makes the folder complete."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMPLETE_MARKER).unlink(missing_ok=True)
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._offsets = array("q", [0])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if kind is None:
            np.frombuffer(self._offsets, dtype=np.int64).astype(_OFFSET, copy=False).tofile(
                self._folder / f"{_OFFSETS}.bin"
            )
            (self._folder / COMPLETE_MARKER).touch()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, samples: Sequence[Row]) -> None:
        """Writes one row made of these, each a sample of its own."""
        for document, sample in enumerate(samples):
            self._write("tokens", sample.tokens)
            self._write("labels", sample.labels)
            self._write("documents", np.full(len(sample.tokens), document))
        self._offsets.append(self._offsets[-1] + sum(len(sample.tokens) for sample in samples))

    def append_rows(self, lengths: np.ndarray, **arrays: np.ndarray) -> None:
        """Writes many rows.

        Args:
            lengths: Tokens of each.
            arrays: What `Row` has, of all rows one after the other.
        """
        for name, values in arrays.items():
            self._write(name, values)
        self._offsets.frombytes((self._offsets[-1] + np.cumsum(lengths, dtype=np.int64)).tobytes())

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=_ITEM).data)


def _map(path: Path, *, dtype: np.dtype = _ITEM) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
