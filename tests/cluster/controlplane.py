"""A Kubernetes control plane without a node: etcd, kube-apiserver and, when asked, kube-controller-manager.

It needs no root, takes free ports on loopback, keeps its data in a temporary folder and leaves nothing behind. Custom
resources, CEL rules, RBAC and watches behave as on any cluster: this is the real API server. Pods stay Pending.

    with ControlPlane() as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", "crds/")
"""

import contextlib
import json
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from tests.cluster import kubectl
from tests.cluster.binaries import ensure
from tests.cluster.pki import Authority, Identity
from tests.cluster.progress import stage
from tests.ports import free_ports

ADMIN = Identity("admin", groups=["system:masters"])
CONTROLLER_MANAGER = Identity("system:kube-controller-manager")
SERVICE_RANGE = "10.96.0.0/16"
API_SERVER_HOSTS = (
    "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "127.0.0.1", "10.96.0.1",
)  # fmt: skip
READY_SECONDS = 90.0


class ControlPlane:
    """An API server of one's own, from entering the block to leaving it.

    Args:
        controller_manager: Also run kube-controller-manager: Jobs make Pods, owned objects are collected.
        audit_log: Where the API server writes one JSON line per finished request (who, verb, object), or None.

    Attributes:
        kubeconfig: A kubeconfig of a cluster administrator.
        server: The API server's URL.
        audit_log: As given.
    """

    def __init__(self, *, controller_manager: bool = False, audit_log: Path | None = None) -> None:
        self.audit_log = audit_log
        self._controller_manager = controller_manager
        self._directory = Path(tempfile.mkdtemp(prefix="kubetune-control-plane-"))
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.kubeconfig = self._directory / "admin.kubeconfig"
        self.server = ""

    def __enter__(self) -> Self:
        names = ["etcd", "kube-apiserver", "kubectl"]
        if self._controller_manager:
            names.append("kube-controller-manager")
        self._programs = ensure(*names)
        try:
            with stage(f"control plane: {', '.join(names[:2] + names[3:])}"):
                self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End what was started and remove the data; does nothing the second time."""
        for _, process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                # The API server waits for open watches longer than a test run wants to.
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 (the word that subprocess.run uses)
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator; `input` is its standard input, `check` raises when it fails."""
        return kubectl.run(self.kubeconfig, *args, input=input, check=check)

    def kubeconfig_for(self, user: str, *, groups: Sequence[str] = ()) -> Path:
        """Write a kubeconfig for any user, for tests of what a role may do; returns its path."""
        identity = Identity(user, groups=groups)
        path = self._directory / f"{user.replace(':', '-')}.kubeconfig"
        return self._authority.kubeconfig(identity, server=self.server, path=path)

    def _start(self) -> None:
        self._authority = Authority(self._directory / "pki")
        client_port, peer_port, api_port = free_ports(3)
        self.server = f"https://127.0.0.1:{api_port}"
        self._authority.kubeconfig(ADMIN, server=self.server, path=self.kubeconfig)
        self._run("etcd", etcd_arguments(self._directory / "etcd", client_port=client_port, peer_port=peer_port))
        arguments = api_server_arguments(
            self._authority, hosts=API_SERVER_HOSTS, port=api_port, etcd_port=client_port, audit_log=self.audit_log
        )
        extra = [] if self._controller_manager else ["--disable-admission-plugins=ServiceAccount"]
        self._run("kube-apiserver", [*arguments, "--bind-address=127.0.0.1", *extra])
        wait_ready(self.server, self._authority.certificate, check=self._check)
        if self._controller_manager:
            kubeconfig = self.kubeconfig_for(CONTROLLER_MANAGER.name)
            self._run("kube-controller-manager", controller_manager_arguments(self._authority, kubeconfig))
            self._wait_for_default_account()

    def _run(self, name: str, arguments: Sequence[str]) -> None:
        command = [str(self._programs[name]), *arguments]
        if setpriv := shutil.which("setpriv"):
            # A test run that is killed takes its servers with it.
            command = [setpriv, "--pdeathsig", "KILL", *command]
        with (self._directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.append((name, process))

    def _check(self) -> None:
        for name, process in self._processes:
            if (code := process.poll()) is not None:
                log = (self._directory / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} ended with code {code}:\n{log[-4000:]}")

    def _wait_for_default_account(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while self.kubectl("get", "serviceaccount", "default", check=False).returncode:
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError("kube-controller-manager made no default service account")
            time.sleep(0.2)


def etcd_arguments(data: Path, *, client_port: int, peer_port: int) -> list[str]:
    """How etcd is started: on loopback, not waiting for the disk."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        f"--data-dir={data}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def api_server_arguments(
    authority: Authority, *, hosts: Sequence[str], port: int, etcd_port: int, audit_log: Path | None = None
) -> list[str]:
    """How kube-apiserver is started; where it listens and what it advertises is the caller's."""
    certificate, key = authority.issue(Identity("kube-apiserver", hosts=hosts))
    kubelet_certificate, kubelet_key = authority.issue(Identity("apiserver-kubelet", groups=["system:masters"]))
    public, private = authority.service_account_keys()
    arguments = [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--secure-port={port}",
        f"--tls-cert-file={certificate}",
        f"--tls-private-key-file={key}",
        f"--client-ca-file={authority.certificate}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={public}",
        f"--service-account-signing-key-file={private}",
        "--authorization-mode=Node,RBAC",
        f"--kubelet-client-certificate={kubelet_certificate}",
        f"--kubelet-client-key={kubelet_key}",
        "--kubelet-preferred-address-types=InternalIP",
        "--allow-privileged=true",
        "--enable-priority-and-fairness=false",
    ]
    return arguments + _audit_arguments(authority.directory, audit_log)


def controller_manager_arguments(authority: Authority, kubeconfig: Path) -> list[str]:
    """How kube-controller-manager is started: alone, so without an election, and without ports that nobody reads."""
    _, private = authority.service_account_keys()
    return [
        f"--kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={private}",
        f"--root-ca-file={authority.certificate}",
        "--use-service-account-credentials",
        "--allocate-node-cidrs=false",
        "--leader-elect=false",
        "--secure-port=0",
    ]


def wait_ready(server: str, certificate: Path, *, check: Callable[[], None]) -> None:
    """Return when the API server says that it is ready.

    Args:
        server: Its URL.
        certificate: The authority that signed its certificate.
        check: Called between attempts; raises when waiting has become pointless.
    """
    context = ssl.create_default_context(cafile=str(certificate))
    # /readyz is open to everybody; a proxy from the environment has no business on loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        check()
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(f"{server}/readyz", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"the API server at {server} was not ready in {READY_SECONDS:.0f} s")


def audited(path: Path) -> Iterator[dict[str, Any]]:
    """The finished requests in an audit log, oldest first."""
    for line in path.read_text().splitlines():
        yield json.loads(line)


def _audit_arguments(directory: Path, audit_log: Path | None) -> list[str]:
    if audit_log is None:
        return []
    policy = directory / "audit-policy.json"
    rules = {"level": "Metadata", "omitStages": ["RequestReceived", "ResponseStarted"]}
    policy.write_text(json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [rules]}))
    return [f"--audit-policy-file={policy}", f"--audit-log-path={audit_log}"]
