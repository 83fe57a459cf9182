"""From records to rows of tokens on disk, in two passes: every record becomes a sample, then samples become rows.

Between the passes samples lie in a store of their own. What stays in memory is numbers alone, some 60 bytes a sample.
"""

import dataclasses
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kubetune_trainer.config import Dataset
from kubetune_trainer.data import workers
from kubetune_trainer.data.chunks import Chunk, ChunkEncoder, Counts
from kubetune_trainer.data.formats import Format, RowKind, detect
from kubetune_trainer.data.pack import pack
from kubetune_trainer.data.read import Record, is_table
from kubetune_trainer.data.sources import OpenSource
from kubetune_trainer.data.store import DataStore, DataWriter
from kubetune_trainer.errors import DataError
from kubetune_trainer.report import Report
from kubetune_trainer.tokenizer import Tokenizer

SECONDS_BETWEEN_REPORTS = 2.0
BLOCK_TOKENS = 2**20
"""About so many tokens are copied together from samples to rows."""
NOTHING_HELD = np.empty(0, dtype=np.uint64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedSource:
    """The samples of one dataset, within a store of samples."""

    name: str
    """The dataset's name."""
    weight: float
    """How often it appears in an epoch."""
    first: int
    """Its first sample in the store; the others follow."""
    digests: np.ndarray
    """For each a number made from its tokens; equal samples have equal ones."""

    def samples(self, *, held: np.ndarray, are_held: bool) -> np.ndarray:
        """Returns those that are held out, or those that are not."""
        return self.first + np.flatnonzero(_is_in(self.digests, held) == are_held)


class SampleEncoder:
    """Turns the records of datasets into samples of token ids.

    Args:
        dataset: The config's block.
        tokenizer: The model's.
        report: Takes warnings and progress.
        rows: What is made of a record.
    """

    def __init__(self, dataset: Dataset, *, tokenizer: Tokenizer, report: Report, rows: RowKind = "Samples") -> None:
        self._encoder, self._report, self._rows = ChunkEncoder(dataset, tokenizer, rows), report, rows
        self.counts = Counts()

    def write_samples(self, opened: OpenSource, writer: DataWriter, *, count: bool = True) -> TokenizedSource:
        """Writes the samples of a dataset.

        Args:
            opened: The dataset.
            writer: Takes one row per sample, or several where overlong ones are split.
            count: Whether they are part of the statistics.

        Raises:
            DataError: A record is wrong; names the dataset, the file and the line.
        """
        first, digests, counts = len(writer), array("Q"), Counts()
        last_report = time.monotonic()
        for encoded in workers.encode_chunks(self._chunks(opened), self._encoder):
            writer.append_rows(
                encoded.lengths, tokens=encoded.tokens, labels=encoded.labels, documents=encoded.documents
            )
            digests.frombytes(encoded.digests.tobytes())
            counts.add(encoded.counts)
            if time.monotonic() - last_report > SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                self._report("prepare", stage=f"Tokenizing {opened.source.name}", done=counts.samples)
        self._check_not_empty(opened, counts, written=len(digests))
        if count:
            self.counts.add(counts)
        return TokenizedSource(
            name=opened.source.name,
            weight=opened.source.weight,
            first=first,
            digests=np.frombuffer(digests, dtype=np.uint64),
        )

    def _chunks(self, opened: OpenSource) -> Iterator[Chunk]:
        """Yields the records in chunks; those before a broken one come before its error."""
        format_: Format | None = None
        records: list[tuple[str, Record]] = []
        failure: DataError | None = None
        mapped = _MappedColumns(opened)
        try:
            for place, record in opened.records():
                mapped.look_at(record)
                format_ = format_ or self._format(opened, place, record)
                records.append((place, record))
                if len(records) == workers.CHUNK_SAMPLES:
                    yield self._chunk(opened, records, format_)
                    records = []
            mapped.check()
        except DataError as error:
            failure = error
        if records and format_ is not None:
            yield self._chunk(opened, records, format_)
        if failure is not None:
            raise failure

    @staticmethod
    def _chunk(opened: OpenSource, records: list[tuple[str, Record]], format_: Format) -> Chunk:
        source = opened.source
        return Chunk(source=source.name, records=records, format=format_, columns=dict(source.columns))

    def _format(self, opened: OpenSource, place: str, record: Record) -> Format:
        chosen = opened.source.format
        if chosen != "Auto":
            return chosen
        try:
            return detect(list(record), mapping=opened.source.columns, rows=self._rows)
        except DataError as error:
            raise DataError(f"dataset source {opened.source.name}: {place}: {error}", hint=error.hint) from error

    def _check_not_empty(self, opened: OpenSource, counts: Counts, *, written: int) -> None:
        if not counts.samples:
            files = ", ".join(file.name for file in opened.files)
            raise DataError(f"dataset source {opened.source.name}: {files} has no samples")
        if not written:
            raise DataError(
                f"dataset source {opened.source.name}: none of its {counts.samples} samples has a token to train on",
                hint="Look at dataset.trainOn, dataset.maxSequenceLength and dataset.overlong.",
            )


class _MappedColumns:
    """Looks for the columns that a source maps: a misspelt one would silently leave out what it should bring.

    A table has its columns in every record. Other files need not, so there the last record decides.
    """

    def __init__(self, opened: OpenSource) -> None:
        self._source = opened.source
        self._are_tables = all(is_table(file.name) for file in opened.files)
        self._missing = set(opened.source.columns.values())
        self._first: Record = {}

    def look_at(self, record: Record) -> None:
        """Takes note of a record's columns.

        Raises:
            DataError: The record is of a table, and a column is missing.
        """
        self._first = self._first or record
        if self._missing:
            self._missing -= record.keys()
            if self._are_tables:
                self.check()

    def check(self) -> None:
        """Looks whether a column is still missing.

        Raises:
            DataError: It is, and there are records.
        """
        for field, column in self._source.columns.items():
            if column in self._missing and self._first:
                raise DataError(
                    f"dataset source {self._source.name}: dataset.sources[].columns.{field} is {column}, and no record "
                    f"has that column; the first has {', '.join(self._first)}"
                )


def hold_out(sources: Sequence[TokenizedSource], *, fraction: float) -> np.ndarray:
    """Chooses what is held out, as digests of samples, so that copies of a sample never stand on both sides.

    Args:
        sources: The datasets.
        fraction: The part of each one's different samples; at least one, if it has two.
    """
    held = []
    for source in sources:
        different = np.unique(source.digests)  # ascending, and a digest is as good as a random number
        wanted = max(1, round(fraction * len(different))) if len(different) > 1 else 0
        held.append(different[:wanted])
    return np.unique(np.concatenate(held))


def epoch_of(sources: Sequence[TokenizedSource], *, held: np.ndarray, seed: int) -> np.ndarray:
    """Returns the samples of one epoch: each dataset as often as its weight says, the rest of a weight by lot.

    A dataset of any weight has a sample in it at least, if it has one: a few samples at 0.1 would be gone otherwise.

    Args:
        sources: The datasets.
        held: Digests of samples that are held out.
        seed: Decides the lot.
    """
    epoch = []
    for number, source in enumerate(sources):
        samples = source.samples(held=held, are_held=False)
        whole, rest = divmod(source.weight, 1.0)
        epoch += [samples] * int(whole)
        if rest:
            lot = np.random.default_rng([seed, number]).permutation(len(samples))
            lot = lot[: max(round(rest * len(samples)), not whole)]
            epoch.append(samples[np.sort(lot)])
    return np.concatenate(epoch)


def held_samples(sources: Sequence[TokenizedSource], *, held: np.ndarray) -> np.ndarray:
    """Returns the samples that are held out."""
    return np.concatenate([source.samples(held=held, are_held=True) for source in sources])


def all_samples(sources: Sequence[TokenizedSource]) -> np.ndarray:
    """Returns the samples of all datasets."""
    return np.concatenate([np.arange(source.first, source.first + len(source.digests)) for source in sources])


def write_rows(samples: DataStore, chosen: np.ndarray, folder: Path, *, dataset: Dataset) -> DataStore:
    """Writes rows of the chosen samples, packed if the config says so, and returns them."""
    if dataset.packing == "BestFit":
        order, begins = pack(samples.lengths(chosen), row_length=dataset.max_sequence_length)
        chosen = chosen[order]
        del order
    else:
        begins = np.arange(len(chosen) + 1)
    with DataWriter(folder) as writer:
        for first, last in _blocks(samples.lengths(chosen), begins):
            _write_block(samples, chosen[begins[first] : begins[last]], begins[first : last + 1], writer)
    return DataStore.open(folder)


def _blocks(lengths: np.ndarray, begins: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields the first row of every block of rows, and the one after its last."""
    ends = np.cumsum(lengths, dtype=np.int64)[begins[1:] - 1]  # of the tokens of each row
    first = 0
    while first < len(ends):
        upto = (ends[first - 1] if first else 0) + BLOCK_TOKENS
        last = max(first + 1, int(np.searchsorted(ends, upto, side="right")))
        yield first, last
        first = last


def _write_block(samples: DataStore, chosen: np.ndarray, begins: np.ndarray, writer: DataWriter) -> None:
    """Writes some rows: their samples, and where each begins. A sample's place in its row is its document's number."""
    lengths, gathered = samples.lengths(chosen), samples.gather(chosen)
    in_row = np.diff(begins)
    places = np.arange(len(chosen)) - np.repeat(begins[:-1] - begins[0], in_row)
    gathered["documents"] = gathered["documents"] + np.repeat(places, lengths)
    writer.append_rows(np.add.reduceat(lengths, begins[:-1] - begins[0], dtype=np.int64), **gathered)


def _is_in(digests: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Tells of each digest whether it is held out; `held` is in ascending order."""
    if not len(held):
        return np.zeros(len(digests), dtype=bool)
    return held[np.minimum(np.searchsorted(held, digests), len(held) - 1)] == digests
