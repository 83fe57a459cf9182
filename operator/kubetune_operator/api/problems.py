"""pydantic's errors in the words of the API server, so that a manifest is refused alike with and without a cluster."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kubetune_operator.api.model import BRANCHES, DUPLICATE, RULES_BROKEN, Rule

_JSON_TYPES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"),
)  # fmt: skip
_WANTED = {
    "int_type": "integer", "string_type": "string", "bool_type": "boolean", "list_type": "array",
    "dict_type": "object", "model_type": "object",
}  # fmt: skip


def problems_of(error: ValidationError) -> list[str]:
    """One sentence per broken rule: the field as the user typed it, the rule and the value."""
    seen: dict[str, None] = {}
    for details in error.errors():
        for problem in _sentences(details):
            seen.setdefault(problem)
    return list(seen)


def _sentences(details: ErrorDetails) -> list[str]:
    path, value, context = _path(details["loc"]), details["input"], details.get("ctx", {})
    kind = details["type"]
    if kind == RULES_BROKEN:
        return [_broken(rule, details["loc"], value) for rule in context["broken"]]
    if kind == DUPLICATE:
        return [f"{path}[{context['index']}]: Duplicate value: {context['shown']}"]
    if wanted := _wanted(details):
        got = _json_type(value)
        return [f'{path}: Invalid value: "{got}": {path} in body must be of type {wanted}: "{got}"']
    if sentence := _SENTENCES.get(kind):
        return [sentence(path, value, context)]
    return [f"{path}: Invalid value: {_shown(value)}: {details['msg']}"]


def _broken(rule: Rule, location: tuple[int | str, ...], value: Any) -> str:
    path = f"{_path(location[:-1])}[{location[-1]}]" if rule.keyed else _path(location)
    shown = f"{_shown(value)}: " if isinstance(value, str | int | float) else ""
    return f"{path or '<nil>'}: Invalid value: {shown}{rule.message}"


def _path(location: tuple[int | str, ...]) -> str:
    """`spec.dataset.sources[0].uri`; the branches of a union are no part of it."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in BRANCHES:
            path += f".{part}" if path else part
    return path


def _wanted(details: ErrorDetails) -> str | None:
    """The type that a field should have had, if that is what is wrong."""
    if details["loc"] and details["loc"][-1] in BRANCHES:
        return "integer,string"
    if details["type"] == "literal_error" and not isinstance(details["input"], str):
        return "string"
    return _WANTED.get(details["type"])


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return f'"{_json_type(value)}"'


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    return next((name for kind, name in _JSON_TYPES if isinstance(value, kind)), "object")


def _unsupported(path: str, value: Any, context: Mapping[str, Any]) -> str:
    choices = str(context["expected"]).replace("'", '"').replace(" or ", ", ")
    return f"{path}: Unsupported value: {_shown(value)}: supported values: {choices}"


_SENTENCES: dict[str, Callable[[str, Any, Mapping[str, Any]], str]] = {
    "extra_forbidden": lambda path, _value, _context: f'unknown field "{path}"',
    "missing": lambda path, _value, _context: f"{path}: Required value",
    "literal_error": _unsupported,
    "greater_than_equal": lambda path, value, limit: (
        f"{path}: Invalid value: {value}: {path} in body should be greater than or equal to {limit['ge']}"
    ),
    "less_than_equal": lambda path, value, limit: (
        f"{path}: Invalid value: {value}: {path} in body should be less than or equal to {limit['le']}"
    ),
    "string_too_short": lambda path, value, limit: (
        f"{path}: Invalid value: {_shown(value)}: {path} in body should be at least {limit['min_length']} chars long"
    ),
    "string_too_long": lambda path, _value, limit: (
        f"{path}: Too long: may not be more than {limit['max_length']} bytes"
    ),
    "too_short": lambda path, value, limit: (
        f"{path}: Invalid value: {len(value)}: {path} in body should have at least {limit['min_length']} items"
    ),
    "too_long": lambda path, value, limit: (
        f"{path}: Too many: {len(value)}: must have at most {limit['max_length']} items"
    ),
}
