"""The native node runs what a user's cluster would run, is reached from the host, and leaves nothing when it ends."""

import secrets
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import binaries, images, local, node

pytestmark = pytest.mark.cluster

WEB = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 9000}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: web
      image: localhost/kubetune-s3:dev
      args: [serve, http, --addr=:9000, --config=, /data]
      readinessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
      volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
"""
ASK = """
apiVersion: v1
kind: Pod
metadata: {name: ask}
spec:
  restartPolicy: Never
  containers:
    - name: ask
      image: localhost/kubetune-s3:dev
      args: [lsf, ":http:", "--http-url=http://web.%s.svc.cluster.local", --config=, --contimeout=20s]
"""


@pytest.fixture(scope="module")
def was_up() -> bool:
    """Whether the cluster was up before these tests, and so is somebody's."""
    return local.is_up()


@pytest.fixture(scope="module")
def cluster(was_up: bool) -> Iterator[local.Cluster]:
    if local._uses_kind():
        pytest.skip("the native node; here a Docker daemon answers and kind is used")
    running = local.up()
    images.load_files(local.S3_IMAGE, files={"/rclone": binaries.binary("rclone")}, entrypoint=["/rclone"])
    yield running
    if not was_up:
        local.down()


@pytest.fixture(scope="module")
def own_cluster(was_up: bool, cluster: local.Cluster) -> local.Cluster:
    """The cluster, for tests that end it."""
    if was_up:
        pytest.skip("somebody uses the cluster; it may be ended after: python -m tests.cluster down")
    return cluster


@pytest.fixture
def own_namespace(cluster: local.Cluster) -> Iterator[str]:
    name = f"node-{secrets.token_hex(3)}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("wait", "-n", name, "--for=create", "serviceaccount/default", "--timeout=30s")
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def test_a_restricted_pod_serves_the_host_and_other_pods_by_its_service(
    cluster: local.Cluster, own_namespace: str
) -> None:
    cluster.kubectl("label", "namespace", own_namespace, "pod-security.kubernetes.io/warn=restricted")
    applied = cluster.kubectl("apply", "-n", own_namespace, "-f", "-", input=WEB)
    assert "would violate PodSecurity" not in applied.stderr
    cluster.kubectl("wait", "-n", own_namespace, "--for=condition=Ready", "pod/web", "--timeout=60s")
    for kind, field, port in (("service", ".spec.clusterIP", 80), ("pod", ".status.podIP", 9000)):
        address = cluster.kubectl("get", "-n", own_namespace, kind, "web", f"--output=jsonpath={{{field}}}").stdout
        local._wait_for(f"http://{address}:{port}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{address}:{port}/", timeout=20) as answer:
            assert answer.status == 200
    cluster.kubectl("apply", "-n", own_namespace, "-f", "-", input=ASK % own_namespace)
    cluster.kubectl("wait", "-n", own_namespace, "--for=jsonpath={.status.phase}=Succeeded", "pod/ask", "--timeout=60s")


def test_kubectl_reads_logs_and_runs_commands_in_a_pod(cluster: local.Cluster, own_namespace: str) -> None:
    cluster.kubectl("apply", "-n", own_namespace, "-f", "-", input=WEB)
    cluster.kubectl("wait", "-n", own_namespace, "--for=condition=Ready", "pod/web", "--timeout=60s")
    assert "HTTP Server started" in cluster.kubectl("logs", "-n", own_namespace, "web").stdout
    version = cluster.kubectl("exec", "-n", own_namespace, "web", "--", "/rclone", "version", "--config=").stdout
    assert version.startswith("rclone v")


def test_a_second_up_changes_nothing_and_takes_no_time(cluster: local.Cluster) -> None:
    begun = time.monotonic()
    assert local.up() == cluster
    assert time.monotonic() - begun < 5


def test_a_killed_node_leaves_nothing_and_comes_up_again_with_its_images(own_cluster: local.Cluster) -> None:
    if (pid := node._init_pid()) is None:
        pytest.fail("the node is not up")
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    # The kernel takes a network namespace down a moment after its last process.
    deadline = time.monotonic() + 10
    while remains() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert remains() == []
    local.up()
    assert own_cluster.kubectl("get", "pods", "-A", "-o", "name").stdout == ""
    assert local.S3_IMAGE in images.loaded()


def test_down_leaves_nothing(own_cluster: local.Cluster) -> None:
    local.down()
    time.sleep(1)
    assert remains() == []
    assert not [path for name in node.CGROUPS for path in Path("/sys/fs/cgroup").glob(f"*/{name}")]
    assert local.up() == own_cluster


def remains() -> list[str]:
    """Processes, mounts, links and firewall rules of a node, as the host sees them."""
    seen = {
        "process": subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout,
        "mount": Path("/proc/mounts").read_text(),
        "link": subprocess.run(["ip", "-oneline", "link"], check=True, capture_output=True, text=True).stdout,
        "rule": subprocess.run(["iptables-save"], check=True, capture_output=True, text=True).stdout,
    }
    signs = {
        "process": (str(binaries.folder("kubernetes") / "kubelet"), str(binaries.folder("containerd"))),
        "mount": (str(node.CLUSTER),),
        "link": ("kubetune0", "cni0", "veth"),
        "rule": ("KUBE-", "CNI-"),
    }
    return [f"{what}: {line}" for what, text in seen.items() for line in text.splitlines() if _any(signs[what], line)]


def _any(signs: tuple[str, ...], line: str) -> bool:
    return any(sign in line for sign in signs)
