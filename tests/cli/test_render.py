"""`kubetune render`: what it prints, kubectl takes."""

from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.api.manifest import dump_manifests, load_manifests
from tests.api.test_finetunejob import manifest
from tests.cluster.controlplane import ControlPlane
from tests.cluster.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
EXAMPLE = ROOT / "examples" / "tickets.yaml"


def test_every_object_is_printed(kubetune: Any) -> None:
    ran = kubetune("render", EXAMPLE)
    printed = load_manifests(ran.out, source="render")
    assert [(each["kind"], each["metadata"]["name"]) for each in printed] == [
        ("ConfigMap", "tickets-config"), ("Job", "tickets-prepare"), ("Service", "tickets-train-1"),
        ("Job", "tickets-train-1"),
    ]  # fmt: skip


def test_the_operators_settings_come_from_the_environment(kubetune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNE_OPERATOR_TRAINER_IMAGE", "registry.example/trainer:1")
    assert kubetune("render", EXAMPLE).out.count("image: registry.example/trainer:1") == 2
    monkeypatch.setenv("KUBETUNE_OPERATOR_NONSENSE", "1")
    refused = kubetune("render", EXAMPLE)
    assert (refused.code, "KUBETUNE_OPERATOR_NONSENSE" in refused.err) == (1, True)


def test_the_config_is_printed_as_a_block_of_lines(kubetune: Any) -> None:
    assert "  config.yaml: |\n    api_version: kubetune.dev/v1alpha1\n" in kubetune("render", EXAMPLE).out


@pytest.mark.control_plane
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_api_server_takes_the_examples_and_what_they_lead_to(
    path: Path, kubetune: Any, control_plane: ControlPlane
) -> None:
    control_plane.kubectl("create", "--dry-run=server", "--validate=strict", f"--filename={path}")
    rendered = kubetune("render", path).out
    control_plane.kubectl("create", "--dry-run=server", "--validate=strict", "--filename=-", input=rendered)


@pytest.mark.control_plane
def test_the_api_server_takes_what_is_printed(
    kubetune: Any, control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(dump_manifests([manifest(metadata__namespace=namespace, spec__compute={"nodes": 2})]))
    text = kubetune("render", path).out
    applied = control_plane.kubectl("create", "--dry-run=server", "--validate=strict", "--filename=-", input=text)
    assert applied.stdout.count("created (server dry run)") == 4
