"""A job that is killed goes on as if nothing had happened: every unrounded loss is that of a run in peace."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.local import Cluster
from tests.e2e.jobs import Job, Recording, apply, wait_for
from tests.e2e.manifests import LONG_STEPS, long_job

pytestmark = pytest.mark.cluster
SEED = 7
KEPT = "kubetune.dev/kept"
"""A finalizer that keeps a deleted pod until its exit code was read."""


def delete_pod(job: Job, index: int) -> None:
    job.kubectl("delete", "pod", job.running_pod(index), "--wait=false")


def kill_process(job: Job, index: int, number: signal.Signals = signal.SIGKILL) -> None:
    """SIGKILL of the rank, as the kernel would do it when memory is short; no time to say goodbye."""
    script = (
        "import os, pathlib\n"
        "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        "    words = path.read_bytes().split(b'\\0')\n"
        "    if path.parent.name != '1' and any(word.endswith(b'finetune.py') for word in words):\n"
        f"        os.kill(int(path.parent.name), {int(number)})\n"
    )
    job.kubectl("exec", job.running_pod(index), "--", "python", "-c", script)


def hold_process(job: Job, index: int) -> None:
    """SIGSTOP of the rank: it hangs, with all its connections open."""
    kill_process(job, index, signal.SIGSTOP)


STRIKES: list[tuple[Callable[[Job, int], None], int]] = [
    (delete_pod, 1), (kill_process, 0), (kill_process, 1), (delete_pod, 0), (hold_process, 1),
]  # fmt: skip


@pytest.mark.timeout(900)
def test_four_kills_and_a_hang_change_no_number(
    cluster: Cluster, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = losses_in_peace(cluster, namespace, tmp_path)
    manifest = long_job("struck")
    manifest["spec"]["lifecycle"]["hangTimeoutSeconds"] = 10
    job = apply(cluster, manifest, namespace=namespace)
    generator = random.Random(SEED)  # noqa: S311 (where to strike is no secret)
    resumes = []
    (tmp_path / "struck").mkdir()
    with Recording(job, tmp_path / "struck") as recording:
        for number, (strike, index) in enumerate(STRIKES):
            # Around the checkpoints at every tenth step: before them, while they are written, after them.
            attempt = number + 1
            recording.wait_step(10 * attempt + generator.randint(-2, 2), attempt=attempt)
            began = time.monotonic()
            strike(job, index)
            recording.wait_step(1, attempt=attempt + 1)
            resumes.append(round(time.monotonic() - began, 1))
        status = job.wait_state("Complete")
    with capsys.disabled():
        print("\nseconds from a kill, or a hang, to the next finished step:", resumes)

    seen = recording.losses()
    assert {step for losses in seen.values() for step in losses} == set(expected)
    for attempt, losses in seen.items():
        assert losses == {step: expected[step] for step in losses}, f"attempt {attempt}"
    assert status["restarts"] == len(STRIKES)
    assert status["attempt"] == len(STRIKES) + 1
    assert (status["lastFailure"]["reason"], status["lastFailure"]["exitCode"]) == ("Hang", 76)


def test_sigterm_loses_at_most_the_step_in_flight(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    manifest = long_job("evicted")
    manifest["spec"]["checkpoint"] = {"everySteps": 1000}
    job = apply(cluster, manifest, namespace=namespace)
    with Recording(job, tmp_path) as recording:
        recording.wait_step(5, attempt=1)
        pod = job.running_pod(0)
        with kept(job, pod):
            delete_pod(job, 0)
            assert wait_for(lambda: exit_code(job, pod), f"pod {pod} to end", timeout_seconds=60, every=0.25) == 75
        recording.wait_step(1, attempt=2)
    losses = recording.losses()
    assert min(losses[2]) == max(losses[1]) + 1
    job.remove()


@contextmanager
def kept(job: Job, pod: str) -> Iterator[None]:
    """While the block runs a pod can be read, even when it is deleted and has ended."""
    add = json.dumps([{"op": "add", "path": "/metadata/finalizers/-", "value": KEPT}])
    job.kubectl("patch", "pod", pod, "--type=json", "--patch", add)
    try:
        yield
    finally:
        shown = json.loads(job.kubectl("get", "pod", pod, "--output=json").stdout)
        others = [each for each in shown["metadata"]["finalizers"] if each != KEPT]
        job.kubectl("patch", "pod", pod, "--type=merge", "--patch", json.dumps({"metadata": {"finalizers": others}}))


def exit_code(job: Job, pod: str) -> int | None:
    """What a pod's container ended with, None while it runs."""
    state = "{.status.containerStatuses[0].state.terminated.exitCode}"
    told = job.kubectl("get", "pod", pod, f"--output=jsonpath={state}").stdout
    return int(told) if told else None


def losses_in_peace(cluster: Cluster, namespace: str, folder: Path) -> dict[int, float]:
    (folder / "peaceful").mkdir()
    job = apply(cluster, long_job("peaceful"), namespace=namespace)
    with Recording(job, folder / "peaceful") as recording:
        job.wait_state("Complete")
    (losses,) = recording.losses().values()
    assert sorted(losses) == list(range(1, LONG_STEPS + 1))
    return losses
