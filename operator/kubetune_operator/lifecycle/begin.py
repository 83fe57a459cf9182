"""The beginning: what the schema cannot check, and what is left of an older job of the same name."""

from typing import Any

from kubetune_operator.api.finetunejob import FineTuneJob, batch_problem
from kubetune_operator.api.jobs import Job
from kubetune_operator.api.quantizejob import QuantizeJob, ignored_calibration
from kubetune_operator.lifecycle.draft import Draft
from kubetune_operator.lifecycle.moves import fail
from kubetune_operator.lifecycle.queueing import queue_problem
from kubetune_operator.progress import timestamp
from kubetune_operator.render.job import compute_of, processes_per_node
from kubetune_operator.settings import Settings
from kubetune_operator.status import find_condition

Json = dict[str, Any]


def accept(draft: Draft) -> bool:
    """Check what the schema cannot, once."""
    if find_condition(draft.status.conditions, "Accepted") is not None:
        return False
    job, settings = draft.job, draft.settings
    ranks = compute_of(job).nodes * processes_per_node(job, cpu_processes=settings.cpu_processes)
    problems = spec_problems(job, ranks=ranks)
    if problem := queue_problem(draft):
        problems.append(problem)
    if problems:
        message = "; ".join(problems)
        draft.condition("Accepted", status="False", reason="InvalidSpec", message=message)
        return fail(draft, reason="InvalidSpec", message=message)
    message = _accepted_message(job, settings=settings)
    draft.condition("Accepted", status="True", reason="Accepted", message=message)
    draft.note("Accepted", message)
    if isinstance(job, QuantizeJob):
        for ignored in ignored_calibration(job.spec):
            draft.note("CalibrationIgnored", ignored, warning=True)
    draft.set(start_time=timestamp(draft.seen.now))
    draft.waiting("Pending", reason="Pending", message="nothing is started yet")
    return False


def spec_problems(job: Job, *, ranks: int) -> list[str]:
    """What makes a job impossible on a cluster, though its schema is right."""
    problems = [
        f"{path}: Invalid value: {uri!r}: file:// is only for `kubetune run`; a pod has no such folder, use s3:// or pvc://"
        for path, uri in _uris(job.spec.to_manifest(), path="spec")
        if uri.startswith("file://")
    ]
    if isinstance(job, FineTuneJob) and (problem := batch_problem(job.spec, ranks=ranks)):
        problems.append(problem)
    return problems


def _uris(node: Any, *, path: str) -> list[tuple[str, str]]:
    """Every URI of a manifest with its path."""
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in _uris(value, path=f"{path}.{key}")]
    if isinstance(node, list):
        return [found for number, value in enumerate(node) for found in _uris(value, path=f"{path}[{number}]")]
    return [(path, node)] if isinstance(node, str) and path.endswith((".uri", ".location", ".trackingUri")) else []


def _accepted_message(job: Job, *, settings: Settings) -> str:
    accelerator = compute_of(job).accelerator
    if accelerator is None or not settings.cpu_processes:
        return "the job can run"
    processes = processes_per_node(job, cpu_processes=settings.cpu_processes)
    return (
        f"{accelerator.resource} x {accelerator.per_node} per node is mapped to {processes} CPU "
        f"process{'es' if processes > 1 else ''} per node: this installation has no accelerators"
    )


def wait_for_strangers(draft: Draft) -> bool:
    """Let the children of an older job of the same name go first."""
    if not draft.seen.strangers:
        return False
    names = ", ".join(draft.seen.strangers)
    draft.waiting(
        "Pending", reason="WaitingForCleanup", message=f"objects of an older job of this name are still there: {names}"
    )
    draft.look_again(seconds=2.0)
    return True
