"""Answered requests in the run's folder, so that the next attempt goes on where this one was stopped.

Each rank adds small files of JSON lines, whole or not at all; no file is changed once it is there. A request is known
by a digest of the model and of everything that decides its answer.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from kubetune_trainer.errors import StorageError
from kubetune_trainer.report import report
from kubetune_trainer.storage import Store

ANSWERS_DIR: Final = "answers"
STORE_SECONDS: Final = 10.0
"""How much work may be lost with a killed process."""

Answer = tuple[float, bool] | str
"""Of a scored request the log probability and whether it is the likeliest; of a generated one the text."""


class Answers:
    """What is answered, in this attempt and before.

    Args:
        store: The run's folder.
        fingerprint: Says all about the model that decides answers.
    """

    def __init__(self, store: Store, *, fingerprint: str) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._known: dict[str, Answer] = {}
        self._new: dict[str, Answer] = {}
        self._stored_at = -STORE_SECONDS  # the first answers are stored at once
        self._session = uuid.uuid4().hex[:12]
        self._files = 0

    def load(self) -> int:
        """Read what earlier attempts have stored; return how many answers."""
        for info in self._store.list(ANSWERS_DIR):
            for line in self._store.read_bytes(info.path).splitlines():
                key, answer = json.loads(line)
                self._known[key] = answer if isinstance(answer, str) else (answer[0], answer[1])
        return len(self._known)

    def key(self, request: Any) -> str:
        """Return the name of a request, which is anything that JSON can write."""
        return hashlib.sha256(json.dumps([self._fingerprint, request]).encode()).hexdigest()[:32]

    def get(self, key: str) -> Answer | None:
        """Return a request's answer, if an earlier attempt has stored it."""
        return self._known.get(key)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, and store them if the last time is long enough ago."""
        self._new.update(answers)
        if time.monotonic() - self._stored_at >= STORE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Store what is new; a store that does not answer is asked again with the next answers."""
        if not self._new:
            return
        lines = "".join(json.dumps([key, answer]) + "\n" for key, answer in self._new.items())
        try:
            self._store.write_bytes(f"{ANSWERS_DIR}/{self._session}-{self._files:05d}.jsonl", lines.encode())
        except StorageError as error:
            report("warning", message=f"{len(self._new)} answers are not stored yet: {error}")
            return
        finally:
            self._stored_at = time.monotonic()
        self._files += 1
        self._known |= self._new
        self._new = {}
