"""From records to rows of tokens on disk, in two passes: every record becomes a sample, then samples become rows.

Between the passes samples lie in a store of their own and only their lengths and digests are in memory.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kubetune_trainer.chat import ChatTemplate, TemplateError, encode_messages
from kubetune_trainer.config import Dataset
from kubetune_trainer.data.formats import Chat, Format, RecordError, Text, convert, detect
from kubetune_trainer.data.pack import pack
from kubetune_trainer.data.read import Record
from kubetune_trainer.data.sources import OpenSource
from kubetune_trainer.data.store import DataStore, DataWriter, Row
from kubetune_trainer.errors import DataError
from kubetune_trainer.report import Report
from kubetune_trainer.tokenizer import Tokenizer

SECONDS_BETWEEN_REPORTS = 2.0


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What became of the samples."""

    samples: int = 0
    """Read."""
    dropped_samples: int = 0
    """Left out: longer than allowed, or with nothing in them that is trained."""
    truncated_samples: int = 0
    """Cut at the limit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedSource:
    """The samples of one dataset, within a store of samples."""

    name: str
    """The dataset's name."""
    weight: float
    """How often it appears in an epoch."""
    samples: np.ndarray
    """Its samples, as indexes into the store."""
    digests: np.ndarray
    """For each a number made from its tokens; equal samples have equal ones."""

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yields every sample with its digest."""
        return zip(self.samples.tolist(), self.digests.tolist(), strict=True)


class SampleEncoder:
    """Turns records into samples of token ids.

    Args:
        dataset: The config's block.
        tokenizer: The model's.
        report: Takes warnings and progress.
    """

    def __init__(self, dataset: Dataset, *, tokenizer: Tokenizer, report: Report) -> None:
        self._dataset, self._tokenizer, self._report = dataset, tokenizer, report
        source = dataset.chat_template or tokenizer.chat_template
        self._template = ChatTemplate(source, tokenizer.special_tokens) if source else None
        self._starts_with_bos = tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_id]
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
        first, digests, counts = len(writer), [], Counts()
        format_: Format | None = None
        last_report = time.monotonic()
        for place, record in opened.records():
            try:
                format_ = format_ or self._format(opened, record)
                sample = self._encode(convert(record, format_, mapping=opened.source.columns))
                pieces = self._cut(sample, counts)
            except (RecordError, TemplateError, DataError) as error:
                raise DataError(
                    f"dataset source {opened.source.name}: {place}: {error}", hint=getattr(error, "hint", "")
                ) from error
            counts.samples += 1
            for piece in pieces:
                writer.append([piece])
                digests.append(_digest(sample))
            if time.monotonic() - last_report > SECONDS_BETWEEN_REPORTS:
                last_report = time.monotonic()
                self._report("prepare", stage=f"Tokenizing {opened.source.name}", done=counts.samples)
        self._check_not_empty(opened, counts, written=len(digests))
        if count:
            self._add(counts)
        return TokenizedSource(
            name=opened.source.name,
            weight=opened.source.weight,
            samples=np.arange(first, len(writer)),
            digests=np.array(digests, dtype=np.uint64),
        )

    def _format(self, opened: OpenSource, record: Record) -> Format:
        chosen = opened.source.format
        return detect(list(record), mapping=opened.source.columns) if chosen == "Auto" else chosen

    def _encode(self, sample: Chat | Text) -> Row:
        if isinstance(sample, Text):
            return self._encode_text(sample)
        if self._template is None:
            raise DataError("the model has no chat template", hint="Give one in dataset.chatTemplate.")
        return Row.of(
            *encode_messages(
                sample.messages,
                tokenizer=self._tokenizer,
                template=self._template,
                train_on=self._dataset.train_on,
                tools=sample.tools,
            )
        )

    def _encode_text(self, text: Text) -> Row:
        """Encodes plain text with the beginning that the model knows, if any, and an end that it shall learn."""
        tokenizer = self._tokenizer
        prompt = tokenizer.encode(text.prompt)
        completion = tokenizer.encode(text.completion)
        ids = prompt + completion
        begin = [tokenizer.bos_id] if self._starts_with_bos and ids[:1] != [tokenizer.bos_id] else []
        end = [] if completion[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
        trained = [self._dataset.train_on == "All"] * len(prompt) + [True] * len(completion + end)
        return Row.of([*begin, *ids, *end], [*[False] * len(begin), *trained])

    def _cut(self, sample: Row, counts: Counts) -> list[Row]:
        """Applies dataset.overlong, and leaves out what has nothing to learn in it."""
        limit, length = self._dataset.max_sequence_length, len(sample.tokens)
        pieces = [sample]
        if length > limit and self._dataset.overlong == "Fail":
            raise DataError(
                f"the sample has {length} tokens, and dataset.maxSequenceLength is {limit} with overlong: Fail",
                hint="Raise dataset.maxSequenceLength, or choose Truncate, Split or Drop for dataset.overlong.",
            )
        if length > limit and self._dataset.overlong == "Drop":
            pieces = []
        elif length > limit and self._dataset.overlong == "Truncate":
            counts.truncated_samples += 1
            pieces = [sample.part(0, limit)]
        elif length > limit:
            pieces = [sample.part(begin, begin + limit) for begin in range(0, length, limit)]
        learned = [piece for piece in pieces if piece.trained_tokens]
        counts.dropped_samples += not learned
        return learned

    def _check_not_empty(self, opened: OpenSource, counts: Counts, *, written: int) -> None:
        if not counts.samples:
            files = ", ".join(file.name for file in opened.files)
            raise DataError(f"dataset source {opened.source.name}: {files} has no samples")
        if not written:
            raise DataError(
                f"dataset source {opened.source.name}: none of its {counts.samples} samples has a token to train on",
                hint="Look at dataset.trainOn, dataset.maxSequenceLength and dataset.overlong.",
            )

    def _add(self, counts: Counts) -> None:
        for field in dataclasses.fields(Counts):
            setattr(self.counts, field.name, getattr(self.counts, field.name) + getattr(counts, field.name))


def hold_out(sources: Sequence[TokenizedSource], *, fraction: float) -> set[int]:
    """Chooses what is held out, as digests of samples, so that copies of a sample never stand on both sides.

    Args:
        sources: The datasets.
        fraction: The part of each one's different samples; at least one, if it has two.
    """
    held: set[int] = set()
    for source in sources:
        different = np.unique(source.digests)  # ascending, and a digest is as good as a random number
        wanted = max(1, round(fraction * len(different))) if len(different) > 1 else 0
        held.update(different[:wanted].tolist())
    return held


def epoch_of(sources: Sequence[TokenizedSource], *, held: set[int], seed: int) -> list[int]:
    """Returns the samples of one epoch: each dataset as often as its weight says, the rest of a weight by lot.

    Args:
        sources: The datasets.
        held: Digests of samples that are held out.
        seed: Decides the lot.
    """
    epoch: list[int] = []
    for number, source in enumerate(sources):
        samples = [
            i for i, digest in zip(source.samples.tolist(), source.digests.tolist(), strict=True) if digest not in held
        ]
        whole, rest = divmod(source.weight, 1.0)
        lot = np.random.default_rng([seed, number]).permutation(len(samples))[: round(rest * len(samples))]
        epoch += samples * int(whole) + [samples[index] for index in sorted(lot)]
    return epoch


def held_samples(sources: Sequence[TokenizedSource], *, held: set[int]) -> list[int]:
    """Returns the samples that are held out."""
    return [index for source in sources for index, digest in source.pairs() if digest in held]


def write_rows(samples: DataStore, chosen: Sequence[int], folder: Path, *, dataset: Dataset) -> DataStore:
    """Writes rows of the chosen samples, packed if the config says so, and returns them."""
    if dataset.packing == "BestFit":
        lengths = [len(samples[index].tokens) for index in chosen]
        rows = [[chosen[index] for index in row] for row in pack(lengths, row_length=dataset.max_sequence_length)]
    else:
        rows = [[index] for index in chosen]
    with DataWriter(folder) as writer:
        for row in rows:
            writer.append([samples[index] for index in row])
    return DataStore.open(folder)


def trainable_tokens(store: DataStore) -> int:
    """Returns how many positions of all rows carry loss."""
    return sum(row.trained_tokens for row in store)


def _digest(sample: Row) -> int:
    return int.from_bytes(hashlib.blake2b(sample.tokens.tobytes(), digest_size=8).digest(), "little")
