"""The chart on the real API server: what it may do, what is refused, and that it goes without a trace."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import CHART, EVERYTHING, Rendered, run_helm
from tests.cluster.controlplane import ControlPlane

pytestmark = pytest.mark.control_plane

ACCOUNT = "system:serviceaccount:kubetune-system:kubetune"


@pytest.fixture(scope="module")
def cluster(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """The control plane with the namespaces of the tests; the operator's own refuses pods that are not restricted."""
    for name in ("kubetune-system", "team-a", "team-b"):
        control_plane.kubectl("create", "namespace", name)
    enforce = "pod-security.kubernetes.io/enforce=restricted"
    control_plane.kubectl("label", "namespace", "kubetune-system", enforce)
    yield control_plane
    for name in ("kubetune-system", "team-a", "team-b"):
        control_plane.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def installed(cluster: ControlPlane, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Install the release `kubetune`; returns what Helm says. It is uninstalled in the end."""
    common = [f"--kubeconfig={cluster.kubeconfig}", "--namespace=kubetune-system"]

    def install(values: dict[str, Any]) -> str:
        # The control plane has the CRDs already, and they are not this release's.
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values | {"crds": {"enabled": False}}))
        arguments = ["upgrade", "--install", "kubetune", str(CHART), f"--values={tmp_path / 'values.yaml'}"]
        return run_helm(*arguments, *common, "--wait=hookOnly").stdout

    yield install
    run_helm("uninstall", "kubetune", *common, check=False)


def can(cluster: ControlPlane, verb: str, resource: str, *, namespace: str, subresource: str = "") -> bool:
    where = [f"--as={ACCOUNT}", f"--namespace={namespace}", f"--subresource={subresource}"]
    asked = cluster.kubectl("auth", "can-i", verb, resource, *where, check=False)
    return asked.stdout.strip() == "yes"


def test_the_operator_may_do_its_work_in_all_namespaces_and_read_no_secret(
    cluster: ControlPlane, installed: Callable[..., str]
) -> None:
    installed({})
    for namespace in ("team-a", "team-b"):
        assert can(cluster, "create", "jobs.batch", namespace=namespace)
        for plural in ("finetunejobs", "evaljobs", "quantizejobs"):
            assert can(cluster, "patch", f"{plural}.kubetune.dev", subresource="status", namespace=namespace)
        for verb in ("get", "list", "watch"):
            assert not can(cluster, verb, "secrets", namespace=namespace)
    assert can(cluster, "update", "leases.coordination.k8s.io/kubetune", namespace="kubetune-system")
    assert not can(cluster, "update", "leases.coordination.k8s.io/another", namespace="kubetune-system")


def test_the_namespaced_operator_may_do_its_work_there_and_nowhere_else(
    cluster: ControlPlane, installed: Callable[..., str]
) -> None:
    installed({"namespaces": ["team-a"]})
    assert can(cluster, "create", "jobs.batch", namespace="team-a")
    assert can(cluster, "watch", "pods", namespace="team-a")
    assert not can(cluster, "get", "secrets", namespace="team-a")
    for verb, resource in (("create", "jobs.batch"), ("list", "finetunejobs.kubetune.dev"), ("list", "nodes")):
        assert not can(cluster, verb, resource, namespace="team-b")
        assert not can(cluster, verb, resource, namespace="kubetune-system")


def test_an_upgrade_turns_everything_on_and_uninstall_leaves_nothing(
    cluster: ControlPlane, installed: Callable[..., str]
) -> None:
    installed({})
    values = {key: value for key, value in EVERYTHING.items() if key != "monitoring"}
    installed(values | {"monitoring": {"dashboard": {"enabled": True}}})
    selector = "--selector=app.kubernetes.io/instance=kubetune"
    kinds = "all,configmap,serviceaccount,role,rolebinding,clusterrole,clusterrolebinding,networkpolicy,pdb"

    def left() -> set[str]:
        shown = cluster.kubectl("get", kinds, selector, "--all-namespaces", "--output=name")
        return set(shown.stdout.split())

    assert {"deployment.apps/kubetune", "networkpolicy.networking.k8s.io/kubetune"} <= left()
    run_helm("uninstall", "kubetune", f"--kubeconfig={cluster.kubeconfig}", "--namespace=kubetune-system")
    assert not left()


def test_pods_are_admitted_where_pod_security_is_restricted(
    cluster: ControlPlane, render: Callable[..., Rendered]
) -> None:
    for spec in render({}).pod_specs():
        metadata = {"name": "probe", "namespace": "kubetune-system"}
        pod = json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        assert "pod/probe" in cluster.kubectl("create", "--dry-run=server", "--filename=-", input=pod).stdout


def test_the_namespace_would_refuse_a_pod_with_privileges(
    cluster: ControlPlane, render: Callable[..., Rendered]
) -> None:
    spec, *_ = render({}).pod_specs()
    container = {key: value for key, value in spec["containers"][0].items() if key != "securityContext"}
    metadata = {"name": "probe", "namespace": "kubetune-system"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec | {"containers": [container]}}
    refused = cluster.kubectl("create", "--dry-run=server", "--filename=-", input=json.dumps(pod), check=False)
    assert "violates PodSecurity" in refused.stderr


@pytest.mark.parametrize("values", [{}, {"namespaces": ["team-a"]}], ids=["cluster", "namespaced"])
def test_the_manifest_in_the_notes_is_accepted(
    values: dict[str, Any], cluster: ControlPlane, installed: Callable[..., str]
) -> None:
    notes = installed(values)
    manifest = notes.partition("<<'EOF'\n")[2].partition("  EOF")[0]
    assert "kind: FineTuneJob" in manifest
    said = cluster.kubectl("create", "--dry-run=server", "--namespace=team-a", "--filename=-", input=manifest)
    assert "finetunejob.kubetune.dev/first created" in said.stdout
