"""The shapes that records come in, and what becomes of each: messages for the chat template, or parts of plain text.

| Format           | Columns                                             | Trained                             |
|------------------|-----------------------------------------------------|-------------------------------------|
| Messages         | messages: list of {role, content}; tools            | as dataset.train_on says            |
| ShareGPT         | conversations: list of {from, value}; system, tools | as Messages                         |
| Alpaca           | instruction, output; input, system                  | as Messages                         |
| PromptCompletion | prompt, completion: two texts, or two message lists | texts: the completion; else as above |
| Text             | text                                                | every token                         |
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from kubetune_trainer.data.tool_calls import as_object, with_objects
from kubetune_trainer.errors import DataError

Format = Literal["Messages", "ShareGPT", "Alpaca", "PromptCompletion", "Text", "Preference", "UnpairedPreference"]
RowKind = Literal["Samples", "Pairs", "Answers"]
"""What a row is: samples to learn from, two answers of which one is better, or one that is good or bad."""

REQUIRED: Mapping[Format, tuple[str, ...]] = {
    "Messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "PromptCompletion": ("prompt", "completion"),
    "Text": ("text",),
    "Preference": ("chosen", "rejected"),
    "UnpairedPreference": ("prompt", "completion", "label"),
}
"""What a record must have to be of a format; Auto takes the first that matches."""

SHAREGPT_ROLES: Final = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_call": "assistant",
}  # fmt: skip
"""What ShareGPT's own words for speakers are in the words of chat templates."""

FORMATS_OF: Mapping[RowKind, tuple[Format, ...]] = {
    "Samples": ("Messages", "ShareGPT", "Alpaca", "PromptCompletion", "Text"),
    "Pairs": ("Preference",),
    "Answers": ("Preference", "UnpairedPreference"),
}
"""The formats that each kind of row can be made of."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation, to be written out by the chat template."""

    messages: Sequence[Mapping[str, Any]]
    """Its messages, each with role and content."""
    tools: Sequence[Any] | None = None
    """What the assistant may call, where the template knows tools."""
    num_given: int = 0
    """How many of the first messages are given, so that no answer among them is trained."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text, of which the first part may be given and not trained."""

    prompt: str
    """What is given; may be empty."""
    completion: str
    """What is learned; an end-of-text token follows."""


class RecordError(Exception):
    """A record is not what its format asks for; whoever knows the file and the line says where."""


def detect(columns: Sequence[str], *, mapping: Mapping[str, str], rows: RowKind = "Samples") -> Format:
    """Returns the first format whose columns are all there.

    Args:
        columns: Columns of the data.
        mapping: From a format's field to the data's own column.
        rows: What is to be made of the data.

    Raises:
        DataError: No format matches; names the columns and what each format asks for.
    """
    for candidate in FORMATS_OF[rows]:
        if all(mapping.get(field, field) in columns for field in REQUIRED[candidate]):
            return candidate
    tried = "; ".join(f"{name} needs {' and '.join(REQUIRED[name])}" for name in FORMATS_OF[rows])
    raise DataError(
        f"the columns {', '.join(columns) or '(none)'} match no format: {tried}",
        hint="Map the format's fields to your columns with dataset.sources[].columns, as in {prompt: question}.",
    )


def convert(record: Mapping[str, Any], format_: Format, *, mapping: Mapping[str, str]) -> Chat | Text:
    """Turns a record into what is tokenized.

    Args:
        record: The record as it was read.
        format_: Its format.
        mapping: From the format's field to the data's own column.

    Raises:
        RecordError: A column is missing or holds something else than it should.
    """
    fields = Fields(record, mapping)
    if format_ == "Messages":
        return Chat(messages=fields.messages("messages"), tools=fields.tools())
    if format_ == "ShareGPT":
        return _sharegpt(fields)
    if format_ == "Alpaca":
        return _alpaca(fields)
    if format_ == "Text":
        return Text(prompt="", completion=fields.text("text"))
    if isinstance(fields.optional("prompt"), list):
        return Chat(messages=[*fields.messages("prompt"), *fields.messages("completion")], tools=fields.tools())
    return Text(prompt=fields.text("prompt"), completion=fields.text("completion"))


def _alpaca(fields: "Fields") -> Chat:
    system, given = fields.optional_text("system"), fields.optional_text("input")
    instruction = fields.text("instruction")
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction},
        {"role": "assistant", "content": fields.text("output")},
    ]
    return Chat(messages=[{"role": "system", "content": system}, *messages] if system else messages)


def _sharegpt(fields: "Fields") -> Chat:
    """Says who speaks in the words of chat templates; data with role and content already does."""
    system, turns = fields.optional_text("system"), fields.optional("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        messages = fields.messages("conversations")
    else:
        messages = [_message(turn, place=place) for place, turn in fields.items("conversations")]
    return Chat(
        messages=[{"role": "system", "content": system}, *messages] if system else messages, tools=fields.tools()
    )


def _message(turn: Any, *, place: str) -> Mapping[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise RecordError(f"{place} must have from and value, got {_shown(turn)}")
    if turn.get("from") not in SHAREGPT_ROLES:
        raise RecordError(f"{place}.from must be one of {', '.join(SHAREGPT_ROLES)}, got {_shown(turn.get('from'))}")
    if turn["from"] == "function_call":
        calls = _calls(turn["value"], place=f"{place}.value")
        return {"role": SHAREGPT_ROLES["function_call"], "content": "", "tool_calls": calls}
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _calls(text: str, *, place: str) -> list[Mapping[str, Any]]:
    """Returns tool calls, of the JSON that LLaMA-Factory defines: one {name, arguments}, or a list of them."""
    value = _from_json(text, place)
    functions, asked = value if isinstance(value, list) else [value], {"name", "arguments"}
    if not functions or not all(isinstance(each, Mapping) and asked <= set(each) for each in functions):
        raise RecordError(f"{place} must be JSON of {{name, arguments}} or a list of them, got {_shown(text)}")
    return [
        {"type": "function", "function": {"name": each["name"], "arguments": as_object(each["arguments"])}}
        for each in functions
    ]


class Fields:
    """A record under the format's own field names; what is not as it should be is a RecordError."""

    def __init__(self, record: Mapping[str, Any], mapping: Mapping[str, str]) -> None:
        self._record, self._mapping = record, mapping

    def column(self, field: str) -> str:
        """The data's own name of a field."""
        return self._mapping.get(field, field)

    def optional(self, field: str) -> Any:
        """Whatever is there, None where nothing is."""
        return self._record.get(self.column(field))

    def text(self, field: str) -> str:
        """A text."""
        value = self.optional(field)
        if not isinstance(value, str):
            raise RecordError(f"{self.column(field)} must be text, got {_shown(value)}")
        return value

    def optional_text(self, field: str) -> str:
        """A text, empty where nothing is."""
        return "" if self.optional(field) is None else self.text(field)

    def items(self, field: str) -> list[tuple[str, Any]]:
        """The parts of a conversation, each with its place."""
        value = self.optional(field)
        if not isinstance(value, list) or not value:
            raise RecordError(f"{self.column(field)} must be a list of messages, got {_shown(value)}")
        return [(f"{self.column(field)}[{number}]", item) for number, item in enumerate(value)]

    def messages(self, field: str) -> list[Mapping[str, Any]]:
        """A list of messages, the arguments of their tool calls as objects."""
        items = self.items(field)
        for place, message in items:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RecordError(f"{place} must have role and content, got {_shown(message)}")
            if message.get("content") is None and not message.get("tool_calls"):
                raise RecordError(f"{place}.content is missing")
        return [with_objects(message) for _, message in items]

    def tools(self) -> list[Any] | None:
        """What the assistant may call: a list, or a list written as JSON, as tables that cannot hold one have it."""
        value = self.optional("tools")
        if isinstance(value, str):
            value = _from_json(value, self.column("tools")) if value else None
        if value is not None and not isinstance(value, list):
            raise RecordError(f"{self.column('tools')} must be a list of tools, got {_shown(value)}")
        return value or None


def _from_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{place} is not JSON: {json_complaint(error)}") from error


def json_complaint(error: json.JSONDecodeError) -> str:
    """Returns what is wrong and at which column of its line."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"  # some of its messages end so, others do not


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
