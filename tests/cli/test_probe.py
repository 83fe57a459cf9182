"""What `kubetune validate --live` finds in storage: the words of a run, before there is one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from kubetune_operator.api.kinds import parse_job
from kubetune_operator.cli.bundle import Bundle
from kubetune_operator.cli.local import local_config
from kubetune_operator.render.config import dump_config
from tests.api.test_finetunejob import manifest
from tests.s3 import endpoint_of, locked_s3_server, s3_server


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with s3_server() as server:
        yield endpoint_of(server)


def probe(folder: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """What the probe says, by field."""
    return probe_job(folder, manifest(**changes))


def probe_job(folder: Path, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    config = folder / "config.yaml"
    config.write_text(dump_config(local_config(Bundle(job=parse_job(job), manifest=job), processes=1)))
    command = [sys.executable, "-m", "kubetune_trainer.probe", "--config", str(config)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {place["field"]: place for place in map(json.loads, said.splitlines())}


def test_a_bucket_with_everything_in_it_has_no_problem(endpoint: str, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    for bucket in ("models", "data", "team"):
        client.create_bucket(Bucket=bucket)
    header = b"\x02\0\0\0\0\0\0\0{}"
    for name, body in {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": header}.items():
        client.put_object(Bucket="models", Key=f"smollm2/{name}", Body=body)
    client.put_object(Bucket="data", Key="tickets.jsonl", Body=b"{}\n")
    found = probe(tmp_path, spec__storage={"s3": {"endpoint": endpoint, "region": "us-east-1"}})
    assert {field: place["problem"] for field, place in found.items()} == {
        "spec.model.uri.location": None, "spec.dataset.sources[0].uri.location": None, "spec.workspace.uri": None,
    }  # fmt: skip
    assert "Contents" not in client.list_objects_v2(Bucket="team"), "nothing is left behind"


def test_a_bucket_that_does_not_exist_is_named(endpoint: str, tmp_path: Path) -> None:
    found = probe(tmp_path, spec__storage={"s3": {"endpoint": endpoint, "region": "us-east-1"}})
    for field, bucket in {"spec.model.uri.location": "models", "spec.workspace.uri": "team"}.items():
        assert bucket in found[field]["problem"]
        assert "does not exist" in found[field]["problem"]
        assert not found[field]["unreachable"]


def test_wrong_credentials_are_named_for_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bucket in ("models", "data", "team"):
        (tmp_path / "buckets" / bucket).mkdir(parents=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret key")
    with locked_s3_server(tmp_path / "buckets", access_key="somebody", secret_key="the secret key") as url:
        found = probe(tmp_path, spec__storage={"s3": {"endpoint": url, "region": "us-east-1"}})
    assert set(found) == {"spec.model.uri.location", "spec.dataset.sources[0].uri.location", "spec.workspace.uri"}
    for place in found.values():
        assert "the credentials do not open it" in place["problem"]
        assert not place["unreachable"]


def test_a_model_folder_without_config_json_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    found = probe(
        tmp_path, spec__model__uri__location=f"file://{tmp_path}/model", spec__workspace__uri=f"file://{tmp_path}"
    )
    assert "config.json" in found["spec.model.uri.location"]["problem"]


def test_models_and_adapters_beside_the_trained_model_are_looked_at(tmp_path: Path) -> None:
    for name in ("other", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").touch()
    found = probe(
        tmp_path,
        spec__recipe="DPO",
        spec__dpo={"reference": {"uri": {"location": f"file://{tmp_path}/other"}}},
        spec__lora={"adapter": {"uri": {"location": f"file://{tmp_path}/adapter"}}},
        spec__dataset__sources=[{"name": "a", "uri": {"location": f"file://{tmp_path}/a.jsonl"}}],
        spec__model={"uri": {"location": f"file://{tmp_path}/model"}},
        spec__workspace__uri=f"file://{tmp_path}/runs",
    )
    assert "config.json is missing" in found["spec.dpo.reference.uri.location"]["problem"]
    assert "adapter_config.json is missing" in found["spec.lora.adapter.uri.location"]["problem"]


def test_a_checkpoint_to_begin_with_is_looked_for(tmp_path: Path) -> None:
    found = probe(tmp_path, spec__checkpoint={"resumeFrom": {"uri": f"file://{tmp_path}/none"}})
    assert "must hold a complete checkpoint" in found["spec.checkpoint.resumeFrom.uri"]["problem"]


def test_damage_of_a_checkpoint_to_begin_with_is_a_problem_and_no_noise(tmp_path: Path) -> None:
    (tmp_path / "old" / "step-3").mkdir(parents=True)
    (tmp_path / "old" / "step-3" / "COMPLETE").write_text('{"step": 3, "files": {"trainer.json": 9}}')
    found = probe(tmp_path, spec__checkpoint={"resumeFrom": {"uri": f"file://{tmp_path}/old"}})
    assert "trainer.json is missing" in found["spec.checkpoint.resumeFrom.uri"]["problem"]


def test_an_evaluation_may_be_of_a_gguf_output(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.gguf"):
        (tmp_path / name).write_text("{}")
    spec = {
        "model": {"uri": {"location": f"file://{tmp_path}"}}, "workspace": {"uri": f"file://{tmp_path}/runs"},
        "tasks": [{"name": "hellaswag"}],
    }  # fmt: skip
    job = {"apiVersion": "kubetune.dev/v1alpha1", "kind": "EvalJob", "metadata": {"name": "a"}, "spec": spec}
    assert probe_job(tmp_path, job)["spec.model.uri.location"]["problem"] is None


def test_every_kind_says_where_it_reads_and_writes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty, gone = {"location": f"file://{tmp_path}/empty"}, {"location": f"file://{tmp_path}/gone"}
    common = {"model": {"uri": gone}, "workspace": {"uri": f"file://{tmp_path}/runs"}}
    rows = {"dataset": {"sources": [{"name": "rows", "uri": gone}]}}
    specs = {
        "EvalJob": {
            "tasks": [{"name": "mine"}],
            "taskFiles": [{"name": "mine", "configMap": {"name": "tasks"}}, {"name": "more", "uri": empty}],
        },
        "QuantizeJob": {
            "outputs": [
                {"name": "int4", "type": "CompressedTensors", "scheme": "Int4WeightOnly", "uri": empty["location"]}
            ],
            "calibration": rows,
            "verify": rows,
        },
    }
    found, bad = {}, {}
    for kind, spec in specs.items():
        job = {"apiVersion": "kubetune.dev/v1alpha1", "kind": kind, "metadata": {"name": "run", "namespace": "default"}}
        found[kind] = probe_job(tmp_path, job | {"spec": common | spec})
        bad[kind] = {field: bool(place["problem"]) for field, place in found[kind].items()}
    assert bad == {
        "EvalJob": {
            "spec.model.uri.location": True, "spec.taskFiles[1].uri.location": True, "spec.workspace.uri": False,
        },
        "QuantizeJob": {
            "spec.model.uri.location": True, "spec.calibration.dataset.sources[0].uri.location": True,
            "spec.verify.dataset.sources[0].uri.location": True, "spec.workspace.uri": False,
            "spec.outputs[0].uri": False,
        },
    }  # fmt: skip
    assert found["EvalJob"]["spec.taskFiles[1].uri.location"]["problem"] == "task_files more has no .yaml files"
