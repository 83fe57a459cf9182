"""What each kind of job has found out when its work is done, and the verdict of its gates."""

from collections.abc import Sequence
from typing import Any, Final

from kubetune_operator import progress as progresses
from kubetune_operator.api.evaljob import Artifacts, EvalGateResult, EvalJob, EvalProgress, EvalResult
from kubetune_operator.api.finetunejob import FineTuneJob, FineTuneJobStatus, Progress, PushedToHub, TunedOutput
from kubetune_operator.api.jobs import GateResult, JobStatus
from kubetune_operator.api.outputs import FinishedOutput
from kubetune_operator.api.quantizejob import MeasuredOutput, QuantizeGateResult, QuantizeJob, QuantizeProgress
from kubetune_operator.lifecycle.draft import Draft
from kubetune_operator.lifecycle.moves import taken, taken_all
from kubetune_operator.progress import timestamp
from kubetune_operator.render.config import run_directory

Json = dict[str, Any]

RESULTS: Final = 1024
"""How many results the status has room for; all of them are in the artifacts."""
IN_LOG: Final = {"result": "results", "gate": "gates", "output": "outputs"}
"""Events of the log, and the part of the termination message that each is in where there is room."""
SHOWN: Final = 6
"""How many results the message of the Complete condition tells."""


def take_results(draft: Draft, *, report: Json) -> str:
    """Take over what rank 0 reported in its termination message; returns it in a sentence, empty if there is none."""
    _take_progress(draft, report=report)
    match draft.job:
        case EvalJob():
            return _take_evaluation(draft, report=report)
        case QuantizeJob():
            return _take_quantized(draft, report=report)
        case FineTuneJob() as job:
            outputs = taken_all(draft, TunedOutput, report.get("outputs")) or [
                TunedOutput(
                    name=output.name, type=output.type, uri=output.uri or f"{run_directory(job)}/outputs/{output.name}"
                )
                for output in job.spec.outputs
            ]
            pushed = report.get("pushedToHub")
            draft.set(outputs=outputs, pushed_to_hub=taken(draft, PushedToHub, pushed) if pushed else None)
            return "; ".join([*_ended_early(job, draft.status), _located(outputs)])
    return ""


def _ended_early(job: FineTuneJob, status: JobStatus) -> list[str]:
    """What a job that training.earlyStopping ended says of it."""
    progress = status.progress if isinstance(status, FineTuneJobStatus) else None
    if progress is None or progress.step >= (progress.total_steps or 0):
        return []
    said = f"ended early, after step {progress.step} of {progress.total_steps}"
    if progress.best_validation_step is not None:
        return [
            f"{said}, with the weights of step {progress.best_validation_step}, whose validation loss is the lowest"
        ]
    return [f"{said}, with its weights: the best checkpoint was gone"] if job.spec.training.early_stopping else []


def is_lost(draft: Draft, *, report: Json) -> bool:
    """Whether a job ended well and what it found out cannot be read. Outputs of training are where they must be."""
    if isinstance(draft.job, FineTuneJob):
        return False
    if report.get("result") != "Complete":
        return True
    return bool(report.get("seeLog")) and not any(_told(draft, name, report=report) for name in IN_LOG)


def _told(draft: Draft, name: str, *, report: Json) -> Any:
    """Results, gates or outputs: from the termination message, otherwise from the log that it refers to."""
    told = report.get(IN_LOG[name])
    return progresses.events_named(draft.seen.log, name) if told is None and report.get("seeLog") else told


def _take_progress(draft: Draft, *, report: Json) -> None:
    told, at_the_end = report.get("progress"), {"eta_seconds": 0, "updated_at": timestamp(draft.seen.now)}
    status = draft.status
    if isinstance(status, FineTuneJobStatus):
        if isinstance(told, dict):
            # The last word on what the outputs are made of: where the best checkpoint was gone, of no best step.
            no_best = {"best_validation_loss": None, "best_validation_step": None}
            fields = no_best | progresses.step_fields(told) | at_the_end
            draft.set(progress=(status.progress or Progress()).model_copy(update=fields))
        return
    model = EvalProgress if isinstance(draft.job, EvalJob) else QuantizeProgress
    before: Any = getattr(status, "progress", None)
    fields = progresses.work_fields(told if isinstance(told, dict) else {}, model=model) | at_the_end
    if before is not None or len(fields) > len(at_the_end):
        draft.set(progress=(before or model()).model_copy(update=fields))


# ------------------------------------------------------------------------------------------------- evaluation


def _take_evaluation(draft: Draft, *, report: Json) -> str:
    results = taken_all(draft, EvalResult, _told(draft, "result", report=report))
    gates = taken_all(draft, EvalGateResult, _told(draft, "gate", report=report))
    draft.set(
        results=(_last_of_each(results, "task", "metric", "filter") or [])[:RESULTS] or None,
        gates=_last_of_each(gates, "name"),
        artifacts=taken(draft, Artifacts, report["artifacts"]) if report.get("artifacts") else None,
    )
    assert isinstance(draft.job, EvalJob)  # noqa: S101 (whoever calls has looked)
    judge(draft, names=[gate.name for gate in draft.job.spec.gates or []], gates=gates)
    shown = [f"{result.task} {result.metric} {result.value}" for result in results[:SHOWN]]
    return "; ".join(shown) + (f" and {len(results) - SHOWN} more" if len(results) > SHOWN else "")


# ----------------------------------------------------------------------------------------------- quantization


def _take_quantized(draft: Draft, *, report: Json) -> str:
    outputs = _last_of_each(taken_all(draft, MeasuredOutput, _told(draft, "output", report=report)), "name") or []
    gates = taken_all(draft, QuantizeGateResult, _told(draft, "gate", report=report))
    draft.set(outputs=outputs or None, gates=_last_of_each(gates, "name", "output"))
    assert isinstance(draft.job, QuantizeJob)  # noqa: S101 (whoever calls has looked)
    judge(draft, names=[gate.name for gate in draft.job.spec.gates or []], gates=gates)
    return _located(outputs)


def _located(outputs: Sequence[FinishedOutput]) -> str:
    return "; ".join(f"{output.name}: {output.uri}" for output in outputs)


# ------------------------------------------------------------------------------------------------------ gates


def judge(draft: Draft, *, names: Sequence[str], gates: Sequence[GateResult]) -> None:
    """Say whether the gates passed. One that nothing was reported about has not."""
    if not names:
        return
    reported = {gate.name for gate in gates}
    failed = [_verdict(gate) for gate in gates if not gate.passed]
    failed += [f"gate {name}: nothing was reported about it" for name in names if name not in reported]
    if failed:
        message = "; ".join(failed)
        draft.condition("GatePassed", status="False", reason="GateFailed", message=message)
        draft.note("GateFailed", message, warning=True)
        return
    message = "; ".join(_verdict(gate) for gate in gates)
    draft.condition("GatePassed", status="True", reason="GatesPassed", message=message)
    draft.note("GatesPassed", message)


def _verdict(gate: GateResult) -> str:
    return f"gate {gate.name}: {gate.message or f'{gate.rule}, got {gate.value}'}"


def _last_of_each(items: list[Any], *keys: str) -> list[Any] | None:
    """The last of the items that have these fields in common; None if there are none."""
    return list({tuple(getattr(item, key) for key in keys): item for item in items}.values()) or None
