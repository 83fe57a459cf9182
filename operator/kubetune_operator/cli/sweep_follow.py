"""The jobs of a sweep at work: made in a cluster and followed there, or run here one after the other."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kubetune_operator.cli import local
from kubetune_operator.cli.bundle import Bundle
from kubetune_operator.cli.cluster import FINISHED, Connection, asking, connect
from kubetune_operator.cli.sweep import Run, told
from kubetune_operator.cli.sweep_report import Result, cells
from kubetune_operator.errors import ClusterError, SpecError
from kubetune_operator.names import (
    ANNOTATION_SWEEP_DIGEST,
    ANNOTATION_SWEEP_VALUES,
    API_GROUP,
    API_VERSION,
    KIND_FINETUNEJOB,
    KINDS,
    LABEL_SWEEP,
    ExitCode,
)

Json = dict[str, Any]

POLL_SECONDS: Final = 2.0
Show = Callable[[Sequence[Result]], None]


@contextmanager
def showing(console: Console, *, metric: str, table: bool) -> Iterator[Show]:
    """A table that is kept up to date on a terminal; elsewhere a line for each change of a job's state."""
    if not (table and console.is_terminal):
        said: dict[str, str] = {}

        def say(results: Sequence[Result]) -> None:
            for result in results:
                if result.state and said.get(result.run.name) != result.state:
                    said[result.run.name] = result.state
                    words = f"{result.run.name} ({told(result.run.values)}): {result.state}"
                    about = f": {result.message}" if result.message and result.state != "Running" else ""
                    console.print(escape(words + about), highlight=False, soft_wrap=True)

        yield say
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda results: live.update(_table(results, metric=metric), refresh=True)


def _table(results: Sequence[Result], *, metric: str) -> Table:
    fields = list(results[0].run.values)
    table = Table("JOB", *fields, "STATE", metric, "STEP", "ETA", box=None, pad_edge=False)
    for result in results:
        steps, eta = (str(result.progress.get(name) or "") for name in ("steps", "eta"))
        table.add_row(*(escape(cell) for cell in (*cells(result, metric=metric, fields=fields), steps, eta)))
    return table


# --------------------------------------------------------------------------------------------------- a cluster


def in_cluster(runs: Sequence[Run], *, namespace: str | None, parallel: int | None, show: Show) -> list[Result]:
    """Make the jobs, those that are not there yet, and follow them to their end; one that is deleted is not made again.

    Args:
        runs: The jobs.
        namespace: Where; None is the manifest's, or the kubeconfig's.
        parallel: At most so many that are not finished at once; None leaves that to the cluster and its queues.
        show: Called with all results, again and again.

    Raises:
        SpecError: A job of such a name exists that is none of this sweep, or the API server refuses one.
    """
    cluster = connect("kubetune sweep")
    namespace = namespace or runs[0].manifest["metadata"].get("namespace") or cluster.namespace
    found = known = _found(cluster, runs, namespace=namespace)
    for run in runs:
        if run.name not in found:
            _create(cluster, run, namespace=namespace, dry_run=True)
    while True:
        results = [_result(run, known.get(run.name), is_there=run.name in found) for run in runs]
        show(results)
        if all(result.state in FINISHED for result in results):
            return results
        room = len(runs) if parallel is None else parallel
        room -= sum(1 for result in results if result.run.name in known and result.state not in FINISHED)
        missing = [run for run in runs if run.name not in known]
        for run in missing[: max(0, room)]:
            _create(cluster, run, namespace=namespace)
        time.sleep(POLL_SECONDS)
        found = _found(cluster, runs, namespace=namespace)
        known = known | found


def _found(cluster: Connection, runs: Sequence[Run], *, namespace: str) -> dict[str, Json]:
    """The jobs that are there already.

    Raises:
        SpecError: One of them is something else.
    """
    with asking(f"{KINDS[KIND_FINETUNEJOB].plural} in {namespace}"):
        listed = cluster.custom.list_namespaced_custom_object(
            API_GROUP, API_VERSION, namespace, KINDS[KIND_FINETUNEJOB].plural
        )["items"]
    there = {item["metadata"]["name"]: item for item in listed}
    found = {run.name: there[run.name] for run in runs if run.name in there}
    for run in runs:
        if run.name in found and not _is_of(run, found[run.name]):
            problem = (
                f"exists and is not of this sweep ({told(run.values)}) and manifest; "
                "delete it, or rename this sweep's manifest"
            )
            raise SpecError(f"{KIND_FINETUNEJOB} {namespace}/{run.name}", problems=[problem])
    return found


def _is_of(run: Run, item: Json) -> bool:
    labels, annotations = (item["metadata"].get(key) or {} for key in ("labels", "annotations"))
    written = run.manifest["metadata"]
    return bool(
        labels.get(LABEL_SWEEP) == written["labels"][LABEL_SWEEP]
        and all(
            annotations.get(name) == written["annotations"][name]
            for name in (ANNOTATION_SWEEP_VALUES, ANNOTATION_SWEEP_DIGEST)
        )
    )


def _create(cluster: Connection, run: Run, *, namespace: str, dry_run: bool = False) -> None:
    from kubernetes.client import ApiException  # noqa: PLC0415 (see cluster.connect)

    manifest = run.manifest | {"metadata": run.manifest["metadata"] | {"namespace": namespace}}
    options = {"dry_run": "All"} if dry_run else {}
    where = (API_GROUP, API_VERSION, namespace, KINDS[KIND_FINETUNEJOB].plural)
    try:
        with asking(f"{KIND_FINETUNEJOB} {namespace}/{run.name}"):
            cluster.custom.create_namespaced_custom_object(*where, manifest, field_validation="Strict", **options)
    except ClusterError as error:
        if isinstance(error.__cause__, ApiException) and error.__cause__.status == 409:
            return  # made meanwhile, by another hand; the next look tells whether it is of this sweep
        raise


def _result(run: Run, item: Json | None, *, is_there: bool) -> Result:
    """What is known of a job.

    Args:
        run: The job.
        item: It, as it was last seen; None before it was made.
        is_there: Whether it still is.
    """
    status = (item or {}).get("status") or {}
    if item is not None and not is_there and status.get("state") not in FINISHED:
        return Result(run=run, state="Failed", progress=status.get("progress") or {}, message="it was deleted")
    outputs = status.get("outputs") or [{}]
    conditions = {each["type"]: each for each in status.get("conditions") or []}
    told_by = conditions.get("Failed") or conditions.get("Running") or {}
    return Result(
        run=run,
        state=status.get("state") or ("Pending" if item is not None else ""),
        progress=status.get("progress") or {},
        message=str(told_by.get("message") or ""),
        output=str(outputs[0].get("uri") or ""),
    )


# ------------------------------------------------------------------------------------------------ this machine


def on_this_machine(runs: Sequence[Run], bundle: Bundle, *, memory: Path, show: Show) -> list[Result]:
    """Run the jobs one after the other.

    Args:
        runs: The jobs.
        bundle: The manifest file, for its Secrets and ConfigMaps.
        memory: Where is kept which jobs are done, so that the same command goes on after an interruption.
        show: Called with all results, again and again.

    Raises:
        SpecError: A job was stopped, cannot run here, or has run here with other values or of another manifest.
    """
    done = {each["job"]: each for each in _remembered(memory)}
    for run in runs:
        if run.name in done and done[run.name]["digest"] != _digest(run):
            problem = (
                f"was run here with other values or another manifest ({told(done[run.name]['values'])}); rename this "
                f"sweep's manifest, or remove {memory} and the jobs' folders in {run.job.spec.workspace.uri}"
            )
            raise SpecError(f"{KIND_FINETUNEJOB} {run.name}", problems=[problem])
    results = [_recalled(run, done.get(run.name)) for run in runs]
    for index, run in enumerate(runs):
        if results[index].state:
            continue
        show([*results[:index], Result(run=run, state="Running", progress={}), *results[index + 1 :]])
        results[index], is_stopped = _run_here(run, bundle)
        kept = [_to_remember(each) for each in results if _is_done(each)]
        memory.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        show(results)
        if is_stopped and not all(each.state for each in results):
            raise SpecError(
                "kubetune sweep", problems=[f"stopped after {run.name}; the same command goes on from there"]
            )
    return results


def _is_done(result: Result) -> bool:
    return result.state == "Complete"


def _digest(run: Run) -> str:
    """What tells a job from another one of its name, which goes by its number."""
    digest: str = run.manifest["metadata"]["annotations"][ANNOTATION_SWEEP_DIGEST]
    return digest


def _to_remember(result: Result) -> Json:
    known = {"job": result.run.name, "digest": _digest(result.run), "values": dict(result.run.values)}
    return {**known, "progress": dict(result.progress), "output": result.output}


def _recalled(run: Run, known: Json | None) -> Result:
    if known is None:
        return Result(run=run, state="", progress={})
    return Result(run=run, state="Complete", progress=known["progress"], output=known["output"])


def _remembered(memory: Path) -> list[Json]:
    """The jobs that are done, of those that the file tells apart: an early version kept their values alone."""
    if not memory.exists():
        return []
    found: list[Json] = json.loads(memory.read_text(encoding="utf-8"))
    return [each for each in found if "digest" in each]


def _run_here(run: Run, bundle: Bundle) -> tuple[Result, bool]:
    """Run a job to its end, and tell whether it was asked to stop, too late for that."""
    outcome = local.outcome_of(
        Bundle(
            job=run.job,
            manifest=run.manifest,
            secrets=bundle.secrets,
            config_maps=bundle.config_maps,
            others=bundle.others,
        )
    )
    if outcome.code == ExitCode.PREEMPTED or (outcome.is_stopped and outcome.code):
        raise SpecError("kubetune sweep", problems=[f"stopped during {run.name}; the same command goes on from there"])
    outputs, progress = outcome.record.get("outputs") or [{}], outcome.record.get("progress")
    # What the outputs are made of is the record's to say: where the best checkpoint was gone, no best step.
    measured = {key: value for key, value in outcome.measured.items() if not (progress and key.startswith("best"))}
    result = Result(
        run=run,
        state="Failed" if outcome.code else "Complete",
        progress={**(progress or {}), **measured},
        message=str(outcome.record.get("message") or ""),
        output=str(outputs[0].get("uri") or ""),
    )
    return result, outcome.is_stopped
