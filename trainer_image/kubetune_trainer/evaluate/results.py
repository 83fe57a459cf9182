"""What lm_eval found, as rows for people and the status, as the whole record, and as a log of every sample."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lm_eval.api.metrics import mean
from lm_eval.api.registry import get_aggregation, get_metric_aggregation
from lm_eval.utils import handle_non_serializable
from pydantic import BaseModel, ConfigDict

from kubetune_trainer.config import EvalConfig, Gate
from kubetune_trainer.evaluate.gates import Aggregate, Measured, Verdict, decimal, judge_pair, judge_value, unjudged
from kubetune_trainer.names import LINEAGE_FILE
from kubetune_trainer.storage import Store, open_store

RESULTS_FILE: Final = "results.json"
SAMPLES_DIR: Final = "samples"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found."""

    record: Mapping[str, Any]
    """lm_eval's record, with our settings under kubetune."""
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    """lm_eval's log of every sample, by task."""


class Result(BaseModel):
    """One metric of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    """The task, or a group of tasks."""
    metric: str
    """As lm_eval names it."""
    filter: str
    """What the answers went through before they were judged."""
    value: float
    """The metric."""
    stderr: float | None
    """Standard error of the value, where lm_eval knows one."""
    samples: int
    """How many samples it was computed from."""

    def told(self) -> dict[str, Any]:
        """Return it as the status has it: numbers are decimal strings."""
        stderr = {} if self.stderr is None else {"stderr": decimal(self.stderr)}
        row = {"task": self.task, "metric": self.metric, "filter": self.filter, "value": decimal(self.value)}
        return {**row, **stderr, "samples": self.samples}


def result_rows(record: Mapping[str, Any]) -> list[Result]:
    """Return the metrics of lm_eval's record, tasks and groups, in its order."""
    rows = []
    for task, found in {**record["results"], **record.get("groups", {})}.items():
        for key, value in found.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = found.get(f"{metric}_stderr,{filter_}")
            rows.append(
                Result(
                    task=task,
                    metric=metric,
                    filter=filter_,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    samples=int(found["sample_len"]),
                )
            )
    return rows


def save_evaluation(store: Store, found: Evaluation, *, verdicts: Sequence[Verdict]) -> None:
    """Write the samples of each task, and then the record, with the gates: it stands for a finished evaluation."""
    for task, logged in found.samples.items():
        lines = "".join(_json(sample) + "\n" for sample in logged)
        store.write_bytes(f"{SAMPLES_DIR}/{task}.jsonl", lines.encode())
    record = {**found.record, "gates": [verdict.told() for verdict in verdicts]}
    store.write_bytes(RESULTS_FILE, (_json(record, indent=2) + "\n").encode())


def clear_results(store: Store) -> None:
    """Remove what an earlier evaluation left: until this one is over there is no result."""
    store.delete_tree(RESULTS_FILE)
    store.delete_tree(LINEAGE_FILE)
    store.delete_tree(SAMPLES_DIR)


def settings_of(config: EvalConfig, *, dtype: str, max_length: int) -> dict[str, Any]:
    """Return what decides the numbers beside the model and the tasks, for the record and for comparisons."""
    return {
        "dtype": dtype,
        "max_sequence_length": max_length,
        "apply_chat_template": config.apply_chat_template,
        "system_instruction": config.system_instruction,
        "seed": config.seed,
    }


def load_evaluation(store: Store, *, tasks: Sequence[str]) -> Evaluation:
    """Read what another evaluation has stored, with the samples of some tasks."""
    record = json.loads(store.read_bytes(RESULTS_FILE))
    samples = {}
    for task in tasks:
        path = f"{SAMPLES_DIR}/{task}.jsonl"
        if store.exists(path):
            samples[task] = [json.loads(line) for line in store.read_bytes(path).splitlines()]
    return Evaluation(record=record, samples=samples)


def _json(value: Any, *, indent: int | None = None) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent)


def judge(gate: Gate, mine: Evaluation, *, config: EvalConfig) -> Verdict:
    """Judge one gate.

    Args:
        gate: One of the job's.
        mine: What this job found.
        config: The job.
    """
    rows = {(row.task, row.metric, row.filter): row for row in result_rows(mine.record)}
    row = rows.get((gate.task, gate.metric, gate.filter))
    if gate.compared_to is None or row is None:
        known = [f"{metric} of {task} with filter {filter_}" for task, metric, filter_ in rows]
        return judge_value(gate, row.value if row else None, known=known)
    other = gate.compared_to
    store = open_store(other.directory, s3=config.storage.s3)
    if not store.exists(RESULTS_FILE):
        return unjudged(gate, f"EvalJob {other.name} has no results in {other.directory}", value=row.value)
    theirs = load_evaluation(store, tasks=[gate.task])
    measured = [_measured(evaluation, gate) for evaluation in (mine, theirs)]
    for name, found in zip(("this EvalJob", f"EvalJob {other.name}"), measured, strict=True):
        if found is None:
            message = f"{name} has no samples of {gate.metric} of {gate.task} with filter {gate.filter}"
            return unjudged(gate, message, value=row.value)
    return judge_pair(gate, *(found for found in measured if found is not None))


def _measured(evaluation: Evaluation, gate: Gate) -> Measured | None:
    record, logged = evaluation.record, evaluation.samples.get(gate.task, ())
    rows = {(row.task, row.metric, row.filter): row.value for row in result_rows(record)}
    samples = {
        (sample["doc_id"], sample["doc_hash"], sample["target_hash"]): sample[gate.metric]
        for sample in logged
        if sample["filter"] == gate.filter and gate.metric in sample
    }
    value = rows.get((gate.task, gate.metric, gate.filter))
    if value is None or not samples:
        return None
    settings = {
        **record["kubetune"],
        "num_fewshot": record["n-shot"][gate.task],
        "version": record["versions"][gate.task],
    }
    return Measured(
        value=value, settings=settings, samples=samples, aggregate=_aggregate(record["configs"][gate.task], gate.metric)
    )


def _aggregate(task_config: Mapping[str, Any], metric: str) -> Aggregate | None:
    """Return what makes a metric of samples; None for the mean, which lm_eval takes too where nothing else is said."""
    entries = [entry for entry in task_config.get("metric_list") or () if entry.get("metric") == metric]
    named = entries[0].get("aggregation") if entries else None
    found: Aggregate | None = get_aggregation(named) if named is not None else get_metric_aggregation(metric)
    return None if found is mean else found
