"""The images: built from their Dockerfiles, and brought into the node's containerd a layer at a time.

An image is a base, a dependency layer and a thin code layer. The first two are made and loaded once per set of pinned
versions; a change of code costs a build of the last stage and the transfer of that layer alone. buildah builds them,
without a daemon.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.cluster import locks, oci, packages, settings
from tests.cluster.binaries import binary
from tests.cluster.paths import CACHE, ROOT
from tests.cluster.progress import note, stage

DIRECTORY: Final = CACHE / "images"
STORE: Final = DIRECTORY / "store"
RUN: Final = Path("/run") / f"kubetune-buildah-{hashlib.sha256(str(STORE).encode()).hexdigest()[:8]}"
"""What buildah remembers until the machine restarts; one folder per store."""
BASE_REFERENCE: Final = "python:3.11-slim"
BASE_PACKAGES: Final = "python3,python3-venv,ca-certificates"
PULL_SECONDS: Final = 120
CODE_STAGE: Final = "FROM ${DEPENDENCIES}"
CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"
BUILD_SETTINGS: Final = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_DEFAULT_TIMEOUT",
    "UV_INDEX_URL",
    "UV_DEFAULT_INDEX",
)
"""Variables of this machine that a build needs to reach packages; it sees them while it runs and does not keep them."""
OVERLAY_OPAQUE: Final = "trusted.overlay.opaque"


@dataclass(frozen=True)
class Image:
    """One of our images: its name, its Dockerfile and the extra of pyproject.toml that it installs."""

    name: str
    dockerfile: Path
    extra: str

    @property
    def reference(self) -> str:
        """What manifests call it."""
        return f"localhost/{self.name}:dev"


IMAGES: Final = {
    "operator": Image("kubetune-operator", ROOT / "operator" / "Dockerfile", "operator"),
    "trainer": Image("kubetune-trainer", ROOT / "trainer_image" / "Dockerfile", "trainer"),
}


def load(name: str) -> str:
    """Build an image from the checkout as it is and bring it into the running node; returns its reference."""
    image = IMAGES[name]
    packages.ensure(packages.IMAGES)
    with locks.held(DIRECTORY / "lock"):
        dependencies = _build_dependencies(image)
        layers = _load_dependencies(dependencies)
        with stage(f"image {image.name}: the code layer"):
            _build(image.dockerfile, image.reference, "--build-arg", f"DEPENDENCIES={dependencies}")
            _load_code(image.reference, layers)
    return image.reference


def build_dependencies(*names: str) -> None:
    """Build the dependency stages of images whose versions have not been built before."""
    packages.ensure(packages.IMAGES)
    with locks.held(DIRECTORY / "lock"):
        for name in names:
            _build_dependencies(IMAGES[name])


def _build_dependencies(image: Image) -> str:
    base = _ensure_base()
    reference = f"localhost/{image.name}-dependencies:{_dependencies_key(image, base)}"
    if not _exists(reference):
        with stage(f"image {image.name}: the dependencies (once per set of versions)"):
            _build(image.dockerfile, reference, "--target", "dependencies", "--build-arg", f"BASE_IMAGE={base}")
    return reference


def load_files(reference: str, *, files: Mapping[str, Path], entrypoint: list[str]) -> None:
    """Bring an image that holds only `files` (name inside: file outside) into the running node."""
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(directory) / "image.tar"
        oci.write_image(archive, reference=reference, files=files, entrypoint=entrypoint)
        with archive.open("rb") as source:
            _import(lambda pipe: shutil.copyfileobj(source, pipe))


def loaded() -> set[str]:
    """The names of the images that the running node has."""
    return set(_ctr("images", "list", "--quiet").split())


def prune() -> None:
    """Remove the images that the checkout no longer uses, from the build store and from a node that runs."""
    base = _ensure_base()
    kept = {image.reference for image in IMAGES.values()}
    kept |= {f"localhost/{image.name}-dependencies:{_dependencies_key(image, base)}" for image in IMAGES.values()}
    for reference in _built() - kept - {base}:
        note(f"removing {reference}")
        _buildah("rmi", "--force", reference)
    _buildah("rmi", "--prune", "--force")
    if settings.CONTAINERD_SOCKET.exists():
        for reference in {name for name in loaded() if "-dependencies:" in name} - kept:
            _ctr("images", "remove", reference)


def _built() -> set[str]:
    listed = _buildah_output("images", "--format={{.Name}}:{{.Tag}}")
    return {line for line in listed.split() if "<none>" not in line}


def _dependencies_key(image: Image, base: str) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        "base": base,
        "stage": image.dockerfile.read_text().split(CODE_STAGE)[0],
        "constraints": (ROOT / "constraints.txt").read_text(),
        "dependencies": project["dependencies"],
        "extra": project["optional-dependencies"][image.extra],
    }
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]


def _ensure_base() -> str:
    """The base image: python:3.11-slim where an image registry answers, otherwise a Debian with the same Python."""
    stand_in = "localhost/kubetune-base:bookworm"
    for reference in (BASE_REFERENCE, stand_in):
        if _exists(reference):
            return reference
    with stage(f"base image: {BASE_REFERENCE}"):
        if _buildah("pull", "--quiet", *_policy(), BASE_REFERENCE, check=False, timeout=PULL_SECONDS):
            return BASE_REFERENCE
        note("no image registry answers; a minimal Debian with Python 3.11 stands in")
        _make_stand_in(stand_in)
    return stand_in


def _make_stand_in(reference: str) -> None:
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as context:
        archive = ["bookworm", f"{context}/base.tar"]
        _run(["mmdebstrap", "--quiet", "--variant=minbase", f"--include={BASE_PACKAGES}", *archive])
        (Path(context) / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        _buildah("bud", "--quiet", *_policy(), "--tag", reference, context)


def _build(dockerfile: Path, reference: str, *arguments: str) -> None:
    with _build_secret() as secret:
        cache = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
        cache.mkdir(parents=True, exist_ok=True)
        volumes = [f"{cache}:/tmp/uv-cache", f"{_host_certificates()}:{CERTIFICATES}:ro"]
        _buildah(
            "bud", *_policy(), "--pull-never", "--layers=false", "--secret", f"id=environment,src={secret}",
            *(f"--volume={volume}" for volume in volumes), *arguments,
            "--file", str(dockerfile), "--tag", reference, str(ROOT),
        )  # fmt: skip


@contextmanager
def _build_secret() -> Iterator[Path]:
    values = {name: os.environ[name] for name in BUILD_SETTINGS if name in os.environ}
    values |= {"PIP_CERT": CERTIFICATES, "SSL_CERT_FILE": CERTIFICATES, "UV_CACHE_DIR": "/tmp/uv-cache"}  # noqa: S108 (inside the build)
    with tempfile.NamedTemporaryFile("w", suffix=".env") as file:
        file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
        file.flush()
        yield Path(file.name)


def _host_certificates() -> str:
    named = os.environ.get("SSL_CERT_FILE")
    return named if named and Path(named).is_file() else CERTIFICATES


def _load_dependencies(reference: str) -> list[dict[str, Any]]:
    """Bring a dependency image into the node unless it has it; returns the descriptors of its layers."""
    record = DIRECTORY / "layers" / f"{reference.replace('/', '_').replace(':', '_')}.json"
    if record.exists() and reference in loaded():
        return json.loads(record.read_text())
    with stage(f"loading {reference} into the node"), tempfile.TemporaryDirectory(dir=DIRECTORY) as directory:
        # Written as a folder, because every other form compresses, which takes minutes and is undone at once.
        _buildah("push", "--quiet", *_policy(), "--disable-compression", "--format=oci", reference, f"dir:{directory}")
        manifest = oci.Blob(oci.MANIFEST, (Path(directory) / "manifest.json").read_bytes())
        _import(lambda pipe: _stream(pipe, reference, manifest, Path(directory)))
        layers = json.loads(manifest.content)["layers"]
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(layers))
    return layers


def _stream(pipe: Any, reference: str, manifest: oci.Blob, directory: Path) -> None:
    with tarfile.open(fileobj=pipe, mode="w|") as archive:
        content = json.loads(manifest.content)
        for blob in (*content["layers"], content["config"]):
            algorithm, _, name = blob["digest"].partition(":")
            archive.add(directory / name, f"blobs/{algorithm}/{name}")
            # Three copies of some gigabytes are two too many.
            (directory / name).unlink()
        oci.add_blob(archive, manifest)
        oci.add_index(archive, reference=reference, manifest=manifest.descriptor)


def _load_code(reference: str, layers: list[dict[str, Any]]) -> None:
    """Bring an image into the node whose layers but the last are there already."""
    layer = oci.Blob(oci.LAYER, _tar_of_changes(_top_layer(reference)))
    described = json.loads(_buildah_output("inspect", "--type=image", reference))["OCIv1"]
    described["rootfs"]["diff_ids"] = [*described["rootfs"]["diff_ids"][:-1], layer.digest]
    config = oci.json_blob(oci.CONFIG, described)
    manifest = oci.image_manifest(config, [*layers, layer.descriptor])

    def write(pipe: Any) -> None:
        with tarfile.open(fileobj=pipe, mode="w|") as archive:
            for blob in (layer, config, manifest):
                oci.add_blob(archive, blob)
            oci.add_index(archive, reference=reference, manifest=manifest.descriptor)

    _import(write)


def _top_layer(reference: str) -> Path:
    images = json.loads((STORE / "overlay-images" / "images.json").read_text())
    layer = next(image["layer"] for image in images if reference in image.get("names", []))
    return STORE / "overlay" / layer / "diff"


def _tar_of_changes(directory: Path) -> bytes:
    """What an overlay folder changes, as a layer: a deleted file is a character device there and a `.wh.` file here."""
    with tempfile.SpooledTemporaryFile() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in sorted(directory.rglob("*")):
                name = str(path.relative_to(directory))
                if stat.S_ISCHR(path.lstat().st_mode):
                    oci.add_bytes(archive, str(Path(name).with_name(f".wh.{path.name}")), b"")
                    continue
                archive.add(path, name, recursive=False)
                if path.is_dir() and OVERLAY_OPAQUE in os.listxattr(path):
                    oci.add_bytes(archive, f"{name}/.wh..wh..opq", b"")
        buffer.seek(0)
        return buffer.read()


def _import(write: Callable[[Any], None]) -> None:
    """Give containerd an archive; it keeps unpacked layers only, since nobody pulls from it."""
    command = [*_ctr_command(), "images", "import", "--local", "--discard-unpacked-layers", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # what ctr says explains it
        write(process.stdin)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")


def _ctr(*arguments: str) -> str:
    return _run([*_ctr_command(), *arguments])


def _ctr_command() -> list[str]:
    return [str(binary("ctr")), "--address", str(settings.CONTAINERD_SOCKET), "--namespace", "k8s.io"]


def _exists(reference: str) -> bool:
    return _buildah("inspect", "--type=image", "--format={{.FromImageID}}", reference, check=False)


def _policy() -> list[str]:
    """Accept unsigned images, said in a file of our own instead of the machine's."""
    path = DIRECTORY / "policy.json"
    if not path.exists():
        path.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    return [f"--signature-policy={path}"]


def _buildah(*arguments: str, check: bool = True, timeout: float | None = None) -> bool:
    try:
        _buildah_output(*arguments, timeout=timeout)
    except (RuntimeError, subprocess.TimeoutExpired):
        if check:
            raise
        return False
    return True


def _buildah_output(*arguments: str, timeout: float | None = None) -> str:
    environment = os.environ | {"STORAGE_DRIVER": "overlay", "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(DIRECTORY)}
    command = ["buildah", "--root", str(STORE), "--runroot", str(RUN), *arguments]
    return _run(command, environment=environment, timeout=timeout)


def _run(command: list[str], *, environment: Mapping[str, str] | None = None, timeout: float | None = None) -> str:
    ran = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=timeout)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}")
    return ran.stdout
