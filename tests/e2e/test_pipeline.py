"""A chain on a real node: fine-tune, evaluate, quantize, evaluate again; a gate that fails stops what is after it."""

import json
from pathlib import Path
from typing import Any

import pytest

from kubetune_trainer.export.digest import folder_digest
from tests.cluster.local import Cluster
from tests.e2e.jobs import Job
from tests.e2e.manifests import eval_job, quantize_job, small_job

pytestmark = pytest.mark.cluster


def apply_all(cluster: Cluster, *manifests: dict[str, Any], namespace: str) -> list[Job]:
    """Create all of them at once, as from one file."""
    together = {"apiVersion": "v1", "kind": "List", "items": manifests}
    cluster.kubectl("apply", "--namespace", namespace, "--filename", "-", input=json.dumps(together))
    return [Job(cluster, namespace, each["metadata"]["name"], kind=each["kind"]) for each in manifests]


def gate(name: str, **rule: Any) -> list[dict[str, Any]]:
    return [{"name": name, "task": "sums", "metric": "bits_per_byte", **rule}]


def reference(kind: str, name: str, output: str) -> dict[str, Any]:
    return {"jobRef": {"kind": kind, "name": name, "output": output}}


@pytest.mark.timeout(600)
def test_a_chain_in_one_file_runs_in_order_and_a_failed_gate_stops_it(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    better = gate("better", comparedTo={"name": "base", "maxIncrease": "0"})
    near = gate("near", comparedTo={"name": "tuned", "maxIncrease": "0.05"})
    after_tuned = [{"kind": "EvalJob", "name": "tuned", "condition": "GatePassed"}]
    after_strict = [{"kind": "EvalJob", "name": "strict", "condition": "GatePassed"}]
    tune, base, tuned, small, checked, strict, blocked = apply_all(
        cluster,
        small_job("tune"),
        eval_job("base"),
        eval_job("tuned", model=reference("FineTuneJob", "tune", "merged"), gates=better),
        quantize_job(
            "small",
            model=reference("FineTuneJob", "tune", "merged"),
            after=after_tuned,
            gates=[{"name": "quality", "maxPerplexityIncreasePercent": "5"}],
        ),
        eval_job("checked", model=reference("QuantizeJob", "small", "int8"), gates=near),
        eval_job("strict", gates=gate("all-right", atMost="0.1")),
        quantize_job("blocked", after=after_strict),
        namespace=namespace,
    )
    statuses = {
        job.name: job.wait_state("Complete", timeout_seconds=500) for job in (tune, base, tuned, small, checked)
    }
    for job in (tuned, small, checked):
        assert job.condition("GatePassed")["status"] == "True", job.status()
    bits = {name: float(statuses[name]["results"][0]["value"]) for name in ("base", "tuned", "checked")}
    assert bits["tuned"] < bits["base"]
    assert bits["checked"] == pytest.approx(bits["tuned"], rel=0.01)
    assert {each["samples"] for each in statuses["base"]["results"]} == {40}

    merged = next(each for each in statuses["tune"]["outputs"] if each["name"] == "merged")
    int8, q8 = statuses["small"]["outputs"]
    assert int8["bytes"] < int8["sourceBytes"]
    assert q8["bytes"] < q8["sourceBytes"]
    assert statuses["small"]["resolved"]["parents"][0]["name"] == "tune"
    cluster.download(int8["uri"], tmp_path / "int8")
    assert folder_digest(tmp_path / "int8")[0] == int8["digest"]
    lineage = json.loads((tmp_path / "int8" / "lineage.json").read_text())
    assert (lineage["kind"], lineage["name"]) == ("QuantizeJob", "small")
    assert "sha256:" in statuses["small"]["image"]
    [parent] = lineage["parents"]
    assert (parent["kind"], parent["name"]) == ("FineTuneJob", "tune")
    assert parent["softwareDigest"] == lineage["softwareDigest"]
    assert merged["digest"] in {each["digest"] for each in parent["outputs"]}

    strict.wait_state("Complete", timeout_seconds=200)
    assert strict.condition("GatePassed")["status"] == "False"
    held = blocked.wait_condition("Running", says="all-right")
    assert held["reason"] == "UpstreamGateFailed"
    assert not blocked.pods("prepare")
