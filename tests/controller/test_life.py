"""The life of a FineTuneJob on the real API server, the kubelet played by hand."""

import pytest

from tests.controller.world import World

pytestmark = pytest.mark.control_plane


async def test_a_job_is_prepared_then_trained_then_complete(world: World) -> None:
    await world.apply()
    await world.until(lambda status: status.get("state") == "Pending" and status["resolved"]["config"] == "run-config")
    await world.prepared()
    status = await world.until(lambda status: status.get("attempt") == 1)
    assert status["data"] == {
        "samples": 100, "rows": 40, "tokens": 9000, "trainableTokenPercent": "41.2", "droppedSamples": 0,
    }  # fmt: skip
    assert status["estimate"]["memoryPerDeviceBytes"] == 2**30
    assert status["resolved"]["model"] == {"location": "s3://models/tiny/", "etag": "abc"}
    assert status["progress"]["steps"] == "0/30"
    assert status["artifacts"] == {"report": "s3://runs/t/report.html"}
    pods = await world.training()
    status = await world.complete(pods)
    assert status["outputs"] == [
        {"name": "merged", "type": "HuggingFace", "uri": "s3://runs/out/merged", "digest": "d1", "bytes": 42}
    ]
    assert status["progress"]["loss"] == "0.5123"
    assert status["progress"]["steps"] == "30/30"
    assert status["completionTime"]
    assert await world.jobs() == ["run-prepare", "run-train-1"]


async def test_a_job_that_ended_early_says_so(world: World) -> None:
    await world.apply()
    await world.prepared()
    told = {"event": "step", "step": 12, "totalSteps": 30, "bestValidationLoss": 0.25, "bestValidationStep": 6}
    status = await world.complete(await world.training(), progress=told)
    complete = next(item for item in status["conditions"] if item["type"] == "Complete")
    assert complete["message"] == (
        "ended early, after step 12 of 30, with the weights of step 6, whose validation loss is the lowest; "
        "merged: s3://runs/out/merged"
    )
    assert status["progress"]["steps"] == "12/30"
