"""Suspend, resume, deadlines, time to live, and that the end is the end."""

import pytest

from tests.controller.world import PREPARED, World

pytestmark = pytest.mark.control_plane


async def test_suspend_stops_the_pods_and_resume_goes_on_with_a_new_attempt_that_is_no_restart(world: World) -> None:
    await world.apply(compute={"nodes": 2})
    await world.prepared()
    await world.training(nodes=2)
    await world.patch(suspend=True)
    await world.state("Suspended")
    await world.gone("Job", "run-train-1")
    await world.gone("Service", "run-train-1")
    await world.patch(suspend=False)
    pods = await world.training(nodes=2, attempt=2)
    status = await world.status()
    assert not status.get("restarts")
    suspended = next(item for item in status["conditions"] if item["type"] == "Suspended")
    assert (suspended["status"], suspended["reason"]) == ("False", "Resumed")
    await world.complete(pods)


async def test_a_job_that_is_created_suspended_starts_nothing_until_it_is_resumed(world: World) -> None:
    await world.apply(suspend=True)
    await world.state("Suspended")
    assert await world.jobs() == []
    await world.patch(suspend=False)
    await world.prepared()
    pods = await world.training()
    await world.complete(pods)


async def test_suspend_and_resume_faster_than_pods_end(world: World) -> None:
    await world.apply(compute={"nodes": 2})
    await world.prepared()
    await world.training(nodes=2)
    await world.patch(suspend=True)
    await world.state("Suspended")
    await world.patch(suspend=False)
    pods = await world.training(nodes=2, attempt=2)
    await world.complete(pods)


async def test_the_deadline_fails_the_job_and_stops_its_pods(world: World) -> None:
    await world.apply(lifecycle={"activeDeadlineSeconds": 6})
    await world.prepared()
    await world.training()
    status = await world.state("Failed", seconds=30)
    failed = next(item for item in status["conditions"] if item["type"] == "Failed")
    assert failed["reason"] == "DeadlineExceeded"
    assert "6 s" in failed["message"]
    await world.stopped("run-train-1")


async def test_a_finished_job_is_deleted_after_its_time_to_live_with_all_it_made(world: World) -> None:
    await world.apply(lifecycle={"ttlSecondsAfterFinished": 2})
    await world.prepared()
    await world.complete(await world.training())
    await world.gone("FineTuneJob", "run")
    await world.gone("Job", "run-train-1")
    await world.gone("ConfigMap", "run-config")


async def test_the_time_to_live_may_be_set_after_the_end(world: World) -> None:
    await world.apply()
    await world.prepared()
    await world.complete(await world.training())
    await world.patch(lifecycle={"ttlSecondsAfterFinished": 0})
    await world.gone("FineTuneJob", "run")


async def test_a_complete_job_stays_complete_whatever_happens_to_its_children(world: World) -> None:
    await world.apply()
    await world.prepared()
    before = await world.complete(await world.training())
    await world.cluster.delete("Job", namespace=world.namespace, name="run-train-1")
    await world.cluster.delete("Job", namespace=world.namespace, name="run-prepare")
    await world.cluster.delete("ConfigMap", namespace=world.namespace, name="run-config")
    await world.patch(suspend=True)
    after = await world.until(lambda status: status["observedGeneration"] == 2)
    assert after == before | {"observedGeneration": 2}
    assert await world.jobs() == []


async def test_an_estimate_above_the_limit_fails_before_training(world: World) -> None:
    await world.apply(compute={"resources": {"limits": {"memory": "1Gi"}}})
    await world.prepared(
        report=PREPARED | {"estimate": {"memoryPerDeviceBytes": 3 * 2**30, "message": "weights 3 GiB"}}
    )
    status = await world.state("Failed")
    failed = next(item for item in status["conditions"] if item["type"] == "Failed")
    assert failed["reason"] == "DoesNotFit"
    assert failed["message"].startswith(
        "needs 3.0 GiB per process, but has only 1.0 GiB (compute.resources.limits.memory 1Gi)"
    )
    assert status["estimate"]["fits"] is False
    assert await world.jobs() == ["run-prepare"]


async def test_a_prepare_pod_that_cannot_be_helped_fails_the_job_with_its_words(world: World) -> None:
    await world.apply()
    [pod] = await world.live_pods("prepare", count=1)
    await world.run(pod)
    await world.state("Preparing")
    message = "s3://data/t.jsonl line 3 is not JSON"
    await world.end(
        pod, code=65, report={"result": "Failed", "exitCode": 65, "reason": "DataInvalid", "message": message}
    )
    status = await world.state("Failed")
    assert status["lastFailure"]["message"] == message
    failed = next(item for item in status["conditions"] if item["type"] == "Failed")
    assert (failed["reason"], failed["message"]) == ("DataInvalid", message)


async def test_a_batch_that_does_not_divide_and_a_local_folder_are_refused(world: World) -> None:
    await world.apply(
        compute={"nodes": 3}, training={"maxSteps": 1, "globalBatchSize": 4}, workspace={"uri": "file:///runs"}
    )
    status = await world.state("Failed")
    accepted = next(item for item in status["conditions"] if item["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "InvalidSpec")
    assert "spec.workspace.uri" in accepted["message"]
    assert "nearest: 3 or 6" in accepted["message"]
    assert await world.jobs() == []
