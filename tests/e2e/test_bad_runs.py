"""What is wrong shows in the status, in words that name it; nothing of it can be known before the job runs."""

from typing import Any, NamedTuple

import pytest

from tests.cluster import local
from tests.cluster.local import Cluster
from tests.e2e.jobs import apply, wait_for
from tests.e2e.manifests import small_job

pytestmark = pytest.mark.cluster


class Bad(NamedTuple):
    """A job that must fail.

    Attributes:
        change: Blocks of the spec that replace those of a good one.
        reason: Of the condition Failed.
        says: What its message contains, each.
        exit_code: Of the container that found it, or None where the operator found it itself.
    """

    change: dict[str, Any]
    reason: str
    says: tuple[str, ...]
    exit_code: int | None


def dataset(
    path: str = "s3://material/sums.jsonl", *, source: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    return {"dataset": {"sources": [{"name": "data", "uri": {"location": path}, **(source or {})}], **more}}


def model(path: str) -> dict[str, Any]:
    return {"model": {"uri": {"location": path}}}


def training(**change: Any) -> dict[str, Any]:
    return {"training": small_job("")["spec"]["training"] | change}


def storage(**change: Any) -> dict[str, Any]:
    return {"storage": {"s3": small_job("")["spec"]["storage"]["s3"] | change}}


def memory(limit: str) -> dict[str, Any]:
    resources = {"requests": {"cpu": "100m", "memory": limit}, "limits": {"cpu": "1", "memory": limit}}
    return {"compute": small_job("")["spec"]["compute"] | {"resources": resources}}


BAD = {
    "bucket": Bad({"workspace": {"uri": "s3://nobody/runs"}}, "ConfigInvalid", ("bucket nobody does not exist",), 64),
    "credentials": Bad(
        storage(credentialsSecret={"name": "wrong"}), "ConfigInvalid", ("the credentials do not open it",), 64
    ),
    "no-config": Bad(model("s3://material/bad/no-config"), "DataInvalid", ("no-config", "config.json"), 65),
    "truncated": Bad(model("s3://material/bad/truncated"), "DataInvalid", ("model.safetensors",), 65),
    "malformed": Bad(dataset("s3://material/bad/malformed.jsonl"), "DataInvalid", ("malformed.jsonl", "line 3"), 65),
    "empty": Bad(dataset("s3://material/bad/empty.jsonl"), "DataInvalid", ("empty.jsonl",), 65),
    "columns": Bad(dataset("s3://material/bad/columns.jsonl"), "DataInvalid", ("question", "answer"), 65),
    "template": Bad(
        dataset("s3://material/capitals.jsonl", chatTemplate="{{ raise_exception('no roles here') }}"),
        "DataInvalid", ("no roles here",), 65,
    ),
    "overlong": Bad(
        dataset(maxSequenceLength=16, overlong="Fail"), "DataInvalid", ("16", "tokens"), 65
    ),
    "batch": Bad(training(globalBatchSize=7), "InvalidSpec", ("globalBatchSize", "4 or 8", "7"), None),
    "memory": Bad(memory("600Mi"), "DoesNotFit", ("per process", "600Mi"), None),
    "infinite": Bad(training(learningRate="1e38", maxGradNorm="1e38"), "NonFiniteLoss", ("step",), 77),
}  # fmt: skip


@pytest.mark.timeout(600)
def test_each_bad_job_fails_with_a_message_that_names_what_is_wrong(cluster: Cluster, namespace: str) -> None:
    wrong = local.s3_secret(namespace, name="wrong").replace(local.S3_SECRET_KEY, "not-the-secret-key")
    cluster.kubectl("apply", "--filename", "-", input=wrong)
    jobs = {name: apply(cluster, small_job(name, **bad.change), namespace=namespace) for name, bad in BAD.items()}
    seen, expected = {}, {}
    for name, bad in BAD.items():
        status = jobs[name].wait_state("Failed", timeout_seconds=400)
        failed = jobs[name].condition("Failed")
        missing = [words for words in bad.says if words not in failed["message"]]
        seen[name] = (failed["reason"], missing and failed["message"], status.get("lastFailure", {}).get("exitCode"))
        expected[name] = (bad.reason, [], bad.exit_code)
    assert seen == expected


def test_a_missing_secret_is_named_while_the_job_waits(cluster: Cluster, namespace: str) -> None:
    job = apply(cluster, small_job("keyless", **storage(credentialsSecret={"name": "absent"})), namespace=namespace)
    job.wait_condition("Running", says='secret "absent" not found')
    cluster.kubectl("apply", "--filename", "-", input=local.s3_secret(namespace, name="absent"))
    job.wait_state("Running", "Complete")
    job.remove()


def test_a_pod_that_fits_nowhere_is_told_with_the_schedulers_words(cluster: Cluster, namespace: str) -> None:
    resources = {"requests": {"cpu": "64"}, "limits": {"cpu": "64", "memory": "3Gi"}}
    job = apply(
        cluster,
        small_job("giant", compute=small_job("")["spec"]["compute"] | {"resources": resources}),
        namespace=namespace,
    )
    job.wait_condition("Running", says="Insufficient cpu")
    assert job.status()["state"] == "Pending"
    job.remove()


def test_storage_that_nobody_serves_is_named_and_tried_again(cluster: Cluster, namespace: str) -> None:
    job = apply(
        cluster, small_job("unreachable", **storage(endpoint="http://s3.kubetune-s3:9999")), namespace=namespace
    )
    job.wait_condition("Running", says="an attempt before failed with StorageUnavailable: s3://runs/e2e/")
    assert job.status()["lastFailure"]["exitCode"] == 69
    assert job.status()["state"] == "Pending"
    wait_for(lambda: len(job.pods("prepare")) > 1 or None, "another attempt", timeout_seconds=60)
    job.remove()
