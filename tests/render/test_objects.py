"""The manifests, as golden files: `UPDATE_GOLDEN=1 pytest tests/render` writes them anew, a diff shows what changed."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_operator.render.job import render_work_job
from kubetune_operator.render.objects import render_all
from kubetune_operator.settings import Settings
from tests.render.manifests import (
    CUSTOM,
    EVAL_EVERYTHING,
    EVAL_SMALL,
    EVERYTHING,
    QUANTIZE_EVERYTHING,
    QUANTIZE_SMALL,
    SMALL,
    finetunejob,
    job,
)

Json = dict[str, Any]
GOLDEN = Path(__file__).parent / "golden"

CASES = {
    "small": (SMALL, Settings(identity="test")),
    "everything": (EVERYTHING, Settings(identity="test", image_pull_secrets=("registry",))),
    "everything-on-cpu": (EVERYTHING, Settings(identity="test", cpu_processes=2)),
    "custom": (CUSTOM, Settings(identity="test")),
    "eval-small": (EVAL_SMALL, Settings(identity="test")),
    "eval-everything": (EVAL_EVERYTHING, Settings(identity="test")),
    "quantize-small": (QUANTIZE_SMALL, Settings(identity="test")),
    "quantize-everything": (QUANTIZE_EVERYTHING, Settings(identity="test")),
}


class _Block(yaml.SafeDumper):
    """Texts of several lines are written as blocks, so that a diff shows their lines."""


_Block.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def rendered(case: str) -> list[Json]:
    text, settings = CASES[case]
    return render_all(job(text), settings)


def pod_specs(case: str) -> list[Json]:
    return [item["spec"]["template"]["spec"] for item in rendered(case) if item["kind"] == "Job"]


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_the_golden_ones(case: str) -> None:
    path = GOLDEN / f"{case}.yaml"
    text = yaml.dump_all(rendered(case), Dumper=_Block, sort_keys=False, width=120)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("case", CASES)
def test_pods_keep_the_restricted_pod_security_standard(case: str) -> None:
    for spec in pod_specs(case):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        [container] = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip


def test_secrets_are_mounted_with_the_keys_that_are_named_and_no_others() -> None:
    [spec, _] = pod_specs("everything")
    [volume] = [volume for volume in spec["volumes"] if volume["name"] == "kubetune-secrets"]
    sources = [source["secret"] for source in volume["projected"]["sources"]]
    needed = {
        source["name"]: [item["key"] for item in source["items"]] for source in sources if not source.get("optional")
    }
    keys = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    assert needed == {"hf": ["token", "write"], "mlflow": ["token"], "other": keys, "s3": keys, "wandb": ["api"]}


def test_a_gang_is_counted_by_the_operator_and_a_single_pod_by_the_job_controller() -> None:
    limits = {
        nodes: render_all(finetunejob(SMALL, compute={"nodes": nodes}, lifecycle={"maxRestarts": 5}), Settings())[-1]
        for nodes in (1, 2)
    }
    assert limits[1]["spec"]["backoffLimit"] == 5
    assert limits[2]["spec"]["backoffLimit"] == 2_147_483_647


def test_every_attempt_is_the_same_but_for_its_number() -> None:
    made, settings = finetunejob(EVERYTHING), Settings()
    config = yaml.safe_load(render_all(made, settings)[0]["data"]["config.yaml"])
    first, second = (
        yaml.safe_dump(render_work_job(made, config=config, attempt=attempt, backoff_limit=9, settings=settings))
        for attempt in (1, 2)
    )
    assert first.replace("train-1", "train-2").replace("'1'", "'2'") == second.replace("'1'", "'2'")


@pytest.mark.parametrize(("text", "nodes"), [(SMALL, 256), (EVAL_SMALL, 256), (QUANTIZE_SMALL, 1)])
def test_the_longest_name_leaves_room_for_host_names(text: str, nodes: int) -> None:
    made = job(text.replace("name: small,", f"name: {'n' * 40},"), compute={"nodes": nodes})
    config, prepare, *_ = render_all(made, Settings())
    work = render_work_job(
        made, config=yaml.safe_load(config["data"]["config.yaml"]), attempt=9999, backoff_limit=0, settings=Settings()
    )
    assert len(f"{work['metadata']['name']}-255") <= 63
    assert len(f"{prepare['metadata']['name']}-abcde") <= 63


def test_no_job_of_one_kind_makes_what_a_job_of_another_kind_makes_too() -> None:
    words = ("a", "a-eval", "a-config", "a-prepare", "a-eval-1", "a-quantize", "a-config-eval", "a-train-1")
    made = [
        (item["kind"], item["metadata"]["name"])
        for text in (SMALL, EVAL_SMALL, QUANTIZE_SMALL)
        for name in words
        for item in render_all(job(text.replace("name: small,", f"name: {name},")), Settings())
    ]
    assert len(made) == len(set(made)) == 3 * 3 * len(words)


def test_a_config_map_is_mounted_with_the_keys_that_are_named_or_as_a_whole() -> None:
    [spec, _] = pod_specs("eval-everything")
    places = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    mounted = {
        places[volume["name"]]: volume["configMap"].get("items")
        for volume in spec["volumes"]
        if volume["name"].startswith("kubetune-configmap-")
    }
    assert mounted == {
        "/var/run/kubetune/configmaps/ca": [{"key": "ca.crt", "path": "ca.crt"}],
        "/var/run/kubetune/configmaps/tasks": None,
    }


@pytest.mark.parametrize(
    ("toleration", "ours"),
    [
        ({"key": "gpu", "operator": "Exists"}, ["unreachable", "not-ready"]),
        (
            {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoSchedule"},
            ["unreachable", "not-ready"],
        ),
        ({"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 9}, ["not-ready"]),
        ({"operator": "Exists", "effect": "NoExecute"}, []),
    ],
)
def test_a_silent_node_is_tolerated_for_a_while_unless_the_job_says_otherwise(
    toleration: Json, ours: list[str]
) -> None:
    job = finetunejob(SMALL, compute={"tolerations": [toleration]})
    rendered = render_all(job, Settings(identity="test", lost_node_seconds=7))
    pods = [each["spec"]["template"]["spec"] for each in rendered if each["kind"] == "Job"]
    added = [
        {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 7}
        for key in ours
    ]
    assert [pod["tolerations"] for pod in pods] == [[toleration, *added]] * 2
