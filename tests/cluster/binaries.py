"""The programs of a cluster, built from the Go module proxy and kept by the hash of what they are built from.

Each folder under `go/` holds the go.mod and go.sum of one group of programs. A program is built when first asked for.
`KUBEBUILDER_ASSETS`, the convention of envtest, is honoured for the three programs that such a folder holds.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from tests.cluster import locks
from tests.cluster.paths import BIN, CACHE, HERE
from tests.cluster.progress import stage

KUBERNETES_VERSION: Final = "1.36.3"

LOCK: Final = CACHE / "bin.lock"
BUILD_CACHE: Final = BIN / "go-build"
"""What Go compiles on the way, unless GOCACHE names a place: gigabytes that nobody needs once programs are there."""

CNI_PLUGINS: Final = {"bridge": "main", "loopback": "main", "host-local": "ipam", "portmap": "meta"}

GROUPS: Final[Mapping[str, Mapping[str, str]]] = {
    "kubernetes": {
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
    },
    "etcd": {"etcd": "go.etcd.io/etcd/server/v3"},
    "containerd": {
        name: f"github.com/containerd/containerd/v2/cmd/{name}"
        for name in ("containerd", "containerd-shim-runc-v2", "ctr")
    },
    "cni": {
        name: f"github.com/containernetworking/plugins/plugins/{kind}/{name}" for name, kind in CNI_PLUGINS.items()
    },
    "coredns": {"coredns": "github.com/coredns/coredns"},
    "helm": {"helm": "helm.sh/helm/v4/cmd/helm"},
    "kind": {"kind": "sigs.k8s.io/kind"},
    "kueue": {"kueue": "sigs.k8s.io/kueue/cmd/kueue"},
    "rclone": {"rclone": "github.com/rclone/rclone"},
    "pause": {"pause": "kubetune.dev/cluster/pause"},
}
"""Per folder of `go/`: the programs and the packages they are built from."""

ASSETS: Final = ("kube-apiserver", "etcd", "kubectl")
"""What a folder named by KUBEBUILDER_ASSETS holds."""


def ensure(*names: str) -> dict[str, Path]:
    """Build what is missing of the programs `names`; returns where each one is.

    Raises:
        RuntimeError: Go is missing, or a build failed; the message ends with what Go said.
    """
    found = {name: asset for name in names if (asset := _asset(name)) is not None}
    wanted = [name for name in names if name not in found]
    for group in dict.fromkeys(_group(name) for name in wanted):
        found |= _ensure_group(group, [name for name in wanted if name in GROUPS[group]])
    return found


def binary(name: str) -> Path:
    """Where the program `name` is, built now if it has to be."""
    return ensure(name)[name]


def forget_build_cache() -> None:
    """Give back the disk that building took; waits for another process that builds."""
    with locks.held(LOCK):
        shutil.rmtree(BUILD_CACHE, ignore_errors=True)


def folder(group: str) -> Path:
    """The cache folder of a group; its name changes with the versions and the flags."""
    source = HERE / "go" / group
    digest = hashlib.sha256("\0".join(_flags(group)).encode())
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return BIN / f"{group}-{digest.hexdigest()[:12]}"


def _asset(name: str) -> Path | None:
    directory = os.environ.get("KUBEBUILDER_ASSETS")
    if not directory or name not in ASSETS or not (path := Path(directory) / name).is_file():
        return None
    return path


def _group(name: str) -> str:
    for group, programs in GROUPS.items():
        if name in programs:
            return group
    known = ", ".join(sorted(program for programs in GROUPS.values() for program in programs))
    raise ValueError(f"no program is called {name}; there are {known}")


def _ensure_group(group: str, names: Iterable[str]) -> dict[str, Path]:
    target = folder(group)
    found = {name: target / name for name in names}
    if all(path.is_file() for path in found.values()):
        return found
    with locks.held(LOCK):
        if missing := [name for name, path in found.items() if not path.is_file()]:
            with stage(f"building {', '.join(missing)}"):
                _build(group, missing, target)
    return found


def _build(group: str, names: list[str], target: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise RuntimeError(f"building {', '.join(names)} needs Go (https://go.dev/dl) on PATH")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as made:
        # Several at once share their packages and link side by side; one alone may have a name of its own.
        output = f"{made}/{names[0]}" if len(names) == 1 else f"{made}/"
        packages = [GROUPS[group][name] for name in names]
        _go(go, ["build", *_flags(group), "-o", output, *packages], HERE / "go" / group)
        for name in names:
            (Path(made) / name).replace(target / name)


def _go(go: str, arguments: list[str], directory: Path) -> None:
    environment = {"GOCACHE": str(BUILD_CACHE)} | os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"}
    ran = subprocess.run(
        [go, *arguments], cwd=directory, env=environment, check=False, stderr=subprocess.PIPE, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"go {' '.join(arguments)} in {directory} failed:\n{ran.stderr[-4000:]}")


def _flags(group: str) -> list[str]:
    link = "-s -w"
    if group == "kubernetes":
        # Without these the servers call themselves v0.0.0, which Helm and other clients refuse.
        major, minor, _ = KUBERNETES_VERSION.split(".")
        values = {"gitVersion": f"v{KUBERNETES_VERSION}", "gitMajor": major, "gitMinor": minor}
        link += "".join(f" -X k8s.io/component-base/version.{key}={value}" for key, value in values.items())
    return ["-trimpath", f"-ldflags={link}"]
