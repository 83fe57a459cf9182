"""A world per test: its own namespace and operator, on one API server with the controllers of Kubernetes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster.controlplane import ControlPlane
from tests.controller.world import World, world_of


@pytest.fixture
async def world(
    control_plane_with_controllers: ControlPlane, namespace_with_controllers: str, tmp_path: Path
) -> AsyncIterator[World]:
    """A namespace with an operator that runs."""
    log = tmp_path / "operator.log"
    async with world_of(control_plane_with_controllers, namespace=namespace_with_controllers, log=log) as made:
        yield made
