"""What the end-to-end tests do with a job: apply it, follow it, strike at it, read what it printed.

Pods go with their attempt, so a `Recording` follows the log of each from its start: what it holds is what a person
saw who watched with `kubectl logs --follow`.
"""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.cluster.binaries import binary
from tests.cluster.local import Cluster

T = TypeVar("T")
TERMINAL = frozenset({"Complete", "Failed"})


@dataclass(frozen=True)
class Job:
    """A job in the cluster, by kind and name."""

    cluster: Cluster
    namespace: str
    name: str
    kind: str = "FineTuneJob"

    def kubectl(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run kubectl in the job's namespace."""
        return self.cluster.kubectl("--namespace", self.namespace, *args, check=check)

    def status(self) -> dict[str, Any]:
        """`.status`, empty while there is none."""
        shown = json.loads(self.kubectl("get", self.kind, self.name, "--output", "json").stdout)
        status: dict[str, Any] = shown.get("status", {})
        return status

    def condition(self, kind: str) -> dict[str, Any]:
        """The condition of that type, empty while there is none."""
        found = [each for each in self.status().get("conditions", []) if each["type"] == kind]
        return found[0] if found else {}

    def wait_state(self, *states: str, timeout_seconds: float = 240) -> dict[str, Any]:
        """Wait until `.status.state` is one of `states`; a terminal state that is not asked for fails at once."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            state = status.get("state")
            if state in states:
                return status
            assert state not in TERMINAL, f"{self.name} became {state}: {json.dumps(status, indent=1)}"
            return None

        return wait_for(look, f"{self.name} to become {' or '.join(states)}", timeout_seconds=timeout_seconds)

    def wait_condition(self, kind: str, *, says: str, timeout_seconds: float = 120) -> dict[str, Any]:
        """Wait until the condition's message contains `says`; returns the condition."""

        def look() -> dict[str, Any] | None:
            found = self.condition(kind)
            return found if says in found.get("message", "") else None

        return wait_for(look, f"{kind} of {self.name} to say {says!r}", timeout_seconds=timeout_seconds)

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Pods of `component` (prepare, train, eval or quantize), finished ones included, oldest first."""
        selector = f"kubetune.dev/job-name={self.name},kubetune.dev/component={component}"
        shown = self.kubectl("get", "pods", "--selector", selector, "--output", "json")
        pods: list[dict[str, Any]] = json.loads(shown.stdout)["items"]
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def running_pod(self, index: int) -> str:
        """Name of the running training pod with that completion index."""

        def look() -> str | None:
            for pod in self.pods("train"):
                leaving = "deletionTimestamp" in pod["metadata"]
                if index_of(pod) == index and pod["status"].get("phase") == "Running" and not leaving:
                    return str(pod["metadata"]["name"])
            return None

        return wait_for(look, f"pod {index} of {self.name} to run", timeout_seconds=90, every=0.25)

    def remove(self) -> None:
        """Delete the job and wait until it is gone."""
        self.kubectl("delete", self.kind, self.name, "--timeout=60s")


@dataclass
class Recording:
    """Everything that rank 0 of a job prints, by attempt, from when the block begins to when it ends."""

    job: Job
    folder: Path
    _followed: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()
        for follower in self._followed.values():
            try:
                follower.wait(timeout=10)
            except subprocess.TimeoutExpired:
                follower.terminate()
                follower.wait()

    def attempts(self) -> dict[int, list[dict[str, Any]]]:
        """Attempt → its events so far."""
        return {int(path.stem): list(events(path.read_text())) for path in sorted(self.folder.glob("*.jsonl"))}

    def losses(self) -> dict[int, dict[int, float]]:
        """Attempt → step → unrounded loss."""
        return {attempt: losses(lines) for attempt, lines in self.attempts().items()}

    def wait_step(self, step: int, *, attempt: int, timeout_seconds: float = 120) -> int:
        """Wait until rank 0 has printed that it finished `step` in `attempt`; returns the step it is at."""

        def look() -> int | None:
            done = self.losses().get(attempt, {})
            return max(done) if done and max(done) >= step else None

        waited = f"attempt {attempt} of {self.job.name} to finish step {step}"
        return wait_for(look, waited, timeout_seconds=timeout_seconds, every=0.1)

    def _follow(self) -> None:
        while not self._over.wait(0.25):
            for pod in self.job.pods("train"):
                name = pod["metadata"]["name"]
                if name not in self._followed and index_of(pod) == 0 and pod["status"].get("phase") != "Pending":
                    self._start(name, pod["metadata"]["labels"]["kubetune.dev/attempt"])

    def _start(self, pod: str, attempt: str) -> None:
        command = [str(binary("kubectl")), "--kubeconfig", str(self.job.cluster.kubeconfig)]
        command += ["logs", "--follow", "--namespace", self.job.namespace, pod]
        with (self.folder / f"{attempt}.jsonl").open("wb") as log:
            self._followed[pod] = subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL)


def apply(cluster: Cluster, manifest: dict[str, Any], *, namespace: str) -> Job:
    """Create the job `manifest` in `namespace`."""
    cluster.kubectl("apply", "--namespace", namespace, "--filename", "-", input=json.dumps(manifest))
    return Job(cluster, namespace, manifest["metadata"]["name"], kind=manifest["kind"])


def events(text: str) -> Iterator[dict[str, Any]]:
    """The trainer's JSON lines in `text`; other lines, and one that is cut off, are left out."""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def losses(lines: list[dict[str, Any]]) -> dict[int, float]:
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
