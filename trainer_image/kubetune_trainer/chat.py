"""Conversations to text and token ids by a jinja chat template, and which of the tokens the loss asks for.

Two ways to know what the assistant said. A template that marks it with `{% generation %}` is taken at its word. Any
other is rendered up to each message: what an answer adds behind the assistant's header is the answer with its end.
"""

import datetime as dt
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from kubetune_trainer.errors import DataError
from kubetune_trainer.tokenizer import Tokenizer

TrainOn = Literal["Assistant", "LastAssistant", "All"]
Message = Mapping[str, Any]
Span = tuple[int, int]
"""Begin and end of a part of the text, in characters."""

ASSISTANT = "assistant"
_BEGIN, _END = "\ue0f0", "\ue0f1"
"""Around what a template marks as generated, until the text is taken apart; from Unicode's private use area."""


class TemplateError(Exception):
    """A template cannot write a conversation out; whoever knows which one says so."""


class ChatTemplate:
    """A chat template, rendered as transformers renders it (its environment and its extra functions).

    `marks_generation` tells whether the template itself says what the assistant wrote.

    Args:
        source: Jinja source.
        special_tokens: What the template may name, such as bos_token.

    Raises:
        DataError: The source is not jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = special_tokens
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self.marks_generation = _Generation.is_used_in(environment, source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is not jinja: line {error.lineno}: {error.message}") from error

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Writes a conversation out as text.

        Args:
            messages: Each with role and content.
            tools: What the assistant may call.
            add_generation_prompt: Whether the header of an answer to come is added.

        Raises:
            TemplateError: The template fails, or refuses these messages.
        """
        return self.render_marked(messages, tools=tools, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """As render, with the parts that the template marks as generated."""
        try:
            text = self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template can fail in any way that Python can
            raise TemplateError(f"the chat template fails: {error}") from error
        return _take_marks_out(text)


def encode_messages(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    train_on: TrainOn,
    tools: Sequence[Any] | None = None,
    num_given: int = 0,
) -> tuple[list[int], list[bool]]:
    """Returns the token ids of a conversation, and for each whether it is trained.

    Args:
        messages: Each with role and content.
        tokenizer: The model's.
        template: Writes the beginning-of-text token itself where the model wants one, so none is added.
        train_on: Assistant trains every answer with its end of turn, LastAssistant the last one, All every token.
        tools: What the assistant may call.
        num_given: How many of the first messages are given; the answers among them are not trained.

    Raises:
        TemplateError: The template fails, or its text does not grow with the messages, so that answers cannot be found.
    """
    text, marked = template.render_marked(messages, tools=tools)
    stops = [tokenizer.decode([stop], skip_special_tokens=False) for stop in tokenizer.stop_ids]
    if train_on == "All":
        spans = [(0, len(text))]
    else:
        spans = marked if template.marks_generation else list(_answers(messages, text, template, tools))
        spans = [_up_to_end_of_turn(text, span, stops) for span in spans]
        spans = spans[sum(message["role"] == ASSISTANT for message in messages[:num_given]) :]
        spans = spans[-1:] if train_on == "LastAssistant" else spans
    ids, trained = _encode(text, spans, tokenizer)
    if messages[-1]["role"] == ASSISTANT and not text.rstrip().endswith(tuple(stops)):
        # Without an end the model would never learn to stop.
        return [*ids, tokenizer.eos_id], [*trained, True]
    return ids, trained


def _answers(
    messages: Sequence[Message], text: str, template: ChatTemplate, tools: Sequence[Any] | None
) -> Iterator[Span]:
    """Finds each answer: it begins behind the header that asks for it and ends where the conversation goes on."""
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        head = template.render(messages[:number], tools=tools, add_generation_prompt=True)
        upto = text if number == len(messages) - 1 else template.render(messages[: number + 1], tools=tools)
        if not upto.startswith(head):
            # Some templates write no header, or begin the answer to come with something of their own.
            head = template.render(messages[:number], tools=tools)
        if not (text.startswith(upto) and upto.startswith(head)):
            raise TemplateError(
                f"messages[{number}]: the chat template does not write the conversation up to here as a beginning of "
                "the whole, so the answer cannot be found in it; mark answers with {% generation %} in the template"
            )
        yield len(head), len(upto)


def _up_to_end_of_turn(text: str, span: Span, stops: Sequence[str]) -> Span:
    """Moves the end of an answer behind its end-of-turn token, if any; white space after it is not learned."""
    begin, end = span
    for stop in stops:
        if text[begin:end].rstrip().endswith(stop):
            return begin, begin + len(text[begin:end].rstrip())
        if text.startswith(stop, end):
            return begin, end + len(stop)
    return span


def _encode(text: str, spans: Sequence[Span], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Encodes the text as a whole, as at inference; a token is trained if any of it lies in a span."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    trained = [any(first < end and begin < last for first, last in spans) for begin, end in encoding.offsets]
    return encoding.ids, trained


def _take_marks_out(text: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = begin = 0
    for part in _split_keeping_marks(text):
        if part == _BEGIN:
            begin = length
        elif part == _END:
            spans.append((begin, length))
        else:
            pieces.append(part)
            length += len(part)
    return "".join(pieces), spans


def _split_keeping_marks(text: str) -> Iterator[str]:
    for number, part in enumerate(text.split(_BEGIN)):
        if number:
            yield _BEGIN
        inside, *after = part.split(_END)
        yield inside
        for rest in after:
            yield _END
            yield rest


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}…{% endgeneration %}`, which marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way to declare it)

    @staticmethod
    def is_used_in(environment: jinja2.Environment, source: str) -> bool:
        """Whether a template has such a block."""
        tokens = list(environment.lex(source))
        return any(kind == "name" and value == "generation" for _, kind, value in tokens)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Turns the block into a call that puts marks around what it renders."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return dt.datetime.now().astimezone().strftime(format_)
