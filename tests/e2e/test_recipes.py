"""A job of every recipe and every tuning on a real node, two jobs at a time."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml

from tests.cluster.local import Cluster
from tests.cluster.paths import ROOT
from tests.e2e.jobs import Recording, apply
from tests.e2e.manifests import small_job

pytestmark = pytest.mark.cluster

STEPS: Final = 3
AT_ONCE: Final = 2
REWARDS: Final = frozenset({"rewardsChosen", "rewardsRejected", "rewardsMargin", "rewardsAccuracy"})
TEACHER: Final = {"uri": {"location": "s3://material/model"}}
MERGED: Final = {"name": "merged", "type": "HuggingFace"}
INT4: Final = {"name": "int4", "type": "CompressedTensors", "scheme": "Int4WeightOnly", "groupSize": 32}


class Recipe(NamedTuple):
    """A job of three steps.

    Attributes:
        spec: Blocks that replace those of the small job.
        tells: What each of its steps reports beside what every step does.
    """

    spec: dict[str, Any]
    tells: frozenset[str] = frozenset()


def rows(path: str, form: str) -> dict[str, Any]:
    """A dataset whose rows stand by themselves."""
    source = {"name": "rows", "uri": {"location": f"s3://material/{path}"}, "format": form}
    return {"dataset": {"sources": [source], "maxSequenceLength": 128, "packing": "None"}}


PAIRS: Final = rows("pairs.jsonl", "Preference")
RECIPES: Final = {
    "sft-lora": Recipe({"tuning": "LoRA"}),
    "sft-dora": Recipe({"tuning": "DoRA"}),
    "sft-qlora": Recipe({"tuning": "QLoRA"}),
    "sft-full": Recipe({"tuning": "Full"}),
    "dpo": Recipe(PAIRS | {"recipe": "DPO"}, REWARDS),
    "orpo": Recipe(PAIRS | {"recipe": "ORPO"}, REWARDS),
    "simpo": Recipe(PAIRS | {"recipe": "SimPO"}, REWARDS),
    "kto": Recipe(rows("feedback.jsonl", "UnpairedPreference") | {"recipe": "KTO"}, frozenset({"divergence"})),
    "distillation": Recipe(
        {"recipe": "Distillation", "distillation": {"teacher": TEACHER}},
        frozenset({"divergence", "crossEntropy"}),
    ),
    "qat": Recipe(
        {
            "recipe": "QAT",
            "qat": {"scheme": "Int4WeightOnly", "groupSize": 32},
            "tuning": "Full",
            "outputs": [MERGED, INT4],
        }
    ),
    "custom": Recipe(
        {
            "recipe": "Custom",
            "custom": {"script": {"configMap": {"name": "focal", "key": "focal.py"}}, "args": ["--gamma", "2.0"]},
            "dataset": small_job("")["spec"]["dataset"] | {"packing": "None"},
        }
    ),
}


@pytest.mark.timeout(900)
def test_a_job_of_every_recipe_comes_to_its_end(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    for config_map in config_maps():
        cluster.kubectl("apply", "--namespace", namespace, "--filename", "-", input=yaml.safe_dump(config_map))

    def finish(name: str) -> dict[str, Any]:
        folder = tmp_path / name
        folder.mkdir()
        job = apply(cluster, one_pod(name), namespace=namespace)
        with Recording(job, folder) as recording:
            status = job.wait_state("Complete", timeout_seconds=300)
        (lines,) = recording.attempts().values()
        job.remove()
        return {"status": status, "steps": [line for line in lines if line["event"] == "step"]}

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        running = {name: pool.submit(finish, name) for name in RECIPES}
        ends = {name: future.result() for name, future in running.items()}
    finally:
        pool.shutdown(cancel_futures=True)

    for name, end in ends.items():
        assert end["status"]["progress"]["step"] == STEPS, name
        assert [line["step"] for line in end["steps"]] == list(range(1, STEPS + 1)), name
        for line in end["steps"]:
            assert RECIPES[name].tells <= line.keys(), (name, line)
        wanted = {output["name"] for output in one_pod(name)["spec"]["outputs"]}
        made = {output["name"] for output in end["status"]["outputs"] if output["bytes"] and output["digest"]}
        assert made == wanted, name
    assert len({end["steps"][0]["loss"] for end in ends.values()}) >= len(RECIPES) - 2, "losses differ by recipe"


def one_pod(name: str) -> dict[str, Any]:
    """The manifest of that job."""
    manifest = small_job(name, **copy.deepcopy(RECIPES[name].spec))
    spec = manifest["spec"]
    spec["compute"]["nodes"] = 1
    spec["training"] = spec["training"] | {"maxSteps": STEPS}
    if spec.get("tuning") == "Full":
        del spec["lora"]
        spec["outputs"] = [output for output in spec["outputs"] if output["type"] != "PEFT"]
    return manifest


def config_maps() -> Iterator[dict[str, Any]]:
    """The example's script, as users write one."""
    for document in yaml.safe_load_all((ROOT / "examples" / "custom.yaml").read_text()):
        if document["kind"] == "ConfigMap" and document["metadata"]["name"] == "focal":
            yield document
