"""The cluster where a Docker daemon answers: kind, with kind-config.yaml of the repository's root.

Unlike the native node it has not been run by the machine that runs the tests, which has no Docker.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.cluster import oci
from tests.cluster.binaries import binary
from tests.cluster.images import IMAGES
from tests.cluster.paths import CLUSTER, LOGS, ROOT
from tests.cluster.progress import stage

NAME: Final = "kubetune"
CONFIG: Final = ROOT / "kind-config.yaml"
KUBECONFIG: Final = CLUSTER / "kind.kubeconfig"
S3_ENDPOINT: Final = "http://127.0.0.1:30900"
"""The port that kind-config.yaml maps to the S3 server's node port."""


def answers() -> bool:
    """Whether there is a Docker daemon to run kind on."""
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], check=False, capture_output=True, timeout=30).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def is_up() -> bool:
    """Whether our kind cluster exists."""
    return NAME in _kind("get", "clusters").split()


def up() -> None:
    """Create the kind cluster unless it exists."""
    CLUSTER.mkdir(parents=True, exist_ok=True)
    if not is_up():
        with stage("creating the kind cluster"):
            _kind("create", "cluster", f"--config={CONFIG}", f"--kubeconfig={KUBECONFIG}", "--wait=120s")
    _kind("export", "kubeconfig", f"--name={NAME}", f"--kubeconfig={KUBECONFIG}")


def down() -> None:
    """Delete the kind cluster."""
    with stage("deleting the kind cluster"):
        _kind("delete", "cluster", f"--name={NAME}", f"--kubeconfig={KUBECONFIG}")


def load(name: str) -> str:
    """Build an image from the checkout with Docker and load it into the nodes; returns its reference."""
    image = IMAGES[name]
    with stage(f"image {image.name}"):
        _run(["docker", "build", "--quiet", f"--file={image.dockerfile}", f"--tag={image.reference}", str(ROOT)])
        _kind("load", "docker-image", image.reference, f"--name={NAME}")
    return image.reference


def load_files(reference: str, *, files: Mapping[str, Path], entrypoint: list[str]) -> None:
    """Load an image that holds only `files` (name inside: file outside) into the nodes."""
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory) / "image.tar"
        oci.write_image(archive, reference=reference, files=files, entrypoint=entrypoint)
        _kind("load", "image-archive", str(archive), f"--name={NAME}")


def export_logs() -> None:
    """Bring the nodes' logs to where the native node writes its own."""
    _kind("export", "logs", str(LOGS), f"--name={NAME}")


def _kind(*arguments: str) -> str:
    return _run([str(binary("kind")), *arguments])


def _run(command: list[str]) -> str:
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-4000:]}")
    return ran.stdout
