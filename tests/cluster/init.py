"""The node's first process: it makes the node's network, starts the components, and starts those again that end.

It runs in process, mount and network namespaces of its own (`node.py` makes them), as a container would: when it ends,
the kernel takes down every process, mount, bridge, route and iptables rule of the node, whatever state they were in.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster import controlplane
from tests.cluster.paths import LOGS
from tests.cluster.settings import API_PORT, BRIDGE, BRIDGE_ADDRESS, COMPONENTS_FILE, CONTAINERD_SOCKET

RESTART_SECONDS = 1.0
SOCKET_SECONDS = 30.0


def main() -> None:
    """Start everything, then reap children until SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end())
    _own_folders()
    _bridge()
    content = json.loads(COMPONENTS_FILE.read_text())
    components = {component["name"]: component for component in content["components"]}
    running = {_start(components[name]): name for name in ("etcd", "kube-apiserver", "containerd")}
    _wait_for_containerd()
    if _remove_leftovers(content["ctr"]):
        # containerd keeps in memory what it read at its start, so it must read again.
        restarted = next(pid for pid, name in running.items() if name == "containerd")
        os.kill(restarted, signal.SIGTERM)
        os.waitpid(restarted, 0)
        del running[restarted]
        CONTAINERD_SOCKET.unlink(missing_ok=True)
        running[_start(components["containerd"])] = "containerd"
        _wait_for_containerd()
    controlplane.wait_ready(f"https://127.0.0.1:{API_PORT}", Path(content["authority"]), check=lambda: None)
    running |= {_start(each): name for name, each in components.items() if name not in running.values()}
    _say("all components are started")
    _reap(running, components)


def end() -> None:
    """End every process of the node but this one, then this one."""
    _say("asked to end")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(-1, signal.SIGKILL)
    sys.exit(0)


def _own_folders() -> None:
    # What the programs write to fixed places stays in the node: folders in memory that only it sees.
    for path in ("/run", "/var/log", "/var/lib/cni", "/var/lib/kubelet"):
        _do("mount", "-t", "tmpfs", "tmpfs", path)
    _do("mount", "--make-rshared", "/")


def _bridge() -> None:
    for setting in ("ipv4/ip_forward", "bridge/bridge-nf-call-iptables"):
        path = Path("/proc/sys/net") / setting
        if path.exists():
            path.write_text("1")
    _do("ip", "link", "set", "lo", "up")
    _do("ip", "link", "add", BRIDGE, "type", "bridge")
    _do("ip", "address", "add", f"{BRIDGE_ADDRESS}/24", "dev", BRIDGE)
    _do("ip", "link", "set", BRIDGE, "up")


def _start(component: Mapping[str, Any]) -> int:
    name = component["name"]
    path = os.pathsep.join([*component["path"], os.environ["PATH"]])
    log = os.open(LOGS / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    files = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
    # Not Popen: it would reap children that `_reap` waits for.
    pid = os.posix_spawn(component["command"][0], component["command"], os.environ | {"PATH": path}, file_actions=files)
    os.close(log)
    os.close(null)
    _say(f"started {name}")
    return pid


def _wait_for_containerd() -> None:
    deadline = time.monotonic() + SOCKET_SECONDS
    while not CONTAINERD_SOCKET.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"containerd made no socket in {SOCKET_SECONDS:.0f} s")
        time.sleep(0.05)


def _remove_leftovers(ctr: str) -> bool:
    """Remove the containers of an earlier life of the node; returns whether there were any."""
    command = [ctr, "--address", str(CONTAINERD_SOCKET), "--namespace", "k8s.io"]
    removed = False
    for kind in ("containers", "sandboxes"):
        listed = subprocess.run([*command, kind, "list"], check=True, capture_output=True, text=True)
        if names := [line.split()[0] for line in listed.stdout.splitlines()[1:]]:
            removed = True
            subprocess.run([*command, kind, "remove", *names], check=False)
    return removed


def _reap(running: dict[int, str], components: Mapping[str, Mapping[str, Any]]) -> None:
    while True:
        pid, status = os.wait()
        if name := running.pop(pid, None):
            _say(f"{name} ended with {os.waitstatus_to_exitcode(status)}; starting it again")
            time.sleep(RESTART_SECONDS)
            running[_start(components[name])] = name


def _do(*command: str) -> None:
    subprocess.run(command, check=True)


def _say(what: str) -> None:
    print(time.strftime("%H:%M:%S"), what, flush=True)


if __name__ == "__main__":
    main()
