"""The few programs that come from Debian instead of the Go module proxy."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from tests.cluster.progress import note, stage

NODE: Final = {
    "runc": ("runc", "containerd starts containers with it"),
    "iptables": ("iptables", "kube-proxy writes the rules of Services with it"),
    "conntrack": ("conntrack", "kube-proxy forgets connections to pods that are gone"),
    "ip": ("iproute2", "the node's bridge and its wire to the host"),
}
IMAGES: Final = {
    "buildah": ("buildah", "builds the Dockerfiles without a daemon"),
    "mmdebstrap": ("mmdebstrap", "makes a base image where no image registry answers"),
}


def ensure(programs: Mapping[str, tuple[str, str]]) -> None:
    """Install the packages whose programs are missing, saying which and why.

    Raises:
        RuntimeError: A program is missing and this is not root on a Debian.
    """
    # A login that is not root's often leaves the system's folders out.
    if "/usr/sbin" not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    missing = {package: why for name, (package, why) in programs.items() if shutil.which(name) is None}
    if not missing:
        return
    for package, why in missing.items():
        note(f"{package}: {why}")
    if os.geteuid() or shutil.which("apt-get") is None:
        raise RuntimeError(f"install {' '.join(missing)} first: only root on a Debian can do it by itself")
    with stage(f"installing {', '.join(missing)} with apt-get"):
        _apt("update")
        _apt("install", "--yes", "--no-install-recommends", *missing)


def _apt(*arguments: str) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command: Sequence[str] = ["apt-get", "--quiet", "--quiet", *arguments]
    ran = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
