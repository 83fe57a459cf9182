"""A node that falls silent: Kubernetes evicts its pods, nobody sees them end, and their jobs go on elsewhere."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kubetune_operator.cluster import object_path
from tests.cluster.controlplane import ControlPlane
from tests.controller.world import World, condition_of, grant_nodes, world_of

READY = {"type": "Ready", "status": "True"}

pytestmark = pytest.mark.control_plane


@pytest.fixture
async def world(
    control_plane_with_controllers: ControlPlane, namespace_with_controllers: str, tmp_path: Path
) -> AsyncIterator[World]:
    """A namespace whose operator may read nodes, and gives them up after two seconds."""
    namespace, log = namespace_with_controllers, tmp_path / "operator.log"
    grant_nodes(control_plane_with_controllers, namespace=namespace)
    async with world_of(control_plane_with_controllers, namespace=namespace, log=log, lost_node_seconds="2") as made:
        # Kubernetes evicts nobody while all nodes are silent: it thinks then that it is cut off itself.
        another = {"metadata": {"name": f"another-of-{namespace}"}, "status": {"conditions": [READY]}}
        await made.cluster.request("POST", object_path("Node", namespace=None), body=another)
        yield made
        name = another["metadata"]["name"]
        await made.cluster.request("DELETE", object_path("Node", namespace=None, name=name))


@pytest.mark.parametrize("nodes", [1, 2])
async def test_a_job_goes_on_elsewhere_when_its_node_is_out_of_touch(world: World, nodes: int) -> None:
    await world.apply(compute={"nodes": nodes}, lifecycle={"maxRestarts": 0, "gracePeriodSeconds": 600})
    await world.prepared()
    lost = await world.training(nodes=nodes)
    await world.lose_node()
    fresh = await world.live_pods("train", count=nodes, attempt=2)
    status = await world.status()
    failure = status["lastFailure"]
    assert (failure["reason"], failure["node"]) == ("NodeLost", world.node)
    assert failure["message"].startswith(f"node {world.node} is out of touch since 20")
    assert failure["pod"] in {pod["metadata"]["name"] for pod in lost}
    assert (status["restarts"], status["preemptions"]) == (1, 1), "maxRestarts does not count it"
    assert await world.jobs() == ["run-prepare", "run-train-1", "run-train-2"], "nobody says that the old pods ended"
    silent, world.node = world.node, f"another-of-{world.namespace}"
    pods = await world.training(nodes=nodes, attempt=2)
    assert pods[0]["metadata"]["uid"] == fresh[0]["metadata"]["uid"]
    status = await world.complete(pods)
    world.node = silent
    assert condition_of(status, "Complete")["status"] == "True"
