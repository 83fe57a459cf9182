"""Fixtures that more than one area uses: the real API server, with our custom resources, and a namespace per test."""

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import local
from tests.cluster.controlplane import ControlPlane
from tests.cluster.paths import ROOT
from tests.order import in_order, longest_files
from tests.parity import write_table

CRDS = ROOT / "crds"
_numbers = itertools.count(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a node on a machine that cannot have one; CI, which sets KUBETUNE_EVERY_TIER, fails instead."""
    if item.get_closest_marker("cluster") and (missing := local.lacks()):
        if os.environ.get("KUBETUNE_EVERY_TIER"):
            pytest.fail(f"a node needs {missing}", pytrace=False)
        pytest.skip(f"a node needs {missing}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; xdist hands them out in this order with --no-loadscope-reorder."""
    items[:] = in_order(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the families that were checked, and the longest files wherever the longest tests are named."""
    write_table(terminalreporter)
    if config.getoption("durations"):
        passed = [report for key in ("", "passed", "failed") for report in terminalreporter.stats.get(key, [])]
        terminalreporter.write_sep("=", "slowest files")
        for name, seconds in longest_files(passed):
            terminalreporter.write_line(f"{seconds:6.1f}s {name}")


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The real kube-apiserver and etcd with the CRDs of `crds/`; no controllers, so nothing acts on what a test writes.

    Its requests are in `control_plane.audit_log`, one JSON line each.
    """
    with ControlPlane(audit_log=tmp_path_factory.mktemp("audit") / "audit.jsonl") as running:
        _apply_crds(running)
        yield running


@pytest.fixture(scope="session")
def control_plane_with_controllers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """As `control_plane`, with kube-controller-manager: Jobs make Pods, owned objects are collected."""
    audit_log = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    with ControlPlane(controller_manager=True, audit_log=audit_log) as running:
        _apply_crds(running)
        yield running


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace of `control_plane`."""
    yield from _namespace(control_plane)


@pytest.fixture
def namespace_with_controllers(control_plane_with_controllers: ControlPlane) -> Iterator[str]:
    """A fresh namespace of `control_plane_with_controllers`."""
    yield from _namespace(control_plane_with_controllers)


def _namespace(control_plane: ControlPlane) -> Iterator[str]:
    name = f"test-{next(_numbers)}"
    control_plane.kubectl("create", "namespace", name)
    yield name
    # Without a controller manager it stays "Terminating", which is all that a test needs.
    control_plane.kubectl("delete", "namespace", name, "--wait=false")


def _apply_crds(control_plane: ControlPlane) -> None:
    if files := _crd_files():
        control_plane.kubectl("apply", "--server-side", *(f"--filename={path}" for path in files))
        # `kubectl wait` gives up at once on a CRD that has no conditions yet.
        deadline = time.monotonic() + 60
        while not _are_established(control_plane):
            assert time.monotonic() < deadline, control_plane.kubectl("describe", "crd").stdout
            time.sleep(0.1)


def _are_established(control_plane: ControlPlane) -> bool:
    crds = json.loads(control_plane.kubectl("get", "crd", "--output=json").stdout)["items"]
    conditions = [(each.get("status") or {}).get("conditions") or [] for each in crds]
    return all(any(each["type"] == "Established" and each["status"] == "True" for each in all_) for all_ in conditions)


def _crd_files() -> list[Path]:
    return sorted(CRDS.glob("*.yaml"))
