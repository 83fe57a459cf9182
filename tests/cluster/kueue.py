"""The real Kueue beside a control plane: its manager as a process, its CRDs and the webhooks that guard batch Jobs.

It needs no node: the API server reaches the webhooks on loopback, by a Service whose external name is `localhost`.

    with Kueue(control_plane):
        control_plane.kubectl("apply", "-f", "my-queues.yaml")
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import yaml

from tests.cluster.binaries import binary
from tests.cluster.controlplane import ControlPlane
from tests.cluster.paths import HERE
from tests.cluster.progress import stage
from tests.ports import free_ports

Json = dict[str, Any]

MODULE: Final = "sigs.k8s.io/kueue"
NAMESPACE: Final = "kueue-system"
SERVICE: Final = "kueue-webhook-service"
SECRET: Final = "kueue-webhook-server-cert"
GUARDED_GROUPS: Final = ("batch", "kueue.x-k8s.io")
"""API groups whose webhooks are installed; the others belong to kinds that the control plane does not have."""
READY_SECONDS: Final = 60.0


class Kueue:
    """Kueue on a control plane, from entering the block to leaving it; its CRDs stay."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._control_plane = control_plane
        self._directory = Path(tempfile.mkdtemp(prefix="kubetune-kueue-"))
        self._webhook_port, self._health_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        program = binary("kueue")
        try:
            with stage("Kueue"):
                self._apply(self._manifests())
                self._start(program)
                self._mount_certificate()
                self._wait(self._is_ready, what="Kueue's webhooks")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and take its webhooks away, which nobody would answer any more."""
        for kind in ("validating", "mutating"):
            name = f"kueue-{kind}-webhook-configuration"
            self._control_plane.kubectl("delete", f"{kind}webhookconfiguration", name, "--ignore-not-found")
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def log(self) -> str:
        """What it wrote."""
        path = self._directory / "kueue.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _manifests(self) -> list[Json]:
        components = _source() / "config" / "components"
        patches = {patch["metadata"]["name"]: patch for patch in _read(components / "crd" / "patches")}
        crds = []
        for crd in _read(components / "crd" / "bases"):
            if patch := patches.get(crd["metadata"]["name"]):
                crd["spec"]["conversion"] = patch["spec"]["conversion"]
                self._point(crd["spec"]["conversion"]["webhook"]["clientConfig"])
            crds.append(crd)
        return [*_place(), *crds, *self._webhooks(components / "webhook" / "manifests.yaml")]

    def _webhooks(self, path: Path) -> Iterator[Json]:
        for manifest in yaml.safe_load_all(path.read_text()):
            manifest["metadata"]["name"] = f"kueue-{manifest['metadata']['name']}"
            manifest["webhooks"] = [
                webhook
                for webhook in manifest["webhooks"]
                if all(set(rule["apiGroups"]) <= set(GUARDED_GROUPS) for rule in webhook["rules"])
            ]
            for webhook in manifest["webhooks"]:
                self._point(webhook["clientConfig"])
            yield manifest

    def _point(self, client: Json) -> None:
        client["service"] |= {"name": SERVICE, "namespace": NAMESPACE, "port": self._webhook_port}

    def _apply(self, manifests: list[Json]) -> None:
        content = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
        self._control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=content)

    def _start(self, program: Path) -> None:
        settings = {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self._health_port}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {
                "host": "127.0.0.1",
                "port": self._webhook_port,
                "certDir": str(self._directory / "certificate"),
            },
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": True, "webhookServiceName": SERVICE, "webhookSecretName": SECRET},
            "integrations": {"frameworks": ["batch/job"]},
        }
        path = self._directory / "kueue.yaml"
        path.write_text(yaml.safe_dump(settings))
        command = [str(program), f"--config={path}", "--feature-gates=VisibilityOnDemand=false"]
        if setpriv := shutil.which("setpriv"):
            # A test run that is killed takes it along.
            command = [setpriv, "--pdeathsig", "KILL", *command]
        environment = os.environ | {"KUBECONFIG": str(self._control_plane.kubeconfig)}
        with (self._directory / "kueue.log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _mount_certificate(self) -> None:
        """Do the kubelet's part: bring the certificate that Kueue makes for itself into its folder."""
        found: Json = {}

        def is_made() -> bool:
            read = self._control_plane.kubectl("get", "secret", SECRET, "-n", NAMESPACE, "--output=json")
            found.update(json.loads(read.stdout).get("data") or {})
            return "tls.crt" in found

        self._wait(is_made, what="Kueue's certificate")
        directory = self._directory / "certificate"
        directory.mkdir()
        for name in ("ca.crt", "tls.key", "tls.crt"):
            (directory / name).write_bytes(base64.b64decode(found[name]))

    def _is_ready(self) -> bool:
        """Whether the webhooks answer; a flavor that is only tried passes through two of them."""
        flavor = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "probe"}}
        tried = self._control_plane.kubectl(
            "create", "--dry-run=server", "-f", "-", input=json.dumps(flavor), check=False
        )
        return tried.returncode == 0

    def _wait(self, holds: Callable[[], bool], *, what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not holds():
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"Kueue ended with code {code}:\n{self.log[-4000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} not ready in {READY_SECONDS:.0f} s:\n{self.log[-4000:]}")
            time.sleep(0.2)


def _source() -> Path:
    """Kueue's source as Go keeps it, fetched if it has to be; its manifests are part of it."""
    ran = subprocess.run(
        ["go", "mod", "download", "-json", MODULE],
        cwd=HERE / "go" / "kueue",
        env=os.environ | {"GOWORK": "off"},
        check=True,
        capture_output=True,
        text=True,
    )
    return Path(json.loads(ran.stdout)["Dir"])


def _read(directory: Path) -> Iterator[Json]:
    for path in sorted(directory.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def _place() -> list[Json]:
    """Kueue's namespace, the Service by which the API server finds its webhooks, and an empty Secret for their key."""
    metadata = {"namespace": NAMESPACE}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata | {"name": SERVICE},
            "spec": {"type": "ExternalName", "externalName": "localhost"},
        },
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata | {"name": SECRET}},
    ]
