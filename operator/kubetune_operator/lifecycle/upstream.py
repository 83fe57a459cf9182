"""What the spec refers to: other jobs are waited for, then all is fixed in the ConfigMap."""

from dataclasses import dataclass
from typing import Final

from kubetune_operator.api import finetunejob as api
from kubetune_operator.api.finetunejob import FineTuneJob, Parent
from kubetune_operator.lifecycle.draft import Create, Draft
from kubetune_operator.names import KIND_FINETUNEJOB, config_name
from kubetune_operator.render.config import Resolved, ResolvedModel, render_config
from kubetune_operator.render.job import processes_per_node, render_configmap

UPSTREAM_SECONDS: Final = 30.0
"""How often to look for another job that does not exist; one that exists wakes us up itself."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why something cannot be resolved yet."""

    reason: str
    message: str


def write_config(draft: Draft) -> bool:
    """Resolve what the spec refers to and fix it in the ConfigMap."""
    if draft.seen.config is not None or (draft.status.attempt and draft.seen.train(draft.status.attempt) is not None):
        return False
    found = _resolve(draft)
    if isinstance(found, Waiting):
        draft.waiting("Pending", reason=found.reason, message=found.message)
        draft.look_again(seconds=UPSTREAM_SECONDS)
        return True
    parents = [
        Parent(kind=KIND_FINETUNEJOB, name=name, uid=parent.metadata.uid)
        for name, parent in sorted(draft.seen.parents.items())
    ]
    resolved = (draft.status.resolved or api.Resolved()).model_copy(
        update={"config": config_name(draft.job.metadata.name), "parents": parents or None}
    )
    draft.set(resolved=resolved)
    draft.waiting("Pending", reason="Preparing", message="the model and the data are about to be prepared")
    draft.do(Create(manifest=render_configmap(draft.job, config=render_config(draft.job, resolved=found))))
    draft.look_again(seconds=0)
    return True


def _resolve(draft: Draft) -> Resolved | Waiting:
    """What the references stand for, or why they stand for nothing yet."""
    job = draft.job
    model: ResolvedModel | None = None
    resume_from: str | None = None
    if reference := job.spec.model.job_ref:
        found = _upstream_output(draft, name=reference.name, output=reference.output)
        if isinstance(found, Waiting):
            return found
        model = found
    resume = job.spec.checkpoint.resume_from if job.spec.checkpoint else None
    if resume is not None and resume.job_ref is not None:
        parent = draft.seen.parents.get(resume.job_ref.name)
        if parent is None:
            return _missing(resume.job_ref.name)
        if parent.status.state not in {"Complete", "Failed", "Suspended"}:
            return _unfinished(parent)
        if parent.status.checkpoint is None:
            return Waiting(reason="UpstreamNotUsable", message=f"{_called(parent)} has no checkpoint to resume from")
        resume_from = parent.status.checkpoint.uri
    processes = processes_per_node(job, cpu_processes=draft.settings.cpu_processes)
    return Resolved(processes_per_node=processes, model=model, resume_from=resume_from)


def _upstream_output(draft: Draft, *, name: str, output: str | None) -> ResolvedModel | Waiting:
    """The folder of another job's output, or why there is none yet."""
    parent = draft.seen.parents.get(name)
    if parent is None:
        return _missing(name)
    if parent.status.state == "Failed":
        message = f"{_called(parent)} has failed; delete it and make it anew, or delete this job"
        return Waiting(reason="UpstreamFailed", message=message)
    if parent.status.state != "Complete":
        return _unfinished(parent)
    written = parent.status.outputs or []
    fitting = [item for item in written if (item.name == output if output else item.type == "HuggingFace")]
    if not fitting:
        wanted = f"output {output!r}" if output else "output of type HuggingFace"
        message = f"{_called(parent)} has no {wanted}; it has {', '.join(item.name for item in written) or 'none'}"
        return Waiting(reason="UpstreamNotUsable", message=message)
    theirs = parent.spec.storage.s3 if parent.spec.storage else None
    ours = draft.job.spec.storage.s3 if draft.job.spec.storage else None
    return ResolvedModel(location=fitting[0].uri, s3=theirs if theirs != ours else None)


def _missing(name: str) -> Waiting:
    return Waiting(reason="UpstreamMissing", message=f"{KIND_FINETUNEJOB} {name} does not exist")


def _unfinished(parent: FineTuneJob) -> Waiting:
    state = (parent.status.state or "Pending").lower()
    return Waiting(reason="WaitingForUpstream", message=f"{_called(parent)} is {state}")


def _called(job: FineTuneJob) -> str:
    return f"{KIND_FINETUNEJOB} {job.metadata.name}"
