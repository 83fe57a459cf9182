"""Preferences: pairs of answers of which one is better, or answers that are good or bad each by itself.

A record of format Preference has prompt, chosen and rejected: texts, or lists of messages. Without a prompt, or with
one of another sort than the answers, the prompt is what chosen and rejected begin with in common: of another sort, they
have to begin with something. What is given is never scored. A row has the better answer as its document 0 and the other
one as 1, each with the prompt.

A record of format UnpairedPreference has prompt, completion and label, which says whether the completion is a good one.
A row of it is one side of a pair's: document 0 if the answer is good, 1 if it is bad.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kubetune_trainer.data.formats import Chat, Fields, RecordError, Text
from kubetune_trainer.data.store import Row
from kubetune_trainer.names import IGNORE_LABEL

Answer = Chat | Text
_LABELS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Answer
    """The better one."""
    rejected: Answer
    """The other one."""


def pair_of(record: Mapping[str, Any], *, mapping: Mapping[str, str]) -> Pair:
    """Turns a record of format Preference into a pair.

    Args:
        record: The record as it was read.
        mapping: From the format's field to the data's own column.

    Raises:
        RecordError: A column is missing or holds something else than it should, or the answers do not differ.
    """
    fields = Fields(record, mapping)
    prompt, is_chat = fields.optional("prompt"), isinstance(fields.optional("chosen"), list)
    read = fields.messages if is_chat else fields.text
    chosen, rejected = read("chosen"), read("rejected")
    if prompt is not None and isinstance(prompt, list) == is_chat:
        given = read("prompt")
    else:
        given = chosen[: _num_common(chosen, rejected)]
        if prompt is not None and not given:
            raise RecordError(
                f"{fields.column('prompt')} must be of the sort of {fields.column('chosen')} and "
                f"{fields.column('rejected')}, text or messages, or they must begin with it"
            )
        chosen, rejected = chosen[len(given) :], rejected[len(given) :]
    if chosen == rejected:
        raise RecordError(f"{fields.column('chosen')} and {fields.column('rejected')} must differ")
    tools = fields.tools()
    return Pair(chosen=_answer(given, chosen, tools=tools), rejected=_answer(given, rejected, tools=tools))


def answer_of(record: Mapping[str, Any], *, mapping: Mapping[str, str]) -> tuple[Answer, bool]:
    """Turns a record of format UnpairedPreference into an answer, and whether it is a good one.

    Args:
        record: The record as it was read.
        mapping: From the format's field to the data's own column.

    Raises:
        RecordError: A column is missing or holds something else than it should.
    """
    fields = Fields(record, mapping)
    label = fields.optional("label")
    if isinstance(label, str):  # as all cells of csv
        label = _LABELS.get(label.strip().lower(), label)
    if label not in (True, False):  # 1 and 0 are equal to them
        raise RecordError(f"{fields.column('label')} must be true or false, got {label!r}")
    read = fields.messages if isinstance(fields.optional("completion"), list) else fields.text
    return _answer(read("prompt"), read("completion"), tools=fields.tools()), bool(label)


def judged(answer: Row, *, is_good: bool) -> Row:
    """Returns an answer as one side of a pair's row."""
    return Row(tokens=answer.tokens, labels=answer.labels, documents=np.full_like(answer.documents, not is_good))


def is_good(row: Row) -> bool:
    """Whether the answer of a row is a good one."""
    return bool(row.documents[0] == 0)


def prompt_of(row: Row) -> bytes:
    """Returns what a row's answer answers: the tokens before the first that is trained."""
    return row.tokens[: _last_of_prompt(row) + 1].tobytes()


def with_answer_of(row: Row, other: Row, *, max_length: int) -> Row:
    """Returns a row's prompt with another row's answer, cut at a length."""
    begin, other_begin = _last_of_prompt(row), _last_of_prompt(other)
    tokens = np.concatenate([row.tokens[: begin + 1], other.tokens[other_begin + 1 :]])
    labels = np.concatenate([row.labels[:begin], other.labels[other_begin:]])
    mixed = Row(tokens=tokens, labels=labels, documents=np.full_like(tokens, row.documents[0]))
    return mixed.part(0, max_length)


def _last_of_prompt(row: Row) -> int:
    return int(np.argmax(row.labels != IGNORE_LABEL))  # a label stands where its token is asked for, one before it


def join_pair(chosen: Row, rejected: Row) -> Row:
    """Returns the row of a pair."""
    sides = (chosen, rejected)
    return Row(
        tokens=np.concatenate([side.tokens for side in sides]),
        labels=np.concatenate([side.labels for side in sides]),
        documents=np.concatenate([np.full_like(side.documents, place) for place, side in enumerate(sides)]),
    )


def split_pair(row: Row) -> tuple[Row, Row]:
    """Returns the better and the other side of a pair's row, each a row of its own."""
    begin = int(np.count_nonzero(row.documents == 0))
    return row.part(0, begin), row.part(begin, len(row.tokens))


def _answer(given: Any, answer: Any, *, tools: Any) -> Answer:
    if isinstance(answer, str):
        return Text(prompt=given, completion=answer)
    return Chat(messages=[*given, *answer], tools=tools, num_given=len(given))


def _num_common(chosen: Any, rejected: Any) -> int:
    """How many messages, or characters, two answers begin with in common; a text's last space belongs to what follows.

    A message that one answer lacks is no part of what is given, so at least one is left on each side.
    """
    shorter = min(len(chosen), len(rejected))
    common = next((at for at in range(shorter) if chosen[at] != rejected[at]), shorter)
    if isinstance(chosen, list):
        return min(common, shorter - 1)
    return common - 1 if common and chosen[common - 1] == " " else common
