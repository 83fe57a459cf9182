"""A quantization from config to stored outputs, in peace and through kills."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from kubetune_trainer.config import QuantizeConfig, load_config
from kubetune_trainer.export.digest import folder_digest
from kubetune_trainer.model.weights import load_model
from tests.cluster.paths import ROOT
from tests.recipes.gang import Gang, Zygote

INT8 = {"name": "int8", "type": "CompressedTensors", "scheme": "Int8WeightOnly"}
INT4 = {"name": "int4", "type": "CompressedTensors", "scheme": "Int4WeightOnly", "group_size": 32}
Q8 = {"name": "q8", "type": "GGUF", "gguf": {"type": "Q8_0"}}
AO = {"name": "ao", "type": "TorchAO", "scheme": "Int8DynamicActivationInt4Weight"}


def write_config(place: Path, *outputs: dict[str, Any], **blocks: Any) -> Path:
    """A config over the material in the folder; blocks replace those of a small quantization."""
    dataset = {"sources": [{"name": "pairs", "uri": {"location": f"file://{place}/pairs.jsonl"}}]}
    config = {
        "kind": "QuantizeJob",
        "model": {"uri": {"location": f"file://{place}/model"}},
        "outputs": outputs,
        "verify": {"dataset": {**dataset, "max_sequence_length": 64}, "samples": 4},
        "workspace": {"uri": f"file://{place}/runs"},
    }
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump({**config, **blocks}))
    return path


def start(zygote: Zygote, folder: Path, config: Path, *overrides: str) -> Gang:
    return Gang.start(zygote, folder, config, *overrides, recipe="quantize")


def without_time(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key not in {"time", "event"}} for event in events]


def test_outputs_are_stored_measured_judged_and_say_where_they_come_from(zygote: Zygote, place: Path) -> None:
    gates = [
        {"name": "loose", "max_perplexity_increase_percent": 50},
        {"name": "strict", "output": "int4", "max_perplexity_increase_percent": 0},
    ]
    # The model is random, so that rounding may as well lower its perplexity: what it learned is noise.
    gang = start(zygote, place / "run", write_config(place, INT8, Q8, INT4, gates=gates)).succeed()
    message = gang.message()
    assert (message["result"], message["exitCode"]) == ("Complete", 0)
    assert message["progress"] == {"done": 60, "total": 60}
    assert [output["name"] for output in message["outputs"]] == ["int8", "q8", "int4"]
    assert without_time(gang.events("output")) == message["outputs"]
    for output in message["outputs"]:
        folder = Path(output["uri"].removeprefix("file://"))
        assert folder_digest(folder) == (output["digest"], output["bytes"])
        assert output["bytes"] < output["sourceBytes"]
        lineage = json.loads((folder / "lineage.json").read_bytes())
        assert (lineage["kind"], lineage["output"]) == ("QuantizeJob", output["name"])
        assert lineage["model"]["location"] == f"file://{place}/model"
        assert [source["name"] for source in lineage["sources"]] == ["pairs"]
        assert output["divergence"].keys() == {"meanKl", "topTokenAgreementPercent", "maxLogitDifference"}
        assert output["perplexity"] == pytest.approx(output["sourcePerplexity"], rel=0.2)
    int8, q8, int4 = message["outputs"]
    assert 0 < int8["divergence"]["maxLogitDifference"] < int4["divergence"]["maxLogitDifference"]
    assert ("scheme" in int8, "scheme" in q8) == (True, False)
    judged = {(gate["name"], gate["output"]): gate for gate in message["gates"]}
    assert judged.keys() == {("loose", "int8"), ("loose", "q8"), ("loose", "int4"), ("strict", "int4")}
    for (name, _), gate in judged.items():
        assert gate["passed"] == (float(gate["value"]) <= {"loose": 50, "strict": 0}[name])
    assert [event["phase"] for event in gang.events("phase")][:4] == [
        "Downloading", "Quantizing", "Verifying", "Storing",
    ]  # fmt: skip
    assert (place / "runs" / "run" / "logs" / "attempt-1.jsonl").exists()


def test_weights_that_are_rounded_by_data_are_nearer_to_the_model(zygote: Zygote, place: Path) -> None:
    dataset = {"sources": [{"name": "more", "uri": {"location": f"file://{place}/more.jsonl"}}]}
    calibration = {"dataset": {**dataset, "max_sequence_length": 64, "train_on": "All"}, "samples": 16}
    verify = {"dataset": {**dataset, "max_sequence_length": 64, "train_on": "All"}, "samples": 16}
    by_data = {"calibration": calibration, "verify": verify, "run": {"name": "by-data"}}
    divergence = []
    for name, blocks in (("nearest", {"verify": verify}), ("by-data", by_data)):
        gang = start(zygote, place / name, write_config(place, INT4, **blocks)).succeed()
        divergence.append(gang.message()["outputs"][0]["divergence"]["meanKl"])
    assert 0 < divergence[1] < divergence[0]
    assert [event["phase"] for event in gang.events("phase")] == [
        "Downloading", "Calibrating", "Quantizing", "Verifying", "Storing",
    ]  # fmt: skip
    peaks = gang.message()["outputs"][0]["peakMemory"]
    assert peaks.keys() == {"calibrationBytes", "conversionBytes", "verificationBytes"}
    assert min(peaks.values()) > 0
    lineage = json.loads((place / "runs" / "by-data" / "lineage.json").read_bytes())
    assert [source["name"] for source in lineage["sources"]] == ["more"]


def test_an_output_that_is_not_rounded_by_data_is_warned_of(zygote: Zygote, place: Path) -> None:
    dataset = {"sources": [{"name": "pairs", "uri": {"location": f"file://{place}/pairs.jsonl"}}]}
    calibration = {"dataset": {**dataset, "max_sequence_length": 64}, "samples": 2}
    gang = start(zygote, place / "run", write_config(place, AO, Q8, calibration=calibration, verify=None)).succeed()
    rule = "calibration is used for type CompressedTensors only"
    assert [event["message"] for event in gang.events("warning")] == [
        f"QuantizeJob local/run: output {name}: {rule}, got {kind}: its weights go to the nearest value"
        for name, kind in (("ao", "TorchAO"), ("q8", "GGUF"))
    ]
    assert [output["peakMemory"].keys() for output in gang.message()["outputs"]] == [{"conversionBytes"}] * 2


def test_an_adapter_is_merged_before_the_model_is_quantized(zygote: Zygote, place: Path) -> None:
    finetune = {
        "model": {"uri": {"location": f"file://{place}/model"}},
        "dataset": {
            "sources": [{"name": "pairs", "uri": {"location": f"file://{place}/pairs.jsonl"}}],
            "max_sequence_length": 64,
        },
        "lora": {"rank": 4, "alpha": 8},
        "training": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 0.05},
        "outputs": [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}],
        "workspace": {"uri": f"file://{place}/runs"},
    }
    (place / "tune.yaml").write_text(yaml.safe_dump(finetune))
    Gang.start(zygote, place / "tune", place / "tune.yaml").succeed()
    outputs = f"file://{place}/runs/tune/outputs"
    base = {"uri": {"location": f"file://{place}/model"}}
    digests = []
    for model in ({"uri": {"location": f"{outputs}/merged"}}, {**base, "adapter": {"location": f"{outputs}/adapter"}}):
        config = write_config(place, INT8, model=model, run={"name": f"run-{len(digests)}"})
        digests.append(start(zygote, place / f"run-{len(digests)}", config).succeed().message()["outputs"][0]["digest"])
    assert digests[0] == digests[1]


def test_a_stopped_run_keeps_what_is_finished_and_comes_to_the_same_end(zygote: Zygote, place: Path) -> None:
    config = write_config(place, INT8, Q8, AO)
    peaceful = start(zygote, place / "peaceful", config, "run.name=peaceful").succeed()
    stopped = start(zygote, place / "stopped", config)
    stopped.wait_for(lambda event: event["event"] == "output")
    stopped.kill(0, signal.SIGTERM)
    assert stopped.wait() == [75]
    assert stopped.message()["result"] == "Preempted"
    kept = place / "runs" / "run" / "outputs" / "int8" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    killed = start(zygote, place / "killed", config)
    killed.wait_for(lambda event: event["event"] == "phase" and event["phase"] == "Verifying")
    killed.kill(0)
    assert killed.wait() == [-9]
    again = start(zygote, place / "again", config).succeed()
    assert kept.stat().st_mtime_ns == before

    def results(gang: Gang) -> list[dict[str, Any]]:
        return [{**output, "uri": "", "peakMemory": {}} for output in gang.message()["outputs"]]

    assert results(again) == results(peaceful)
    assert again.message()["progress"] == {"done": 60, "total": 60}


def test_an_output_that_has_lost_a_file_is_made_again(zygote: Zygote, place: Path) -> None:
    config = write_config(place, INT8)
    first = start(zygote, place / "first", config).succeed()
    (place / "runs" / "run" / "outputs" / "int8" / "model.safetensors").unlink()
    second = start(zygote, place / "second", config).succeed()
    made = [gang.message()["outputs"][0] for gang in (first, second)]
    assert made[0]["digest"] == made[1]["digest"]
    load_model(place / "runs" / "run" / "outputs" / "int8")


def test_a_config_that_asks_for_something_else_makes_everything_again(zygote: Zygote, place: Path) -> None:
    first = start(zygote, place / "first", write_config(place, INT8)).succeed()
    second = start(zygote, place / "second", write_config(place, INT4 | {"name": "int8"})).succeed()
    assert first.message()["outputs"][0]["digest"] != second.message()["outputs"][0]["digest"]
    assert second.message()["outputs"][0]["scheme"] == "Int4WeightOnly"


def test_what_cannot_be_quantized_is_refused_with_the_code_that_says_whose_turn_it_is(
    zygote: Zygote, place: Path
) -> None:
    float8 = {"name": "f8", "type": "TorchAO", "scheme": "Float8DynamicActivation"}
    cases: list[tuple[Path, int, str]] = []
    refused = start(zygote, place / "float8", write_config(place, float8))
    cases.append((refused.folder, refused.wait()[0], "needs a CUDA device"))
    refused = start(zygote, place / "groups", write_config(place, INT4 | {"group_size": 128}))
    cases.append((refused.folder, refused.wait()[0], "group_size must divide the inputs of each linear layer"))
    refused = start(zygote, place / "gate", write_config(place, INT8), 'gates=[{"name":"g","output":"x"}]')
    cases.append((refused.folder, refused.wait()[0], "gates[0].max_perplexity_increase_percent is required"))
    (place / "model" / "model.safetensors").rename(place / "model" / "model.gguf")
    refused = start(zygote, place / "gguf", write_config(place, INT8))
    cases.append((refused.folder, refused.wait()[0], "model.gguf can be evaluated and talked to, not trained or"))
    shutil.rmtree(place / "model")
    refused = start(zygote, place / "gone", write_config(place, INT8))
    cases.append((refused.folder, refused.wait()[0], "there is no such folder"))
    assert [code for _, code, _ in cases] == [66, 64, 64, 65, 65]
    for folder, _, words in cases:
        assert words in json.loads((folder / "message-0.json").read_bytes())["message"]


def test_the_config_to_clone_is_complete() -> None:
    config = load_config(ROOT / "recipes" / "configs" / "smollm2_int8.yaml", expect=QuantizeConfig)
    assert [output.scheme for output in config.outputs] == ["Int8WeightOnly", "Int4WeightOnly"]
    assert (config.calibration.method, config.gates[0].output) == ("GPTQ", "int8")


def test_an_output_of_a_model_that_was_trained_on_since_is_made_again(zygote: Zygote, place: Path) -> None:
    both, one = write_config(place, INT8, Q8).read_text(), write_config(place, INT8).read_text()
    config = place / "run.yaml"
    config.write_text(both)
    first = start(zygote, place / "first", config).succeed().message()["outputs"]
    weights = place / "model" / "model.safetensors"
    changed = {name: weight * 1.5 for name, weight in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    config.write_text(one)
    start(zygote, place / "second", config).succeed()
    config.write_text(both)
    third = start(zygote, place / "third", config).succeed().message()["outputs"]
    for before, after in zip(first, third, strict=True):
        assert before["name"] == after["name"]
        assert before["digest"] != after["digest"]


@pytest.mark.parametrize("output", [INT8, AO, Q8])
def test_a_model_that_lacks_a_tensor_is_no_output(zygote: Zygote, place: Path, output: dict[str, Any]) -> None:
    weights = place / "model" / "model.safetensors"
    fewer = {name: weight for name, weight in load_file(weights).items() if "layers.1.mlp.up_proj" not in name}
    save_file(fewer, weights, metadata={"format": "pt"})
    config = write_config(place, output, verify=None)
    gang = start(zygote, place / "ranks", config)
    assert gang.wait() == [65], gang.stderr()
    assert "is missing tensors: model.layers.1.mlp.up_proj.weight" in gang.message()["message"]
