"""The control plane behaves as the tests that build on it expect."""

import contextlib
from pathlib import Path

import pytest

from tests.cluster.controlplane import ControlPlane, audited

pytestmark = pytest.mark.control_plane

CONFIG_MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: seen}\n"


def test_an_object_survives_the_round_trip_and_the_write_is_audited(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=CONFIG_MAP)
    assert control_plane.kubectl("get", "-n", namespace, "configmap", "seen", "-o", "name").stdout == "configmap/seen\n"
    assert control_plane.audit_log is not None
    references = [event["objectRef"] for event in audited(control_plane.audit_log) if event["verb"] == "create"]
    written = [each for each in references if (each["resource"], each.get("namespace")) == ("configmaps", namespace)]
    assert len(written) == 1


def test_each_test_has_a_namespace_of_its_own(control_plane: ControlPlane, namespace: str) -> None:
    assert not control_plane.kubectl("get", "-n", namespace, "configmaps", "-o", "name").stdout


def test_a_user_without_rights_is_refused(control_plane: ControlPlane) -> None:
    kubeconfig = control_plane.kubeconfig_for("nobody")
    refused = control_plane.kubectl(f"--kubeconfig={kubeconfig}", "get", "secrets", "-A", check=False)
    assert refused.returncode
    assert 'User "nobody" cannot list resource "secrets"' in refused.stderr


def test_nothing_is_left_when_it_ends() -> None:
    with ControlPlane() as own:
        directory = own.kubeconfig.parent
        assert own.kubectl("get", "--raw", "/readyz").stdout == "ok"
        running = processes_that_name(directory)
        assert len(running) == 2
    assert not directory.exists()
    assert not [pid for pid in running if Path(f"/proc/{pid}").exists()]


def processes_that_name(directory: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # a process that ended meanwhile
            if str(directory).encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_a_job_makes_pods_with_controllers(
    control_plane_with_controllers: ControlPlane, namespace_with_controllers: str
) -> None:
    kubectl, namespace = control_plane_with_controllers.kubectl, namespace_with_controllers
    kubectl("create", "job", "-n", namespace, "--image=none", "once")
    kubectl("wait", "-n", namespace, "--for=create", "pod", "-l", "job-name=once", "--timeout=30s")
