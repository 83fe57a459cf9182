"""An operator at rest writes nothing but its Lease and what running jobs have to tell."""

import asyncio
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from kubetune_operator.names import KINDS
from tests.cluster.controlplane import ControlPlane, audited
from tests.controller.world import World, user_of, world_of

pytestmark = pytest.mark.control_plane

FINISHED, RUNNING, WINDOW_SECONDS, INTERVAL_SECONDS = 50, 5, 60, 2
KIND_OF = dict(enumerate(list(KINDS) * FINISHED))
"""Which kind the job of a number is: all three take turns."""
EVENTS = {
    "FineTuneJob": lambda second: {"event": "step", "step": second, "totalSteps": 99, "loss": 1.0},
    "EvalJob": lambda second: {"event": "progress", "done": second, "total": 99, "tokensPerSecond": 1.0},
    "QuantizeJob": lambda second: {"event": "progress", "done": second, "total": 99, "phase": "Quantizing"},
}
"""What each kind tells while it runs."""


async def _finish(world: World, name: str) -> None:
    await world.apply(name)
    condition = {
        "type": "Complete", "status": "True", "reason": "Complete", "message": "training is done",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    status = {"state": "Complete", "observedGeneration": 1, "conditions": [condition]}
    status["completionTime"] = condition["lastTransitionTime"]
    await world.cluster.patch(
        world.kind, namespace=world.namespace, name=name, patch={"status": status}, subresource="status"
    )


async def _start(world: World, name: str) -> str:
    await world.apply(name)
    await world.prepared(name=name)
    [pod] = await world.training(name=name)
    return str(pod["metadata"]["name"])


def _writes(audit_log: Path, *, user: str, skip: int) -> Counter[str]:
    """What a user wrote, from a place of the audit log on."""
    writes: Counter[str] = Counter()
    for event in itertools.islice(audited(audit_log), skip, None):
        if event["user"]["username"] == user and event["verb"] not in {"get", "list", "watch"}:
            about = event["objectRef"]
            writes[f"{event['verb']} {about['resource']}/{about.get('subresource', '')} {about.get('name', '')}"] += 1
    return writes


async def test_with_finished_and_running_jobs_only_progress_and_the_lease_are_written(
    control_plane_with_controllers: ControlPlane, namespace_with_controllers: str, tmp_path: Path
) -> None:
    namespace = namespace_with_controllers
    settings = {"progress_interval_seconds": str(INTERVAL_SECONDS), "resync_seconds": "3", "freshness_seconds": "3"}
    log = tmp_path / "operator.log"
    audit_log = control_plane_with_controllers.audit_log
    assert audit_log is not None
    async with world_of(control_plane_with_controllers, namespace=namespace, log=log, start=False, **settings) as world:
        await asyncio.gather(*(_finish(world.of(KIND_OF[number]), f"done-{number}") for number in range(FINISHED)))
        world.operator.start()
        pods = await asyncio.gather(*(_start(world.of(KIND_OF[number]), f"live-{number}") for number in range(RUNNING)))
        await asyncio.sleep(3)
        begin = len(audit_log.read_text().splitlines())
        for second in range(WINDOW_SECONDS):
            for number, pod in enumerate(pods):
                world.logs[pod] = json.dumps(EVENTS[KIND_OF[number]](second))
            await asyncio.sleep(1)
        writes = _writes(audit_log, user=user_of(namespace), skip=begin)
        leases = sum(count for what, count in writes.items() if what.startswith("update leases/"))
        assert 0 < leases <= WINDOW_SECONDS + 2
        patches = {what: count for what, count in writes.items() if not what.startswith("update leases/")}
        assert set(patches) == {
            f"patch {KINDS[KIND_OF[number]].plural}/status live-{number}" for number in range(RUNNING)
        }
        assert max(patches.values()) <= WINDOW_SECONDS / INTERVAL_SECONDS + 1
        health, text = world.operator.get("/healthz", port=world.operator.health_port)
        assert (health, text) == (200, "ok")
        metrics = world.operator.metrics()
        for kind in KINDS:
            for state, count in (("Complete", FINISHED), ("Running", RUNNING)):
                jobs = sum(KIND_OF[number] == kind for number in range(count))
                assert f'kubetune_jobs{{kind="{kind}",state="{state}"}} {jobs:.1f}' in metrics
        assert "kubetune_leader 1.0" in metrics
