"""`kubetune get` and `kubetune logs`: what a cluster says about jobs."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from kubetune_operator.api.jobs import Job
from kubetune_operator.api.kinds import MODELS, parse_job
from kubetune_operator.cli.progress import describe, parse_event
from kubetune_operator.cli.summary import summary
from kubetune_operator.errors import ClusterError, SpecError
from kubetune_operator.names import (
    ANNOTATION_COMPLETION_INDEX,
    API_GROUP,
    API_VERSION,
    COMPONENT_PREPARE,
    KINDS,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_JOB_KIND,
    LABEL_JOB_NAME,
    TRAINER_CONTAINER,
)

Json = dict[str, Any]

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


def find(cluster: Connection, target: str, *, namespace: str, purpose: str) -> Json:
    """The job that is meant by NAME, or by KIND/NAME where jobs of several kinds have the name.

    Args:
        cluster: Where to look.
        target: What the user typed. A kind may be written as kubectl takes it.
        namespace: Where the job is.
        purpose: The command, for messages.

    Raises:
        SpecError: Several jobs have the name, or the kind is none of ours.
        ClusterError: There is none, or the API server does not answer.
    """
    kind, _, name = target.rpartition("/")
    kinds = [each for each in KINDS if kind.lower() in {"", *_names_of(each)}]
    if not kinds:
        raise SpecError(purpose, problems=[f"there is no kind {kind}; there are {', '.join(KINDS)}"])
    found = [job for each in kinds if (job := read(cluster, each, name=name, namespace=namespace)) is not None]
    if not found:
        raise ClusterError(f"{' or '.join(kinds)} {namespace}/{name}: not found")
    if len(found) > 1:
        choices = " or ".join(f"{job['kind'].lower()}/{name}" for job in found)
        raise SpecError(purpose, problems=[f"several jobs are called {name}; say {choices}"])
    return found[0]


def _names_of(kind: str) -> set[str]:
    return {kind.lower(), KINDS[kind].plural, MODELS[kind].short_name}


def read(cluster: Connection, kind: str, *, name: str, namespace: str) -> Json | None:
    """Read a job, None if it is not there."""
    from kubernetes.client import ApiException  # noqa: PLC0415 (see connect)

    with asking(f"{kind} {namespace}/{name}"):
        try:
            found: Json = cluster.custom.get_namespaced_custom_object(
                API_GROUP, API_VERSION, namespace, KINDS[kind].plural, name
            )
        except ApiException as error:
            if error.status != 404:
                raise
            return None
    return found


def get(target: str | None, *, namespace: str | None) -> None:
    """Print the jobs of a namespace as kubectl does, a table for each kind, or one job in full."""
    cluster = connect("kubetune get")
    namespace = namespace or cluster.namespace
    if target is not None:
        job = parse_job(find(cluster, target, namespace=namespace, purpose="kubetune get"), is_stored=True)
        typer.echo("\n".join(summary(job)))
        return
    tables = [lines for kind in KINDS if (lines := _table(cluster, kind, namespace=namespace))]
    if not tables:
        typer.echo(f"no jobs in namespace {namespace}")
    typer.echo("\n\n".join("\n".join(lines) for lines in tables), nl=bool(tables))


def _table(cluster: Connection, kind: str, *, namespace: str) -> list[str]:
    """The jobs of a kind as the API server lays them out for kubectl, with the CRD's columns; empty without jobs."""
    with asking(f"{KINDS[kind].plural} in {namespace}"):
        table = cluster.custom.list_namespaced_custom_object(
            API_GROUP, API_VERSION, namespace, KINDS[kind].plural, _headers={"Accept": _TABLE}
        )
    if not table["rows"]:
        return []
    shown = [index for index, column in enumerate(table["columnDefinitions"]) if not column.get("priority")]
    lines = [[table["columnDefinitions"][index]["name"].upper() for index in shown]]
    lines += [
        ["" if row["cells"][index] is None else str(row["cells"][index]) for index in shown] for row in table["rows"]
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def logs(target: str, *, namespace: str | None, follow: bool, raw: bool) -> None:
    """Print the log of a job's first pod; with `follow`, of each such pod until the job has finished."""
    cluster = connect("kubetune logs")
    namespace = namespace or cluster.namespace
    seen: set[str] = set()
    while True:
        job = parse_job(find(cluster, target, namespace=namespace, purpose="kubetune logs"), is_stored=True)
        pod = _first_pod(cluster, job)
        if pod is not None and pod.metadata.uid not in seen and _has_begun(pod):
            seen.add(pod.metadata.uid)
            for line in _lines(cluster, pod, follow=follow):
                event = None if raw else parse_event(line)
                typer.echo(describe(event) if event else line)
        elif not follow:
            raise ClusterError(f"{job.kind} {namespace}/{job.metadata.name} has no log yet: {_why(job)}")
        if not follow or job.status.state in FINISHED:
            return
        time.sleep(_POLL_SECONDS)


def _first_pod(cluster: Connection, job: Job) -> Any:
    """The pod of rank 0 in the last attempt, or of prepare before there is one."""
    selector = f"{LABEL_JOB_NAME}={job.metadata.name},{LABEL_JOB_KIND}={job.kind}"
    with asking(f"pods in {job.metadata.namespace}"):
        pods = cluster.core.list_namespaced_pod(job.metadata.namespace, label_selector=selector).items
    leaders = [pod for pod in pods if (pod.metadata.annotations or {}).get(ANNOTATION_COMPLETION_INDEX, "0") == "0"]
    return max(leaders, key=_recency, default=None)


def _recency(pod: Any) -> tuple[bool, int, float]:
    labels = pod.metadata.labels or {}
    attempt = int(labels.get(LABEL_ATTEMPT, "0"))
    return labels.get(LABEL_COMPONENT) != COMPONENT_PREPARE, attempt, pod.metadata.creation_timestamp.timestamp()


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


def _why(job: Job) -> str:
    """The message of the condition that stands in the way, as far as there is one."""
    waiting = [
        condition.message for condition in job.status.conditions if condition.status == "False" and condition.message
    ]
    return waiting[0] if waiting else f"its state is {job.status.state or 'not known: no operator has seen it'}"


def _first_reason(error: BaseException) -> str:
    """The innermost cause: what a person can act on."""
    reason = getattr(error, "reason", None)
    return " ".join(str(reason or error).split())
