"""Records to token ids, a chunk at a time: what every process that tokenizes does."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from kubetune_trainer.chat import ChatTemplate, TemplateError, encode_messages
from kubetune_trainer.config import Dataset
from kubetune_trainer.data.formats import Chat, Format, RecordError, RowKind, Text, convert
from kubetune_trainer.data.half_characters import half_character
from kubetune_trainer.data.preference import answer_of, join_pair, judged, pair_of
from kubetune_trainer.data.read import Record
from kubetune_trainer.data.store import Row
from kubetune_trainer.data.tool_calls import takes_text, with_text
from kubetune_trainer.errors import DataError
from kubetune_trainer.tokenizer import Tokenizer


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What became of the samples."""

    samples: int = 0
    """Read."""
    dropped_samples: int = 0
    """Left out: longer than allowed, or with nothing in them that is trained."""
    truncated_samples: int = 0
    """Cut at the limit."""

    def add(self, other: "Counts") -> None:
        """Adds up."""
        for field in dataclasses.fields(Counts):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some records of one dataset, in order."""

    source: str
    """The dataset's name."""
    records: Sequence[tuple[str, Record]]
    """Each with its place."""
    format: Format
    """Their shape."""
    columns: Mapping[str, str]
    """From the format's field to the data's own column."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """What became of a chunk: one sample per record, or several where overlong ones are split, or none."""

    tokens: np.ndarray
    """Token ids of all samples, one after the other."""
    labels: np.ndarray
    """Their labels."""
    documents: np.ndarray
    """Their documents."""
    lengths: np.ndarray
    """Tokens of each sample."""
    digests: np.ndarray
    """For each a number made from all that is kept of its record; where that is equal, so are the numbers."""
    counts: Counts
    """What became of the records."""


class ChunkEncoder:
    """Turns records into samples. `parts` is what makes another one in another process.

    Args:
        dataset: The config's block.
        tokenizer: The model's.
        rows: What is made of a record.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, rows: RowKind = "Samples") -> None:
        self.parts = dataset, tokenizer, rows
        self._dataset, self._tokenizer, self._rows = dataset, tokenizer, rows
        source = dataset.chat_template or tokenizer.chat_template
        self._template = ChatTemplate(source, tokenizer.special_tokens) if source else None
        self._calls_as_text = self._template is not None and takes_text(self._template)
        self._starts_with_bos = tokenizer.encode("a", add_special_tokens=True)[:1] == [tokenizer.bos_id]

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encodes every record.

        Raises:
            DataError: A record is wrong; names the dataset, the file and the line.
        """
        counts, pieces, digests = Counts(), list[Row](), list[int]()
        for place, record in chunk.records:
            try:
                cut = self._pieces(record, chunk, counts)
            except (RecordError, TemplateError, DataError) as error:
                message = f"dataset source {chunk.source}: {place}: {error}"
                raise DataError(message, hint=getattr(error, "hint", "")) from error
            except TypeError as error:  # what tokenizers raise for text that is none
                field = half_character(record)
                if field is None:
                    raise
                raise DataError(
                    f"dataset source {chunk.source}: {place}: {field} has half of a character (a lone surrogate)",
                    hint="Remove it: a text was cut within a character such as an emoji.",
                ) from error
            counts.samples += 1
            pieces += cut
            digests += [_digest(cut)] * len(cut)
        return EncodedChunk(
            tokens=_joined([piece.tokens for piece in pieces]),
            labels=_joined([piece.labels for piece in pieces]),
            documents=_joined([piece.documents for piece in pieces]),
            lengths=np.array([len(piece.tokens) for piece in pieces], dtype=np.int32),
            digests=np.array(digests, dtype=np.uint64),
            counts=counts,
        )

    def _pieces(self, record: Record, chunk: Chunk, counts: Counts) -> list[Row]:
        """Returns what becomes of a record."""
        if chunk.format == "Preference":
            pair = pair_of(record, mapping=chunk.columns)
            chosen, rejected = self._encode(pair.chosen), self._encode(pair.rejected)
            of_record = self._of_two_answers if self._rows == "Answers" else self._of_pair
            return of_record(chosen, rejected, counts)
        if chunk.format == "UnpairedPreference":
            answer, good = answer_of(record, mapping=chunk.columns)
            return [judged(piece, is_good=good) for piece in self._cut(self._encode(answer), counts)]
        return self._cut(self._encode(convert(record, chunk.format, mapping=chunk.columns)), counts)

    def _of_pair(self, chosen: Row, rejected: Row, counts: Counts) -> list[Row]:
        """Returns a pair; it is left out whole where one of its sides is."""
        of_pair = Counts()
        sides = [piece for side in (chosen, rejected) for piece in self._cut(side, of_pair)]
        counts.truncated_samples += bool(of_pair.truncated_samples)
        counts.dropped_samples += bool(of_pair.dropped_samples)
        return [] if of_pair.dropped_samples else [join_pair(*sides)]

    def _of_two_answers(self, chosen: Row, rejected: Row, counts: Counts) -> list[Row]:
        """Returns the sides of a pair as rows of their own: a good answer and a bad one."""
        of_pair = Counts()
        good, bad = (self._cut(side, of_pair) for side in (chosen, rejected))
        counts.truncated_samples += bool(of_pair.truncated_samples)
        counts.dropped_samples += bool(of_pair.dropped_samples)
        return [judged(row, is_good=side is good) for side in (good, bad) for row in side]

    def _encode(self, sample: Chat | Text) -> Row:
        if isinstance(sample, Text):
            return self._encode_text(sample)
        if self._template is None:
            raise DataError("the model has no chat template", hint="Give one in dataset.chatTemplate.")
        return Row.of(
            *encode_messages(
                [with_text(message) for message in sample.messages] if self._calls_as_text else sample.messages,
                tokenizer=self._tokenizer,
                template=self._template,
                train_on=self._dataset.train_on,
                tools=sample.tools,
                num_given=sample.num_given,
            )
        )

    def _encode_text(self, text: Text) -> Row:
        """Encodes plain text with the beginning that the model knows, if any, and an end that it shall learn.

        Prompt and completion are encoded as one text: apart, some tokenizers put a space before each. A token with
        characters of both is trained, as in conversations and by TRL.
        """
        tokenizer = self._tokenizer
        encoding = tokenizer.backend.encode(text.prompt + text.completion, add_special_tokens=False)
        ids = encoding.ids
        if self._dataset.train_on == "All" or not text.prompt:
            trained = [True] * len(ids)
        else:
            border = len(text.prompt)
            trained = [end > border for _, end in encoding.offsets]
        begin = [tokenizer.bos_id] if self._starts_with_bos and ids[:1] != [tokenizer.bos_id] else []
        end = [] if text.completion and ids[-1:] == [tokenizer.eos_id] else [tokenizer.eos_id]
        return Row.of([*begin, *ids, *end], [*[False] * len(begin), *trained, *[True] * len(end)])

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


def _digest(pieces: Sequence[Row]) -> int:
    """Returns a number made from what is kept of a record: those that differ behind the cut alone are copies."""
    hashed = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        hashed.update(piece.tokens.tobytes())
    return int.from_bytes(hashed.digest(), "little")


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
