"""Which jobs a job refers to. Pure; nothing here knows whether they exist."""

from typing import NamedTuple

from kubetune_operator.api.common import ModelSource
from kubetune_operator.api.evaljob import EvalJob
from kubetune_operator.api.finetunejob import OTHER_MODELS, FineTuneJob
from kubetune_operator.api.jobs import Job
from kubetune_operator.names import KIND_EVALJOB


class JobKey(NamedTuple):
    """A job of the same namespace."""

    kind: str
    name: str

    @property
    def title(self) -> str:
        """The job as messages name it."""
        return f"{self.kind} {self.name}"


def key_of(job: Job) -> JobKey:
    """What others refer to a job by."""
    return JobKey(job.kind, job.metadata.name)


def model_sources(job: Job) -> dict[str, ModelSource]:
    """The models that a job names, by their field in the spec: its own first, then those that it uses beside."""
    fields = OTHER_MODELS if isinstance(job, FineTuneJob) else ()
    others = {f"{block}.{name}": getattr(getattr(job.spec, block), name, None) for block, name in fields}
    return {"model": job.spec.model} | {field: source for field, source in others.items() if source is not None}


def models_of(job: Job) -> dict[str, JobKey]:
    """The jobs whose outputs are models of this one, by the model's field in the spec."""
    references = {field: source.job_ref for field, source in model_sources(job).items()}
    return {field: JobKey(ref.kind, ref.name) for field, ref in references.items() if ref is not None}


def resumed_from(job: Job) -> JobKey | None:
    """The job whose checkpoint a FineTuneJob begins with."""
    if not isinstance(job, FineTuneJob) or job.spec.checkpoint is None or job.spec.checkpoint.resume_from is None:
        return None
    reference = job.spec.checkpoint.resume_from.job_ref
    return JobKey(reference.kind, reference.name) if reference is not None else None


def compared_with(job: Job) -> list[JobKey]:
    """The EvalJobs that an EvalJob's gates compare with, each once."""
    gates = (job.spec.gates or []) if isinstance(job, EvalJob) else []
    return list(dict.fromkeys(JobKey(KIND_EVALJOB, gate.compared_to.name) for gate in gates if gate.compared_to))


def used_by(job: Job) -> list[JobKey]:
    """The jobs whose results a job uses, each once."""
    keys = [*models_of(job).values(), resumed_from(job), *compared_with(job)]
    return list(dict.fromkeys(key for key in keys if key is not None))


def still_waits(job: Job) -> bool:
    """Whether a job has yet to find what it refers to; one that has is not held up by it any more."""
    resolved = job.status.resolved
    unfinished = job.status.state not in {"Complete", "Failed"}
    return unfinished and (resolved is None or resolved.config is None) and bool(references_of(job))


def references_of(job: Job) -> list[JobKey]:
    """The jobs that a job waits for, each once."""
    after = [JobKey(item.kind, item.name) for item in job.spec.after or []]
    return list(dict.fromkeys([*used_by(job), *after]))
