"""What the spec refers to: other jobs are waited for, then all is fixed in the ConfigMap."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from kubetune_operator.api import jobs as api
from kubetune_operator.api.common import S3, JobRef
from kubetune_operator.api.finetunejob import FineTuneJobStatus
from kubetune_operator.api.jobs import Job, Parent, Prerequisite
from kubetune_operator.api.outputs import ADAPTERS, LOADABLE, WHOLE, FinishedOutput
from kubetune_operator.api.quantizejob import QuantizeJobStatus
from kubetune_operator.api.references import (
    JobKey,
    compared_with,
    key_of,
    model_sources,
    references_of,
    resumed_from,
    still_waits,
    used_by,
)
from kubetune_operator.lifecycle.draft import Create, Draft
from kubetune_operator.names import CHECKPOINTS_DIR, config_name
from kubetune_operator.progress import timestamp
from kubetune_operator.render.config import Resolved, render_config, run_directory
from kubetune_operator.render.job import lifecycle_of, processes_per_node, render_configmap
from kubetune_operator.status import find_condition, parse_time

Json = dict[str, Any]

FIRST_ADAPTERS: Final = "lora.adapter"
"""The field whose jobRef takes adapters alone, without the model that they were trained on."""
UPSTREAM_SECONDS: Final = 30.0
"""How often to look for another job that does not exist; one that exists wakes us up itself."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Why something cannot be resolved yet."""

    reason: str
    message: str


@dataclass(kw_only=True)
class _Found:
    """What has been resolved so far."""

    models: dict[str, Json] = field(default_factory=dict)
    outputs: dict[JobKey, FinishedOutput] = field(default_factory=dict)
    resume_from: str | None = None
    compared: dict[str, str] = field(default_factory=dict)


def write_config(draft: Draft) -> bool:
    """Resolve what the spec refers to and fix it in the ConfigMap."""
    if draft.seen.config is not None or (draft.status.attempt and draft.seen.work(draft.status.attempt) is not None):
        return False
    found = _resolve(draft)
    if isinstance(found, Waiting):
        draft.waiting("Pending", reason=found.reason, message=found.message)
        draft.look_again(seconds=UPSTREAM_SECONDS)
        return True
    parents = _parents(draft, found=found)
    status = (draft.status.resolved or api.Resolved()).model_copy(
        update={"config": config_name(draft.job.kind, draft.job.metadata.name), "parents": parents or None}
    )
    resolved = Resolved(
        processes_per_node=processes_per_node(draft.job, cpu_processes=draft.settings.cpu_processes),
        models=found.models,
        resume_from=found.resume_from,
        compared=found.compared,
        parents=tuple(parent.model_dump(exclude_none=True, exclude={"digest"}) for parent in parents),
    )
    if still_waits(draft.job):
        draft.set(start_time=timestamp(draft.seen.now))
    draft.set(resolved=status)
    draft.waiting("Pending", reason="Preparing", message="the model and the data are about to be prepared")
    draft.do(Create(manifest=render_configmap(draft.job, config=render_config(draft.job, resolved=resolved))))
    draft.look_again(seconds=0)
    return True


def adapters_bases(job: Job, *, upstream: dict[JobKey, Job]) -> list[JobKey]:
    """The jobs whose adapters this one would use, and whose configs therefore say what their base is; each once."""
    bases = []
    for reference in (source.job_ref for path, source in model_sources(job).items() if path != FIRST_ADAPTERS):
        parent = upstream.get(_key(reference)) if reference is not None else None
        if reference is None or parent is None or parent.status.state != "Complete":
            continue
        output = _chosen(job, reference, parent=parent)
        if isinstance(output, FinishedOutput) and output.type == ADAPTERS:
            bases.append(_key(reference))
    return list(dict.fromkeys(bases))


def _resolve(draft: Draft) -> _Found | Waiting:
    """What the references stand for, or why they stand for nothing yet."""
    if chain := _cycle(draft):
        said = ", which waits for ".join(key.title for key in chain[1:])
        return Waiting(reason="UpstreamCycle", message=f"{chain[0].title} waits for {said}; delete one of them")
    for item in draft.job.spec.after or []:
        if waiting := _held_by(draft, item):
            return waiting
    found = _Found()
    for resolve in (_resolve_models, _resolve_checkpoint, _resolve_comparisons):
        if waiting := resolve(draft, found):
            return waiting
    return found


def _cycle(draft: Draft) -> list[JobKey]:
    """The chain of jobs that leads from this one back to it, both ends included; empty if there is none."""
    start, seen = key_of(draft.job), draft.seen.upstream
    chains = [[start, key] for key in references_of(draft.job)]
    visited: set[JobKey] = set()
    while chains:
        chain = chains.pop()
        last = chain[-1]
        if last == start:
            return chain
        if last in visited or last not in seen or not still_waits(seen[last]):
            continue
        visited.add(last)
        chains += [[*chain, key] for key in references_of(seen[last])]
    return []


def _held_by(draft: Draft, item: Prerequisite) -> Waiting | None:
    """Why this job may not begin before another one, None if it may."""
    parent = _complete(draft, JobKey(item.kind, item.name))
    if isinstance(parent, Waiting) or item.condition == "Complete":
        return parent if isinstance(parent, Waiting) else None
    gate = find_condition(parent.status.conditions, "GatePassed")
    if gate is None:
        return Waiting(reason="UpstreamNotUsable", message=f"{parent.title} has no gates that could pass")
    if gate.status != "True":
        return Waiting(reason="UpstreamGateFailed", message=f"{parent.title}: {gate.message}")
    return None


def _complete(draft: Draft, key: JobKey) -> Job | Waiting:
    """Another job that is complete, or why there is none."""
    parent = draft.seen.upstream.get(key)
    if parent is None:
        return Waiting(reason="UpstreamMissing", message=f"{key.title} does not exist")
    if parent.status.state == "Failed":
        message = f"{parent.title} has failed; delete it and make it anew, or delete this job"
        return Waiting(reason="UpstreamFailed", message=message)
    return parent if parent.status.state == "Complete" else _unfinished(parent)


def _unfinished(parent: Job) -> Waiting:
    state = (parent.status.state or "Pending").lower()
    return Waiting(reason="WaitingForUpstream", message=f"{parent.title} is {state}")


# ------------------------------------------------------------------- model.jobRef, and those of the other models


def _resolve_models(draft: Draft, found: _Found) -> Waiting | None:
    for path, source in model_sources(draft.job).items():
        if source.job_ref is not None and (waiting := _resolve_model(draft, found, path, source.job_ref)):
            return waiting
    return None


def _resolve_model(draft: Draft, found: _Found, path: str, reference: JobRef) -> Waiting | None:
    parent = _complete(draft, _key(reference))
    if isinstance(parent, Waiting):
        return parent
    output = _adapters(reference, parent) if path == FIRST_ADAPTERS else _chosen(draft.job, reference, parent=parent)
    if isinstance(output, Waiting):
        return output
    uri = _uri(output.uri, s3=_access(parent), ours=_access(draft.job))
    model: Json | Waiting = {"uri": uri}
    if output.type == ADAPTERS and path != FIRST_ADAPTERS:
        model = _with_adapters(draft, parent, adapters=uri)
    if isinstance(model, Waiting):
        return model
    found.models[path] = model
    found.outputs.setdefault(_key(reference), output)
    return None


def _key(reference: JobRef) -> JobKey:
    return JobKey(reference.kind, reference.name)


def _chosen(job: Job, reference: JobRef, *, parent: Job) -> FinishedOutput | Waiting:
    """The output of another job that this one uses: the named one, else the one that serves it best."""
    name, loadable = reference.output, LOADABLE[job.kind]
    written = _written(parent)
    has = _has(written)
    if name is not None:
        named = next((item for item in written if item.name == name), None)
        if named is None:
            return Waiting(reason="UpstreamNotUsable", message=f"{parent.title} has no output {name!r}; {has}")
        if named.type not in (*loadable, ADAPTERS):
            message = f"output {name!r} of {parent.title} is of type {named.type}, which {job.kind}s cannot load; {has}"
            return Waiting(reason="UpstreamNotUsable", message=message)
        return named
    kinds = ((WHOLE,), loadable, (ADAPTERS,))
    best = next((item for types in kinds for item in written if item.type in types), None)
    if best is None:
        message = f"{parent.title} has no output that {job.kind}s can load; {has}"
        return Waiting(reason="UpstreamNotUsable", message=message)
    return best


def _adapters(reference: JobRef, parent: Job) -> FinishedOutput | Waiting:
    """The adapters of another job that this one goes on with: the named output, else the first of their type."""
    written, name = _written(parent), reference.output
    found = next((item for item in written if item.type == ADAPTERS and name in {None, item.name}), None)
    if found is None:
        what = f"output {name!r} of {parent.title} is" if name is not None else f"{parent.title} has"
        message = f"{what} no output of type {ADAPTERS}, which spec.{FIRST_ADAPTERS} takes; {_has(written)}"
        return Waiting(reason="UpstreamNotUsable", message=message)
    return found


def _written(parent: Job) -> list[FinishedOutput]:
    status = parent.status
    return list(status.outputs or []) if isinstance(status, FineTuneJobStatus | QuantizeJobStatus) else []


def _has(written: list[FinishedOutput]) -> str:
    return f"it has {', '.join(f'{item.name} ({item.type})' for item in written) or 'none'}"


def _with_adapters(draft: Draft, parent: Job, *, adapters: Json) -> Json | Waiting:
    """The model that adapters were trained on, as that job's config names it, with the adapters beside it."""
    config = draft.seen.configs.get(key_of(parent))
    if config is None:
        message = f"{parent.title} has only adapters, and its ConfigMap, which names their base, is gone"
        return Waiting(reason="UpstreamNotUsable", message=message)
    base = dict(config["model"])
    if "adapter" in base:
        message = f"{parent.title} has only adapters on a model with adapters; it needs an output of type {WHOLE}"
        return Waiting(reason="UpstreamNotUsable", message=message)
    resolved = parent.status.resolved
    if "hub" in base and resolved is not None and resolved.model is not None and resolved.model.commit:
        base["hub"] = base["hub"] | {"revision": resolved.model.commit}
    elif "uri" in base and "s3" not in base["uri"]:
        base["uri"] = _uri(base["uri"]["location"], s3=_access(parent), ours=_access(draft.job))
    return base | {"adapter": adapters}


def _access(job: Job) -> S3 | None:
    return job.spec.storage.s3 if job.spec.storage else None


def _uri(location: str, *, s3: S3 | None, ours: S3 | None) -> Json:
    """A location in the trainer's words, with access to it where it differs from the job's own."""
    if s3 is None or s3 == ours:
        return {"location": location}
    return {"location": location, "s3": s3.model_dump(mode="json", exclude_none=True)}


# ------------------------------------------------------------------------------------- checkpoints, comparisons


def _resolve_checkpoint(draft: Draft, found: _Found) -> Waiting | None:
    key = resumed_from(draft.job)
    if key is None:
        return None
    parent = draft.seen.upstream.get(key)
    if parent is None:
        return Waiting(reason="UpstreamMissing", message=f"{key.title} does not exist")
    if parent.status.state not in {"Complete", "Failed", "Suspended"}:
        return _unfinished(parent)
    status = parent.status
    failed = find_condition(status.conditions, "Failed")
    # What pods write after their job has failed, no status tells.
    may_have = status.attempt is not None and failed is not None
    if not isinstance(status, FineTuneJobStatus) or (status.checkpoint is None and not may_have):
        return Waiting(reason="UpstreamNotUsable", message=f"{parent.title} has no checkpoint to resume from")
    ended = parse_time(status.completion_time)
    if failed is not None and failed.reason == "DeadlineExceeded" and ended is not None:
        until = ended + timedelta(seconds=lifecycle_of(parent).grace_period_seconds)
        if (left := (until - draft.seen.now).total_seconds()) > 0:
            draft.look_again(seconds=left)
            message = f"the pods of {parent.title} have until {timestamp(until)} to write a checkpoint"
            return Waiting(reason="WaitingForUpstream", message=message)
    found.resume_from = f"{run_directory(parent)}/{CHECKPOINTS_DIR}"
    return None


def _resolve_comparisons(draft: Draft, found: _Found) -> Waiting | None:
    for key in compared_with(draft.job):
        parent = _complete(draft, key)
        if isinstance(parent, Waiting):
            return parent
        found.compared[key.name] = run_directory(parent)
    return None


def _parents(draft: Draft, *, found: _Found) -> list[Parent]:
    """The jobs whose results are used, as the status and the lineage name them."""
    parents = []
    for key in used_by(draft.job):
        output = found.outputs.get(key)
        parents.append(
            Parent(
                kind=key.kind,
                name=key.name,
                uid=draft.seen.upstream[key].metadata.uid,
                output=output.name if output is not None else None,
                digest=output.digest if output is not None else None,
            )
        )
    return parents
