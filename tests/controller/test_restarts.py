"""Restarts: each failure is answered once, by a new attempt for a gang, by the Job controller for one pod."""

import time
from typing import Any

import pytest

from kubetune_operator.status import index_of
from tests.controller.world import IMAGE_ID, World, condition_of, running_of

pytestmark = pytest.mark.control_plane

GANG = {"compute": {"nodes": 2}}


async def _in_training(world: World, *, nodes: int, **spec: object) -> list[dict[str, object]]:
    await world.apply(**({"compute": {"nodes": nodes}} | spec))
    await world.prepared()
    return await world.training(nodes=nodes)


async def test_five_kills_of_a_gang_are_five_restarts_each_within_seconds(world: World) -> None:
    pods = await _in_training(world, nodes=2, lifecycle={"maxRestarts": 5})
    for kill in range(1, 6):
        victim = pods[kill % 2]
        struck = time.monotonic()
        await world.end(victim, code=137)
        await world.end(pods[(kill + 1) % 2], code=78, report={"exitCode": 78, "reason": "PeerLost"})
        pods = await world.training(nodes=2, attempt=kill + 1)
        assert time.monotonic() - struck < 10
        status = await world.status()
        assert status["restarts"] == kill
        assert status["lastFailure"]["index"] == index_of(victim)
        assert status["lastFailure"]["exitCode"] == 137
        assert status["lastFailure"]["reason"] == "Killed"
        assert "SIGKILL" in status["lastFailure"]["message"]
        assert await world.jobs() == ["run-prepare", f"run-train-{kill + 1}"]
    status = await world.complete(pods)
    assert status["restarts"] == 5


async def test_a_gang_that_fails_too_often_fails_with_the_cause(world: World) -> None:
    pods = await _in_training(world, nodes=2, lifecycle={"maxRestarts": 1})
    for attempt in (1, 2):
        await world.end(pods[1], code=139)
        if attempt == 1:
            pods = await world.training(nodes=2, attempt=2)
    status = await world.state("Failed")
    failed = next(item for item in status["conditions"] if item["type"] == "Failed")
    assert failed["reason"] == "MaxRestartsExceeded"
    assert status["restarts"] == 1
    assert "SIGSEGV" in status["lastFailure"]["message"]
    assert status["lastFailure"]["node"] == world.node
    await world.stopped("run-train-2")  # what still runs ends, and what failed stays for diagnosis


async def test_a_gang_that_hangs_is_restarted_and_says_so(world: World) -> None:
    pods = await _in_training(world, nodes=2, lifecycle={"maxRestarts": 1})
    said = "rank 1 made no progress in training for 612 s"
    report = {"result": "Failed", "exitCode": 76, "reason": "Hang", "message": said, "logTail": "in stand_still"}
    await world.end(pods[1], code=76, report=report)
    await world.end(pods[0], code=78, report={"exitCode": 78, "reason": "PeerLost"})
    pods = await world.training(nodes=2, attempt=2)
    status = await world.status()
    failure = status["lastFailure"]
    assert (failure["reason"], failure["exitCode"], failure["index"]) == ("Hang", 76, 1)
    assert (failure["message"], failure["logTail"]) == (said, "in stand_still")
    assert (status["restarts"], status.get("preemptions")) == (1, None)
    await world.complete(pods)


async def test_a_permanent_exit_code_fails_at_once_with_the_trainers_own_words(world: World) -> None:
    pods = await _in_training(world, nodes=2)
    report = {"result": "Failed", "exitCode": 77, "reason": "NonFiniteLoss", "message": "loss is NaN at step 7",
              "hint": "Lower training.learningRate.", "logTail": "step 7"}  # fmt: skip
    await world.end(pods[1], code=77, report=report)
    await world.end(pods[0], code=78, report={"exitCode": 78, "reason": "PeerLost"})
    status = await world.state("Failed")
    assert not status.get("restarts")
    failure = status["lastFailure"]
    assert (failure["reason"], failure["exitCode"], failure["index"]) == ("NonFiniteLoss", 77, 1)
    assert failure["message"] == "loss is NaN at step 7"
    assert failure["hint"] == "Lower training.learningRate."
    assert failure["logTail"] == "step 7"


async def test_a_preemption_is_a_restart_but_does_not_count_against_the_limit(world: World) -> None:
    pods = await _in_training(world, nodes=2, lifecycle={"maxRestarts": 0})
    for pod in pods:
        await world.end(pod, code=75, report={"result": "Preempted", "exitCode": 75, "reason": "Preempted"})
    pods = await world.training(nodes=2, attempt=2)
    status = await world.status()
    assert (status["restarts"], status["preemptions"]) == (1, 1)
    await world.complete(pods)


async def test_a_pod_of_a_gang_that_is_deleted_counts_as_a_restart(world: World) -> None:
    pods = await _in_training(world, nodes=2, lifecycle={"maxRestarts": 0})
    await world.cluster.delete("Pod", namespace=world.namespace, name=pods[1]["metadata"]["name"])
    pods = await world.training(nodes=2, attempt=2)
    status = await world.status()
    assert status["restarts"] == 1
    assert status["lastFailure"]["pod"]
    await world.complete(pods)


async def test_one_pod_is_restarted_by_the_job_controller_and_counted(world: World) -> None:
    [pod] = await _in_training(world, nodes=1)
    await world.end(pod, code=139)
    status = await world.until(lambda status: status.get("restarts") == 1)
    assert status["state"] == "Restarting"
    [pod] = await world.live_pods("train", count=1)
    await world.run(pod)
    status = await world.state("Running")
    assert (status["attempt"], status["image"]) == (1, IMAGE_ID)
    assert "SIGSEGV" in status["lastFailure"]["message"]
    status = await world.complete([pod])
    assert status["restarts"] == 1


async def test_one_pod_that_fails_too_often_fails_the_job(world: World) -> None:
    [pod] = await _in_training(world, nodes=1, lifecycle={"maxRestarts": 0})
    await world.end(pod, code=1, report={"result": "Failed", "exitCode": 1, "reason": "Crashed", "message": "boom"})
    status = await world.state("Failed")
    failed = next(item for item in status["conditions"] if item["type"] == "Failed")
    assert failed["reason"] == "MaxRestartsExceeded"
    assert "boom" in failed["message"]
    assert not status.get("restarts")


async def test_a_single_pod_that_is_deleted_counts_as_a_preemption(world: World) -> None:
    [pod] = await _in_training(world, nodes=1, lifecycle={"maxRestarts": 0})
    await world.cluster.delete("Pod", namespace=world.namespace, name=pod["metadata"]["name"])
    [fresh] = await world.live_pods("train", count=1)
    assert fresh["metadata"]["uid"] != pod["metadata"]["uid"]
    await world.run(fresh)
    status = await world.until(lambda status: status.get("restarts") == 1 and status["state"] == "Running")
    assert status["preemptions"] == 1
    await world.complete([fresh])


async def test_a_training_job_that_somebody_deletes_is_started_anew(world: World) -> None:
    await _in_training(world, nodes=2)
    await world.cluster.delete("Job", namespace=world.namespace, name="run-train-1", foreground=True)
    pods = await world.training(nodes=2, attempt=2)
    status = await world.complete(pods)
    assert status["restarts"] == 1


FOUR_ROWS = {"maxSteps": 30, "globalBatchSize": 8, "microBatchSize": 4}
OUT_OF_MEMORY = {"result": "Failed", "exitCode": 71, "reason": "OutOfMemory", "message": "CUDA out of memory"}


def _overrides(pod: dict[str, Any]) -> list[str]:
    """What the trainer in a pod is told beside its config."""
    command = pod["spec"]["containers"][0]["command"]
    return list(command[command.index("--config") + 2 :])


@pytest.mark.parametrize(
    ("nodes", "code", "report", "why"),
    [(1, 137, None, "OOMKilled"), (1, 71, OUT_OF_MEMORY, ""), (2, 137, None, "OOMKilled"), (2, 71, OUT_OF_MEMORY, "")],
)
async def test_out_of_memory_halves_the_micro_batch_down_to_one_row_and_then_fails(
    world: World, nodes: int, code: int, report: dict[str, Any] | None, why: str
) -> None:
    """No restart of these counts: none is allowed here."""
    [pod, *peers] = await _in_training(world, nodes=nodes, lifecycle={"maxRestarts": 0}, training=FOUR_ROWS)
    assert _overrides(pod) == []
    reason = why or "OutOfMemory"
    for attempt, (before, size) in enumerate([(4, 2), (2, 1)], start=2):
        await world.end(pod, code=code, report=report, reason=why)
        for peer in peers:
            await world.end(peer, code=78, report={"exitCode": 78, "reason": "PeerLost"})
        pod, *peers = await world.training(nodes=nodes, attempt=attempt)
        assert _overrides(pod) == [f"training.micro_batch_size={size}"]
        status = await world.status()
        assert (status["microBatchSize"], status["restarts"]) == (size, attempt - 1)
        assert f"microBatchSize {size} " in running_of(status)["message"]
        assert status["lastFailure"]["reason"] == reason
        assert status["lastFailure"]["hint"].startswith(
            f"The next attempt has microBatchSize {size} in place of {before}"
        )
    config = await world.config()
    assert config["training"]["micro_batch_size"] == 4, "the config stays as it was made"
    await world.end(pod, code=code, report=report, reason=why)
    status = await world.state("Failed")
    assert condition_of(status, "Failed")["reason"] == reason
    assert (status["restarts"], status["microBatchSize"]) == (2, 1)
    assert "Even one row at a time needs too much" in status["lastFailure"]["hint"]
    told = await world.cluster.list_all("Event", namespace=world.namespace)
    assert any("attempt 2 has microBatchSize 2 in place of 4" in event["message"] for event in told)


async def test_what_ran_out_of_memory_keeps_its_smaller_micro_batch_through_other_restarts(world: World) -> None:
    [pod] = await _in_training(world, nodes=1, training=FOUR_ROWS)
    await world.end(pod, code=71, report=OUT_OF_MEMORY)
    [pod] = await world.training(attempt=2)
    await world.patch(suspend=True)
    await world.gone("Job", "run-train-2")
    await world.patch(suspend=False)
    [pod] = await world.training(attempt=3)
    assert _overrides(pod) == ["training.micro_batch_size=2"]
    status = await world.complete([pod])
    assert status["microBatchSize"] == 2
