"""What a job found out, from its termination message or from the log that it refers to."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from kubetune_operator.api.kinds import parse_job
from kubetune_operator.lifecycle import decide
from kubetune_operator.lifecycle.draft import Decision, Observed
from kubetune_operator.render.job import render_work_job
from kubetune_operator.render.objects import render_all
from kubetune_operator.settings import Settings
from tests.render.manifests import EVAL_SMALL, QUANTIZE_SMALL, SMALL, job

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
MOMENT = "2026-01-01T12:00:00Z"
OUTPUT: Json = {
    "name": "int8",
    "type": "CompressedTensors",
    "uri": "s3://o",
    "digest": "d",
    "bytes": 1,
    "perplexity": 9.5,
}
RESULT: Json = {"task": "hellaswag", "metric": "acc", "filter": "none", "value": 0.5, "stderr": None, "samples": 10}
GATE: Json = {"name": "g", "output": "int8", "rule": "r", "value": 1.25, "passed": True, "message": "m"}


def ended(text: str, *, report: Json | None, log: list[Json] | None = None, **spec: Any) -> Decision:
    """A pass over a job whose only pod has ended well."""
    made, settings = job(text, **spec), Settings(identity="t")
    config = yaml.safe_load(render_all(made, settings)[0]["data"]["config.yaml"])
    work = render_work_job(made, config=config, attempt=1, backoff_limit=3, settings=settings)
    work["metadata"] |= {"uid": "w", "creationTimestamp": MOMENT}
    work["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    terminated: Json = {"exitCode": 0, "finishedAt": MOMENT}
    terminated |= {"message": json.dumps(report)} if report is not None else {}
    pod = {
        "metadata": {"name": "p", "uid": "u", "labels": {"batch.kubernetes.io/job-name": work["metadata"]["name"]}},
        "status": {
            "phase": "Succeeded",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": terminated}}],
        },
    }
    accepted = {"type": "Accepted", "status": "True", "reason": "R", "message": "m", "lastTransitionTime": MOMENT}
    status = {"state": "Running", "startTime": MOMENT, "attempt": 1, "conditions": [accepted]}
    running = parse_job(made.to_manifest() | {"status": status})
    lines = "\n".join(json.dumps(event) for event in log or [])
    return decide(Observed(job=running, now=NOW, jobs=[work], pods=[pod], log=lines), settings=settings)


VERIFY: Json = {
    "verify": {"dataset": {"sources": [{"name": "v", "uri": {"location": "s3://data/v"}}]}},
    "gates": [{"name": "g", "maxPerplexityIncreasePercent": "2"}],
}


def test_what_the_termination_message_has_no_room_for_is_read_from_the_log() -> None:
    log = [{"event": "output", "time": 1, **OUTPUT}, {"event": "gate", "time": 2, **GATE}]
    status = ended(
        QUANTIZE_SMALL, report={"result": "Complete", "seeLog": True}, log=log, **VERIFY
    ).status.to_manifest()
    assert status["outputs"] == [OUTPUT | {"perplexity": "9.5"}]
    assert status["gates"] == [GATE | {"value": "1.25"}]
    assert status["state"] == "Complete"


def test_what_the_message_holds_is_taken_from_it_and_only_the_rest_from_the_log() -> None:
    report = {"result": "Complete", "seeLog": True, "outputs": [OUTPUT]}
    old = OUTPUT | {"name": "int8", "uri": "s3://an-older-attempt"}
    log = [{"event": "output", **old}, {"event": "gate", **GATE}]
    status = ended(QUANTIZE_SMALL, report=report, log=log, **VERIFY).status.to_manifest()
    assert [output["uri"] for output in status["outputs"]] == ["s3://o"]
    assert status["gates"][0]["passed"]


def test_a_log_that_is_not_there_yet_is_waited_for_and_then_the_work_is_done_again() -> None:
    decision = ended(EVAL_SMALL, report={"result": "Complete", "seeLog": True})
    assert (decision.status.state, decision.status.attempt, decision.requeue_after) == ("Running", 1, 1.0)


@pytest.mark.parametrize("report", [None, {}, {"result": "Failed"}])
def test_an_end_without_a_report_is_no_result(report: Json | None) -> None:
    status = ended(EVAL_SMALL, report=report).status
    assert (status.state, status.attempt, status.restarts) == ("Restarting", 2, 1)
    assert status.last_failure is not None
    assert status.last_failure.reason == "ReportLost"


def test_more_results_than_the_status_has_room_for_are_left_to_the_artifacts() -> None:
    report = {"result": "Complete", "seeLog": True}
    log = [{"event": "result", **RESULT, "task": f"t{number}"} for number in range(1500)]
    status = ended(EVAL_SMALL, report=report, log=log).status.to_manifest()
    assert len(status["results"]) == 1024
    assert "and 1494 more" in next(item["message"] for item in status["conditions"] if item["type"] == "Complete")


def test_a_result_that_is_told_twice_stands_once_and_a_value_that_is_no_number_is_text() -> None:
    twice = [RESULT, RESULT | {"value": float("nan")}]
    status = ended(EVAL_SMALL, report={"result": "Complete", "results": twice}).status.to_manifest()
    assert [result["value"] for result in status["results"]] == ["nan"]


@pytest.mark.parametrize("pushed", [None, {"repo": "team/bot", "commit": "c0ffee"}])
def test_a_push_to_the_hub_stands_beside_the_outputs(pushed: Json | None) -> None:
    output = {"name": "merged", "type": "HuggingFace", "uri": "s3://o/merged", "digest": "d", "bytes": 1}
    report = {"result": "Complete", "outputs": [output], **({"pushedToHub": pushed} if pushed else {})}
    status = ended(SMALL, report=report).status.to_manifest()
    assert (status["outputs"], status.get("pushedToHub")) == ([output], pushed)
