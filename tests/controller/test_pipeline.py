"""Chains of jobs: a whole one in one file, stopped by a gate, broken and mended, or bent into a circle."""

from typing import Any

import pytest

from tests.controller.world import World, condition_of

pytestmark = pytest.mark.control_plane

PEFT = [{"name": "adapter", "type": "PEFT"}]
MADE = {"name": "adapter", "type": "PEFT", "uri": "s3://runs/out/adapter", "digest": "sha256:ad", "bytes": 7}


def gate(name: str, *, passed: bool, difference: float | None = None) -> dict[str, Any]:
    told = {
        "name": name, "task": "tickets", "metric": "acc", "filter": "none", "rule": "comparedTo base maxDrop 0.01",
        "value": 0.4, "passed": passed, "message": f"acc is 0.4, {'no' if passed else 'much'} worse than base's",
    }  # fmt: skip
    return told | ({"difference": difference, "stderr": 0.004} if difference is not None else {})


def compared(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "task": "tickets", "metric": "acc", "comparedTo": {"name": "base", "maxDrop": "0.01"}}]


def table(world: World, title: str) -> str:
    """What a person sees; `pytest -s` shows it too, for docs/pipelines.md."""
    kinds = "finetunejobs,evaljobs,quantizejobs"  # the category is not known to kubectl from the first moment on
    shown = world.control_plane.kubectl("get", kinds, "--output=wide", f"--namespace={world.namespace}").stdout
    print(f"--- {title}\n{shown}")
    return shown


async def apply_chain(world: World) -> None:
    """Fine-tune, evaluate base and tuned, quantize, evaluate again: all at once, the last one first."""
    evals, quantizes = world.of("EvalJob"), world.of("QuantizeJob")
    await evals.apply(
        "small", model={"jobRef": {"kind": "QuantizeJob", "name": "tuned", "output": "int8"}}, gates=compared("as-good")
    )
    await quantizes.apply(
        "tuned",
        model={"jobRef": {"name": "tuned"}},
        after=[{"kind": "EvalJob", "name": "tuned", "condition": "GatePassed"}],
    )
    await evals.apply("tuned", model={"jobRef": {"name": "tuned"}}, gates=compared("as-good"))
    await evals.apply("base")
    await world.apply("tuned")


async def test_a_whole_chain_runs_from_training_to_the_evaluation_of_the_quantized_model(world: World) -> None:
    evals, quantizes = world.of("EvalJob"), world.of("QuantizeJob")
    await apply_chain(world)
    assert await quantizes.reason("WaitingForUpstream", name="tuned") == "EvalJob tuned is pending"
    assert await evals.reason("WaitingForUpstream", name="small")
    await world.live_pods("prepare", count=1, name="tuned")
    table(world, "start")
    await evals.live("base")
    await world.live("tuned")
    await evals.prepared(name="tuned")
    pods = await evals.training(name="tuned")
    assert await quantizes.reason("WaitingForUpstream", name="tuned")
    table(world, "middle")
    await evals.complete(pods, name="tuned", gates=[gate("as-good", passed=True, difference=-0.0012)])
    config = await evals.config("tuned")
    base = await evals.job("base")
    directory = f"s3://runs/{world.namespace}/base-{base['metadata']['uid'][:8]}"
    assert config["gates"][0]["compared_to"] == {"name": "base", "max_drop": 0.01, "directory": directory}
    assert [(parent["kind"], parent["name"], parent.get("output")) for parent in config["run"]["parents"]] == [
        ("FineTuneJob", "tuned", "merged"), ("EvalJob", "base", None),
    ]  # fmt: skip
    await quantizes.live("tuned")
    status = await evals.live("small", gates=[gate("as-good", passed=True)])
    assert condition_of(status, "GatePassed")["status"] == "True"
    assert (await evals.config("small"))["model"] == {"uri": {"location": "s3://runs/q/int8"}}
    parents = status["resolved"]["parents"]
    assert [(parent["kind"], parent.get("digest")) for parent in parents] == [
        ("QuantizeJob", "sha256:ab"), ("EvalJob", None),
    ]  # fmt: skip
    shown = table(world, "end")
    states = [line.split()[1] for line in shown.splitlines() if "kubetune.dev/" in line]
    assert states == ["Complete"] * 5


async def test_a_gate_that_fails_stops_what_comes_after_it_and_is_named(world: World) -> None:
    evals, quantizes = world.of("EvalJob"), world.of("QuantizeJob")
    await apply_chain(world)
    await evals.live("base")
    await world.live("tuned")
    status = await evals.live("tuned", gates=[gate("as-good", passed=False, difference=-0.06)])
    assert status["gates"][0]["difference"] == "-0.06"
    message = await quantizes.reason("UpstreamGateFailed", name="tuned")
    assert message == "EvalJob tuned: gate as-good: acc is 0.4, much worse than base's"
    assert (await quantizes.status("tuned"))["state"] == "Pending"
    assert await evals.reason("WaitingForUpstream", name="small") == "QuantizeJob tuned is pending"
    assert not await quantizes.pods("prepare", name="tuned")
    table(world, "failed gate")
    # The evaluation is made anew, with another result: the rest of the chain goes on.
    await evals.delete("tuned")
    assert await quantizes.reason("UpstreamMissing", name="tuned") == "EvalJob tuned does not exist"
    await evals.apply("tuned", model={"jobRef": {"name": "tuned"}}, gates=compared("as-good"))
    await evals.live("tuned", gates=[gate("as-good", passed=True)])
    await quantizes.live_pods("prepare", count=1, name="tuned")


async def test_a_chain_that_breaks_in_the_middle_is_mended_by_making_the_failed_job_anew(world: World) -> None:
    quantizes, evals = world.of("QuantizeJob"), world.of("EvalJob")
    await quantizes.apply("small", model={"jobRef": {"name": "tuned"}})
    await evals.apply("check", model={"jobRef": {"kind": "QuantizeJob", "name": "small"}})
    assert await quantizes.reason("UpstreamMissing", name="small") == "FineTuneJob tuned does not exist"
    await world.apply("tuned", model={"hub": {"repo": "a/b"}}, outputs=PEFT)
    await quantizes.reason("WaitingForUpstream", name="small")
    await world.prepared(name="tuned")
    [pod] = await world.training(name="tuned")
    await world.end(pod, code=77, report={"exitCode": 77, "reason": "NonFiniteLoss", "message": "NaN"})
    assert "has failed; delete it and make it anew" in await quantizes.reason("UpstreamFailed", name="small")
    await world.delete("tuned")
    await quantizes.reason("UpstreamMissing", name="small")
    await world.apply("tuned", model={"hub": {"repo": "a/b"}}, outputs=PEFT)
    await world.prepared(
        name="tuned",
        report={"result": "Prepared", "model": {"location": "s3://runs/cache/m", "commit": "c0ffee"}, "totalSteps": 3},
    )
    await world.complete(await world.training(name="tuned"), name="tuned", outputs=[MADE])
    await quantizes.live_pods("prepare", count=1, name="small")
    model = {"hub": {"repo": "a/b", "revision": "c0ffee"}, "adapter": {"location": "s3://runs/out/adapter"}}
    assert (await quantizes.config("small"))["model"] == model
    # What has its model goes on without the job that made it, and nothing of the chain is owned by it.
    await world.delete("tuned")
    status = await quantizes.live("small")
    assert status["resolved"]["model"]["adapter"] == "s3://runs/out/adapter"
    assert (await evals.live("check"))["state"] == "Complete"


async def test_jobs_that_wait_for_each_other_in_a_circle_are_told_the_way_round(world: World) -> None:
    evals, quantizes = world.of("EvalJob"), world.of("QuantizeJob")
    await world.apply("a", after=[{"kind": "EvalJob", "name": "c"}])
    await quantizes.apply("b", model={"jobRef": {"name": "a"}})
    await evals.apply("outside", after=[{"kind": "FineTuneJob", "name": "a"}])
    assert await quantizes.reason("WaitingForUpstream", name="b") == "FineTuneJob a is pending"
    await evals.apply("c", model={"jobRef": {"kind": "QuantizeJob", "name": "b"}})
    message = await world.reason("UpstreamCycle", name="a")
    assert message == (
        "FineTuneJob a waits for EvalJob c, which waits for QuantizeJob b, which waits for FineTuneJob a; "
        "delete one of them"
    )
    await quantizes.reason("UpstreamCycle", name="b")
    await evals.reason("UpstreamCycle", name="c")
    assert await evals.reason("WaitingForUpstream", name="outside") == "FineTuneJob a is pending"
    assert await world.jobs() == []
    await evals.delete("c")
    assert await world.reason("UpstreamMissing", name="a") == "EvalJob c does not exist"
    assert await quantizes.reason("WaitingForUpstream", name="b") == "FineTuneJob a is pending"
    await evals.apply("c")
    await evals.live("c")
    await world.live_pods("prepare", count=1, name="a")
