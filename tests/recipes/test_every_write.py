"""An evaluation and a quantization that are killed in the middle of any write come to the same end."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kubetune_trainer.export.digest import folder_digest
from tests.recipes.evaluation import write_eval_config, write_material
from tests.recipes.gang import Gang, Zygote
from tests.recipes.snapshots import ENV_SNAPSHOTS, ENV_WORKSPACE
from tests.recipes.test_quantize import INT4, INT8, write_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

Found = dict[str, Any]


def watched(zygote: Zygote, place: Path, config: Path, *, recipe: str) -> Gang:
    """A run that leaves a snapshot of its workspace at each of its writes."""
    environment = {ENV_WORKSPACE: str(place / "runs"), ENV_SNAPSHOTS: str(place / "snapshots")}
    return Gang.start(
        zygote, place / "peaceful", config, recipe=recipe, environment=environment, before="tests.recipes.snapshots"
    ).succeed()


def recoveries(zygote: Zygote, place: Path, config: Path, *, recipe: str) -> Iterator[tuple[str, Gang]]:
    """The next attempt from each snapshot; first the snapshot itself lies in the place of the workspace."""
    for snapshot in sorted((place / "snapshots").iterdir()):
        shutil.rmtree(place / "runs")
        shutil.copytree(snapshot, place / "runs")
        yield snapshot.name, Gang.start(zygote, place / "again" / snapshot.name, config, recipe=recipe).succeed()


def read(path: Path) -> Found | None:
    return json.loads(path.read_bytes()) if path.exists() else None


def origin(path: Path) -> Found | None:
    return {**found, "finishedAt": ""} if (found := read(path)) else None


def evaluated(run: Path) -> Found:
    """All that an evaluation leaves, but for dates."""
    results = read(run / "results.json") or {}
    return {
        "results": {key: results.get(key) for key in ("results", "gates", "versions", "n-samples")},
        "samples": {path.name: path.read_text() for path in (run / "samples").glob("*.jsonl")},
        "lineage": origin(run / "lineage.json"),
    }


def test_an_evaluation_ends_alike_after_a_kill_at_any_write(zygote: Zygote, tmp_path: Path) -> None:
    write_material(tmp_path)
    gates = [{"name": "any", "task": "choice", "metric": "acc", "at_least": 0.0}]
    tasks = [{"name": "choice", "limit": 4}]
    config = write_eval_config(tmp_path / "run.yaml", tasks=tasks, gates=gates)
    run = tmp_path / "runs" / "run"
    first = watched(zygote, tmp_path, config, recipe="eval_model")
    wanted = evaluated(run)
    for snapshot in (tmp_path / "snapshots").iterdir():
        if (snapshot / "run" / "results.json").exists():
            assert evaluated(snapshot / "run") == wanted, "results are there when they are whole"
    names = set()
    for name, again in recoveries(zygote, tmp_path, config, recipe="eval_model"):
        names.add(name.partition("-")[2])
        assert evaluated(run) == wanted, name
        assert [again.message()[key] for key in ("results", "gates", "artifacts")] == [
            first.message()[key] for key in ("results", "gates", "artifacts")
        ], name
    assert {"prepared.json", "choice.jsonl", "lineage.json", "results.json", "attempt-1.jsonl"} <= names


def quantized(gang: Gang) -> list[Found]:
    """What a quantization says of its outputs; its memory is that of the attempt."""
    return [{**output, "peakMemory": None} for output in gang.message()["outputs"]]


def test_a_quantization_ends_alike_after_a_kill_at_any_write(zygote: Zygote, place: Path) -> None:
    config = write_config(place, INT8)
    first = watched(zygote, place, config, recipe="quantize")
    run, wanted = place / "runs" / "run", quantized(first)
    lineage = origin(run / "lineage.json")
    names = set()
    for name, again in recoveries(zygote, place, config, recipe="quantize"):
        names.add(name.partition("-")[2])
        assert quantized(again) == wanted, name
        assert folder_digest(run / "outputs" / "int8") == (wanted[0]["digest"], wanted[0]["bytes"]), name
        assert origin(run / "lineage.json") == lineage, name
        assert {**(origin(run / "outputs" / "int8" / "lineage.json") or {}), "output": "", "files": {}} == {
            **(lineage or {}), "output": "", "files": {},
        }, name  # fmt: skip
    assert {"prepared.json", "model.safetensors", "config.json", "int8.json", "lineage.json"} <= names


def test_an_output_that_another_config_was_writing_over_is_made_again(zygote: Zygote, place: Path) -> None:
    ours, run = write_config(place, INT8), place / "runs" / "run"
    first = Gang.start(zygote, place / "ours", ours, recipe="quantize").succeed()
    (place / "theirs").mkdir()
    theirs = place / "theirs" / "run.yaml"
    shutil.copyfile(write_config(place, INT4 | {"name": "int8"}), theirs)
    watched(zygote, place, theirs, recipe="quantize")
    ours = write_config(place, INT8)
    halfway = next(path for path in (place / "snapshots").iterdir() if path.name.endswith("-tokenizer.json"))
    shutil.rmtree(place / "runs")
    shutil.copytree(halfway, place / "runs")
    again = Gang.start(zygote, place / "again", ours, recipe="quantize").succeed()
    assert quantized(again) == quantized(first)
    assert folder_digest(run / "outputs" / "int8")[0] == first.message()["outputs"][0]["digest"]
