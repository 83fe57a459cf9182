"""EvalJobs: from a model and tasks to results and gates, with kills in between."""

import asyncio
import json
from typing import Any

import pytest

from tests.controller.world import EVALUATED, World, condition_of, running_of

pytestmark = pytest.mark.control_plane

GATES = [
    {"name": "floor", "task": "tickets", "metric": "acc", "atLeast": "0.40"},
    {"name": "ceiling", "task": "wikitext", "metric": "word_perplexity", "atMost": "20"},
]


@pytest.fixture
def evals(world: World) -> World:
    return world.of("EvalJob")


def judged(*, floor: bool = True, ceiling: bool = True) -> list[dict[str, Any]]:
    """What a trainer reports about `GATES`."""
    return [
        {
            "name": "floor", "task": "tickets", "metric": "acc", "filter": "none", "rule": "atLeast 0.40",
            "value": 0.4125, "passed": floor, "message": "0.4125 is at least 0.40",
        },
        {
            "name": "ceiling", "task": "wikitext", "metric": "word_perplexity", "filter": "none", "rule": "atMost 20",
            "value": 23.456789, "passed": ceiling, "message": "23.4568 is above 20",
        },
    ]  # fmt: skip


async def test_an_evaluation_goes_from_its_tasks_to_results_in_the_status(evals: World) -> None:
    await evals.apply()
    await evals.prepared(report={"result": "Prepared", "model": {"location": "s3://models/tiny/", "etag": "abc"},
                                 "total": 862})  # fmt: skip
    status = await evals.until(lambda status: status.get("progress"))
    assert status["progress"] == {"done": 0, "total": 862, "ofTotal": "0/862"}
    [pod] = await evals.training()
    status = await evals.state("Running")
    assert running_of(status)["reason"] == "Evaluating"
    event = {"event": "progress", "done": 120, "total": 862, "tokensPerSecond": 812.34, "etaSeconds": 61}
    evals.logs[pod["metadata"]["name"]] = json.dumps(event)
    status = await evals.until(lambda status: status["progress"]["done"] == 120)
    assert status["progress"].pop("updatedAt")
    assert status["progress"] == {
        "done": 120, "total": 862, "etaSeconds": 61, "ofTotal": "120/862", "eta": "1m01s", "tokensPerSecond": "812.3",
    }  # fmt: skip
    status = await evals.complete([pod])
    assert status["results"] == [
        {"task": "tickets", "metric": "acc", "filter": "none", "value": "0.4125", "stderr": "0.0174", "samples": 800},
        {"task": "wikitext", "metric": "word_perplexity", "filter": "none", "value": "23.4568", "samples": 62},
    ]
    assert status["artifacts"] == EVALUATED["artifacts"]
    assert status["progress"]["ofTotal"] == "862/862"
    assert "gates" not in status
    assert not condition_of(status, "GatePassed")
    complete = condition_of(status, "Complete")
    assert complete["message"] == "tickets acc 0.4125; wikitext word_perplexity 23.4568"
    assert await evals.jobs() == ["run-eval-1", "run-prepare-eval"]


async def test_what_the_pods_run_and_the_config_that_they_read(evals: World) -> None:
    await evals.apply(gates=GATES[:1], taskFiles=[{"name": "mine", "configMap": {"name": "tasks"}}])
    [pod] = await evals.live_pods("prepare", count=1)
    container = pod["spec"]["containers"][0]
    assert container["command"][3:] == ["prepare", "--config", "/etc/kubetune/config.yaml"]
    environment = {item["name"]: item.get("value") for item in container["env"]}
    assert environment["KUBETUNE_IMAGE"] == container["image"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert "/var/run/kubetune/configmaps/tasks" in mounts
    config = await evals.config()
    assert (config["kind"], config["tasks"][1]) == ("EvalJob", {"name": "wikitext", "limit": 62})
    assert config["gates"][0]["at_least"] == 0.4
    await evals.run(pod)
    await evals.end(pod, code=0, report={"result": "Prepared"})
    [pod] = await evals.training()
    assert pod["spec"]["containers"][0]["command"][3] == "eval_model"


@pytest.mark.parametrize(("passed", "reason"), [(True, "GatesPassed"), (False, "GateFailed")])
async def test_a_job_is_complete_whatever_its_gates_say(passed: bool, reason: str, evals: World) -> None:
    await evals.apply(gates=GATES)
    status = await evals.live(gates=judged(ceiling=passed))
    condition = condition_of(status, "GatePassed")
    assert (condition["status"], condition["reason"]) == (str(passed), reason)
    assert "gate ceiling: 23.4568 is above 20" in condition["message"]
    assert [gate["passed"] for gate in status["gates"]] == [True, passed]
    assert (status["gates"][1]["value"], status["gates"][1]["rule"]) == ("23.4568", "atMost 20")
    for _ in range(100):  # Events come after the status
        if reason in (reasons := await event_reasons(evals)):
            return
        await asyncio.sleep(0.1)
    pytest.fail(f"no Event {reason}, only {reasons}")


async def event_reasons(evals: World) -> set[str]:
    about = await evals.cluster.list_all("Event", namespace=evals.namespace, fields="involvedObject.kind=EvalJob")
    return {event["reason"] for event in about}


async def test_a_gate_that_nothing_is_reported_about_has_not_passed(evals: World) -> None:
    await evals.apply(gates=GATES)
    status = await evals.live(gates=judged()[:1])
    condition = condition_of(status, "GatePassed")
    assert condition["status"] == "False"
    assert condition["message"] == "gate ceiling: nothing was reported about it"


async def test_results_that_do_not_fit_the_termination_message_are_read_from_the_log(evals: World) -> None:
    await evals.apply(gates=GATES)
    await evals.prepared()
    [pod] = await evals.training()
    results = [
        {"event": "result", "task": f"mmlu_{number}", "metric": "acc", "filter": "none", "value": 0.25, "samples": 9}
        for number in range(600)
    ]
    gates = [{"event": "gate", **gate} for gate in judged()]
    evals.logs[pod["metadata"]["name"]] = "\n".join(json.dumps(event) for event in [*results, *gates])
    report = {"result": "Complete", "exitCode": 0, "seeLog": True, "artifacts": EVALUATED["artifacts"]}
    await evals.end(pod, code=0, report=report)
    status = await evals.state("Complete")
    assert len(status["results"]) == 600
    assert status["results"][599]["task"] == "mmlu_599"
    assert [gate["name"] for gate in status["gates"]] == ["floor", "ceiling"]
    assert condition_of(status, "GatePassed")["status"] == "True"


async def test_an_evaluation_whose_report_is_lost_runs_again_and_reports_nothing_before(evals: World) -> None:
    await evals.apply(gates=GATES)
    await evals.prepared()
    [pod] = await evals.training()
    await evals.end(pod, code=0)
    [pod] = await evals.training(attempt=2)
    status = await evals.status()
    assert (status["restarts"], status["lastFailure"]["reason"]) == (1, "ReportLost")
    assert "results" not in status
    await evals.complete([pod], gates=judged())


async def test_a_killed_evaluation_goes_on_with_a_new_pod(evals: World) -> None:
    await evals.apply()
    await evals.prepared()
    [pod] = await evals.training()
    await evals.end(pod, code=137)
    await evals.until(lambda status: status.get("restarts") == 1)
    [pod] = await evals.live_pods("eval", count=1)
    await evals.run(pod)
    status = await evals.state("Running")
    assert status["lastFailure"]["reason"] == "Killed"
    status = await evals.complete([pod])
    assert (status["restarts"], status["attempt"]) == (1, 1)


async def test_data_parallel_evaluation_is_a_gang_that_restarts_as_a_whole(evals: World) -> None:
    await evals.apply(compute={"nodes": 2})
    await evals.prepared()
    pods = await evals.training(nodes=2)
    assert await evals.cluster.request("GET", f"/api/v1/namespaces/{evals.namespace}/services/run-eval-1")
    await evals.end(pods[1], code=137)
    await evals.end(pods[0], code=78, report={"exitCode": 78, "reason": "PeerLost"})
    pods = await evals.training(nodes=2, attempt=2)
    status = await evals.complete(pods)
    assert (status["restarts"], status["lastFailure"]["index"]) == (1, 1)


async def test_memory_that_is_too_small_is_answered_with_what_an_evaluation_can_do(evals: World) -> None:
    await evals.apply(lifecycle={"maxRestarts": 0})
    await evals.prepared()
    [pod] = await evals.training()
    await evals.end(pod, code=137, reason="OOMKilled")
    status = await evals.state("Failed")
    assert "a smaller batchSize or maxSequenceLength" in status["lastFailure"]["hint"]


async def test_suspend_and_resume_and_an_operator_that_starts_anew(evals: World) -> None:
    await evals.apply()
    await evals.prepared()
    [pod] = await evals.training()
    evals.logs[pod["metadata"]["name"]] = json.dumps({"event": "progress", "done": 5, "total": 9, "etaSeconds": 7})
    await evals.until(lambda status: (status.get("progress") or {}).get("etaSeconds") == 7)
    await evals.patch(suspend=True)
    status = await evals.state("Suspended")
    assert "eta" not in status["progress"], "nobody knows when a job that does not run will be done"
    await evals.gone("Job", "run-eval-1")
    evals.operator.kill()
    await evals.patch(suspend=False)
    evals.operator.start()
    pods = await evals.training(attempt=2)
    evals.operator.kill()
    await evals.end(pods[0], code=0, report=EVALUATED)
    evals.operator.start()
    status = await evals.state("Complete")
    assert [result["value"] for result in status["results"]] == ["0.4125", "23.4568"]


async def test_jobs_of_three_kinds_live_under_one_name(world: World) -> None:
    kinds = [world, world.of("EvalJob"), world.of("QuantizeJob")]
    for each in kinds:
        await each.apply("one")
    await asyncio.gather(*(each.live("one") for each in kinds))
    assert await world.jobs() == [
        "one-eval-1", "one-prepare", "one-prepare-eval", "one-prepare-quantize", "one-quantize-1", "one-train-1",
    ]  # fmt: skip
    await world.of("EvalJob").delete("one")
    await world.gone("Job", "one-eval-1")
    assert await world.jobs() == ["one-prepare", "one-prepare-quantize", "one-quantize-1", "one-train-1"]
