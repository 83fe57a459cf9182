"""One short name for anything that JSON can write: the same for the same content, whatever the order of its keys."""

import hashlib
import json
from typing import Any


def fingerprint(content: Any, *, length: int = 64) -> str:
    """Return the first digits of the SHA-256, in hexadecimal, of some content.

    Args:
        content: Anything that JSON can write.
        length: How many digits; stored names depend on it.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]
