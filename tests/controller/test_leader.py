"""Of several operators one is active; the next takes over."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

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
