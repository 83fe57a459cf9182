"""The local cluster as its users see it, whichever of the two kinds it is: a native node, or kind where Docker answers.

cluster = local.up()
local.load("trainer")
cluster.kubectl("apply", "-f", "examples/tickets.yaml")
"""

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
from botocore.config import Config

from tests.cluster import binaries, images, kind, kubectl, locks, node, packages, settings
from tests.cluster.paths import CACHE, CLUSTER, HERE, LOGS, ROOT
from tests.cluster.progress import note, stage

S3_NAMESPACE: Final = "kubetune-s3"
S3_ENDPOINT: Final = "http://s3.kubetune-s3:9000"
"""What a job's `storage.s3.endpoint` says."""
S3_ACCESS_KEY: Final = "kubetune-access-key"
S3_SECRET_KEY: Final = "kubetune-secret-key"
S3_REGION: Final = "us-east-1"
S3_IMAGE: Final = "localhost/kubetune-s3:dev"
CHART: Final = ROOT / "helm" / "kubetune"
OPERATOR_NAMESPACE: Final = "kubetune-system"
RELEASE: Final = "kubetune"
FIRST_TIME_BYTES: Final = 30 * 10**9
"""Disk that an empty cache needs at most, while the trainer's image is brought into the node; less stays taken."""


@dataclass(frozen=True)
class Cluster:
    """A running local cluster.

    Attributes:
        kubeconfig: A kubeconfig of an administrator.
        is_kind: Whether it is a kind cluster; otherwise it is the native node.
    """

    kubeconfig: Path
    is_kind: bool

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 (the word that subprocess.run uses)
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator; `input` is its standard input, `check` raises when it fails."""
        return kubectl.run(self.kubeconfig, *args, input=input, check=check)

    def helm(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Helm as administrator; `check` raises when it fails, with what Helm said as a note."""
        command = [str(binaries.binary("helm")), "--kubeconfig", str(self.kubeconfig), *args]
        return kubectl.completed(command, check=check)

    @functools.cached_property
    def s3_endpoint(self) -> str:
        """Where the host reaches the S3 server."""
        if self.is_kind:
            return kind.S3_ENDPOINT
        address = self.kubectl("get", "-n", S3_NAMESPACE, "service", "s3", "--output=jsonpath={.spec.clusterIP}").stdout
        return f"http://{address}:9000"

    @functools.cached_property
    def s3(self) -> Any:
        """A boto3 client of the S3 server."""
        return boto3.client(
            "s3",
            endpoint_url=self.s3_endpoint,
            aws_access_key_id=S3_ACCESS_KEY,
            aws_secret_access_key=S3_SECRET_KEY,
            region_name=S3_REGION,
            # The server is one hop away, never behind a proxy of the environment.
            config=Config(proxies={}),
        )

    def make_bucket(self, bucket: str) -> None:
        """Make a bucket unless it exists."""
        with contextlib.suppress(self.s3.exceptions.BucketAlreadyExists, self.s3.exceptions.BucketAlreadyOwnedByYou):
            self.s3.create_bucket(Bucket=bucket)

    def upload(self, source: Path, uri: str) -> None:
        """Put a file, or every file of a folder, to `s3://bucket/key`; the bucket is made if it does not exist."""
        bucket, key = _bucket_and_key(uri)
        self.make_bucket(bucket)
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                name = f"{key.rstrip('/')}/{path.relative_to(source)}" if source.is_dir() else key
                self.s3.upload_file(str(path), bucket, name.lstrip("/"))

    def download(self, uri: str, target: Path) -> None:
        """Write every object under `s3://bucket/prefix` into the folder `target`."""
        bucket, prefix = _bucket_and_key(uri.rstrip("/") + "/")
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                path = target / entry["Key"].removeprefix(prefix)
                path.parent.mkdir(parents=True, exist_ok=True)
                self.s3.download_file(bucket, entry["Key"], str(path))


def up() -> Cluster:
    """Bring the cluster up, or leave it as it is when it is up; one process at a time."""
    with _lock():
        if not _uses_kind():
            node.up()
            if settings.PAUSE_IMAGE not in images.loaded():
                files = {"/pause": binaries.binary("pause")}
                images.load_files(settings.PAUSE_IMAGE, files=files, entrypoint=["/pause"])
        else:
            kind.up()
    return running()


def down() -> None:
    """Take the cluster down and remove what it made; the images stay for the next time."""
    with _lock():
        if _uses_kind():
            kind.down()
        else:
            node.down()


def bring_up(*, values: Sequence[str] = ()) -> Cluster:
    """Bring up all of it: node, both images of the checkout, S3 server, chart; `values` go to `install`."""
    prepare()
    cluster = up()
    load("operator", "trainer")
    start_s3()
    install(values=values)
    return cluster


@contextlib.contextmanager
def whole(*, values: Sequence[str] = ()) -> Iterator[Cluster]:
    """All of it for a while: what was up before stays up, otherwise it is taken down at the end."""
    was_up = is_up()
    try:
        yield bring_up(values=values)
    finally:
        if not was_up:
            down()


def lacks() -> str:
    """What this machine lacks for a node; empty if it can have one."""
    return "" if _uses_kind() or os.geteuid() == 0 else "root, or a Docker daemon"


def is_up() -> bool:
    """Whether the cluster is up."""
    return kind.is_up() if _uses_kind() else node.is_up()


def running() -> Cluster:
    """The cluster that is up.

    Raises:
        RuntimeError: None is.
    """
    if not is_up():
        raise RuntimeError("the cluster is not up: python -m tests.cluster up")
    return Cluster(kind.KUBECONFIG if _uses_kind() else settings.KUBECONFIG, is_kind=_uses_kind())


def prepare() -> None:
    """Make what an empty cache lacks, the programs while the images' packages download."""
    if _uses_kind():
        binaries.ensure("kind", "kubectl", "helm", "rclone")
        return
    if missing := lacks():
        note(f"a node would need {missing}: only what a control plane needs is built")
        binaries.ensure(*settings.CONTROL_PLANE_PROGRAMS, "helm")
        return
    _check_disk()
    packages.ensure(packages.NODE | packages.IMAGES)
    with ThreadPoolExecutor() as pool:
        programs = pool.submit(binaries.ensure, *settings.NODE_PROGRAMS, "pause", "helm", "rclone")
        images.build_dependencies(*images.IMAGES)
        programs.result()
    binaries.forget_build_cache()


def _check_disk() -> None:
    """Refuse an empty cache on a disk that it would fill, on which pods do not start and builds fail half-way."""
    if images.STORE.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free
    if free < FIRST_TIME_BYTES:
        raise RuntimeError(
            f"the first time needs {FIRST_TIME_BYTES / 1e9:.0f} GB of free disk at {CACHE}, got {free / 1e9:.0f} GB; "
            "KUBETUNE_CACHE names another place"
        )


def load(*names: str) -> None:
    """Build images (`operator`, `trainer`) from the checkout as it is and bring them into the cluster."""
    for name in names:
        (kind if _uses_kind() else images).load(name)


def start_s3() -> str:
    """Start the S3 server in the cluster unless it runs; returns where the host reaches it."""
    cluster = running()
    if _uses_kind() or S3_IMAGE not in images.loaded():
        load_files = (kind if _uses_kind() else images).load_files
        load_files(S3_IMAGE, files={"/rclone": binaries.binary("rclone")}, entrypoint=["/rclone"])
    with stage("starting the S3 server"):
        cluster.kubectl("apply", "-f", str(HERE / "manifests" / "s3.yaml"))
        try:
            cluster.kubectl("rollout", "status", "-n", S3_NAMESPACE, "deployment/s3", "--timeout=60s")
        except subprocess.CalledProcessError as error:
            error.add_note(cluster.kubectl("get", "events", "-n", S3_NAMESPACE, "--sort-by=.lastTimestamp").stdout)
            raise
        _wait_for(cluster.s3_endpoint)
    return cluster.s3_endpoint


def install(*, values: Sequence[str] = ()) -> None:
    """Install or upgrade the chart with Helm and wait for the operator.

    Args:
        values: More of Helm's `--set` arguments, for instance `settings.logLevel=DEBUG`.
    """
    cluster = running()
    # The node has no accelerators, so a job's are mapped to processes. The image's tag stays the same when the code
    # changes, so the pod's annotations have to change with it.
    settled = ["trainer.cpuProcesses=1", f"podAnnotations.code={_operator_code()}", *values]
    with stage("installing the chart"):
        cluster.helm(
            "upgrade", "--install", RELEASE, str(CHART), "--namespace", OPERATOR_NAMESPACE, "--create-namespace",
            *(f"--set={value}" for value in settled), "--wait", "--timeout=120s",
        )  # fmt: skip


def s3_secret(namespace: str, *, name: str = "s3") -> str:
    """The manifest of a credentials Secret for the S3 server, for the namespace of a job."""
    keys = f"{{AWS_ACCESS_KEY_ID: {S3_ACCESS_KEY}, AWS_SECRET_ACCESS_KEY: {S3_SECRET_KEY}}}"
    return f"apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: {namespace}}}\nstringData: {keys}\n"


def logs() -> Path:
    """The folder with one log per component and, under `pods`, what containers wrote."""
    if _uses_kind() and kind.is_up():
        kind.export_logs()
    return LOGS


@functools.cache
def _uses_kind() -> bool:
    """KUBETUNE_CLUSTER (`kind` or `native`) decides; unset, kind where a Docker daemon answers."""
    wanted = os.environ.get("KUBETUNE_CLUSTER", "")
    if wanted not in ("", "kind", "native"):
        raise ValueError(f"KUBETUNE_CLUSTER must be kind or native, got {wanted}")
    return wanted == "kind" or (not wanted and kind.answers())


def _lock() -> contextlib.AbstractContextManager[None]:
    return locks.held(CLUSTER.with_suffix(".lock"))


def _operator_code() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "operator").rglob("*.py")):
        digest.update(path.read_bytes())
    return f"sha256-{digest.hexdigest()[:12]}"


def _wait_for(url: str) -> None:
    """Wait until the host reaches a Service; its rules follow its endpoints by a moment."""
    address = urllib.parse.urlsplit(url)
    deadline = time.monotonic() + 30
    while not node.answers(str(address.hostname), int(address.port or 80)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody answers at {url}")
        time.sleep(0.2)


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
