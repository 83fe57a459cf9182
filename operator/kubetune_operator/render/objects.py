"""Every object that a FineTuneJob leads to, as `kubetune render` prints them."""

from typing import Any

from kubetune_operator.api.finetunejob import FineTuneJob
from kubetune_operator.render.config import Resolved, ResolvedModel, render_config
from kubetune_operator.render.job import (
    backoff_limit,
    compute_of,
    processes_per_node,
    render_configmap,
    render_prepare_job,
    render_service,
    render_train_job,
)
from kubetune_operator.settings import Settings

Json = dict[str, Any]


def render_all(job: FineTuneJob, settings: Settings) -> list[Json]:
    """Build the manifests of the first attempt, in the order in which the operator creates them.

    What only the cluster knows stands as a placeholder: `<output of FineTuneJob NAME>` for a jobRef.
    """
    reference = job.spec.model.job_ref
    resume = job.spec.checkpoint.resume_from if job.spec.checkpoint else None
    resolved = Resolved(
        processes_per_node=processes_per_node(job, cpu_processes=settings.cpu_processes),
        model=ResolvedModel(location=f"<output of FineTuneJob {reference.name}>") if reference else None,
        resume_from=f"<checkpoint of FineTuneJob {resume.job_ref.name}>" if resume and resume.job_ref else None,
    )
    config = render_config(job, resolved=resolved)
    limit = backoff_limit(job, counted=0)
    manifests = [
        render_configmap(job, config=config),
        render_prepare_job(job, config=config, settings=settings),
        render_train_job(job, config=config, attempt=1, backoff_limit=limit, settings=settings),
    ]
    if compute_of(job).nodes > 1:
        manifests.insert(2, render_service(job, attempt=1))
    return manifests
