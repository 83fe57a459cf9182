"""A namespace of the real API server with an operator of its own, and a hand that plays the kubelet."""

import asyncio
import contextlib
import copy
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from kubetune_operator.cluster import Cluster, object_path
from kubetune_operator.errors import ClusterError
from kubetune_operator.names import KINDS, LABEL_ATTEMPT, LABEL_COMPONENT, LABEL_JOB_KIND, LABEL_JOB_NAME, config_name
from kubetune_operator.status import index_of, is_deleting, phase_of
from tests.cluster.controlplane import ControlPlane
from tests.cluster.pki import Authority, Identity
from tests.ports import free_ports

Json = dict[str, Any]

KIND = "FineTuneJob"
HEARTBEAT_SECONDS = 5.0
IMAGE_ID = "registry.example/trainer@sha256:9"
RIGHTS: list[Json] = [
    {
        "apiGroups": ["kubetune.dev"], "resources": ["finetunejobs", "evaljobs", "quantizejobs"],
        "verbs": ["get", "list", "watch", "delete"],
    },
    {
        "apiGroups": ["kubetune.dev"],
        "resources": ["finetunejobs/status", "evaljobs/status", "quantizejobs/status"],
        "verbs": ["patch"],
    },
    {
        "apiGroups": ["batch"], "resources": ["jobs"],
        "verbs": ["get", "list", "watch", "create", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["services"], "verbs": ["create", "delete"]},
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "create"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list", "create"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
]  # fmt: skip
"""What `kubetune_operator.cluster` says that it needs; every operator of these tests has exactly this."""
RIGHTS_WITH_KUEUE: list[Json] = [
    *RIGHTS,
    {"apiGroups": ["batch"], "resources": ["jobs/status"], "verbs": ["patch"]},
    {"apiGroups": ["kueue.x-k8s.io"], "resources": ["workloads"], "verbs": ["list", "patch"]},
]
"""The same where jobs may stand in queues."""
PREPARED: Json = {
    "result": "Prepared",
    "model": {"location": "s3://models/tiny/", "etag": "abc"},
    "sources": [{"name": "tickets", "etag": "def"}],
    "data": {"samples": 100, "rows": 40, "tokens": 9000, "trainableTokenPercent": 41.25, "droppedSamples": 0},
    "estimate": {"memoryPerDeviceBytes": 2**30, "message": "weights 0.5 GiB, activations 0.5 GiB"},
    "parameters": 1000,
    "totalSteps": 30,
    "artifacts": {"report": "s3://runs/t/report.html"},
}
COMPLETE: Json = {
    "result": "Complete",
    "exitCode": 0,
    "outputs": [{"name": "merged", "type": "HuggingFace", "uri": "s3://runs/out/merged", "digest": "d1", "bytes": 42}],
    "progress": {
        "event": "step",
        "step": 30,
        "totalSteps": 30,
        "loss": 0.51234567,
        "epoch": 3.0,
        "tokensPerSecond": 9.5,
    },
}


EVALUATED: Json = {
    "result": "Complete",
    "exitCode": 0,
    "results": [
        {"task": "tickets", "metric": "acc", "filter": "none", "value": 0.4125, "stderr": 0.0174, "samples": 800},
        {"task": "wikitext", "metric": "word_perplexity", "filter": "none", "value": 23.456789123, "samples": 62},
    ],
    "artifacts": {"results": "s3://runs/e/results.json", "samples": "s3://runs/e/samples"},
    "progress": {"event": "progress", "done": 862, "total": 862, "tokensPerSecond": 812.34},
}
QUANTIZED: Json = {
    "result": "Complete",
    "exitCode": 0,
    "outputs": [
        {
            "name": "int8", "type": "CompressedTensors", "scheme": "Int8WeightOnly", "uri": "s3://runs/q/int8",
            "digest": "sha256:ab", "bytes": 100, "sourceBytes": 400, "perplexity": 12.3456789, "sourcePerplexity": 12,
            "divergence": {"meanKl": 0.00123, "topTokenAgreementPercent": 98.7, "maxLogitDifference": 0.5},
        }
    ],
    "progress": {"event": "progress", "done": 60, "total": 60},
}  # fmt: skip
REPORTS: dict[str, Json] = {"FineTuneJob": COMPLETE, "EvalJob": EVALUATED, "QuantizeJob": QUANTIZED}
"""What rank 0 of each kind says at its end."""
SPECS: dict[str, Json] = {
    "FineTuneJob": {
        "dataset": {"sources": [{"name": "tickets", "uri": {"location": "s3://data/t.jsonl"}}]},
        "training": {"maxSteps": 30, "globalBatchSize": 4},
        "outputs": [{"name": "merged", "type": "HuggingFace"}],
    },
    "EvalJob": {"tasks": [{"name": "tickets"}, {"name": "wikitext", "limit": 62}]},
    "QuantizeJob": {"outputs": [{"name": "int8", "type": "CompressedTensors", "scheme": "Int8WeightOnly"}]},
}


def manifest(name: str, *, namespace: str, kind: str = KIND, **spec: Any) -> Json:
    """A job that is as small as can be; keyword arguments replace blocks of its spec."""
    return {
        "apiVersion": "kubetune.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"uri": {"location": "s3://models/tiny"}}, "workspace": {"uri": "s3://runs"}}
        | SPECS[kind]
        | spec,
    }


class OperatorProcess:
    """`python -m kubetune_operator` with settings of its own."""

    def __init__(self, *, kubeconfig: Path, log: Path, settings: dict[str, str]) -> None:
        self.metrics_port, self.health_port = free_ports(2)
        self._log = log
        named = {f"KUBETUNE_OPERATOR_{key.upper()}": value for key, value in settings.items()}
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("KUBETUNE_OPERATOR_")},
            **named,
            "KUBECONFIG": str(kubeconfig),
            "KUBETUNE_OPERATOR_METRICS_PORT": str(self.metrics_port),
            "KUBETUNE_OPERATOR_HEALTH_PORT": str(self.health_port),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def another(self, *, log: Path) -> "OperatorProcess":
        """A second process with the same settings."""
        made = OperatorProcess(kubeconfig=Path(self._environment["KUBECONFIG"]), log=log, settings={})
        made._environment = self._environment | {
            "KUBETUNE_OPERATOR_METRICS_PORT": str(made.metrics_port),
            "KUBETUNE_OPERATOR_HEALTH_PORT": str(made.health_port),
        }
        return made

    def set(self, key: str, value: str) -> None:
        """Change a setting for the next start."""
        self._environment[f"KUBETUNE_OPERATOR_{key.upper()}"] = value

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kubetune_operator"], env=self._environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """End it as a node failure would."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it as the kubelet would; returns its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(how)
        code = self._process.wait(timeout=30)
        self._process = None
        return code

    @property
    def running(self) -> bool:
        return self._process is not None

    def get(self, path: str, *, port: int) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> str:
        return self.get("/metrics", port=self.metrics_port)[1]

    @property
    def log(self) -> str:
        return self._log.read_text()


class World:
    """What a test sees and does in its namespace."""

    def __init__(self, *, namespace: str, operator: OperatorProcess, control_plane: ControlPlane) -> None:
        self.kind = KIND
        self.namespace = namespace
        self.operator = operator
        self.control_plane = control_plane
        self.cluster = Cluster(qps=1000, burst=1000)
        self.node = f"node-of-{namespace}"
        self.node_lives = True
        self.logs: dict[str, str] = {}
        self.polls: list[str] = []

    def of(self, kind: str) -> "World":
        """The same world, where jobs are of another kind unless said otherwise."""
        other = copy.copy(self)
        other.kind = kind
        return other

    # ---------------------------------------------------------------------------------------------- a person

    async def apply(self, name: str = "run", **spec: Any) -> Json:
        return await self.cluster.create(manifest(name, namespace=self.namespace, kind=self.kind, **spec))

    async def patch(self, name: str = "run", **spec: Any) -> None:
        await self.cluster.patch(self.kind, namespace=self.namespace, name=name, patch={"spec": spec})

    async def job(self, name: str = "run") -> Json:
        found = await self.cluster.get(self.kind, namespace=self.namespace, name=name)
        assert found is not None, f"{self.kind} {name} is gone"
        return found

    async def status(self, name: str = "run") -> Json:
        return (await self.job(name)).get("status") or {}

    async def until(self, holds: Callable[[Json], Any], *, name: str = "run", seconds: float = 60.0) -> Json:
        """Wait until the status is as wanted; returns it."""
        deadline = time.monotonic() + seconds
        while True:
            status = await self.status(name)
            if holds(status):
                return status
            if time.monotonic() > deadline:
                shown = json.dumps(status, indent=1)
                raise TimeoutError(f"the status did not become as wanted:\n{shown}\n{self.operator.log[-4000:]}")
            await asyncio.sleep(0.05)

    async def state(self, state: str, *, name: str = "run", seconds: float = 60.0) -> Json:
        return await self.until(lambda status: status.get("state") == state, name=name, seconds=seconds)

    # ------------------------------------------------------------------------------------------- the cluster

    async def jobs(self) -> list[str]:
        return sorted(job["metadata"]["name"] for job in await self.cluster.list_all("Job", namespace=self.namespace))

    async def pods(self, component: str, *, name: str = "run", attempt: int | None = None) -> list[Json]:
        labels = {LABEL_JOB_NAME: name, LABEL_JOB_KIND: self.kind, LABEL_COMPONENT: component}
        if attempt is not None:
            labels[LABEL_ATTEMPT] = str(attempt)
        found = await self.cluster.list_all("Pod", namespace=self.namespace, labels=labels)
        return sorted(found, key=lambda pod: (index_of(pod), pod["metadata"]["creationTimestamp"]))

    async def live_pods(
        self, component: str, *, count: int, name: str = "run", attempt: int | None = None
    ) -> list[Json]:
        """Wait until the Job controller has made this many pods that are not finished."""
        deadline = time.monotonic() + 60
        while True:
            found = await self.pods(component, name=name, attempt=attempt)
            live = [pod for pod in found if phase_of(pod) in {"Pending", "Running"} and not is_deleting(pod)]
            if len(live) >= count:
                return live
            if time.monotonic() > deadline:
                shown = json.dumps(await self.status(name), indent=1)
                raise TimeoutError(f"{len(live)} of {count} pods: {shown}\n{self.operator.log[-4000:]}")
            await asyncio.sleep(0.05)

    async def gone(self, kind: str, object_name: str, *, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while await self.cluster.get(kind, namespace=self.namespace, name=object_name) is not None:
            assert time.monotonic() < deadline, f"{kind} {object_name} is still there\n{self.operator.log[-4000:]}"
            await asyncio.sleep(0.05)

    async def stopped(self, job_name: str) -> None:
        """Wait until a batch Job is suspended: the status tells the end of a job before its pods are stopped."""
        deadline = time.monotonic() + 20
        while True:
            found = await self.cluster.get("Job", namespace=self.namespace, name=job_name)
            assert found is not None
            if found["spec"].get("suspend"):
                return
            assert time.monotonic() < deadline, f"Job {job_name} still runs\n{self.operator.log[-4000:]}"
            await asyncio.sleep(0.05)

    # ------------------------------------------------------------------------------------------- the kubelet

    async def run(self, *pods: Json) -> None:
        """Have pods run on the node."""
        for pod in pods:
            if not pod["spec"].get("nodeName"):
                await self.bind(pod)
            await self._status(pod, phase="Running", state={"running": {"startedAt": _now()}})

    async def bind(self, pod: Json) -> None:
        path = object_path("Pod", namespace=self.namespace, name=pod["metadata"]["name"], subresource="binding")
        target = {"apiVersion": "v1", "kind": "Node", "name": self.node}
        body = {
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}, "target": target,
        }  # fmt: skip
        await self.cluster.request("POST", path, body=body)

    async def end(self, pod: Json, *, code: int, report: Json | None = None, reason: str = "", **status: Any) -> None:
        """Have a pod's container end."""
        terminated: Json = {"exitCode": code, "finishedAt": _now(), "startedAt": _now()}
        terminated["reason"] = reason or ("Error" if code else "Completed")
        if report is not None:
            terminated["message"] = json.dumps(report)
        phase = "Failed" if code else "Succeeded"
        await self._status(pod, phase=phase, state={"terminated": terminated}, **status)

    async def _status(self, pod: Json, *, phase: str, state: Json, **status: Any) -> None:
        container = {
            "name": "trainer", "image": "trainer", "imageID": IMAGE_ID, "ready": phase == "Running", "restartCount": 0,
            "state": state,
        }  # fmt: skip
        patch = {"status": {"phase": phase, "containerStatuses": [container], **status}}
        await self.cluster.patch(
            "Pod", namespace=self.namespace, name=pod["metadata"]["name"], patch=patch, subresource="status"
        )

    async def play_kubelet(self) -> None:
        """Let pods that are deleted end, as a kubelet does: the trainer writes a checkpoint and exits with 75.

        And say again and again that the node lives: Kubernetes evicts its pods otherwise, after a minute or two.
        """
        told = time.monotonic()
        while self.node_lives:
            with contextlib.suppress(ClusterError):
                if time.monotonic() - told >= HEARTBEAT_SECONDS:
                    await self.say_of_node("True")
                    told = time.monotonic()
                for pod in await self.cluster.list_all("Pod", namespace=self.namespace):
                    if is_deleting(pod) and pod["spec"].get("nodeName"):
                        await self._evict(pod)
            await asyncio.sleep(0.1)

    async def say_of_node(self, ready: str) -> None:
        """Set the Ready condition of the node."""
        condition = {"type": "Ready", "status": ready, "lastHeartbeatTime": _now()}
        if ready != "True":
            condition["lastTransitionTime"] = _now()
        patch = {"status": {"conditions": [condition]}}
        await self.cluster.patch("Node", namespace=None, name=self.node, patch=patch, subresource="status")

    async def lose_node(self) -> None:
        """Have the node fall silent, and Kubernetes notice it; that takes it 50 seconds elsewhere."""
        self.node_lives = False
        await asyncio.sleep(0.5)
        await self.say_of_node("Unknown")

    async def _evict(self, pod: Json) -> None:
        with contextlib.suppress(ClusterError):  # gone meanwhile
            if phase_of(pod) in {"Pending", "Running"}:
                await self.end(pod, code=75, report={"result": "Preempted", "exitCode": 75, "reason": "Preempted"})
            path = object_path("Pod", namespace=self.namespace, name=pod["metadata"]["name"])
            await self.cluster.request("DELETE", path, body={"gracePeriodSeconds": 0})

    async def serve_logs(self, directory: Path) -> web.AppRunner:
        """Register the node and answer for the logs of its pods, as the kubelet does."""

        async def answer(request: web.Request) -> web.Response:
            pod, lines = request.match_info["pod"], int(request.query.get("tailLines", "0"))
            self.polls.append(pod)
            return web.Response(text="\n".join(self.logs.get(pod, "").splitlines()[-lines:]))

        [port] = free_ports(1)
        certificate, key = Authority(directory).issue(Identity("kubelet", hosts=["127.0.0.1"]))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        app = web.Application()
        app.add_routes([web.get("/containerLogs/{namespace}/{pod}/{container}", answer)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "allocatable": {"memory": "8Gi", "cpu": "4"},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        await self.cluster.request(
            "POST",
            object_path("Node", namespace=None),
            body={"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node}, "status": status},
        )
        return runner

    # ---------------------------------------------------------------------------------------- shortcuts through life

    async def prepared(self, *, name: str = "run", report: Json | None = None) -> None:
        """Have the prepare pod do its work."""
        [pod] = await self.live_pods("prepare", count=1, name=name)
        await self.run(pod)
        await self.end(pod, code=0, report=report or PREPARED)

    async def training(self, *, name: str = "run", nodes: int = 1, attempt: int = 1) -> list[Json]:
        """Have all pods of an attempt run; returns them by index."""
        pods = await self.live_pods(KINDS[self.kind].component, count=nodes, name=name, attempt=attempt)
        await self.run(*pods)
        await self.until(lambda status: status.get("state") == "Running" and status["attempt"] == attempt, name=name)
        return pods

    async def complete(self, pods: list[Json], *, name: str = "run", **report: Any) -> Json:
        """Have all pods end well; keyword arguments replace parts of the report. Returns the final status."""
        for pod in pods:
            await self.end(pod, code=0, report=REPORTS[self.kind] | report if index_of(pod) == 0 else None)
        return await self.state("Complete", name=name)

    async def live(self, name: str = "run", **report: Any) -> Json:
        """Have a job that was applied do all its work; returns the final status."""
        await self.prepared(name=name)
        return await self.complete(await self.training(name=name), name=name, **report)

    async def delete(self, name: str = "run") -> None:
        await self.cluster.delete(self.kind, namespace=self.namespace, name=name)
        await self.gone(self.kind, name)

    async def reason(self, reason: str, *, name: str = "run") -> str:
        """Wait until the Running condition has a reason; returns its message."""
        status = await self.until(lambda status: running_of(status).get("reason") == reason, name=name)
        return str(running_of(status)["message"])

    async def config(self, name: str = "run") -> Json:
        found = await self.cluster.get("ConfigMap", namespace=self.namespace, name=config_name(self.kind, name))
        assert found is not None
        return yaml.safe_load(found["data"]["config.yaml"])


def running_of(status: Json) -> Json:
    """The Running condition of a status."""
    return condition_of(status, "Running")


def condition_of(status: Json, name: str) -> Json:
    """A condition of a status; empty if it was never set."""
    return next((item for item in status.get("conditions", []) if item["type"] == name), {})


@contextlib.asynccontextmanager
async def world_of(
    control_plane: ControlPlane,
    *,
    namespace: str,
    log: Path,
    start: bool = True,
    rights: list[Json] = RIGHTS,
    **settings: str,
) -> AsyncIterator[World]:
    """Start an operator for one namespace and take it down afterwards."""
    defaults = {
        "namespaces": namespace, "namespace": namespace, "lease_seconds": "3", "progress_interval_seconds": "0.5",
        "stuck_seconds": "1", "log_level": "INFO",
    }  # fmt: skip
    environment = pytest.MonkeyPatch()
    environment.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    kubeconfig = _grant(control_plane, namespace=namespace, rights=rights)
    operator = OperatorProcess(kubeconfig=kubeconfig, log=log, settings=defaults | settings)
    world = World(namespace=namespace, operator=operator, control_plane=control_plane)
    node = await world.serve_logs(log.parent / "pki")
    kubelet = asyncio.create_task(world.play_kubelet())
    if start:
        operator.start()
    try:
        yield world
    finally:
        kubelet.cancel()
        if operator.running:
            operator.stop()
        await node.cleanup()
        await world.cluster.request("DELETE", object_path("Node", namespace=None, name=world.node))
        await world.cluster.close()
        environment.undo()


def user_of(namespace: str) -> str:
    """The user that the operator of a namespace is to the API server."""
    return f"operator-of-{namespace}"


def _grant(control_plane: ControlPlane, *, namespace: str, rights: list[Json]) -> Path:
    """Make a user with the operator's rights in one namespace; returns its kubeconfig."""
    user = user_of(namespace)
    metadata = {"name": "operator", "namespace": namespace}
    subjects = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"}
    api = "rbac.authorization.k8s.io/v1"
    objects = [
        {"apiVersion": api, "kind": "Role", "metadata": metadata, "rules": rights},
        {"apiVersion": api, "kind": "RoleBinding", "metadata": metadata, "subjects": subjects, "roleRef": role},
    ]
    control_plane.kubectl("create", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    return control_plane.kubeconfig_for(user)


def grant_nodes(control_plane: ControlPlane, *, namespace: str) -> None:
    """Let the operator of a namespace list nodes, as the chart does unless it is installed for single namespaces."""
    name, user = f"nodes-of-{namespace}", user_of(namespace)
    control_plane.kubectl("create", "clusterrole", name, "--verb=list", "--resource=nodes")
    control_plane.kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", f"--user={user}")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
