"""Whether the watches still tell us what happens.

A watch that is dead looks like one where nothing happens. So its events are held against a list from time to time: a
change that the list shows and that the watch has not told for a whole interval makes the operator not live.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kubetune_operator import metrics

Json = dict[str, Any]


@dataclass
class Watched:
    """What one watch has told.

    Attributes:
        resource: What is watched, as metrics call it.
        last_event: When it last told anything.
        versions: The version of each object that it told last.
        overdue: Versions that a list showed and the watch had not told then.
        stale: Whether one of these is still not told.
    """

    resource: str
    last_event: float = field(default_factory=time.monotonic)
    versions: dict[str, str] = field(default_factory=dict)
    overdue: dict[str, str] = field(default_factory=dict)
    stale: bool = False

    def note(self, event_type: str | None, body: Mapping[str, Any]) -> None:
        """Take down an event."""
        self.last_event = time.monotonic()
        metadata = body["metadata"]
        if event_type == "DELETED":
            self.versions.pop(metadata["uid"], None)
            self.overdue.pop(metadata["uid"], None)
        else:
            self.versions[metadata["uid"]] = metadata["resourceVersion"]

    def compare(self, listed: list[Json]) -> bool:
        """Hold the watch against a list of the same objects.

        Returns:
            Whether it is stale: an object still has a version that an earlier list showed and that was never told.
        """
        shown = {item["metadata"]["uid"]: item["metadata"]["resourceVersion"] for item in listed}
        unseen = {uid: version for uid, version in shown.items() if self.versions.get(uid) != version}
        self.stale = any(self.overdue.get(uid) is not None and self._untold(uid) for uid in unseen)
        self.overdue = {uid: self.overdue.get(uid, version) for uid, version in unseen.items()}
        metrics.WATCH_STALE.labels(self.resource).set(self.stale)
        return self.stale

    def _untold(self, uid: str) -> bool:
        """Whether the watch is still behind the version that was overdue. Versions are numbers that grow."""
        told, overdue = self.versions.get(uid), self.overdue[uid]
        return told is None or int(told) < int(overdue)


@dataclass
class Census:
    """Jobs by kind and state, as the watch told them."""

    states: dict[str, tuple[str, str]] = field(default_factory=dict)

    def note(self, event_type: str | None, body: Mapping[str, Any]) -> None:
        """Take down an event about a job of ours."""
        uid = body["metadata"]["uid"]
        if event_type == "DELETED":
            self.states.pop(uid, None)
        else:
            self.states[uid] = (str(body["kind"]), str((body.get("status") or {}).get("state") or "Pending"))

    def publish(self) -> None:
        """Write the gauges."""
        metrics.JOBS.clear()
        for (kind, state), count in Counter(self.states.values()).items():
            metrics.JOBS.labels(kind, state).set(count)
