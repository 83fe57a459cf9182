"""One job in full, as `kubetune get NAME` prints it: a line per thing."""

from collections.abc import Iterator

from kubetune_operator.api.evaljob import EvalJob, EvalJobStatus
from kubetune_operator.api.finetunejob import FineTuneJob
from kubetune_operator.api.jobs import Job, WorkProgress
from kubetune_operator.api.quantizejob import MeasuredOutput, QuantizeJob


def summary(job: Job) -> list[str]:
    """What is known about a job."""
    status = job.status
    state = status.state or "not seen by an operator yet"
    lines = [f"{job.kind} {job.metadata.namespace}/{job.metadata.name}: {state}", *_progress(job)]
    if status.restarts:
        lines.append(f"  restarts: {status.restarts}")
    if isinstance(job, FineTuneJob) and job.status.checkpoint:
        lines.append(f"  checkpoint: step {job.status.checkpoint.step}, {job.status.checkpoint.uri}")
    width = max((len(condition.type) for condition in status.conditions), default=0)
    lines += [
        f"  {each.type.ljust(width)}  {each.status:7}  {each.reason}: {each.message}" for each in status.conditions
    ]
    if failure := status.last_failure:
        lines.append(
            f"  last failure: pod {failure.pod}, exit code {failure.exit_code}, {failure.reason}: {failure.message}"
        )
        lines += [f"  hint: {failure.hint}"] if failure.hint else []
    return [*lines, *_found(job)]


def _progress(job: Job) -> Iterator[str]:
    """How far the work is."""
    if isinstance(job, FineTuneJob) and (training := job.status.progress):
        told = [f"step {training.steps}", f"loss {training.loss}" if training.loss else ""]
        told += [f"{training.tokens_per_second} tokens/s" if training.tokens_per_second else ""]
        yield _line(*told, f"ETA {training.eta}" if training.eta else "")
    elif isinstance(job, EvalJob) and (asking := job.status.progress):
        speed = f"{asking.tokens_per_second} tokens/s" if asking.tokens_per_second else ""
        yield _line(f"{asking.of_total} requests", speed, _eta(asking))
    elif isinstance(job, QuantizeJob) and (writing := job.status.progress):
        yield _line(f"{writing.of_total} tensors", (writing.phase or "").lower(), _eta(writing))


def _eta(progress: WorkProgress) -> str:
    return f"ETA {progress.eta}" if progress.eta else ""


def _line(*parts: str) -> str:
    return "  " + ", ".join(part for part in parts if part)


def _found(job: Job) -> Iterator[str]:
    """What the job wrote and found out."""
    if isinstance(job, FineTuneJob):
        yield from (f"  output {each.name} ({each.type}): {each.uri}" for each in job.status.outputs or [])
        if job.status.artifacts and job.status.artifacts.report:
            yield f"  data report: {job.status.artifacts.report}"
    elif isinstance(job, EvalJob):
        yield from _results(job.status)
        yield from (f"  gate {each.name}: {_verdict(each.passed, each.message)}" for each in job.status.gates or [])
    elif isinstance(job, QuantizeJob):
        yield from (_measured(each) for each in job.status.outputs or [])
        for gate in job.status.gates or []:
            yield f"  gate {gate.name} of {gate.output}: {_verdict(gate.passed, gate.message)}"


def _results(status: EvalJobStatus) -> Iterator[str]:
    for each in status.results or []:
        name = each.metric if each.filter == "none" else f"{each.metric} ({each.filter})"
        error = f" ± {each.stderr}" if each.stderr else ""
        samples = f", {each.samples} samples" if each.samples is not None else ""
        yield f"  {each.task} {name}: {each.value}{error}{samples}"
    if status.artifacts and status.artifacts.results:
        yield f"  all results: {status.artifacts.results}"


def _measured(output: MeasuredOutput) -> str:
    what = f"{output.type} {output.scheme}" if output.scheme else output.type
    perplexity = (
        f", perplexity {output.perplexity} (from {output.source_perplexity})"
        if output.perplexity and output.source_perplexity
        else ""
    )
    return f"  output {output.name} ({what}): {output.uri}{perplexity}"


def _verdict(passed: bool, message: str | None) -> str:
    return ("passed" if passed else "failed") + (f": {message}" if message else "")
