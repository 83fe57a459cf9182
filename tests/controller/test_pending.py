"""A job that cannot start says why."""

import pytest

from tests.controller.world import World

pytestmark = pytest.mark.control_plane


async def _until_reason(world: World, reason: str) -> str:
    def message(status: dict[str, object]) -> str:
        found = next((item for item in status.get("conditions", []) if item["type"] == "Running"), {})
        return str(found["message"]) if found.get("reason") == reason else ""

    return message(await world.until(message))


async def _event(world: World, about: dict[str, object], *, reason: str, message: str) -> None:
    metadata = about["metadata"]
    await world.cluster.create(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": "test.", "namespace": world.namespace},
            "involvedObject": {
                "kind": "Pod", "name": metadata["name"], "namespace": world.namespace, "uid": metadata["uid"],
            },
            "type": "Warning",
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet"},
            "lastTimestamp": "2026-01-01T00:00:00Z",
        }
    )  # fmt: skip


async def test_a_pod_that_no_node_takes(world: World) -> None:
    await world.apply()
    [pod] = await world.live_pods("prepare", count=1)
    said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    await world.cluster.patch(
        "Pod", namespace=world.namespace, name=pod["metadata"]["name"],
        patch={"status": {"conditions": [condition]}}, subresource="status",
    )  # fmt: skip
    assert said in await _until_reason(world, "Unschedulable")
    assert (await world.status())["state"] == "Pending"


async def test_an_image_that_cannot_be_pulled(world: World) -> None:
    await world.apply()
    [pod] = await world.live_pods("prepare", count=1)
    await world.bind(pod)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nowhere/trainer:1"'}}
    await world._status(pod, phase="Pending", state=waiting)
    assert "nowhere/trainer:1" in await _until_reason(world, "ImagePullFailed")


async def test_a_secret_that_is_missing_is_named_and_the_job_starts_once_it_is_there(world: World) -> None:
    await world.apply(storage={"s3": {"credentialsSecret": {"name": "s3"}}})
    [pod] = await world.live_pods("prepare", count=1)
    await world.bind(pod)
    said = 'MountVolume.SetUp failed for volume "kubetune-secrets" : secret "s3" not found'
    await _event(world, pod, reason="FailedMount", message=said)
    assert 'secret "s3" not found' in await _until_reason(world, "SecretMissing")
    await world.prepared()
    await world.complete(await world.training())


async def test_a_quota_that_is_used_up(world: World) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    await world.cluster.request("POST", f"/api/v1/namespaces/{world.namespace}/resourcequotas", body=quota)
    await world.apply()
    assert "exceeded quota: none" in await _until_reason(world, "QuotaExceeded")


async def test_a_job_that_the_api_server_refuses(world: World) -> None:
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }  # fmt: skip
    path = f"/api/v1/namespaces/{world.namespace}/resourcequotas"
    await world.cluster.request("POST", path, body=quota)
    await world.apply()
    assert "exceeded quota: none" in await _until_reason(world, "CreateRefused")
    await world.cluster.request("DELETE", f"{path}/none")
    await world.prepared()


async def test_an_installation_without_accelerators_says_that_it_uses_the_cpu(world: World) -> None:
    world.operator.stop()
    world.operator.set("cpu_processes", "2")
    world.operator.start()
    await world.apply(
        compute={"accelerator": {"resource": "nvidia.com/gpu", "perNode": 8}},
        training={"maxSteps": 2, "globalBatchSize": 2},
    )
    status = await world.until(lambda status: status.get("state") == "Pending")
    accepted = next(item for item in status["conditions"] if item["type"] == "Accepted")
    assert accepted["message"].startswith("nvidia.com/gpu x 8 per node is mapped to 2 CPU processes per node")
