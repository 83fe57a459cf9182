"""Conversations to text and token ids by a jinja chat template, and which of the tokens the loss asks for.

Two ways to know what the assistant said. A template that marks it with `{% generation %}` is taken at its word. Any
other is rendered up to each message: what an answer adds behind the assistant's header is the answer with its end.
Some templates write an answer in another way once the conversation goes on. Then the text up to a message is compared
with the whole from the end of that message's content on.
"""

import datetime as dt
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
_CONTENT_END = "\ue0f2"
"""Put behind a message's content to see where that ends in the text, or before it; from the same area."""


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
        TemplateError: The template fails, or an answer cannot be found in what it writes.
    """
    text, marked = template.render_marked(messages, tools=tools)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)  # as a whole, as at inference
    offsets = encoding.offsets
    stops = [tokenizer.decode([stop], skip_special_tokens=False) for stop in tokenizer.stop_ids]
    stops = [stop for stop in stops if stop]  # an id beyond the vocabulary is no text
    if train_on == "All":
        spans = [(0, len(text))]
    else:
        ends = [end for _, end in offsets]
        written = _Written(messages=messages, tools=tools, template=template, text=text, token_ends=ends)
        answers = _answers(written, marked, num_given=num_given, last_only=train_on == "LastAssistant")
        spans = [_up_to_end_of_turn(text, span, stops) for span in answers]
    trained = [any(first < end and begin < last for first, last in spans) for begin, end in offsets]
    if messages[-1]["role"] == ASSISTANT and not text.rstrip().endswith(tuple(stops)):
        # Without an end the model would never learn to stop.
        return [*encoding.ids, tokenizer.eos_id], [*trained, True]
    return encoding.ids, trained


@dataclass(frozen=True, kw_only=True)
class _Written:
    """A conversation as its template writes it."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None
    template: ChatTemplate
    text: str
    token_ends: Sequence[int]
    """Where each token of the text ends, in characters."""

    def answer(self, number: int) -> Span:
        """Finds an answer: it begins behind the header that asks for it and ends where the conversation goes on."""
        before, upto = self.messages[:number], self.text
        if number < len(self.messages) - 1:
            upto = self._render(self.messages[: number + 1])
        if not number:
            begin = self._begin_of_first()
            return begin, len(upto) if self.text.startswith(upto) else self._shared_with(self.messages[:1], 0)[1]
        if self.text.startswith(upto):
            asked = self._render(before, add_generation_prompt=True)
            if upto.startswith(asked):
                return len(asked), len(upto)
            # Some templates write no header, or begin the answer to come with something of their own.
            head = self._render(before)
            if upto.startswith(head):
                return max(len(head), self._whole_tokens(0, _num_shared(upto, asked))), len(upto)
        begin = self.begin_of_answer(number)
        end_of_content, end = self._shared_with(self.messages[: number + 1], number)
        if begin > end_of_content:
            raise _not_found(number)
        return begin, end

    def _begin_of_first(self) -> int:
        """Finds where an answer begins that nothing stands before: not all templates write an empty conversation."""
        message = self.messages[0]
        content = message.get("content")
        if isinstance(content, str) and content and not message.get("tool_calls"):
            signed = {**message, "content": f"{_CONTENT_END}{content}"}
            head, found, _ = self._render([signed, *self.messages[1:]]).partition(_CONTENT_END)
            if found and self.text.startswith(head):
                return len(head)
        with suppress(TemplateError):
            head = self._render([], add_generation_prompt=True)
            if head and self.text.startswith(head):
                return len(head)
        raise _not_found(0)

    def begin_of_answer(self, number: int) -> int:
        """Finds the end of the header that asks for an answer."""
        head = self._render(self.messages[:number], add_generation_prompt=True)
        if self.text.startswith(head):
            return len(head)
        return self._shared_with(self.messages[:number], number - 1, add_generation_prompt=True)[1]

    def _shared_with(self, beginning: Sequence[Message], number: int, **prompt: bool) -> Span:
        """Finds what stands behind a message's content both in the text and in the render of a beginning."""
        after = self._behind(self.messages, number)
        other = self._behind(beginning, number, **prompt)
        num_shared = _num_shared(after, other)
        if not self.text.endswith(after[num_shared:]):
            raise _not_found(number)
        begin = len(self.text) - len(after)
        end = begin + num_shared
        if num_shared < len(other):
            end = self._whole_tokens(begin, end)
        return begin, end

    def _whole_tokens(self, begin: int, end: int) -> int:
        """Where the last token ends that does so by the end: two special tokens may begin alike."""
        return max((token_end for token_end in self.token_ends if begin <= token_end <= end), default=begin)

    def _behind(self, messages: Sequence[Message], number: int, **prompt: bool) -> str:
        """Returns what is written behind the content of a message."""
        changed = [*messages[:number], _with_content_end(messages[number]), *messages[number + 1 :]]
        _, found, after = self._render(changed, **prompt).partition(_CONTENT_END)
        if not found:
            raise _not_found(number)
        return after

    def _render(self, messages: Sequence[Message], **prompt: bool) -> str:
        return self.template.render(messages, tools=self.tools, **prompt)


def _answers(written: _Written, marked: Sequence[Span], *, num_given: int, last_only: bool) -> Sequence[Span]:
    """Finds the answers that are not given, or the last of them; a template's marks come before all else."""
    numbers = [number for number, message in enumerate(written.messages) if message["role"] == ASSISTANT]
    wanted = [number for number in numbers if number >= num_given]
    wanted = wanted[-1:] if last_only else wanted
    if not written.template.marks_generation:
        return [written.answer(number) for number in wanted]
    if wanted == numbers:
        return marked
    # One answer may have several marks: their place tells whose they are, not their number.
    begin = written.begin_of_answer(wanted[0]) if wanted else len(written.text)
    return [span for span in marked if span[1] > begin]


def _num_shared(text: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    same = (one == two for one, two in zip(text, other, strict=False))
    return len(list(itertools.takewhile(bool, same)))


def _with_content_end(message: Message) -> Message:
    """Puts the sign behind the last that a message says: its content, or what it calls a tool with."""
    calls = message.get("tool_calls")
    last = calls[-1] if isinstance(calls, list) and calls else None
    function = last.get("function", last) if isinstance(last, Mapping) else None
    if not (isinstance(calls, list) and isinstance(last, Mapping) and isinstance(function, Mapping)):
        return {**message, "content": _ended(message.get("content"))}
    function = {**function, "arguments": _ended(function.get("arguments"))}
    call = {**last, "function": function} if "function" in last else function
    return {**message, "tool_calls": [*calls[:-1], call]}


def _ended(value: Any) -> Any:
    if isinstance(value, list):
        return [*value, {"type": "text", "text": _CONTENT_END}]
    if isinstance(value, Mapping):
        return {**value, "end": _CONTENT_END}
    return f"{value or ''}{_CONTENT_END}"


def _not_found(number: int) -> TemplateError:
    return TemplateError(
        f"messages[{number}]: the chat template does not show where this message ends in the conversation, so answers "
        "cannot be told from the rest; mark answers with {% generation %} in the template"
    )


def _up_to_end_of_turn(text: str, span: Span, stops: Sequence[str]) -> Span:
    """Moves the end of an answer behind its end-of-turn token, if any; white space after it is not learned."""
    begin, end = span
    for stop in stops:
        if text[begin:end].rstrip().endswith(stop):
            return begin, begin + len(text[begin:end].rstrip())
        if text.startswith(stop, end):
            return begin, end + len(stop)
    return span


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
