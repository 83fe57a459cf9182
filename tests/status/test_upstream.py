"""What references stand for: a table of other jobs, and what a job does that refers to them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from kubetune_operator.api.jobs import Job
from kubetune_operator.api.kinds import parse_job
from kubetune_operator.api.references import JobKey, key_of
from kubetune_operator.lifecycle import decide
from kubetune_operator.lifecycle.draft import Create, Decision, Observed
from kubetune_operator.lifecycle.upstream import adapters_bases
from kubetune_operator.settings import Settings

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
S3 = {"s3": {"endpoint": "https://s3"}}
SPECS: dict[str, Json] = {
    "FineTuneJob": {
        "dataset": {"sources": [{"name": "a", "uri": {"location": "s3://data/a"}}]},
        "training": {"epochs": 1},
        "outputs": [{"name": "m", "type": "HuggingFace"}],
    },
    "EvalJob": {"tasks": [{"name": "t"}]},
    "QuantizeJob": {"outputs": [{"name": "m", "type": "GGUF", "gguf": {"type": "F16"}}]},
}
OWN: Json = {"uri": {"location": "s3://models/m", "s3": {"region": "r"}}}
HUB: Json = {"hub": {"repo": "a/b", "revision": "main"}}


def job(kind: str, name: str, *, status: Json | None = None, **spec: Any) -> Job:
    return parse_job(
        {
            "apiVersion": "kubetune.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": name, "namespace": "team", "uid": f"{name}-uid"},
            "spec": {"model": {"hub": {"repo": "a/b"}}, "workspace": {"uri": "s3://runs"}} | SPECS[kind] | spec,
            "status": status or {},
        }
    )


def complete(kind: str, *outputs: str, **spec: Any) -> Job:
    """A complete job with outputs of these types, each called like its type in lower case."""
    made = [{"name": each.lower(), "type": each, "uri": f"s3://out/{each}", "digest": f"d-{each}"} for each in outputs]
    resolved: Json = {"config": "c", "model": {"location": "s3://cache/m", "commit": "c0ffee"}}
    return job(kind, "up", status={"state": "Complete", "outputs": made, "resolved": resolved}, **spec)


def decided(made: Job, *upstream: Job, configs: dict[JobKey, Json] | None = None) -> Decision:
    found = {key_of(each): each for each in upstream}
    return decide(Observed(job=made, now=NOW, upstream=found, configs=configs or {}), settings=Settings(identity="t"))


def config_of(decision: Decision) -> Json:
    [create] = [action for action in decision.actions if isinstance(action, Create)]
    assert create.manifest["kind"] == "ConfigMap", decision.status
    return yaml.safe_load(create.manifest["data"]["config.yaml"])


def waiting(decision: Decision) -> tuple[str, str]:
    assert not decision.actions
    [running] = [item for item in decision.status.conditions if item.type == "Running"]
    assert decision.status.state == "Pending"
    return running.reason, running.message


def refers(kind: str, parent: str, output: str | None = None, **spec: Any) -> Job:
    reference = {"kind": parent, "name": "up"} | ({"output": output} if output else {})
    return job(kind, "down", model={"jobRef": reference}, **spec)


@pytest.mark.parametrize(
    ("kind", "parent", "outputs", "named", "taken"),
    [
        ("EvalJob", "FineTuneJob", ("PEFT", "HuggingFace"), None, "HuggingFace"),
        ("EvalJob", "FineTuneJob", ("GGUF", "CompressedTensors"), "compressedtensors", "CompressedTensors"),
        ("EvalJob", "QuantizeJob", ("ExecuTorch", "TorchAO", "CompressedTensors"), None, "TorchAO"),
        ("QuantizeJob", "FineTuneJob", ("HuggingFace",), "huggingface", "HuggingFace"),
    ],
)
def test_the_output_that_serves_best_is_taken(
    kind: str, parent: str, outputs: tuple[str, ...], named: str | None, taken: str
) -> None:
    decision = decided(refers(kind, parent, named), complete(parent, *outputs))
    assert config_of(decision)["model"] == {"uri": {"location": f"s3://out/{taken}"}}
    assert decision.status.resolved is not None
    [used] = decision.status.resolved.parents or []
    assert (used.kind, used.name, used.uid, used.output, used.digest) == (
        parent, "up", "up-uid", taken.lower(), f"d-{taken}",
    )  # fmt: skip


PTE = "executorch (ExecuTorch)"
NOT_TRAINED = f"{{}} has no output that FineTuneJobs can load; it has {PTE}"


@pytest.mark.parametrize(
    ("kind", "parent", "output", "named", "message"),
    [
        ("EvalJob", "QuantizeJob", "ExecuTorch", None, f"{{}} has no output that EvalJobs can load; it has {PTE}"),
        ("FineTuneJob", "QuantizeJob", "ExecuTorch", None, NOT_TRAINED),
        ("EvalJob", "FineTuneJob", "ExecuTorch", "merged", f"{{}} has no output 'merged'; it has {PTE}"),
        (
            "QuantizeJob", "QuantizeJob", "ExecuTorch", "executorch",
            f"output 'executorch' of {{}} is of type ExecuTorch, which QuantizeJobs cannot load; it has {PTE}",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_said_with_what_there_is(
    kind: str, parent: str, output: str, named: str | None, message: str
) -> None:
    decision = decided(refers(kind, parent, named), complete(parent, output))
    assert waiting(decision) == ("UpstreamNotUsable", message.format(f"{parent} up"))


ADAPTED = JobKey("FineTuneJob", "up")


@pytest.mark.parametrize(
    ("base", "model"),
    [
        (HUB, {"hub": {"repo": "a/b", "revision": "c0ffee"}}),
        ({"uri": {"location": "s3://models/m"}}, {"uri": {"location": "s3://models/m", "s3": S3["s3"]}}),
        (
            {"uri": {"location": "s3://models/m", "s3": {"region": "r"}}},
            {"uri": {"location": "s3://models/m", "s3": {"region": "r"}}},
        ),
    ],
)
@pytest.mark.parametrize("named", [None, "peft"])
def test_adapters_come_with_the_model_that_they_were_trained_on(base: Json, model: Json, named: str | None) -> None:
    parent = complete("FineTuneJob", "PEFT", storage=S3)
    decision = decided(refers("EvalJob", "FineTuneJob", named), parent, configs={ADAPTED: {"model": base}})
    assert config_of(decision)["model"] == model | {"adapter": {"location": "s3://out/PEFT", "s3": S3["s3"]}}


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({}, "FineTuneJob up has only adapters, and its ConfigMap, which names their base, is gone"),
        (
            {ADAPTED: {"model": HUB | {"adapter": {"location": "s3://x"}}}},
            "FineTuneJob up has only adapters on a model with adapters; it needs an output of type HuggingFace",
        ),
    ],
)
def test_adapters_without_a_base_are_no_model(configs: dict[JobKey, Json], message: str) -> None:
    decision = decided(refers("EvalJob", "FineTuneJob"), complete("FineTuneJob", "PEFT"), configs=configs)
    assert waiting(decision) == ("UpstreamNotUsable", message)


def judged(passed: bool) -> Json:
    """The status of a complete job with a gate."""
    condition = {"type": "GatePassed", "status": str(passed), "reason": "R", "message": "gate x: so"}
    return {"state": "Complete", "conditions": [condition | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}


FAILED = "EvalJob up has failed; delete it and make it anew, or delete this job"


@pytest.mark.parametrize(
    ("condition", "status", "held"),
    [
        ("Complete", None, ("UpstreamMissing", "EvalJob up does not exist")),
        ("Complete", {"state": "Running"}, ("WaitingForUpstream", "EvalJob up is running")),
        ("Complete", {"state": "Failed"}, ("UpstreamFailed", FAILED)),
        ("Complete", judged(passed=False), None),
        ("GatePassed", judged(passed=False), ("UpstreamGateFailed", "EvalJob up: gate x: so")),
        ("GatePassed", judged(passed=True), None),
        ("GatePassed", {"state": "Complete"}, ("UpstreamNotUsable", "EvalJob up has no gates that could pass")),
    ],
)
@pytest.mark.parametrize("kind", list(SPECS))
def test_a_job_begins_after_others_as_its_condition_says(
    kind: str, condition: str, status: Json | None, held: tuple[str, str] | None
) -> None:
    made = job(kind, "down", after=[{"kind": "EvalJob", "name": "up", "condition": condition}])
    decision = decided(made, *([job("EvalJob", "up", status=status)] if status is not None else []))
    if held is None:
        assert config_of(decision)["kind"] == kind
        assert decision.status.resolved is not None
        assert decision.status.resolved.parents is None, "its result is not used"
    else:
        assert waiting(decision) == held


def test_the_time_that_a_job_waits_for_others_does_not_count_against_its_deadline() -> None:
    accepted = {"type": "Accepted", "status": "True", "reason": "R", "message": "m"}
    status = {
        "state": "Pending", "startTime": "2026-01-01T00:00:00Z",
        "conditions": [accepted | {"lastTransitionTime": "2026-01-01T00:00:00Z"}],
    }  # fmt: skip
    after = [{"kind": "EvalJob", "name": "up"}]
    made = job("QuantizeJob", "down", after=after, lifecycle={"activeDeadlineSeconds": 60}, status=status)
    assert waiting(decided(made))[0] == "UpstreamMissing"
    began = decided(made, complete("EvalJob")).status
    assert (began.state, began.start_time) == ("Pending", "2026-01-01T12:00:00Z")
    late = made.model_copy(update={"status": began, "spec": made.spec.model_copy(update={"after": None})})
    assert decide(Observed(job=late, now=NOW + timedelta(seconds=61)), settings=Settings()).status.state == "Failed"


def test_a_comparison_waits_and_then_names_the_other_run_directory() -> None:
    gate = {"name": "g", "task": "t", "metric": "acc", "comparedTo": {"name": "up", "maxIncrease": "0.5"}}
    made = job("EvalJob", "down", gates=[gate])
    assert waiting(decided(made)) == ("UpstreamMissing", "EvalJob up does not exist")
    compared = config_of(decided(made, complete("EvalJob")))["gates"][0]["compared_to"]
    assert compared == {"name": "up", "max_increase": 0.5, "directory": "s3://runs/team/up-up-uid"}


def resuming(*, reason: str = "", ended: str = "2026-01-01T11:59:00Z", **status: Any) -> Decision:
    """What a job does that goes on from one that has failed for a reason, or did not."""
    failed = {"type": "Failed", "status": "True", "reason": reason, "message": "m", "lastTransitionTime": ended}
    told = {"state": "Failed" if reason else "Suspended", "conditions": [failed] if reason else []} | status
    parent = job("FineTuneJob", "up", status=told | {"completionTime": ended})
    resume = {"resumeFrom": {"jobRef": {"kind": "FineTuneJob", "name": "up"}}}
    return decided(job("FineTuneJob", "down", checkpoint=resume), parent)


CHECKPOINT = {"step": 8, "uri": "s3://runs/team/up-up-uid/checkpoints/step-8", "time": "2026-01-01T11:00:00Z"}


@pytest.mark.parametrize(
    "told",
    [
        {"reason": "NonFiniteLoss", "attempt": 1, "checkpoint": CHECKPOINT},
        {"reason": "NonFiniteLoss", "attempt": 1},
        {"reason": "DeadlineExceeded", "attempt": 1, "ended": "2026-01-01T11:57:59Z"},
        {"attempt": 1, "checkpoint": CHECKPOINT},
    ],
    ids=["failed", "failed before any was seen", "past its deadline", "suspended"],
)
def test_a_job_goes_on_from_the_newest_checkpoint_in_the_others_folder(told: Json) -> None:
    checkpoint = config_of(resuming(**told))["checkpoint"]
    assert checkpoint["resume_from"] == {"uri": "s3://runs/team/up-up-uid/checkpoints"}


@pytest.mark.parametrize(
    ("told", "reason", "message"),
    [
        ({"attempt": 1}, "UpstreamNotUsable", "FineTuneJob up has no checkpoint to resume from"),
        ({"reason": "DataInvalid"}, "UpstreamNotUsable", "FineTuneJob up has no checkpoint to resume from"),
        (
            {"reason": "DeadlineExceeded", "attempt": 1},
            "WaitingForUpstream",
            "the pods of FineTuneJob up have until 2026-01-01T12:01:00Z to write a checkpoint",
        ),
    ],
    ids=["suspended without one", "failed before training", "may still write one"],
)
def test_a_job_waits_for_a_checkpoint_to_go_on_from(told: Json, reason: str, message: str) -> None:
    assert waiting(resuming(**told)) == (reason, message)


def test_a_job_that_has_what_it_needs_is_no_part_of_a_circle() -> None:
    after = [{"kind": "EvalJob", "name": "down"}]
    ready = job("FineTuneJob", "up", after=after, status={"state": "Running", "resolved": {"config": "c"}})
    assert waiting(decided(refers("EvalJob", "FineTuneJob"), ready))[0] == "WaitingForUpstream"
    stuck = job("FineTuneJob", "up", after=after, status={"state": "Pending"})
    assert waiting(decided(refers("EvalJob", "FineTuneJob"), stuck)) == (
        "UpstreamCycle",
        "EvalJob down waits for FineTuneJob up, which waits for EvalJob down; delete one of them",
    )


def measures(name: str = "up", output: str | None = None, *, model: Json | None = None) -> Job:
    """A job whose answers are measured against another job's output."""
    reference = {"jobRef": {"name": name} | ({"output": output} if output else {})}
    return job("FineTuneJob", "down", recipe="DPO", dpo={"reference": reference}, model=model or HUB)


def test_a_model_beside_the_trained_one_is_waited_for_and_told_as_parent() -> None:
    assert waiting(decided(measures())) == ("UpstreamMissing", "FineTuneJob up does not exist")
    running = job("FineTuneJob", "up", status={"state": "Running"})
    assert waiting(decided(measures(), running)) == ("WaitingForUpstream", "FineTuneJob up is running")
    decision = decided(measures(), complete("FineTuneJob", "PEFT", "HuggingFace"))
    config = config_of(decision)
    assert (config["model"], config["dpo"]["reference"]) == (HUB, {"uri": {"location": "s3://out/HuggingFace"}})
    assert decision.status.resolved is not None
    [used] = decision.status.resolved.parents or []
    assert (used.name, used.output, used.digest) == ("up", "huggingface", "d-HuggingFace")


def test_adapters_measure_together_with_the_model_that_they_were_trained_on() -> None:
    made, parent = measures(output="peft"), complete("FineTuneJob", "PEFT", "HuggingFace")
    assert adapters_bases(made, upstream={ADAPTED: parent}) == [ADAPTED]
    reference = config_of(decided(made, parent, configs={ADAPTED: {"model": HUB}}))["dpo"]["reference"]
    assert reference == {"hub": HUB["hub"] | {"revision": "c0ffee"}, "adapter": {"location": "s3://out/PEFT"}}


def test_jobs_that_measure_against_each_other_wait_in_a_circle() -> None:
    other = job(
        "FineTuneJob", "up", recipe="DPO", dpo={"reference": {"jobRef": {"name": "down"}}}, status={"state": "Pending"}
    )
    said = "FineTuneJob down waits for FineTuneJob up, which waits for FineTuneJob down; delete one of them"
    assert waiting(decided(measures(), other)) == ("UpstreamCycle", said)


@pytest.mark.parametrize("named", [None, "peft"])
def test_adapters_are_gone_on_with_without_their_model(named: str | None) -> None:
    reference = {"jobRef": {"name": "up"} | ({"output": named} if named else {})}
    made = job("FineTuneJob", "down", lora={"adapter": reference})
    assert adapters_bases(made, upstream={ADAPTED: complete("FineTuneJob", "PEFT")}) == []
    decision = decided(made, complete("FineTuneJob", "HuggingFace", "PEFT"))
    assert config_of(decision)["lora"]["adapter"] == {"uri": {"location": "s3://out/PEFT"}}
    reason, message = waiting(decided(made, complete("FineTuneJob", "HuggingFace")))
    assert reason == "UpstreamNotUsable"
    assert "no output of type PEFT, which spec.lora.adapter takes; it has huggingface (HuggingFace)" in message


def test_a_teacher_is_waited_for_and_taken_as_a_whole_model() -> None:
    teacher = {"jobRef": {"name": "up"}}
    pupil = job("FineTuneJob", "down", recipe="Distillation", distillation={"teacher": teacher}, model=HUB)
    assert waiting(decided(pupil)) == ("UpstreamMissing", "FineTuneJob up does not exist")
    running = job("FineTuneJob", "up", status={"state": "Running"})
    assert waiting(decided(pupil, running)) == ("WaitingForUpstream", "FineTuneJob up is running")
    decision = decided(pupil, complete("FineTuneJob", "PEFT", "HuggingFace"))
    assert config_of(decision)["distillation"]["teacher"] == {"uri": {"location": "s3://out/HuggingFace"}}
    assert decision.status.resolved is not None
    assert [(used.name, used.output) for used in decision.status.resolved.parents or []] == [("up", "huggingface")]
