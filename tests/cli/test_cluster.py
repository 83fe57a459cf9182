"""`kubetune get` and `kubetune logs` against the real API server."""

import json
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.api.finetunejob import parse_finetunejob
from kubetune_operator.api.manifest import dump_manifests
from kubetune_operator.cli.cluster import summary
from tests.api.test_finetunejob import manifest
from tests.cluster.controlplane import ControlPlane

STATUS = {
    "state": "Failed", "restarts": 3,
    "progress": {"step": 340, "totalSteps": 900, "steps": "340/900", "loss": "1.284", "tokensPerSecond": "812"},
    "checkpoint": {"step": 300, "uri": "s3://a/step-300", "time": "2026-01-01T00:00:00Z"},
    "conditions": [
        {
            "type": "Failed", "status": "True", "reason": "DataInvalid", "message": "a line is no JSON",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ],
    "lastFailure": {
        "pod": "run7-train-1-0", "exitCode": 65, "reason": "DataInvalid", "message": "no JSON", "hint": "Mend it.",
    },
    "outputs": [{"name": "merged", "type": "HuggingFace", "uri": "s3://a/m"}],
}  # fmt: skip


@pytest.fixture
def cluster(control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch) -> ControlPlane:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    control_plane.kubectl("create", "--filename=-", input=dump_manifests([manifest(metadata__namespace=namespace)]))
    return control_plane


@pytest.mark.control_plane
def test_get_prints_kubectls_columns(kubetune: Any, cluster: ControlPlane, namespace: str) -> None:
    cluster.kubectl(
        "patch", f"--namespace={namespace}", "ftj", "run7", "--subresource=status", "--type=merge",
        f"--patch={json.dumps({'status': STATUS})}",
    )  # fmt: skip
    header, row = kubetune("get", "-n", namespace).out.splitlines()
    assert header.split() == ["NAME", "STATE", "STEP", "LOSS", "TOKENS/S", "ETA", "RESTARTS", "AGE"]
    assert row.split()[:6] == ["run7", "Failed", "340/900", "1.284", "812", "3"]


@pytest.mark.control_plane
@pytest.mark.usefixtures("cluster")
def test_get_prints_one_job_in_full(kubetune: Any, namespace: str) -> None:
    assert (
        kubetune("get", "run7", "-n", namespace).out == f"FineTuneJob {namespace}/run7: not seen by an operator yet\n"
    )


def test_a_summary_says_what_happened() -> None:
    assert summary(parse_finetunejob(manifest(status=STATUS))) == [
        "FineTuneJob default/run7: Failed",
        "  step 340/900, loss 1.284, 812 tokens/s",
        "  restarts: 3",
        "  checkpoint: step 300, s3://a/step-300",
        "  Failed  True     DataInvalid: a line is no JSON",
        "  last failure: pod run7-train-1-0, exit code 65, DataInvalid: no JSON",
        "  hint: Mend it.",
        "  output merged (HuggingFace): s3://a/m",
    ]


@pytest.mark.control_plane
@pytest.mark.usefixtures("cluster")
def test_what_is_not_there_is_one_line(kubetune: Any, namespace: str) -> None:
    missing = kubetune("get", "none", "-n", namespace)
    assert missing.code == 1
    assert missing.err == f'error: FineTuneJob {namespace}/none: finetunejobs.kubetune.dev "none" not found\n'
    no_log = kubetune("logs", "run7", "-n", namespace)
    assert (no_log.code, f"FineTuneJob {namespace}/run7 has no log yet" in no_log.err) == (1, True)
    assert kubetune("get", "-n", "empty").out == "no FineTuneJob in namespace empty\n"


@pytest.mark.parametrize("command", [["get"], ["get", "a"], ["logs", "a"], ["logs", "a", "-f"]], ids=" ".join)
def test_without_a_kubeconfig_it_says_what_is_needed(
    command: list[str], kubetune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    ran = kubetune(*command)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"error: kubetune {command[0]}: needs a cluster: ")
    assert "`kubetune run FILE`, which needs none" in ran.err


def test_without_an_api_server_it_says_so(kubetune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    ran = kubetune("get")
    assert ran.code == 1
    assert "the API server does not answer" in ran.err
    assert len(ran.err.splitlines()) == 1


def test_without_the_client_it_says_what_to_install(kubetune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)
    ran = kubetune("get")
    assert ran.err == "error: kubetune get: needs the Kubernetes client: pip install 'kubetune[operator]'\n"
