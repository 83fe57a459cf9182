"""Where a record has half of a character: one surrogate of a pair, which JSON can say and no encoding of text can hold.

It comes from text that was cut within an emoji. Looked for only after a tokenizer has refused a record.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_HALF = re.compile(r"[\ud800-\udfff]")
_HALF_IN_JSON = re.compile(
    r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])"  # the first half alone
    r"|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]"  # the second half alone
)


def half_character(record: Mapping[str, Any]) -> str | None:
    """Returns the place of the first one, as in `messages[2].content`, or None; JSON within a text counts too."""
    for pattern in (_HALF, _HALF_IN_JSON):
        for place, text in _texts(record):
            if pattern.search(text):
                return place
    return None


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yields every text with its place; keys are texts too."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            below = f"{place}.{key}".removeprefix(".").encode("utf-8", "backslashreplace").decode()
            yield below, key
            yield from _texts(inner, below)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{number}]")
