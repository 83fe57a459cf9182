"""Of several operators one is active; the next takes over."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.cluster import Cluster
from kubetune_operator.errors import ClusterError, NotFoundError
from kubetune_operator.leader import Leadership
from kubetune_operator.settings import Settings
from tests.controller.world import OperatorProcess, World

pytestmark = pytest.mark.control_plane


async def _ready(operator: OperatorProcess, *, what: str, seconds: float = 30.0) -> None:
    """Wait until an operator says what it does."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if operator.get("/readyz", port=operator.health_port)[1] == what:
                return
        assert time.monotonic() < deadline, operator.log
        await asyncio.sleep(0.1)


class SilentCluster(Cluster):
    """An API server that keeps a Lease, and from some time on takes requests and answers none."""

    def __init__(self) -> None:
        super().__init__()
        self.is_silent = False
        self.failures = 0
        self.lease: dict[str, object] | None = None

    async def request(self, method: str, path: str, **told: Any) -> Any:
        if self.is_silent:
            await asyncio.sleep(60)
        if self.failures:
            self.failures -= 1
            raise ClusterError(path)
        if method == "GET" and self.lease is None:
            raise NotFoundError(path)
        if method != "GET":
            self.lease = told["body"]
        return self.lease


async def test_a_lease_that_nobody_answers_for_is_lost_before_another_may_take_it() -> None:
    cluster, settings = SilentCluster(), Settings(identity="a", namespace="n", lease_seconds=6)
    lease = Leadership(cluster, settings=settings)
    await lease.acquire()
    holding = asyncio.create_task(lease.hold())
    await asyncio.sleep(settings.lease_seconds)
    assert not holding.done()
    cluster.is_silent = True
    await asyncio.wait_for(holding, timeout=settings.lease_seconds)


async def test_a_renewal_that_fails_is_tried_again_before_the_lease_is_lost() -> None:
    cluster, settings = SilentCluster(), Settings(identity="a", namespace="n", lease_seconds=6)
    lease = Leadership(cluster, settings=settings)
    await lease.acquire()
    cluster.failures = 1
    holding = asyncio.create_task(lease.hold())
    await asyncio.sleep(2 * settings.lease_seconds)
    assert not holding.done()
    cluster.failures = 1000
    await asyncio.wait_for(holding, timeout=settings.lease_seconds)


async def test_one_that_waits_ends_when_it_is_told_to(world: World, tmp_path: Path) -> None:
    await _ready(world.operator, what="leading")
    second = world.operator.another(log=tmp_path / "second.log")
    second.start()
    await _ready(second, what="waiting for the Lease")
    began = time.monotonic()
    code = second.stop()
    assert time.monotonic() - began < 5
    assert code == 0, "by its own handler: as the first process of a container it has no other"


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_second_operator_waits_and_takes_over(world: World, tmp_path: Path, end: str) -> None:
    first = world.operator
    await _ready(first, what="leading")
    second = first.another(log=tmp_path / "second.log")
    second.start()
    try:
        await _ready(second, what="waiting for the Lease")
        await world.apply()
        await world.prepared()
        getattr(first, end)()
        await _ready(second, what="leading", seconds=15)
        await world.complete(await world.training())
    finally:
        second.stop()
