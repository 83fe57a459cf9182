"""The operator lives a whole job with the rights that the chart gives it, and no others."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import render_chart
from tests.cluster.controlplane import ControlPlane
from tests.controller.world import EVALUATED, OperatorProcess, World, world_of

pytestmark = pytest.mark.control_plane

RBAC_KINDS = {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


@pytest.fixture
async def world(
    control_plane_with_controllers: ControlPlane, namespace_with_controllers: str, tmp_path: Path
) -> AsyncIterator[World]:
    """A namespace whose operator is not started yet."""
    log = tmp_path / "operator.log"
    async with world_of(
        control_plane_with_controllers, namespace=namespace_with_controllers, log=log, start=False
    ) as made:
        yield made


def start_with_rights(world: World, *, values: dict[str, Any], home: str, log: Path) -> list[dict[str, Any]]:
    """Grant what the chart grants, as a release in namespace `home`, and start the operator as its service account."""
    granted = [each for each in render_chart(values, namespace=home).objects if each["kind"] in RBAC_KINDS]
    world.control_plane.kubectl("apply", "--filename=-", input=yaml.safe_dump_all(granted))
    settings = {
        "namespaces": ",".join(values.get("namespaces", [])), "namespace": home, "lease_name": "kubetune",
        "lease_seconds": "3", "progress_interval_seconds": "0.5", "stuck_seconds": "1",
    }  # fmt: skip
    account = world.control_plane.kubeconfig_for(f"system:serviceaccount:{home}:kubetune")
    world.operator = OperatorProcess(kubeconfig=account, log=log, settings=settings)
    world.operator.start()
    return granted


async def live_a_life(world: World) -> None:
    """Whatever makes the operator use a right: two nodes, a restart, a suspension, a failure, time to live, a chain."""
    await world.apply("long", compute={"nodes": 2}, lifecycle={"ttlSecondsAfterFinished": 0})
    await world.prepared(name="long")
    first = await world.training(name="long", nodes=2)
    await world.end(first[0], code=1)
    await world.training(name="long", nodes=2, attempt=2)
    await world.patch("long", suspend=True)
    await world.state("Suspended", name="long")
    await world.patch("long", suspend=False)
    pods = await world.training(name="long", nodes=2, attempt=3)
    for pod in pods:
        await world.end(pod, code=0)
    await world.gone("FineTuneJob", "long")
    await world.apply("bad")
    [pod] = await world.live_pods("prepare", count=1, name="bad")
    await world.run(pod)
    await world.end(pod, code=65, report={"result": "Failed", "exitCode": 65, "reason": "DataInvalid", "message": "no"})
    await world.state("Failed", name="bad")
    evals, quantizes = world.of("EvalJob"), world.of("QuantizeJob")
    gate = {"name": "g", "task": "tickets", "metric": "acc", "comparedTo": {"name": "base", "maxDrop": "0"}}
    await evals.apply("gone", gates=[gate], lifecycle={"ttlSecondsAfterFinished": 0})
    await evals.apply("base", after=[{"kind": "QuantizeJob", "name": "small"}])
    await quantizes.apply("small")
    await quantizes.live("small")
    await evals.live("base")
    await evals.prepared(name="gone")
    [pod] = await evals.training(name="gone")
    await evals.end(pod, code=0, report=EVALUATED)
    await evals.gone("EvalJob", "gone")


@pytest.mark.parametrize("mode", ["cluster", "namespaced"])
async def test_the_rights_of_the_chart_are_enough_for_a_whole_life(mode: str, world: World, tmp_path: Path) -> None:
    home = f"{world.namespace}-{mode}"
    world.control_plane.kubectl("create", "namespace", home)
    values = {"namespaces": [world.namespace]} if mode == "namespaced" else {}
    granted = start_with_rights(world, values=values, home=home, log=tmp_path / "operator.log")
    try:
        await live_a_life(world)
    finally:
        world.operator.stop()
        world.control_plane.kubectl("delete", "--filename=-", input=yaml.safe_dump_all(granted))
    # The API server's words for a missing right; a namespace that another test deletes is also "forbidden" to write to.
    assert "forbidden: user" not in world.operator.log.lower()
    events = await world.cluster.list_all("Event", namespace=world.namespace, fields="involvedObject.kind=FineTuneJob")
    assert {"Running", "Restarting", "Suspended", "Complete"} <= {event["reason"] for event in events}
    events = await world.cluster.list_all("Event", namespace=world.namespace, fields="involvedObject.kind=EvalJob")
    assert {"Running", "Complete", "GateFailed"} <= {event["reason"] for event in events}
