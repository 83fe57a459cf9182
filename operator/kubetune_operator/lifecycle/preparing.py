"""The prepare Job, and what it found out."""

from typing import Any, Final

from kubetune_operator import estimate as estimates
from kubetune_operator.api import jobs as api
from kubetune_operator.api.evaljob import EvalJobStatus, EvalProgress
from kubetune_operator.api.finetunejob import DataArtifacts, DataStatistics, FineTuneJobStatus, Progress
from kubetune_operator.api.jobs import LastFailure, ResolvedSource
from kubetune_operator.api.quantizejob import QuantizeProgress
from kubetune_operator.lifecycle.draft import Create, Draft
from kubetune_operator.lifecycle.moves import blocked_by, delete_attempt, fail, taken, taken_all
from kubetune_operator.names import KINDS
from kubetune_operator.progress import timestamp
from kubetune_operator.render.job import compute_of, processes_per_node, render_prepare_job
from kubetune_operator.status import (
    Ending,
    ending_of,
    is_deleting,
    is_true,
    job_condition,
    phase_of,
    pods_of,
    report_of,
)

Json = dict[str, Any]

MODELS: Final = 8
"""How many models beside the job's own the status has room for."""
SOURCES: Final = 64
"""How many sources the status has room for."""


def prepare(draft: Draft) -> bool:
    """Have the model and the data prepared, and refuse what cannot fit before an accelerator is used."""
    if is_true(draft.status.conditions, "DataReady"):
        return False
    seen = draft.seen
    assert seen.config is not None  # noqa: S101 (write_config ends the pass otherwise)
    job = seen.prepare
    if job is None or is_deleting(job):
        message = seen.refused or "the prepare Job is not started yet"
        reason = "CreateRefused" if seen.refused else "Preparing"
        draft.condition("DataReady", status="False", reason=reason, message=message)
        draft.waiting("Pending", reason=reason, message=message)
        if job is None:
            draft.do(Create(manifest=render_prepare_job(draft.job, config=seen.config, settings=draft.settings)))
        return True
    pods = pods_of(seen.pods, job=job["metadata"]["name"])
    endings = [ending_of(pod) for pod in pods if phase_of(pod) == "Failed"]
    condition = job_condition(job, "Failed")
    if condition or any(ending.permanent for ending in endings):
        return _fail_prepare(draft, endings=endings, message=str((condition or {}).get("message", "")))
    if job_condition(job, "Complete"):
        return _prepared(draft, job=job, pods=pods)
    return _preparing(draft, job=job, pods=pods, endings=endings)


def _fail_prepare(draft: Draft, *, endings: list[Ending], message: str) -> bool:
    """Fail for the pod that cannot be helped, otherwise for the last one."""
    last = max(endings, key=lambda ending: (ending.permanent, ending.failure.time or ""), default=None)
    failure = last.failure if last is not None else LastFailure(reason="PrepareFailed", message=message)
    reason, message = failure.reason or "PrepareFailed", failure.message or message
    draft.condition("DataReady", status="False", reason=reason, message=message)
    return fail(draft, reason=reason, message=message, failure=failure)


def _preparing(draft: Draft, *, job: Json, pods: list[Json], endings: list[Ending]) -> bool:
    """Say how far the prepare Job is, or what holds it up."""
    if any(phase_of(pod) == "Running" for pod in pods):
        reason, message, state = "Preparing", KINDS[draft.job.kind].preparing, "Preparing"
    else:
        blocked = blocked_by(draft, job=job, pods=pods)
        reason, message = blocked or ("Pending", "the prepare pod is about to start")
        state = "Pending"
    if endings:
        last = max(endings, key=lambda ending: ending.failure.time or "").failure
        draft.set(last_failure=last)
        message += f"; an attempt before failed with {last.reason}: {last.message}"
    draft.condition("DataReady", status="False", reason=reason, message=message)
    draft.waiting("Preparing" if state == "Preparing" else "Pending", reason=reason, message=message)
    return True


def _prepared(draft: Draft, *, job: Json, pods: list[Json]) -> bool:
    """Take over what prepare found out."""
    report = next((report_of(pod) for pod in reversed(pods) if phase_of(pod) == "Succeeded"), {})
    if report.get("result") != "Prepared":
        # The pod is gone or its message was lost. What it made is in the workspace: another run only reports it again.
        draft.do(*delete_attempt(job))
        return True
    estimate = _estimate(draft, said=report["estimate"]) if report.get("estimate") else None
    draft.set(estimate=estimate, resolved=_resolved(draft, report=report))
    ready = _take_totals(draft, report=report)
    if estimate is not None and estimate.fits is False:
        hint = f"Use more memory per process, or need less: {KINDS[draft.job.kind].less}."
        failure = LastFailure(reason="DoesNotFit", message=estimate.message, hint=hint, time=timestamp(draft.seen.now))
        return fail(draft, reason="DoesNotFit", message=estimate.message or "", failure=failure)
    draft.condition("DataReady", status="True", reason="Prepared", message=ready)
    message = f"{KINDS[draft.job.kind].doing.lower()} is about to start"
    draft.waiting("Pending", reason="Prepared", message=message)
    draft.note("Prepared", ready)
    return False


def _estimate(draft: Draft, *, said: Json) -> api.Estimate:
    """What prepare says is needed, against what there is."""
    compute, settings = compute_of(draft.job), draft.settings
    available = estimates.capacity(
        compute,
        processes_per_node=processes_per_node(draft.job, cpu_processes=settings.cpu_processes),
        on_cpu=compute.accelerator is None or bool(settings.cpu_processes),
        nodes=draft.seen.nodes,
        memory_per_device_bytes=settings.memory_per_device_bytes,
    )
    return estimates.compare(
        memory_per_device_bytes=said.get("memoryPerDeviceBytes"),
        message=str(said.get("message") or ""),
        available=available,
    )


def _take_totals(draft: Draft, *, report: Json) -> str:
    """Take over how much there is to do; returns what is ready."""
    if not isinstance(draft.status, FineTuneJobStatus):
        if isinstance(total := report.get("total"), int):
            model = EvalProgress if isinstance(draft.status, EvalJobStatus) else QuantizeProgress
            draft.set(progress=model(done=0, total=total))
        return "all that is needed is ready"
    data = _data(draft, report=report)
    artifacts = taken(draft, DataArtifacts, report["artifacts"]) if report.get("artifacts") else None
    draft.set(data=data, artifacts=artifacts)
    if report.get("totalSteps") is not None:
        draft.set(progress=Progress(step=0, total_steps=report["totalSteps"]))
    return f"{data.rows} rows are ready" if data is not None and data.rows is not None else "the data is ready"


def _data(draft: Draft, *, report: Json) -> DataStatistics | None:
    data = dict(report.get("data") or {})
    percent = data.get("trainableTokenPercent")
    if isinstance(percent, int | float):
        data["trainableTokenPercent"] = f"{percent:.1f}"
    return taken(draft, DataStatistics, data)


def _resolved(draft: Draft, *, report: Json) -> api.Resolved:
    adapter = ((draft.seen.config or {}).get("model") or {}).get("adapter")
    said = (report.get("model") or {}) | ({"adapter": adapter["location"]} if adapter else {})
    model = taken(draft, api.ResolvedModel, said)
    others = {other.field: other for other in taken_all(draft, api.ResolvedOtherModel, report.get("otherModels"))}
    sources = {source.name: source for source in taken_all(draft, ResolvedSource, report.get("sources"))}
    return (draft.status.resolved or api.Resolved()).model_copy(
        update={
            "model": model,
            "other_models": list(others.values())[:MODELS] or None,
            "sources": list(sources.values())[:SOURCES],
        }
    )
