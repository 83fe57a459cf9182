"""Jobs that use the result of another job wait for it and then take it."""

import pytest
import yaml

from tests.controller.world import COMPLETE, World

pytestmark = pytest.mark.control_plane


async def _config(world: World, name: str) -> dict[str, object]:
    found = await world.cluster.get("ConfigMap", namespace=world.namespace, name=f"{name}-config")
    assert found is not None
    return yaml.safe_load(found["data"]["config.yaml"])


def _running(status: dict[str, object]) -> dict[str, object]:
    return next((item for item in status.get("conditions", []) if item["type"] == "Running"), {})


async def test_a_chain_of_jobs_waits_says_for_what_and_takes_the_output(world: World) -> None:
    await world.apply("second", model={"jobRef": {"kind": "FineTuneJob", "name": "first", "output": "merged"}})
    status = await world.until(lambda status: _running(status).get("reason") == "UpstreamMissing", name="second")
    assert _running(status)["message"] == "FineTuneJob first does not exist"
    first = await world.apply(
        "first", storage={"s3": {"endpoint": "http://s3:9000", "credentialsSecret": {"name": "a"}}}
    )
    status = await world.until(lambda status: _running(status).get("reason") == "WaitingForUpstream", name="second")
    await world.prepared(name="first")
    pods = await world.training(name="first")
    assert not await world.pods("prepare", name="second")
    await world.complete(pods, name="first")
    await world.live_pods("prepare", count=1, name="second")
    config = await _config(world, "second")
    assert config["model"] == {
        "uri": {
            "location": "s3://runs/out/merged",
            "s3": {"endpoint": "http://s3:9000", "credentials_secret": {"name": "a"}},
        }
    }
    status = await world.status("second")
    parent = {"kind": "FineTuneJob", "name": "first", "uid": first["metadata"]["uid"], "output": "merged"}
    assert status["resolved"]["parents"] == [parent | {"digest": "d1"}]
    assert config["run"]["parents"] == [parent]


async def test_an_output_that_the_other_job_does_not_have_is_named(world: World) -> None:
    await world.apply("first")
    await world.apply("second", model={"jobRef": {"kind": "FineTuneJob", "name": "first", "output": "adapter"}})
    await world.prepared(name="first")
    await world.complete(await world.training(name="first"), name="first")
    status = await world.until(lambda status: _running(status).get("reason") == "UpstreamNotUsable", name="second")
    assert _running(status)["message"] == "FineTuneJob first has no output 'adapter'; it has merged (HuggingFace)"


async def test_a_job_that_failed_is_no_model_but_its_checkpoint_can_be_resumed_from(world: World) -> None:
    await world.apply("first", compute={"nodes": 2})
    await world.apply("child", model={"jobRef": {"kind": "FineTuneJob", "name": "first"}})
    await world.apply("again", checkpoint={"resumeFrom": {"jobRef": {"kind": "FineTuneJob", "name": "first"}}})
    await world.prepared(name="first")
    pods = await world.training(name="first", nodes=2)
    line = '{"event":"checkpoint","time":1760000000,"step":8,"uri":"s3://runs/c/step-8","seconds":1}'
    world.logs[pods[0]["metadata"]["name"]] = line
    await world.until(lambda status: status.get("checkpoint"), name="first")
    await world.end(pods[1], code=77, report={"exitCode": 77, "reason": "NonFiniteLoss", "message": "NaN"})
    await world.state("Failed", name="first")
    status = await world.until(lambda status: _running(status).get("reason") == "UpstreamFailed", name="child")
    assert "delete it" in _running(status)["message"]
    await world.live_pods("prepare", count=1, name="again")
    config = await _config(world, "again")
    folder = (await _config(world, "first"))["run"]["directory"]
    assert config["checkpoint"]["resume_from"] == {"uri": f"{folder}/checkpoints"}, "whose newest one is taken"


async def test_a_job_of_the_same_name_waits_until_the_children_of_the_old_one_are_gone(world: World) -> None:
    await world.apply()
    await world.prepared()
    await world.training()
    await world.cluster.delete("FineTuneJob", namespace=world.namespace, name="run")
    await world.apply()
    await world.prepared()
    pods = await world.training()
    status = await world.complete(pods)
    assert status["outputs"] == COMPLETE["outputs"]
