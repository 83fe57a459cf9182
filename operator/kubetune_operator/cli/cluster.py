"""`kubetune get` and `kubetune logs`: what a cluster says about jobs."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from kubetune_operator.api.finetunejob import FineTuneJob, parse_finetunejob
from kubetune_operator.cli.progress import describe, parse_event
from kubetune_operator.errors import ClusterError, SpecError
from kubetune_operator.names import (
    ANNOTATION_COMPLETION_INDEX,
    API_GROUP,
    API_VERSION,
    KIND_FINETUNEJOB,
    KINDS,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_JOB_KIND,
    LABEL_JOB_NAME,
    TRAINER_CONTAINER,
)

PLURAL = "finetunejobs"
FINISHED = {"Complete", "Failed"}
_TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Connection:
    """A cluster, as the user's kubeconfig names it.

    Attributes:
        core: Pods, Secrets, ConfigMaps and their like.
        scheduling: PriorityClasses.
        custom: Custom resources.
        namespace: The kubeconfig's namespace.
    """

    core: Any
    scheduling: Any
    custom: Any
    namespace: str


def connect(purpose: str) -> Connection:
    """Read the kubeconfig.

    Args:
        purpose: The command that needs a cluster, for the message when there is none.

    Raises:
        SpecError: The Kubernetes client is not installed, or there is no usable kubeconfig.
    """
    try:
        from kubernetes import client, config  # noqa: PLC0415 (of the extra `operator`; the other commands do without)
    except ImportError as error:
        raise SpecError(purpose, problems=["needs the Kubernetes client: pip install 'kubetune[operator]'"]) from error
    # Said each time: the client reads KUBECONFIG only once, when it is first imported.
    where = os.environ.get("KUBECONFIG")
    try:
        config.load_kube_config(where)  # type: ignore[no-untyped-call]  # the client's helpers have no types
        _, context = config.list_kube_config_contexts(where)  # type: ignore[no-untyped-call]  # as above
    except (config.ConfigException, OSError) as error:
        said = " ".join(str(error).split())
        problem = f"needs a cluster: {said}; set KUBECONFIG, or use `kubetune run FILE`, which needs none"
        raise SpecError(purpose, problems=[problem]) from error
    return Connection(
        core=client.CoreV1Api(),
        scheduling=client.SchedulingV1Api(),
        custom=client.CustomObjectsApi(),
        namespace=context["context"].get("namespace") or "default",
    )


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Translate the client's errors while `what` is read or written.

    Raises:
        ClusterError: The API server refused or did not answer.
    """
    from kubernetes.client import ApiException  # noqa: PLC0415 (see connect)
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 (comes with the client)

    try:
        yield
    except ApiException as error:
        raise ClusterError(f"{what}: {message_of(error)}") from error
    except (HTTPError, OSError) as error:
        raise ClusterError(f"{what}: the API server does not answer ({_first_reason(error)})") from error


def message_of(error: Any) -> str:
    """What the API server said."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def get(name: str | None, *, namespace: str | None) -> None:
    """Print the jobs of a namespace as kubectl does, or one job in full."""
    cluster = connect("kubetune get")
    namespace = namespace or cluster.namespace
    if name is not None:
        typer.echo("\n".join(summary(_read(cluster, name, namespace=namespace))))
        return
    with asking(f"{PLURAL} in {namespace}"):
        table = _table(cluster, namespace=namespace)
    if not table["rows"]:
        typer.echo(f"no {KIND_FINETUNEJOB} in namespace {namespace}")
        return
    shown = [index for index, column in enumerate(table["columnDefinitions"]) if not column.get("priority")]
    lines = [[table["columnDefinitions"][index]["name"].upper() for index in shown]]
    lines += [
        ["" if row["cells"][index] is None else str(row["cells"][index]) for index in shown] for row in table["rows"]
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    for line in lines:
        typer.echo("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def logs(name: str, *, namespace: str | None, follow: bool, raw: bool) -> None:
    """Print the log of a job's first pod; with `follow`, of each such pod until the job has finished."""
    cluster = connect("kubetune logs")
    namespace = namespace or cluster.namespace
    seen: set[str] = set()
    while True:
        job = _read(cluster, name, namespace=namespace)
        pod = _first_pod(cluster, job)
        if pod is not None and pod.metadata.uid not in seen and _has_begun(pod):
            seen.add(pod.metadata.uid)
            for line in _lines(cluster, pod, follow=follow):
                event = None if raw else parse_event(line)
                typer.echo(describe(event) if event else line)
        elif not follow:
            raise ClusterError(f"{KIND_FINETUNEJOB} {namespace}/{name} has no log yet: {_why(job)}")
        if not follow or job.status.state in FINISHED:
            return
        time.sleep(_POLL_SECONDS)


def summary(job: FineTuneJob) -> list[str]:
    """One job in full, a line per thing."""
    status, progress = job.status, job.status.progress
    state = status.state or "not seen by an operator yet"
    lines = [f"{KIND_FINETUNEJOB} {job.metadata.namespace}/{job.metadata.name}: {state}"]
    if progress:
        told = [f"step {progress.steps}", f"loss {progress.loss}" if progress.loss else ""]
        told += [f"{progress.tokens_per_second} tokens/s" if progress.tokens_per_second else ""]
        told += [f"ETA {progress.eta}" if progress.eta else ""]
        lines.append("  " + ", ".join(part for part in told if part))
    if status.restarts:
        lines.append(f"  restarts: {status.restarts}")
    if status.checkpoint:
        lines.append(f"  checkpoint: step {status.checkpoint.step}, {status.checkpoint.uri}")
    width = max((len(condition.type) for condition in status.conditions), default=0)
    lines += [
        f"  {each.type.ljust(width)}  {each.status:7}  {each.reason}: {each.message}" for each in status.conditions
    ]
    if failure := status.last_failure:
        lines.append(
            f"  last failure: pod {failure.pod}, exit code {failure.exit_code}, {failure.reason}: {failure.message}"
        )
        lines += [f"  hint: {failure.hint}"] if failure.hint else []
    lines += [f"  output {each.name} ({each.type}): {each.uri}" for each in status.outputs or []]
    return lines


def _read(cluster: Connection, name: str, *, namespace: str) -> FineTuneJob:
    with asking(f"{KIND_FINETUNEJOB} {namespace}/{name}"):
        return parse_finetunejob(
            cluster.custom.get_namespaced_custom_object(API_GROUP, API_VERSION, namespace, PLURAL, name)
        )


def _table(cluster: Connection, *, namespace: str) -> Any:
    """The jobs as the API server lays them out for kubectl, with the CRD's columns."""
    return cluster.custom.list_namespaced_custom_object(
        API_GROUP, API_VERSION, namespace, PLURAL, _headers={"Accept": _TABLE}
    )


def _first_pod(cluster: Connection, job: FineTuneJob) -> Any:
    """The pod of rank 0 in the last attempt, or of prepare before there is one."""
    selector = f"{LABEL_JOB_NAME}={job.metadata.name},{LABEL_JOB_KIND}={KIND_FINETUNEJOB}"
    with asking(f"pods in {job.metadata.namespace}"):
        pods = cluster.core.list_namespaced_pod(job.metadata.namespace, label_selector=selector).items
    leaders = [pod for pod in pods if (pod.metadata.annotations or {}).get(ANNOTATION_COMPLETION_INDEX, "0") == "0"]
    return max(leaders, key=_recency, default=None)


def _recency(pod: Any) -> tuple[bool, int, float]:
    labels = pod.metadata.labels or {}
    attempt = int(labels.get(LABEL_ATTEMPT, "0"))
    return (
        labels.get(LABEL_COMPONENT) == KINDS[KIND_FINETUNEJOB].component,
        attempt,
        pod.metadata.creation_timestamp.timestamp(),
    )


def _has_begun(pod: Any) -> bool:
    return any(each.state.running or each.state.terminated for each in pod.status.container_statuses or [])


def _lines(cluster: Connection, pod: Any, *, follow: bool) -> Iterator[str]:
    with asking(f"log of pod {pod.metadata.namespace}/{pod.metadata.name}"):
        answer = cluster.core.read_namespaced_pod_log(
            pod.metadata.name,
            pod.metadata.namespace,
            container=TRAINER_CONTAINER,
            follow=follow,
            _preload_content=False,
        )
        rest = b""
        for chunk in answer.stream(65536):
            *complete, rest = (rest + chunk).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in complete)
        if rest:
            yield rest.decode("utf-8", "replace")


def _why(job: FineTuneJob) -> str:
    """The message of the condition that stands in the way, as far as there is one."""
    waiting = [
        condition.message for condition in job.status.conditions if condition.status == "False" and condition.message
    ]
    return waiting[0] if waiting else f"its state is {job.status.state or 'not known: no operator has seen it'}"


def _first_reason(error: BaseException) -> str:
    """The innermost cause: what a person can act on."""
    reason = getattr(error, "reason", None)
    return " ".join(str(reason or error).split())
