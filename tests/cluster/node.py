"""The native node: a whole Kubernetes in namespaces of its own, started and ended from here.

The node's first process is `init.py`. It has its own process, mount and network namespaces, so ending it ends
everything; what is left to remove are a few folders and cgroups. One wire joins it to the host, which so reaches pods
and Services by their addresses.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.cluster import kubectl, packages, settings
from tests.cluster.binaries import ensure
from tests.cluster.paths import CLUSTER, LOGS, ROOT
from tests.cluster.progress import stage
from tests.cluster.settings import KUBECONFIG

PID_FILE: Final = Path("/run/kubetune-node.json")
"""The node's first process; there is one node per machine, whichever cache it is of."""
READY_SECONDS: Final = 120.0
END_SECONDS: Final = 15.0
CGROUPS: Final = ("kubepods", "k8s.io")
"""What kubelet and containerd make at the root of each cgroup hierarchy."""
ANSWERING: Final = (("10.96.0.1", 443), (settings.BRIDGE_ADDRESS, 53))
"""What pods rely on from their first moment: the API server by its Service (kube-proxy), and the name server."""
DATA: Final = ("etcd", "kubelet", "pki", "cni", "volume-plugins")
"""What an ended node leaves that the next one must not find; images stay, in `containerd`."""


def is_up() -> bool:
    """Whether the node's first process lives."""
    return _init_pid() is not None


def up() -> None:
    """Bring the node up, or leave it as it is when it is up; returns when it takes pods."""
    if os.geteuid():
        raise RuntimeError("a node needs root: it makes namespaces, mounts and cgroups")
    if is_up():
        return
    packages.ensure(packages.NODE)
    programs = ensure(*settings.NODE_PROGRAMS)
    _remove_remains()
    with stage("starting the node"):
        _prepare()
        settings.write(programs)
        pid = _start_init()
        _connect(pid)
        _wait_ready()


def answers(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def down() -> None:
    """End the node and remove what it made, its images excepted; does nothing the second time."""
    if (pid := _init_pid()) is not None:
        with stage("ending the node"):
            _end(pid)
    _remove_remains()


def _prepare() -> None:
    CLUSTER.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(exist_ok=True)
    for path in (Path("/var/lib/cni"), Path("/var/lib/kubelet"), CLUSTER / "volume-plugins"):
        path.mkdir(parents=True, exist_ok=True)


def _start_init() -> int:
    namespaces = ["unshare", "--pid", "--fork", "--mount-proc", "--net", "--mount"]
    command = [*namespaces, sys.executable, "-m", "tests.cluster.init"]
    (LOGS / "init.log").unlink(missing_ok=True)
    log = os.open(LOGS / "init.log", os.O_WRONLY | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    files = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Not Popen: the node outlives this process, which Popen takes for a mistake.
    parent = os.posix_spawnp(command[0], command, environment, file_actions=files, setsid=True)
    os.close(log)
    os.close(null)
    children = Path(f"/proc/{parent}/task/{parent}/children")
    deadline = time.monotonic() + END_SECONDS
    while not (found := children.read_text().split()):
        if os.waitpid(parent, os.WNOHANG)[0] or time.monotonic() > deadline:
            raise RuntimeError(f"the node's first process did not start:\n{_tail('init')}")
        time.sleep(0.02)
    pid = int(found[0])
    PID_FILE.write_text(json.dumps({"pid": pid, "started": _started(pid), "directory": str(CLUSTER)}))
    return pid


def _connect(pid: int) -> None:
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net"]
    link, uplink = settings.HOST_LINK, "uplink"
    steps = [
        ["ip", "link", "add", link, "type", "veth", "peer", "name", uplink, "netns", str(pid)],
        ["ip", "address", "add", f"{settings.HOST_ADDRESS}/30", "dev", link],
        ["ip", "link", "set", link, "up"],
        [*inside, "ip", "address", "add", f"{settings.NODE_ADDRESS}/30", "dev", uplink],
        [*inside, "ip", "link", "set", uplink, "up"],
        ["ip", "route", "add", settings.POD_RANGE, "via", settings.NODE_ADDRESS],
        ["ip", "route", "add", "10.96.0.0/16", "via", settings.NODE_ADDRESS],
    ]
    for step in steps:
        subprocess.run(step, check=True)


def _wait_ready() -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        condition = '{.status.conditions[?(@.type=="Ready")].status}'
        asked = kubectl.run(KUBECONFIG, "get", "node", settings.NODE, f"--output=jsonpath={condition}", check=False)
        account = kubectl.run(KUBECONFIG, "get", "serviceaccount", "default", check=False)
        if asked.stdout == "True" and not account.returncode and all(answers(*each) for each in ANSWERING):
            return
        if not is_up() or time.monotonic() > deadline:
            raise RuntimeError(f"the node is not ready; its logs are in {LOGS}:\n{_tail('init')}{_tail('kubelet')}")
        time.sleep(0.3)


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while is_up():
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _remove_remains() -> None:
    """Remove what outlives the namespaces, also after a node that was not ended but killed."""
    PID_FILE.unlink(missing_ok=True)
    # The kernel takes the wire away a moment after the node's last process; the next `up` may not want to wait.
    subprocess.run(["ip", "link", "delete", settings.HOST_LINK], check=False, capture_output=True)
    settings.CONTAINERD_SOCKET.unlink(missing_ok=True)
    for name in DATA:
        shutil.rmtree(CLUSTER / name, ignore_errors=True)
    for cgroup in (path for name in CGROUPS for path in Path("/sys/fs/cgroup").glob(f"*/{name}")):
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
    for folder in ("/var/lib/cni", "/var/lib/kubelet"):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def _init_pid() -> int | None:
    try:
        recorded = json.loads(PID_FILE.read_text())
    except FileNotFoundError:
        return None
    # A pid alone may belong to somebody else by now.
    if _started(recorded["pid"]) != recorded["started"]:
        return None
    if recorded["directory"] != str(CLUSTER):
        raise RuntimeError(f"a node of another cache runs on this machine: {recorded['directory']}")
    return int(recorded["pid"])


def _started(pid: int) -> str | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _tail(name: str) -> str:
    path = LOGS / f"{name}.log"
    lines = path.read_text(errors="replace").splitlines()[-15:] if path.exists() else []
    return f"--- {name}\n" + "\n".join(lines) + "\n"
