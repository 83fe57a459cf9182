"""`kubetune get` and `kubetune logs` against the real API server."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_operator.api.finetunejob import parse_finetunejob
from kubetune_operator.api.kinds import parse_job
from kubetune_operator.api.manifest import dump_manifests
from kubetune_operator.cli.summary import summary
from tests.api.test_eval_and_quantize import MINIMAL
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


EVAL_STATUS = {
    "state": "Complete",
    "progress": {"done": 800, "total": 800, "ofTotal": "800/800", "tokensPerSecond": "95"},
    "conditions": [
        {
            "type": "GatePassed", "status": "False", "reason": "GateFailed", "message": "gate better: 0.41 < 0.5",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ],
    "results": [
        {"task": "arc", "metric": "acc", "filter": "none", "value": "0.41", "stderr": "0.01", "samples": 200},
        {"task": "gsm", "metric": "exact_match", "filter": "strict", "value": "0.2"},
    ],
    "gates": [
        {
            "name": "better", "task": "arc", "metric": "acc", "filter": "none", "rule": "atLeast 0.5", "value": "0.41",
            "passed": False, "message": "0.41 is below 0.5",
        }
    ],
    "artifacts": {"results": "s3://a/results.json"},
}  # fmt: skip
QUANTIZE_STATUS = {
    "state": "Running",
    "progress": {"done": 3, "total": 9, "phase": "Writing", "etaSeconds": 41},
    "outputs": [
        {
            "name": "int8", "type": "CompressedTensors", "scheme": "Int8WeightOnly", "uri": "s3://a/int8",
            "perplexity": "10.1", "sourcePerplexity": "10",
        },
        {"name": "f16", "type": "GGUF", "uri": "s3://a/f16"},
    ],
    "gates": [
        {"name": "close", "output": "int8", "rule": "maxPerplexityIncreasePercent 2.0", "value": "1", "passed": True}
    ],
}  # fmt: skip


def test_summaries_of_the_other_kinds_say_what_they_found_out() -> None:
    assert summary(parse_job(other("EvalJob", "seen") | {"status": EVAL_STATUS})) == [
        "EvalJob default/seen: Complete",
        "  800/800 requests, 95 tokens/s",
        "  GatePassed  False    GateFailed: gate better: 0.41 < 0.5",
        "  arc acc: 0.41 ± 0.01, 200 samples",
        "  gsm exact_match (strict): 0.2",
        "  all results: s3://a/results.json",
        "  gate better: failed: 0.41 is below 0.5",
    ]
    assert summary(parse_job(other("QuantizeJob", "small") | {"status": QUANTIZE_STATUS})) == [
        "QuantizeJob default/small: Running",
        "  3/9 tensors, writing, ETA 41s",
        "  output int8 (CompressedTensors Int8WeightOnly): s3://a/int8, perplexity 10.1 (from 10)",
        "  output f16 (GGUF): s3://a/f16",
        "  gate close of int8: passed",
    ]


def other(kind: str, name: str, *, namespace: str = "default") -> dict[str, Any]:
    """A job of another kind."""
    found: dict[str, Any] = yaml.safe_load(MINIMAL[kind])
    return found | {"metadata": {"name": name, "namespace": namespace}}


@pytest.mark.control_plane
def test_every_kind_has_its_table_and_a_name_of_two_jobs_needs_its_kind(
    kubetune: Any, cluster: ControlPlane, namespace: str
) -> None:
    jobs = [other("EvalJob", "run7", namespace=namespace), other("QuantizeJob", "small", namespace=namespace)]
    cluster.kubectl("create", "--filename=-", input=dump_manifests(jobs))
    tables = kubetune("get", "-n", namespace).out.split("\n\n")
    assert [table.splitlines()[1].split()[0] for table in tables] == ["run7", "run7", "small"]
    assert "GATE" in tables[1]
    two = kubetune("get", "run7", "-n", namespace)
    assert two.err == "error: kubetune get: several jobs are called run7; say finetunejob/run7 or evaljob/run7\n"
    for kind in ("evaljob", "evaljobs", "evj", "EvalJob"):
        assert kubetune("get", f"{kind}/run7", "-n", namespace).out.startswith(f"EvalJob {namespace}/run7: ")
    assert f"QuantizeJob {namespace}/small has no log yet" in kubetune("logs", "small", "-n", namespace).err


@pytest.mark.control_plane
@pytest.mark.usefixtures("cluster")
def test_what_is_not_there_is_one_line(kubetune: Any, namespace: str) -> None:
    missing = kubetune("get", "none", "-n", namespace)
    assert missing.code == 1
    assert missing.err == f"error: FineTuneJob or EvalJob or QuantizeJob {namespace}/none: not found\n"
    no_log = kubetune("logs", "run7", "-n", namespace)
    assert (no_log.code, f"FineTuneJob {namespace}/run7 has no log yet" in no_log.err) == (1, True)
    assert kubetune("get", "-n", "empty").out == "no jobs in namespace empty\n"


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
