"""`kubetune lineage`: the tree of a job in a cluster, and of a folder or URI that a job wrote."""

import json
from pathlib import Path
from typing import Any

import boto3
import pytest

from kubetune_operator.api.manifest import dump_manifests
from tests.api.test_finetunejob import manifest
from tests.cluster.controlplane import ControlPlane
from tests.s3 import endpoint_of, s3_server

LINEAGE: dict[str, Any] = {
    "kind": "QuantizeJob", "namespace": "team", "name": "small", "uid": "2", "image": "trainer@sha256:9",
    "softwareDigest": "sha256:6",
    "configDigest": "sha256:7", "finishedAt": "2026-01-01T00:00:00Z",
    "model": {"location": "s3://runs/bot/outputs/merged", "digest": "sha256:m"},
    "otherModels": [{"field": "dpo.reference", "location": "org/other", "commit": "def"}],
    "sources": [{"name": "calibration", "location": "s3://data/c.jsonl", "digest": "sha256:c"}],
    "outputs": [{"name": "int8", "type": "CompressedTensors", "uri": "s3://m/int8", "digest": "sha256:8", "bytes": 9}],
    "parents": [
        {
            "kind": "FineTuneJob", "namespace": "team", "name": "bot", "uid": "1",
            "model": {"location": "org/base", "commit": "abc"},
            "sources": [{"name": "tickets", "location": "s3://data/t.jsonl", "digest": "sha256:t"},
                        {"name": "held", "location": "s3://data/h.jsonl", "etag": "h", "use": "validation"}],
            "scriptDigest": "sha256:5",
            "outputs": [{"name": "merged", "type": "HuggingFace", "uri": "s3://m/merged", "digest": "sha256:m"}],
            "parents": [{"kind": "FineTuneJob", "name": "older", "uid": "0"}],
        },
        {
            "kind": "EvalJob", "namespace": "team", "name": "tuned", "uid": "3",
            "model": {"location": "s3://m/merged", "digest": "sha256:m"},
            "sources": [{"name": "mine", "location": "s3://tasks", "digest": "sha256:k"}],
            "tasks": [{"name": "arc", "version": 1.0, "samples": 40, "hash": "4f"}],
            "gates": [{"name": "good", "passed": True}, {"name": "better", "passed": False}],
            "outputs": [],
        },
    ],
}  # fmt: skip
TREE = """\
QuantizeJob team/small, finished 2026-01-01T00:00:00Z
├── model s3://runs/bot/outputs/merged, digest sha256:m
├── dpo.reference org/other, commit def
├── data calibration: s3://data/c.jsonl, digest sha256:c
├── config sha256:7
├── image trainer@sha256:9
├── software sha256:6
├── output int8 (CompressedTensors): s3://m/int8, sha256:8
├── FineTuneJob team/bot
│   ├── model org/base, commit abc
│   ├── data tickets: s3://data/t.jsonl, digest sha256:t
│   ├── validation data held: s3://data/h.jsonl, etag h
│   ├── script sha256:5
│   ├── output merged (HuggingFace): s3://m/merged, sha256:m
│   └── FineTuneJob older
└── EvalJob team/tuned
    ├── model s3://m/merged, digest sha256:m
    ├── data mine: s3://tasks, digest sha256:k
    ├── task arc: version 1.0, 40 samples, hash 4f
    ├── gate good: passed
    └── gate better: failed
"""


def test_a_folder_tells_the_whole_tree(kubetune: Any, tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_text(json.dumps(LINEAGE))
    assert kubetune("lineage", tmp_path).out == TREE


def test_a_uri_tells_the_same(kubetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lineage.json").write_text(json.dumps(LINEAGE))
    assert kubetune("lineage", f"file://{tmp_path}/").out == TREE
    monkeypatch.setenv("KUBETUNE_PVC_DIR", str(tmp_path.parent))
    assert kubetune("lineage", f"pvc://{tmp_path.name}").out == TREE


def test_s3_is_read_where_it_is_reached_from_here(kubetune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(variable, "us-east-1")
    with s3_server() as server:
        endpoint = endpoint_of(server)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="models")
        client.put_object(Bucket="models", Key="out/merged/lineage.json", Body=json.dumps(LINEAGE).encode())
        assert kubetune("lineage", "s3://models/out/merged", "--s3-endpoint", endpoint).out.endswith(TREE)
        missing = kubetune("lineage", "s3://models/out/none", "--s3-endpoint", endpoint)
    assert missing.code == 1
    assert "s3://models/out/none/lineage.json: cannot be read" in missing.err


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("file:///nowhere", "cannot be read: No such file or directory"),
        ("ftp://a/b", "must be s3://bucket/path, pvc://claim/path or file:///path"),
        ("pvc://claim/a", "pvc:// needs KUBETUNE_PVC_DIR"),
    ],
)
def test_a_uri_that_cannot_be_read_is_one_line(kubetune: Any, uri: str, problem: str) -> None:
    ran = kubetune("lineage", uri)
    assert ran.code == 1
    assert problem in ran.err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read"),
        ("[]", "is no JSON object"),
        ('{"outputs": [1]}', "is not what a job of kubetune writes"),
        ('{"outputs": [], "model": "here"}', "is not what a job of kubetune writes"),
    ],
)
def test_a_lineage_that_is_broken_is_named_wherever_it_lies(
    kubetune: Any, tmp_path: Path, content: str, problem: str
) -> None:
    (tmp_path / "lineage.json").write_text(content)
    for target in (str(tmp_path), f"file://{tmp_path}"):
        ran = kubetune("lineage", target)
        assert ran.code == 1
        assert f"{tmp_path}/lineage.json: {problem}" in ran.err


# --------------------------------------------------------------------------------------------------- a cluster


def make(control_plane: ControlPlane, job: dict[str, Any], *, status: dict[str, Any]) -> str:
    """Create a job with a status; returns its UID."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    control_plane.kubectl("create", "--filename=-", input=dump_manifests([job]))
    control_plane.kubectl(
        "patch", f"--namespace={namespace}", "ftj", name, "--subresource=status", "--type=merge",
        f"--patch={json.dumps({'status': status})}",
    )  # fmt: skip
    return control_plane.kubectl(
        "get", f"--namespace={namespace}", "ftj", name, "--output=jsonpath={.metadata.uid}"
    ).stdout


@pytest.fixture
def chain(control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch) -> ControlPlane:
    """Two jobs, the second of which trains what the first wrote."""
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    first = manifest(metadata__name="first", metadata__namespace=namespace, spec__model={"hub": {"repo": "org/base"}})
    uid = make(
        control_plane,
        first,
        status={
            "state": "Complete",
            "resolved": {
                "model": {"commit": "abc"},
                "sources": [{"name": "tickets", "etag": "e"}],
                "config": "first-c",
            },
            "image": "registry.example/trainer@sha256:9",
            "outputs": [{"name": "merged", "type": "HuggingFace", "uri": "s3://m/1", "digest": "sha256:1"}],
        },
    )
    reference = {"jobRef": {"kind": "FineTuneJob", "name": "first"}}
    parents = [
        {"kind": "FineTuneJob", "name": "first", "uid": uid}, {"kind": "FineTuneJob", "name": "gone", "uid": "0"},
    ]  # fmt: skip
    second = manifest(metadata__name="second", metadata__namespace=namespace, spec__model=reference)
    make(control_plane, second, status={"state": "Running", "resolved": {"parents": parents}})
    return control_plane


@pytest.mark.control_plane
@pytest.mark.usefixtures("chain")
@pytest.mark.parametrize("target", ["second", "finetunejob/second", "finetunejobs/second"])
def test_a_job_tells_its_parents_even_those_that_are_gone(kubetune: Any, namespace: str, target: str) -> None:
    assert (
        kubetune("lineage", target, "-n", namespace).out
        == f"""\
FineTuneJob {namespace}/second: Running
├── FineTuneJob {namespace}/first: Complete
│   ├── model org/base on the Hub, commit abc
│   ├── data tickets: etag e
│   ├── config: ConfigMap first-c
│   ├── image registry.example/trainer@sha256:9
│   └── output merged (HuggingFace): s3://m/1, sha256:1
└── FineTuneJob gone: deleted; its outputs may still be there
"""
    )


@pytest.mark.control_plane
def test_a_parent_that_was_made_anew_is_not_taken_for_the_old_one(
    kubetune: Any, namespace: str, chain: ControlPlane
) -> None:
    chain.kubectl("delete", f"--namespace={namespace}", "ftj", "first")
    job = manifest(metadata__name="first", metadata__namespace=namespace)
    chain.kubectl("create", "--filename=-", input=dump_manifests([job]))
    assert "FineTuneJob first: deleted, and made anew since" in kubetune("lineage", "second", "-n", namespace).out


@pytest.mark.control_plane
@pytest.mark.usefixtures("chain")
def test_a_job_that_is_not_there_is_one_line(kubetune: Any, namespace: str) -> None:
    ran = kubetune("lineage", "none", "-n", namespace)
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert f"{namespace}/none: not found" in ran.err
    wrong = kubetune("lineage", "pod/none", "-n", namespace)
    assert "there is no kind pod; there are FineTuneJob" in wrong.err
