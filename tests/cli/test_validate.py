"""`kubetune validate`: the API server's words without an API server, and what only a whole manifest shows."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.api.manifest import dump_manifests
from tests.api.test_eval_and_quantize import manifest as manifest_of
from tests.api.test_finetunejob import BAD, GOOD, manifest
from tests.cluster.controlplane import ControlPlane
from tests.cluster.paths import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def write(path: Path, *manifests: dict[str, Any]) -> Path:
    path.write_text(dump_manifests(list(manifests)))
    return path


@pytest.mark.parametrize("changes", GOOD.values(), ids=GOOD)
def test_a_good_manifest_is_valid(changes: dict[str, Any], kubetune: Any, tmp_path: Path) -> None:
    job = manifest(**changes)
    job["spec"]["training"].setdefault("globalBatchSize", 16)
    ran = kubetune("validate", write(tmp_path / "job.yaml", job))
    assert (ran.code, ran.out) == (0, f"FineTuneJob default/{job['metadata']['name']} is valid\n")


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_a_bad_manifest_is_refused_in_the_words_of_the_api_server(
    changes: dict[str, Any], message: str, kubetune: Any, tmp_path: Path
) -> None:
    ran = kubetune("validate", write(tmp_path / "job.yaml", manifest(**changes)))
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert all(line.startswith("error: FineTuneJob ") for line in ran.err.splitlines())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path, kubetune: Any) -> None:
    assert kubetune("validate", path).code == 0


def test_a_batch_that_does_not_divide_is_told_the_nearest_sizes(kubetune: Any, tmp_path: Path) -> None:
    training = {"epochs": 1, "globalBatchSize": 10, "microBatchSize": 2}
    compute = {"nodes": 2, "accelerator": {"perNode": 2}}
    ran = kubetune("validate", write(tmp_path / "job.yaml", manifest(spec__training=training, spec__compute=compute)))
    assert ran.code == 1
    assert ran.err == (
        "error: FineTuneJob default/run7: spec.training.globalBatchSize: Invalid value: 10: "
        "must be divisible by 8 (4 processes x microBatchSize 2); nearest: 8 or 16\n"
    )


def test_a_local_path_is_valid_and_noted(kubetune: Any, tmp_path: Path) -> None:
    ran = kubetune("validate", write(tmp_path / "job.yaml", manifest(spec__workspace__uri="file:///tmp/runs")))
    assert ran.code == 0
    assert ran.err.startswith("note: spec.workspace.uri: file:// is for `kubetune run`")


def test_an_output_that_calibration_is_not_used_for_is_noted(kubetune: Any, tmp_path: Path) -> None:
    samples = {"sources": [{"name": "a", "uri": {"location": "s3://data/a.jsonl"}}]}
    outputs = [{"name": "ao", "type": "TorchAO", "scheme": "Int8WeightOnly"}]
    job = manifest_of("QuantizeJob", spec__outputs=outputs, spec__calibration={"dataset": samples})
    ran = kubetune("validate", write(tmp_path / "job.yaml", job))
    assert ran.code == 0
    assert (
        "note: spec.outputs[0] (ao): spec.calibration is used for type CompressedTensors only, got TorchAO" in ran.err
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no job of kubetune.dev"),
        ("kind: Pod\napiVersion: v1\n", "holds no job of kubetune.dev"),
        ("kind: FineTuneJob\napiVersion: kubetune.dev/v9\n", 'apiVersion: Unsupported value: "kubetune.dev/v9"'),
        ("kind: TuneJob\napiVersion: kubetune.dev/v1alpha1\n", 'kind: Unsupported value: "TuneJob"'),
        ("a: [\n", "while parsing"),
        ("a: 1\na: 2\n", 'key "a" stands twice'),
    ],
)
def test_a_file_without_a_job_is_refused_by_name(text: str, message: str, kubetune: Any, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    ran = kubetune("validate", tmp_path / "job.yaml")
    assert ran.code == 1
    assert message in ran.err


def test_a_file_that_is_not_there_is_one_line(kubetune: Any, tmp_path: Path) -> None:
    ran = kubetune("validate", tmp_path / "none.yaml")
    assert (ran.code, ran.err) == (1, f"error: {tmp_path}/none.yaml: cannot be read: No such file or directory\n")


def test_of_several_jobs_each_is_checked_or_one_is_named(kubetune: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "jobs.yaml", manifest(metadata__name="a"), manifest(metadata__name="b"))
    assert kubetune("validate", path).out == "FineTuneJob default/a is valid\nFineTuneJob default/b is valid\n"
    assert "holds a, b; say which one with --name" in kubetune("run", path).err
    assert kubetune("validate", path, "--name", "b").out == "FineTuneJob default/b is valid\n"
    assert "holds no job c, only a, b" in kubetune("validate", path, "--name", "c").err


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ({"data": {"a": "%%"}}, "Secret s3: data.a is not base64; plain text goes under stringData"),
        ({"stringData": {"a": 1}}, "Secret s3: stringData.a must be a string; quote it"),
        ({"stringData": {"../a": "1"}}, "Secret s3: stringData: '../a' is no valid key"),
        ({"data": []}, "Secret s3 is valid"),
        ({"data": "a"}, "Secret s3: data must be an object"),
        ({"metadata": {}}, "Secret: metadata.name: Required value"),
        ({"metadata": {"name": "../s3"}}, "Secret: metadata.name: Invalid value"),
    ],
)
def test_a_broken_secret_beside_the_job_is_refused(
    secret: dict[str, Any], message: str, kubetune: Any, tmp_path: Path
) -> None:
    beside = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}} | secret
    ran = kubetune("validate", write(tmp_path / "job.yaml", manifest(), beside))
    if "is valid" in message:
        assert ran.code == 0
    else:
        assert (ran.code, message in ran.err) == (1, True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"focal.py": "x = 1\n"}, "is valid"),
        ({"other.py": "x = 1\n"}, "ConfigMap focal has no key focal.py, only other.py"),
        ({"focal.py": "x = 1\ny = (\n"}, "key focal.py of ConfigMap focal is not Python: '(' was never closed, line 2"),
    ],
)
def test_a_script_beside_the_job_is_there_and_is_python(
    data: dict[str, str], message: str, kubetune: Any, tmp_path: Path
) -> None:
    beside = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "focal"}, "data": data}
    custom = {"script": {"configMap": {"name": "focal", "key": "focal.py"}}}
    job = manifest(spec__recipe="Custom", spec__custom=custom)
    ran = kubetune("validate", write(tmp_path / "job.yaml", job, beside))
    assert message in ran.out + ran.err
    assert ran.code == (0 if "is valid" in message else 1)


def test_standard_input_is_read(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "kubetune_operator.cli", "validate", "-"],
        input=dump_manifests([manifest()]), capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "FineTuneJob default/run7 is valid\n")


def test_usage_errors_end_with_2(kubetune: Any) -> None:
    assert kubetune("validate").code == 2
    assert kubetune("nonsense").code == 2
    assert kubetune("validate", "a.yaml", "--nonsense").code == 2


@pytest.mark.control_plane
def test_live_asks_the_cluster_and_the_storage(
    kubetune: Any, control_plane: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    job = manifest(
        metadata__namespace=namespace,
        spec__model__uri__location=f"file://{tmp_path}/model",
        spec__dataset__sources__0__uri__location=f"file://{tmp_path}/train.jsonl",
        spec__workspace__uri=f"file://{tmp_path}/runs",
        spec__storage={"s3": {"credentialsSecret": {"name": "s3"}}},
        spec__compute={"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "claim"}}]},
    )
    path = write(tmp_path / "job.yaml", job)
    refused = kubetune("validate", path, "--live")
    assert refused.code == 1
    assert f'credentialsSecret: Secret {namespace}/s3: secrets "s3" not found' in refused.err
    assert f'{namespace}/claim: persistentvolumeclaims "claim" not found' in refused.err

    in_namespace = f"--namespace={namespace}"
    control_plane.kubectl("create", in_namespace, "secret", "generic", "s3", "--from-literal=AWS_ACCESS_KEY_ID=a")
    assert "has no key AWS_SECRET_ACCESS_KEY" in kubetune("validate", path, "--live").err

    beside = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}}
    beside["stringData"] = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    del job["spec"]["compute"]
    path = write(tmp_path / "job.yaml", job, beside)
    refused = kubetune("validate", path, "--live")
    assert f"Model folder file://{tmp_path}/model: there is no such folder, or it is empty" in refused.err
    assert f"file://{tmp_path}/train.jsonl has no data files" in refused.err
    assert "spec.workspace.uri: file://" in refused.out

    (tmp_path / "model").mkdir()
    for name, content in {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "model.safetensors": "\2\0\0\0\0\0\0\0{}",
    }.items():
        (tmp_path / "model" / name).write_text(content)
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert kubetune("validate", path, "--live").code == 0
    assert not list((tmp_path / "runs").iterdir()), "the probe leaves nothing behind"


@pytest.mark.control_plane
def test_live_says_what_may_not_change_in_a_job_that_exists(
    kubetune: Any, control_plane: ControlPlane, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    control_plane.kubectl("create", "--filename=-", input=dump_manifests([manifest(metadata__namespace=namespace)]))
    changed = manifest(metadata__namespace=namespace, spec__training__epochs=4)
    ran = kubetune("validate", write(tmp_path / "job.yaml", changed), "--live")
    assert ran.code == 1
    assert "spec.training is immutable; make a new job to change it" in ran.err
