"""An operator may end at any moment: after every single write, nothing is lost and nothing is done twice."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.cluster import Cluster
from kubetune_operator.errors import ClusterError
from kubetune_operator.reconcile import JobRef, Reconciler
from kubetune_operator.settings import Settings
from tests.cluster.controlplane import ControlPlane, audited
from tests.controller.world import World, world_of

pytestmark = pytest.mark.control_plane

WRITES = 32
"""Crashes that are tried: more than a whole life writes, so that each of its writes is struck."""

AT_ONCE = 5
"""Lives that are led at the same time: the controllers of Kubernetes allow themselves 20 requests per second."""


class Crash(BaseException):
    """The process is gone."""


class CrashingCluster(Cluster):
    """An API server that the operator does not live to hear from after a certain write."""

    def __init__(self, *, crash_at: int) -> None:
        super().__init__(qps=1000, burst=1000)
        self.writes = 0
        self._crash_at = crash_at

    async def request(self, method: str, path: str, **rest: Any) -> Any:
        """Send a request, and end the process when it was the one."""
        answer = await super().request(method, path, **rest)
        if method != "GET" and not path.endswith("/events"):
            self.writes += 1
            if self.writes == self._crash_at:
                raise Crash
        return answer


class CrashingOperator:
    """Passes over one job without pause, with a new process after the crash."""

    def __init__(self, ref: JobRef, *, crash_at: int) -> None:
        self._ref = ref
        self._crash_at = crash_at
        self.crashes = 0

    async def run(self) -> None:
        cluster = CrashingCluster(crash_at=self._crash_at)
        reconciler = Reconciler(cluster=cluster, settings=Settings())
        try:
            while True:
                try:
                    await reconciler.reconcile(self._ref)
                except Crash:
                    self.crashes += 1
                    await cluster.close()
                    cluster = CrashingCluster(crash_at=0)
                    reconciler = Reconciler(cluster=cluster, settings=Settings())
                except ClusterError:
                    pass
                await asyncio.sleep(0.3)
        finally:
            await cluster.close()


async def _live(world: World, name: str, *, crash_at: int) -> CrashingOperator:
    """A life with a restart, a suspension and a good end."""
    await world.apply(name, compute={"nodes": 2})
    operator = CrashingOperator(JobRef("FineTuneJob", world.namespace, name), crash_at=crash_at)
    running = asyncio.create_task(operator.run())
    try:
        await world.prepared(name=name)
        pods = await world.training(name=name, nodes=2)
        await world.end(pods[0], code=137)
        await world.training(name=name, nodes=2, attempt=2)
        await world.patch(name, suspend=True)
        await world.gone("Job", f"{name}-train-2", seconds=60)
        await world.patch(name, suspend=False)
        pods = await world.training(name=name, nodes=2, attempt=3)
        status = await world.complete(pods, name=name)
        assert status["restarts"] == 1
        assert status["attempt"] == 3
        await asyncio.sleep(0.5)
        assert await world.status(name) == status
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    return operator


def _created(audit_log: Path, *, namespace: str) -> Mapping[str, int]:
    """How often each Job was created, by the audit log of the API server."""
    created: Counter[str] = Counter()
    for event in audited(audit_log):
        about = event.get("objectRef") or {}
        if (event["verb"], about.get("resource"), about.get("namespace")) == ("create", "jobs", namespace):
            created[about["name"]] += event["responseStatus"]["code"] == 201
    return created


async def test_a_crash_after_any_write_leads_to_no_second_job_and_loses_nothing(
    control_plane_with_controllers: ControlPlane, namespace_with_controllers: str, tmp_path: Path
) -> None:
    namespace, log = namespace_with_controllers, tmp_path / "operator.log"
    log.touch()
    async with world_of(control_plane_with_controllers, namespace=namespace, log=log, start=False) as world:
        room = asyncio.Semaphore(AT_ONCE)

        async def life(number: int) -> CrashingOperator:
            async with room:
                return await _live(world, f"life-{number}", crash_at=number)

        operators = await asyncio.gather(*(life(number) for number in range(1, WRITES + 1)))
    crashes = [operator.crashes for operator in operators]
    assert crashes[:12] == [1] * 12, "each write of a life was the last one of an operator"
    assert crashes[-1] == 0, "a life has fewer writes than crashes were tried"
    audit_log = control_plane_with_controllers.audit_log
    assert audit_log is not None
    expected = {
        f"life-{number}-{job}": 1
        for number in range(1, WRITES + 1)
        for job in ("prepare", "train-1", "train-2", "train-3")
    }
    assert _created(audit_log, namespace=namespace) == expected


async def test_a_process_that_is_killed_at_each_stage_goes_on_where_it_was(world: World) -> None:
    def again() -> None:
        world.operator.kill()
        world.operator.start()

    await world.apply(compute={"nodes": 2})
    await world.live_pods("prepare", count=1)
    again()
    await world.prepared()
    pods = await world.training(nodes=2)
    again()
    await asyncio.sleep(4)  # its predecessor's Lease runs out, then it looks at everything
    status = await world.status()
    assert (status["state"], status["attempt"], status.get("restarts") or 0) == ("Running", 1, 0)
    assert {pod["metadata"]["uid"] for pod in await world.pods("train")} == {pod["metadata"]["uid"] for pod in pods}
    world.operator.kill()
    await world.end(pods[1], code=137)
    world.operator.start()
    pods = await world.training(nodes=2, attempt=2)
    again()
    status = await world.complete(pods)
    assert status["restarts"] == 1


async def test_a_gang_that_the_job_controller_restarted_meanwhile_is_left_alone_and_counted(world: World) -> None:
    await world.apply(compute={"nodes": 2})
    await world.prepared()
    pods = await world.training(nodes=2)
    world.operator.kill()
    for pod in pods:
        await world.end(pod, code=137)
    fresh = await world.live_pods("train", count=2)
    await world.run(*fresh)
    world.operator.start()
    status = await world.until(lambda status: status.get("restarts") == 1 and status["state"] == "Running")
    assert status["attempt"] == 1
    assert await world.jobs() == ["run-prepare", "run-train-1"]
    await world.complete(fresh)
