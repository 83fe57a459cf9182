"""The arguments of tool calls: data has them as an object or as its JSON, and a chat template writes one of the two.

Most templates write an object as JSON. Some put the arguments into the text as they are, and these need the JSON.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from kubetune_trainer.chat import ChatTemplate, Message, TemplateError

_ARGUMENTS = {"city": "Rome"}
"""What templates are tried with."""


def with_objects(message: Message) -> Message:
    """Returns a message whose tool calls have an object as arguments where they had its JSON; other text stays."""
    return _changed(message, as_object)


def with_text(message: Message) -> Message:
    """Returns a message whose tool calls have JSON as arguments where they had an object."""
    return _changed(message, _as_text)


def as_object(arguments: Any) -> Any:
    """Returns the object that a text is the JSON of; anything else as it is, since models also write broken JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except json.JSONDecodeError:
        return arguments
    return value if isinstance(value, dict) else arguments


def takes_text(template: ChatTemplate) -> bool:
    """Tells whether a template needs arguments as JSON: it writes that, and an object not at all or in Python's way."""
    if _written(template, json.dumps(_ARGUMENTS)) is None:
        return False
    written = _written(template, _ARGUMENTS)
    return written is None or repr(_ARGUMENTS) in written


def _written(template: ChatTemplate, arguments: Any) -> str | None:
    """Returns what a template makes of a call, None where it fails."""
    call = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    asked = {"role": "user", "content": "How is the weather?"}
    try:
        return template.render([asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except TemplateError:
        return None


def _changed(message: Message, change: Callable[[Any], Any]) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call(call, change) for call in calls]} if isinstance(calls, list) else message


def _call(call: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a call with other arguments; they stand in its `function`, or beside the name in the call itself."""
    if not isinstance(call, Mapping):
        return call
    if "function" in call:
        return {**call, "function": _call(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments
