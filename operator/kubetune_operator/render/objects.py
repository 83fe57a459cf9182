"""Every object that a job leads to, as `kubetune render` prints them."""

from typing import Any

from kubetune_operator.api.jobs import Job
from kubetune_operator.api.references import compared_with, models_of, resumed_from
from kubetune_operator.render.config import Resolved, render_config
from kubetune_operator.render.job import (
    backoff_limit,
    compute_of,
    processes_per_node,
    render_configmap,
    render_prepare_job,
    render_service,
    render_work_job,
)
from kubetune_operator.render.kueue import render_queue_job
from kubetune_operator.settings import Settings

Json = dict[str, Any]


def render_all(job: Job, settings: Settings) -> list[Json]:
    """Build the manifests of the first attempt, in the order in which the operator creates them.

    What only the cluster knows stands as a placeholder: `<output of FineTuneJob NAME>` for a jobRef.
    """
    resolved = Resolved(
        processes_per_node=processes_per_node(job, cpu_processes=settings.cpu_processes),
        models={path: {"uri": {"location": f"<output of {key.title}>"}} for path, key in models_of(job).items()},
        resume_from=f"<checkpoint of {resumed.title}>" if (resumed := resumed_from(job)) else None,
        compared={other.name: f"<directory of {other.title}>" for other in compared_with(job)},
    )
    config = render_config(job, resolved=resolved)
    limit = backoff_limit(job, counted=0)
    attempt = render_work_job(job, config=config, attempt=1, backoff_limit=limit, settings=settings)
    manifests = [
        render_configmap(job, config=config),
        render_prepare_job(job, config=config, settings=settings),
    ]
    if job.spec.queue is not None:
        manifests.append(render_queue_job(job, attempt=attempt))
    if compute_of(job).nodes > 1:
        manifests.append(render_service(job, attempt=1))
    return [*manifests, attempt]
