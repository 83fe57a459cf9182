"""What the end-to-end tests do with a FineTuneJob: apply it, follow it, strike at it, read what it left.

A test reads the unrounded loss of a step where a person would: in the JSON lines of rank 0, which the trainer also keeps
under `logs/` in the run's folder, one file per attempt.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import yaml

T = TypeVar("T")


class Kubectl(Protocol):
    """What runs kubectl as administrator and returns what it printed."""

    def __call__(self, *args: str, input: str | None = None, check: bool = True) -> Any: ...  # noqa: A002


@dataclass(frozen=True)
class Job:
    """A FineTuneJob in the cluster, by name."""

    kubectl: Kubectl
    namespace: str
    name: str

    def status(self) -> dict[str, Any]:
        """`.status`, empty while there is none."""
        shown = self.kubectl("get", "finetunejob", self.name, "--namespace", self.namespace, "--output", "json")
        return json.loads(shown.stdout).get("status", {})

    def condition(self, kind: str) -> dict[str, Any]:
        """The condition of that type, empty while there is none."""
        found = [each for each in self.status().get("conditions", []) if each["type"] == kind]
        return found[0] if found else {}

    def wait_state(self, *states: str, timeout_seconds: float = 300) -> dict[str, Any]:
        """Wait until `.status.state` is one of `states`; a terminal state that is not asked for fails at once."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            state = status.get("state")
            if state in states:
                return status
            if state in {"Complete", "Failed"}:
                raise AssertionError(f"{self.name} became {state}: {json.dumps(status, indent=1)}")
            return None

        return wait_for(look, f"{self.name} to become {' or '.join(states)}", timeout_seconds=timeout_seconds)

    def wait_step(self, step: int, *, timeout_seconds: float = 180) -> int:
        """Wait until rank 0 of the running attempt has printed that it finished `step`; returns the step it is at."""

        def look() -> int | None:
            done = [event["step"] for event in self.printed() if event["event"] == "step"]
            return done[-1] if done and done[-1] >= step else None

        return wait_for(look, f"{self.name} to finish step {step}", timeout_seconds=timeout_seconds, every=0.25)

    def printed(self) -> list[dict[str, Any]]:
        """The JSON lines that rank 0 of the newest training attempt has printed so far."""
        pods = [pod for pod in self.pods("train") if index_of(pod) == 0]
        if not pods:
            return []
        newest = max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])["metadata"]["name"]
        shown = self.kubectl("logs", newest, "--namespace", self.namespace, check=False)
        return list(events(shown.stdout)) if shown.returncode == 0 else []

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Pods of `component` (prepare or train), finished ones included."""
        selector = f"kubetune.dev/job-name={self.name},kubetune.dev/component={component}"
        shown = self.kubectl("get", "pods", "--namespace", self.namespace, "--selector", selector, "--output", "json")
        return json.loads(shown.stdout)["items"]

    def running_pod(self, index: int) -> str:
        """Name of the running training pod with that completion index."""

        def look() -> str | None:
            found = [
                pod["metadata"]["name"]
                for pod in self.pods("train")
                if index_of(pod) == index and pod["status"]["phase"] == "Running" and not _leaving(pod)
            ]
            return found[0] if found else None

        return wait_for(look, f"pod {index} of {self.name} to run", timeout_seconds=60, every=0.25)


def apply(kubectl: Kubectl, manifest: dict[str, Any], *, namespace: str) -> Job:
    """Create the FineTuneJob `manifest` in `namespace`."""
    kubectl("apply", "--namespace", namespace, "--filename", "-", input=yaml.safe_dump(manifest))
    return Job(kubectl, namespace, manifest["metadata"]["name"])


def events(text: str) -> Iterator[dict[str, Any]]:
    """The trainer's JSON lines in `text`; a line cut off at the end is left out."""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def losses(lines: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> dict[int, float]:
    """Step → unrounded loss."""
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def index_of(pod: dict[str, Any]) -> int:
    """The completion index of a Job's pod."""
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def wait_for(look: Callable[[], T | None], what: str, *, timeout_seconds: float, every: float = 1.0) -> T:
    """Call `look` until it returns something.

    Raises:
        TimeoutError: It returned None until the end; the message says what was waited for.
    """
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(every)
    raise TimeoutError(f"waited {timeout_seconds:.0f} s for {what}")


def _leaving(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" in pod["metadata"]
