"""Jobs in queues of the real Kueue: who runs, who waits and why, and who has the quota in between."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.names import LABEL_COMPONENT, LABEL_JOB_KIND, LABEL_JOB_NAME
from tests.cluster.controlplane import ControlPlane
from tests.cluster.kueue import Kueue
from tests.controller.world import RIGHTS_WITH_KUEUE, World, world_of

Json = dict[str, Any]

QUEUE = {"name": "team"}
ONE_CPU = {"resources": {"requests": {"cpu": "1"}}}
HALF_EACH = {"nodes": 2, "resources": {"requests": {"cpu": "500m"}}}
RESTARTED_SECONDS = 30.0

pytestmark = [pytest.mark.control_plane, pytest.mark.usefixtures("kueue")]


@pytest.fixture(scope="module")
def kueue(control_plane_with_controllers: ControlPlane) -> Iterator[Kueue]:
    """Kueue on the control plane, for the tests of this file."""
    with Kueue(control_plane_with_controllers) as running:
        yield running


@pytest.fixture
async def world(
    control_plane_with_controllers: ControlPlane, namespace_with_controllers: str, tmp_path: Path
) -> AsyncIterator[World]:
    """A namespace with an operator and a queue that has quota for one CPU."""
    namespace = namespace_with_controllers
    for manifest in queue_for(namespace):
        control_plane_with_controllers.kubectl("create", "-f", "-", input=json.dumps(manifest))
    log = tmp_path / "operator.log"
    async with world_of(
        control_plane_with_controllers, namespace=namespace, log=log, rights=RIGHTS_WITH_KUEUE, kueue="true"
    ) as made:
        yield made


@pytest.fixture
async def one_at_a_time(world: World) -> AsyncIterator[None]:
    """Fail the test when training pods of two jobs were there at once."""
    watching = asyncio.create_task(watch_for_two(world))
    yield
    if not watching.done():
        watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


def queue_for(namespace: str) -> list[Json]:
    """One CPU for a namespace, on nodes of its pool; who has a higher priority takes it from who has it."""
    api = "kueue.x-k8s.io/v1beta2"
    pool = {"nodeLabels": {"pool": namespace}}
    quota = [{"name": "cpu", "nominalQuota": "1"}]
    resources = [{"coveredResources": ["cpu"], "flavors": [{"name": namespace, "resources": quota}]}]
    cluster_queue = {
        "namespaceSelector": {},
        "resourceGroups": resources,
        "preemption": {"withinClusterQueue": "LowerPriority"},
    }
    local_queue = {"clusterQueue": namespace}
    return [
        {"apiVersion": api, "kind": "ResourceFlavor", "metadata": {"name": namespace}, "spec": pool},
        {"apiVersion": api, "kind": "ClusterQueue", "metadata": {"name": namespace}, "spec": cluster_queue},
        {
            "apiVersion": api,
            "kind": "LocalQueue",
            "metadata": {"name": QUEUE["name"], "namespace": namespace},
            "spec": local_queue,
        },
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": f"urgent-{namespace}"},
            "value": 1000,
        },
    ]


async def watch_for_two(world: World) -> None:
    """Raise as soon as working pods of two jobs are there at once, those that are ending included."""
    while True:
        working = f"{LABEL_COMPONENT} in (train, eval)"
        pods = await world.cluster.list_all("Pod", namespace=world.namespace, labels=working)
        jobs = {
            (pod["metadata"]["labels"][LABEL_JOB_KIND], pod["metadata"]["labels"][LABEL_JOB_NAME])
            for pod in pods
            if pod["status"]["phase"] not in {"Succeeded", "Failed"}
        }
        assert len(jobs) <= 1, f"quota for one, and pods of {jobs}"
        await asyncio.sleep(0.05)


async def workload_of(world: World, name: str) -> Json:
    """Kueue's Workload for a job."""
    found = await world.cluster.list_all("Workload", namespace=world.namespace)
    [mine] = [item for item in found if item["metadata"]["ownerReferences"][0]["name"] == f"{name}-queue"]
    return mine


def admitted(status: Json) -> Json:
    """The Admitted condition of a status."""
    found = next((item for item in status.get("conditions") or [] if item["type"] == "Admitted"), None)
    return found or {"status": "Unknown", "reason": "", "message": ""}


async def run_first(world: World, **compute: Any) -> list[Json]:
    """Have job `first` train; returns its pods."""
    await world.apply("first", queue=QUEUE, compute=ONE_CPU | compute)
    await world.prepared(name="first")
    return await world.training(name="first", nodes=compute.get("nodes", 1))


async def queue_second(world: World, **compute: Any) -> Json:
    """Have job `second` wait for the quota; returns its status."""
    await world.apply("second", queue=QUEUE, compute=ONE_CPU | compute)
    await world.prepared(name="second")
    return await world.until(lambda status: admitted(status)["reason"] == "WaitingForQuota", name="second")


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_job_waits_for_quota_with_kueues_words_and_starts_when_another_completes(world: World) -> None:
    [pod] = await run_first(world)
    assert pod["spec"]["nodeSelector"] == {"pool": world.namespace}
    assert admitted(await world.status("first"))["status"] == "True"
    waiting = await queue_second(world)
    assert waiting["state"] == "Queued"
    assert admitted(waiting)["status"] == "False"
    assert "insufficient unused quota for cpu" in admitted(waiting)["message"]
    await asyncio.sleep(1.0)
    assert await world.pods("train", name="second") == []

    await world.complete([pod], name="first")
    await world.complete(await world.training(name="second"), name="second")
    for name in ("first", "second"):
        await world.gone("Job", f"{name}-queue")


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_job_that_fails_gives_its_quota_to_the_next(world: World) -> None:
    [pod] = await run_first(world)
    await queue_second(world)
    await world.end(pod, code=65, report={"result": "Failed", "exitCode": 65, "reason": "DataError", "message": "no"})
    await world.state("Failed", name="first")
    await world.training(name="second")


async def test_a_job_that_is_deleted_gives_its_quota_to_the_next(world: World) -> None:
    await run_first(world)
    await queue_second(world)
    await world.cluster.delete("FineTuneJob", namespace=world.namespace, name="first")
    await world.training(name="second")


@pytest.mark.usefixtures("one_at_a_time")
async def test_restarts_of_a_gang_keep_the_quota_and_take_less_than_half_a_minute(world: World) -> None:
    pods = await run_first(world, **HALF_EACH)
    await queue_second(world)
    before = await workload_of(world, "first")
    for attempt in (2, 3, 4):
        begun = time.monotonic()
        await world.end(pods[1], code=137)
        pods = await world.training(name="first", nodes=2, attempt=attempt)
        assert time.monotonic() - begun < RESTARTED_SECONDS
        assert admitted(await world.status("second"))["reason"] == "WaitingForQuota"
    assert (await workload_of(world, "first"))["metadata"]["uid"] == before["metadata"]["uid"]
    await world.complete(pods, name="first")
    await world.training(name="second")


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_preempted_job_stops_with_a_checkpoint_and_resumes_without_using_up_its_restarts(world: World) -> None:
    await world.apply("first", queue=QUEUE, compute=HALF_EACH, lifecycle={"maxRestarts": 0})
    await world.prepared(name="first")
    await world.training(name="first", nodes=2)
    await world.apply("second", queue=QUEUE, compute=ONE_CPU | {"priorityClassName": f"urgent-{world.namespace}"})
    await world.prepared(name="second")

    status = await world.until(lambda status: admitted(status)["reason"] == "Preempted", name="first")
    assert status["state"] == "Queued"
    urgent = await world.training(name="second")
    status = await world.until(lambda status: admitted(status)["reason"] == "WaitingForQuota", name="first")
    assert (status["restarts"], status["preemptions"]) == (1, 1)
    await world.complete(urgent, name="second")

    pods = await world.training(name="first", nodes=2, attempt=2)
    await world.complete(pods, name="first")


@pytest.mark.usefixtures("one_at_a_time")
async def test_nobody_gets_the_quota_of_a_preempted_job_before_its_pods_have_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = asyncio.Event()
    evict = world._evict

    async def evict_later(pod: Json) -> None:
        await ending.wait()
        await evict(pod)

    monkeypatch.setattr(world, "_evict", evict_later)
    await run_first(world)
    await world.apply("second", queue=QUEUE, compute=ONE_CPU | {"priorityClassName": f"urgent-{world.namespace}"})
    await world.prepared(name="second")
    await world.until(lambda status: admitted(status)["reason"] == "Preempted", name="first")
    await asyncio.sleep(2.0)
    assert admitted(await world.status("second"))["status"] == "False"
    assert (await workload_of(world, "first"))["status"]["admission"]["clusterQueue"] == world.namespace
    ending.set()
    await world.training(name="second")


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_suspended_job_leaves_its_quota_and_takes_it_again(world: World) -> None:
    await run_first(world)
    await queue_second(world)
    await world.patch("first", suspend=True)
    second = await world.training(name="second")
    status = await world.state("Suspended", name="first")
    assert (admitted(status)["status"], admitted(status)["reason"]) == ("False", "Suspended")
    assert (await workload_of(world, "first"))["spec"]["active"] is False

    await world.patch("first", suspend=False)
    await world.until(lambda status: admitted(status)["reason"] == "WaitingForQuota", name="first")
    await world.complete(second, name="second")
    await world.complete(await world.training(name="first", attempt=2), name="first")


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_job_that_is_suspended_and_resumed_at_once_runs_again(world: World) -> None:
    await run_first(world)
    await world.patch("first", suspend=True)
    await world.state("Suspended", name="first")
    await world.patch("first", suspend=False)
    await world.training(name="first", attempt=2)


@pytest.mark.usefixtures("one_at_a_time")
async def test_an_operator_that_starts_anew_goes_on_with_whom_kueue_admits(world: World) -> None:
    [pod] = await run_first(world)
    await queue_second(world)
    world.operator.kill()
    await world.end(pod, code=0, report={"result": "Complete", "exitCode": 0})
    world.operator.start()
    await world.state("Complete", name="first")
    await world.training(name="second")


@pytest.mark.usefixtures("one_at_a_time")
async def test_a_queue_that_does_not_exist_is_named(world: World) -> None:
    await world.apply("first", queue={"name": "nobody"}, compute=ONE_CPU)
    await world.prepared(name="first")
    status = await world.until(lambda status: admitted(status)["reason"] == "WaitingForQuota", name="first")
    assert status["state"] == "Queued"
    assert "LocalQueue nobody" in admitted(status)["message"]


async def test_a_job_whose_place_in_the_queue_is_deleted_stands_in_it_again(world: World) -> None:
    await run_first(world)
    await queue_second(world)
    await world.cluster.delete("Job", namespace=world.namespace, name="first-queue")
    second = await world.training(name="second")
    status = await world.until(lambda status: admitted(status)["reason"] == "WaitingForQuota", name="first")
    assert (status["restarts"], status["preemptions"]) == (1, 1)
    await world.complete(second, name="second")
    await world.training(name="first", attempt=2)


@pytest.mark.usefixtures("one_at_a_time")
async def test_an_evaluation_stands_in_the_same_queue(world: World) -> None:
    [pod] = await run_first(world)
    evaluation = world.of("EvalJob")
    await evaluation.apply("first", queue=QUEUE, compute=ONE_CPU)
    await evaluation.prepared(name="first")
    await evaluation.until(lambda status: admitted(status)["reason"] == "WaitingForQuota", name="first")
    await world.complete([pod], name="first")
    await evaluation.complete(await evaluation.training(name="first"), name="first")


async def test_a_job_without_a_queue_asks_for_no_quota(world: World) -> None:
    await world.apply("free", compute=ONE_CPU)
    await world.prepared(name="free")
    await world.complete(await world.training(name="free"), name="free")
    assert await world.cluster.list_all("Workload", namespace=world.namespace) == []
