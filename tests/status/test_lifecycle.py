"""Decisions that depend on timing or on objects that are hard to come by, taken by the pure function alone."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from kubetune_operator.api.finetunejob import FineTuneJobStatus
from kubetune_operator.lifecycle import decide
from kubetune_operator.lifecycle.begin import spec_problems
from kubetune_operator.lifecycle.draft import Create, Decision, Delete, Observed, PatchJob
from kubetune_operator.render.job import render_prepare_job, render_work_job
from kubetune_operator.render.objects import render_all
from kubetune_operator.settings import Settings
from tests.render.manifests import SMALL, finetunejob

Json = dict[str, Any]
SETTINGS = Settings(identity="test")
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
MOMENT = "2026-01-01T12:00:00Z"


def condition(name: str, *, status: str = "True") -> Json:
    return {"type": name, "status": status, "reason": "R", "message": "m", "lastTransitionTime": MOMENT}


TRAINING: Json = {
    "state": "Running",
    "observedGeneration": 1,
    "startTime": MOMENT,
    "attempt": 1,
    "conditions": [condition("Accepted"), condition("DataReady"), condition("Running")],
}


def observe(*, nodes: int = 1, status: Json | None = None, jobs: int = 1, **rest: Any) -> Observed:
    """A job in training; `jobs` is how many of its batch Jobs (prepare, training) are there."""
    spec = {"compute": {"nodes": nodes}} | rest.pop("spec", {})
    job = finetunejob(SMALL, **spec).model_copy()
    manifest = job.to_manifest() | {"status": TRAINING if status is None else status}
    parsed = type(job).model_validate(manifest)
    config = yaml.safe_load(render_all(job, SETTINGS)[0]["data"]["config.yaml"])
    train = render_work_job(job, config=config, attempt=1, backoff_limit=3, settings=SETTINGS)
    train["metadata"] |= {"uid": "train", "creationTimestamp": MOMENT}
    return Observed(job=parsed, config=config, jobs=[train][:jobs], **({"now": NOW} | rest))


def pod(index: int, *, code: int | None = None, at: str = MOMENT) -> Json:
    state: Json = {"running": {}} if code is None else {"terminated": {"exitCode": code, "finishedAt": at}}
    return {
        "metadata": {
            "name": f"p{index}",
            "uid": f"u{index}",
            "creationTimestamp": "2026-01-01T11:00:00Z",
            "labels": {"batch.kubernetes.io/job-name": "small-train-1", "kubetune.dev/attempt": "1"},
            "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
        },
        "spec": {"nodeName": "n"},
        "status": {
            "phase": "Running" if code is None else "Failed",
            "containerStatuses": [{"name": "trainer", "state": state}],
        },
    }


def decided(seen: Observed) -> Decision:
    return decide(seen, settings=SETTINGS)


def test_a_rank_that_lost_its_peer_waits_a_moment_for_the_one_that_failed_first() -> None:
    seen = observe(nodes=2, pods=[pod(0, code=78), pod(1)])
    decision = decided(seen)
    assert decision.status.attempt == 1
    assert decision.actions == ()
    assert decision.requeue_after == 15.0


def test_when_the_one_that_failed_first_does_not_tell_the_gang_is_restarted_all_the_same() -> None:
    seen = observe(nodes=2, pods=[pod(0, code=78), pod(1)], now=NOW + timedelta(seconds=16))
    decision = decided(seen)
    assert decision.status.attempt == 2
    assert Delete(kind="Job", name="small-train-1", uid="train") in decision.actions


def test_the_status_names_the_next_attempt_before_the_old_one_is_deleted_and_a_lost_deletion_is_repeated() -> None:
    first = decided(observe(nodes=2, pods=[pod(0), pod(1, code=137)]))
    again = observe(nodes=2, pods=[pod(0), pod(1, code=137)], status=first.status.to_manifest())
    second = decided(again)
    assert second.status == first.status
    assert Delete(kind="Job", name="small-train-1", uid="train") in second.actions


def test_the_next_attempt_is_created_only_when_nothing_of_the_old_one_is_left() -> None:
    status = decided(observe(nodes=2, pods=[pod(0), pod(1, code=137)])).status.to_manifest()
    kinds = [
        (action.manifest["kind"], action.manifest["metadata"]["name"])
        for action in decided(observe(nodes=2, status=status, jobs=0)).actions
        if isinstance(action, Create)
    ]
    assert kinds == [("Service", "small-train-2"), ("Job", "small-train-2")]


def test_pods_that_do_not_end_are_named_with_their_node() -> None:
    status = decided(observe(nodes=2, pods=[pod(0), pod(1, code=137)])).status.to_manifest()
    lingering = pod(0)
    lingering["metadata"]["deletionTimestamp"] = MOMENT
    soon = decided(observe(nodes=2, status=status, pods=[lingering], now=NOW + timedelta(seconds=5)))
    assert "do not end" not in str(soon.status.conditions)
    assert soon.requeue_after == 30.0
    late = decided(observe(nodes=2, status=status, pods=[lingering], now=NOW + timedelta(seconds=90)))
    running = next(item for item in late.status.conditions if item.type == "Running")
    assert running.reason == "WaitingForPods"
    assert "p0 on node n; are their nodes alive?" in running.message


def test_a_failure_that_is_counted_is_not_counted_again() -> None:
    seen = observe(pods=[pod(0, code=137)])
    first = decided(seen)
    assert first.status.restarts == 1
    second = decided(observe(pods=[pod(0, code=137)], status=first.status.to_manifest()))
    assert second.status.restarts == 1


def test_a_pod_that_vanished_with_its_status_counts_as_a_restart() -> None:
    running = decided(observe(pods=[pod(0)])).status.to_manifest()
    fresh = pod(0)
    fresh["metadata"] |= {"name": "other", "uid": "other"}
    decision = decided(observe(pods=[fresh], status=running))
    assert (decision.status.restarts, decision.status.preemptions) == (1, 1)


def test_a_changed_limit_of_restarts_reaches_the_job_controller() -> None:
    raised = decided(observe(pods=[pod(0)], spec={"lifecycle": {"maxRestarts": 7}}))
    assert PatchJob(name="small-train-1", spec={"backoffLimit": 7}) in raised.actions
    same = decided(observe(pods=[pod(0)]))
    assert not [action for action in same.actions if isinstance(action, PatchJob)]


def test_failures_beyond_the_last_that_is_allowed_do_not_raise_the_job_controllers_limit() -> None:
    pods = [pod(0, code=1), pod(0, code=1)]
    pods[1]["metadata"] |= {"name": "again", "uid": "again"}
    ended = [{"name": "p0", "uid": "u0", "index": 0, "ended": True}]
    status = TRAINING | {"attempt": 2, "restarts": 3, "pods": ended}
    seen = observe(status=status)
    [train] = seen.jobs
    config = seen.config
    assert config is not None
    second = render_work_job(seen.job, config=config, attempt=2, backoff_limit=1, settings=SETTINGS)
    second["metadata"] |= {"uid": "second", "creationTimestamp": MOMENT}
    for each in pods:
        each["metadata"]["labels"] |= {
            "batch.kubernetes.io/job-name": second["metadata"]["name"], "kubetune.dev/attempt": "2",
        }  # fmt: skip
    decision = decided(replace(seen, jobs=[second], pods=pods))
    assert decision.status.restarts == 3
    assert not [action for action in decision.actions if isinstance(action, PatchJob)]
    assert train["metadata"]["name"] != second["metadata"]["name"]
    spec = {"lifecycle": {"maxRestarts": 5}}
    raised = decided(replace(observe(status=status, spec=spec), jobs=[second], pods=pods))
    assert raised.status.restarts == 4
    assert [action.spec for action in raised.actions if isinstance(action, PatchJob)] == [{"backoffLimit": 3}]


def _complete(*, message: str) -> Decision:
    seen = observe(pods=[pod(0)])
    leader = pod(0)
    leader["status"] = {
        "phase": "Succeeded",
        "containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 0, "message": message}}}],
    }
    job = dict(seen.jobs[0]) | {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    return decided(Observed(job=seen.job, now=NOW, config=seen.config, jobs=[job], pods=[leader]))


def test_outputs_are_those_that_the_trainer_reports() -> None:
    report = {"outputs": [{"name": "merged", "type": "HuggingFace", "uri": "s3://o", "digest": "d", "bytes": 1}]}
    status = _complete(message=json.dumps(report)).status
    assert status.state == "Complete"
    assert [output.to_manifest() for output in status.outputs or []] == report["outputs"]


@pytest.mark.parametrize("message", ["", "not json", '{"outputs": [{"name": 7}]}'])
def test_outputs_are_named_even_when_the_report_is_lost(message: str) -> None:
    status = _complete(message=message).status
    assert status.state == "Complete"
    assert [output.uri for output in status.outputs or []] == [
        "pvc://runs/kubetune/team-a/small-1f0c9a2b/outputs/merged"
    ]


def test_the_deadline_wakes_the_job_up_in_time() -> None:
    decision = decided(observe(pods=[pod(0)], spec={"lifecycle": {"activeDeadlineSeconds": 5}}))
    assert decision.requeue_after == 5.0


def test_a_pass_without_news_changes_nothing() -> None:
    first = decided(observe(pods=[pod(0)]))
    second = decided(observe(pods=[pod(0)], status=first.status.to_manifest()))
    assert second.status == first.status
    assert (second.actions, second.notes) == ((), ())


def test_a_prepare_job_whose_message_is_lost_runs_again() -> None:
    status: Json = {"state": "Preparing", "startTime": MOMENT, "conditions": [condition("Accepted")]}
    seen = observe(status=status, jobs=0)
    prepare = render_prepare_job(seen.job, config=seen.config or {}, settings=SETTINGS)
    prepare["metadata"] |= {"uid": "prepare", "creationTimestamp": MOMENT}
    prepare["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    decision = decided(Observed(job=seen.job, now=NOW, config=seen.config, jobs=[prepare]))
    assert decision.actions == (Delete(kind="Job", name="small-prepare", uid="prepare"),)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"workspace": {"uri": "file:///runs"}}, "spec.workspace.uri"),
        ({"model": {"uri": {"location": "file:///m"}}}, "spec.model.uri.location"),
        (
            {"outputs": [{"name": "a", "type": "PEFT"}, {"name": "b", "type": "PEFT", "uri": "file:///o"}]},
            "spec.outputs[1].uri",
        ),
    ],
)
def test_local_folders_are_refused_by_the_field(spec: Json, path: str) -> None:
    [problem] = spec_problems(finetunejob(SMALL, **spec), ranks=1)
    assert problem.startswith(f"{path}: Invalid value: 'file:///")


SILENT = "node n is out of touch since 2026-01-01T11:58:00Z"


def deleted(pod: Json, **status: Any) -> Json:
    metadata = pod["metadata"] | {"deletionTimestamp": MOMENT, "deletionGracePeriodSeconds": 0}
    return pod | {"metadata": metadata, "status": pod["status"] | status}


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_pod_on_a_lost_node_begins_another_attempt_that_waits_for_nothing(nodes: int) -> None:
    pods = [pod(index) for index in range(nodes - 1)] + [deleted(pod(nodes - 1))]
    seen = observe(nodes=nodes, pods=pods, lost={"n": SILENT}, spec={"lifecycle": {"maxRestarts": 0}})
    decision = decided(seen)
    status = decision.status
    assert (status.attempt, status.restarts, status.preemptions, status.state) == (2, 1, 1, "Restarting")
    assert status.last_failure is not None
    assert (status.last_failure.reason, status.last_failure.node) == ("NodeLost", "n")
    assert status.last_failure.message == f"{SILENT}; pod p{nodes - 1} is given up"
    assert decision.actions[0] == Delete(kind="Job", name="small-train-1", uid="train")

    [job] = seen.jobs
    job["metadata"]["deletionTimestamp"] = MOMENT
    left = [deleted(each) for each in pods]
    after = replace(seen, job=seen.job.model_copy(update={"status": status}), pods=left)
    created = [action for action in decided(after).actions if isinstance(action, Create)]
    assert created[-1].manifest["metadata"]["name"] == "small-train-2"
    for waits in (replace(after, lost={}), replace(after, pods=[*left, pod(0)]), replace(after, pods=[])):
        assert decided(waits).actions == (), "something of the attempt before may still work"


def test_a_lost_node_is_named_where_a_peer_could_only_tell_that_it_lost_one() -> None:
    failure = {"pod": "p0", "index": 0, "exitCode": 78, "reason": "PeerLost", "message": "m"}
    status = TRAINING | {"attempt": 2, "restarts": 1, "lastFailure": failure}
    seen = observe(nodes=2, status=status, pods=[deleted(pod(1))], lost={"n": SILENT})
    [job] = seen.jobs
    job["metadata"]["deletionTimestamp"] = MOMENT
    told = decided(seen).status.last_failure
    assert told is not None
    assert (told.reason, told.pod) == ("NodeLost", "p1")


@pytest.mark.parametrize("status", ["True", "False"])
def test_a_pod_of_one_node_that_is_told_to_go_is_left_to_the_job_controller(status: str) -> None:
    going = deleted(pod(0), conditions=[{"type": "DisruptionTarget", "status": status, "reason": "R"}])
    assert decided(observe(pods=[going])).status.attempt == 1


def killed_for_memory(index: int) -> Json:
    ended = pod(index, code=137)
    ended["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] = "OOMKilled"
    return ended


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("size", "smaller"), [(64, 32), (6, 3), (9, 3), (7, 1), (2, 1)])
def test_an_attempt_out_of_memory_is_answered_once_by_one_whose_micro_batch_still_divides_the_batch(
    nodes: int, size: int, smaller: int
) -> None:
    spec = {"training": {"maxSteps": 5, "globalBatchSize": size * nodes, "microBatchSize": size}}
    pods = [killed_for_memory(0), *(pod(index, code=78) for index in range(1, nodes))]
    seen = observe(nodes=nodes, pods=pods, spec=spec)
    first = decided(seen)
    assert first.status.micro_batch_size == smaller
    assert (first.status.attempt, first.status.restarts) == (2, 1)
    assert Delete(kind="Job", name="small-train-1", uid="train") in first.actions
    again = decided(replace(seen, job=seen.job.model_copy(update={"status": first.status})))
    assert again.status == first.status
    started = decided(observe(nodes=nodes, spec=spec, status=first.status.to_manifest(), jobs=0))
    [job] = [each.manifest for each in started.actions if isinstance(each, Create) and each.manifest["kind"] == "Job"]
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][-1] == f"training.micro_batch_size={smaller}"
    assert job["spec"]["backoffLimit"] >= 3, "all restarts that are allowed are left"


def test_one_that_runs_out_of_memory_and_is_disrupted_is_taken_off_the_count_once() -> None:
    spec = {"training": {"maxSteps": 5, "globalBatchSize": 4, "microBatchSize": 4}}
    struck = killed_for_memory(0)
    struck["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": "R"}]
    decision = decided(observe(pods=[struck], spec=spec))
    assert (decision.status.restarts, decision.status.preemptions, decision.status.micro_batch_size) == (1, None, 2)


def test_the_checkpoint_that_pods_write_while_they_are_suspended_is_taken_down() -> None:
    status = TRAINING | {"state": "Suspended", "conditions": [*TRAINING["conditions"], condition("Suspended")]}
    line = '{"event":"checkpoint","time":1760000000,"step":8,"uri":"s3://runs/c/step-8","seconds":1}'
    line = f'{{"event":"step","step":8,"totalSteps":9,"etaSeconds":41}}\n{line}'
    seen = observe(pods=[pod(0)], spec={"suspend": True}, status=status, log=line)
    found = decided(seen).status
    assert isinstance(found, FineTuneJobStatus)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 8
    assert found.progress is not None
    assert (found.progress.step, found.progress.eta_seconds) == (8, None)


def test_a_deletion_that_was_lost_is_asked_for_again_though_the_job_is_to_go_on() -> None:
    status = TRAINING | {"state": "Suspended", "conditions": [*TRAINING["conditions"], condition("Suspended")]}
    decision = decided(observe(pods=[pod(0)], status=status))
    assert decision.status.state == "Suspended"
    assert Delete(kind="Job", name="small-train-1", uid="train") in decision.actions
    going = observe(pods=[pod(0)], status=status)
    going.jobs[0]["metadata"]["deletionTimestamp"] = MOMENT
    assert decided(going).actions == ()


def test_one_that_runs_out_of_memory_while_it_is_suspended_stays_suspended() -> None:
    spec = {"suspend": True, "training": {"maxSteps": 5, "globalBatchSize": 4, "microBatchSize": 4}}
    status = TRAINING | {"state": "Suspended", "conditions": [*TRAINING["conditions"], condition("Suspended")]}
    seen = observe(pods=[killed_for_memory(0)], spec=spec, status=status)
    seen.jobs[0]["metadata"]["deletionTimestamp"] = MOMENT
    decision = decided(seen)
    assert (decision.status.state, decision.status.attempt) == ("Suspended", 1)
