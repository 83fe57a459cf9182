"""Progress and checkpoints come from the log of rank 0, at most one write per interval."""

import asyncio
import json
import time

import pytest

from tests.controller.world import World

pytestmark = pytest.mark.control_plane


def _log(*events: dict[str, object]) -> str:
    return "\n".join(["a line of stderr", *(json.dumps(event) for event in events), '{"event":"step","step":99,"lo'])


def _step(step: int) -> dict[str, object]:
    return {"event": "step", "time": time.time(), "attempt": 1, "step": step, "totalSteps": 30, "epoch": step / 10,
            "loss": 1.2839473724365234, "learningRate": 1.9e-4, "gradNorm": 0.81, "tokensPerSecond": 812.34,
            "peakMemoryBytes": 123, "etaSeconds": 412}  # fmt: skip


async def test_progress_loss_and_the_last_checkpoint_reach_the_status(world: World) -> None:
    await world.apply()
    await world.prepared()
    [pod] = await world.training()
    checkpoint = {"event": "checkpoint", "time": 1760000000.1, "step": 10, "uri": "s3://runs/c/step-10", "seconds": 1.5}
    phase = {"event": "phase", "phase": "Loading"}
    validation = {"event": "validation", "step": 10, "validationLoss": 1.5, "bestValidationLoss": 1.25}
    validation["bestValidationStep"] = 5
    world.logs[pod["metadata"]["name"]] = _log(phase, _step(10), checkpoint, validation, _step(11))
    status = await world.until(lambda status: (status.get("progress") or {}).get("step") == 11)
    progress = status["progress"]
    assert progress.pop("updatedAt")
    assert progress == {
        "step": 11, "totalSteps": 30, "epoch": "1.10", "loss": "1.2839", "validationLoss": "1.5000",
        "bestValidationLoss": "1.2500", "bestValidationStep": 5,
        "learningRate": "0.00019", "tokensPerSecond": "812.3", "peakMemoryBytes": 123, "etaSeconds": 412,
        "steps": "11/30", "eta": "6m52s",
    }  # fmt: skip
    assert status["checkpoint"] == {"step": 10, "uri": "s3://runs/c/step-10", "time": "2025-10-09T08:53:20Z"}
    checkpointed = next(item for item in status["conditions"] if item["type"] == "Checkpointed")
    assert checkpointed["status"] == "True"
    running = next(item for item in status["conditions"] if item["type"] == "Running")
    assert (running["status"], running["reason"]) == ("True", "Loading")


@pytest.mark.parametrize("has_failed", [False, True], ids=["first pod", "after one that failed"])
async def test_a_running_job_is_written_at_most_once_per_interval(world: World, *, has_failed: bool) -> None:
    await world.apply()
    await world.prepared()
    [pod] = await world.training()
    if has_failed:  # the Job controller replaces it, and what is left of it stays
        await world.end(pod, code=139)
        await world.until(lambda status: status.get("restarts") == 1)
        [pod] = await world.live_pods("train", count=1)
        await world.run(pod)
        await world.state("Running")
        await asyncio.sleep(1)
    version = (await world.job())["metadata"]["resourceVersion"]
    writes, begun = 0, time.monotonic()
    for step in range(1, 60):
        world.logs[pod["metadata"]["name"]] = _log(_step(step))
        await asyncio.sleep(0.1)
        seen = (await world.job())["metadata"]["resourceVersion"]
        writes, version = writes + (seen != version), seen
    assert 1 <= writes <= (time.monotonic() - begun) / 0.5 + 1


async def test_the_last_checkpoint_before_a_failure_is_not_lost(world: World) -> None:
    await world.apply(compute={"nodes": 2})
    await world.prepared()
    pods = await world.training(nodes=2)
    checkpoint = {"event": "checkpoint", "time": time.time(), "step": 20, "uri": "s3://runs/c/step-20", "seconds": 1.5}
    world.logs[pods[0]["metadata"]["name"]] = _log(_step(20), checkpoint)
    await world.end(pods[1], code=137)
    status = await world.until(lambda status: status.get("attempt") == 2)
    assert status["checkpoint"]["step"] == 20
    assert status["progress"]["step"] == 20
