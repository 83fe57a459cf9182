"""What a run reports reaches the trackers' own files, once for each step, however often the run was killed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kubetune_trainer.config import load_config
from kubetune_trainer.tracking.mlflow_run import flat
from kubetune_trainer.tracking.wandb_run import history, records
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config

STEPS = 12


@pytest.fixture(scope="module")
def run(zygote: Zygote, tiny: Path) -> dict[str, Any]:
    """A run with all trackers that is killed after its first checkpoint, told to stop later, and then finished."""
    config = write_config(
        tiny / "tracked.yaml",
        training={"max_steps": STEPS, "global_batch_size": 4, "validate_every_steps": 6},
        dataset={
            "sources": [{"name": "pairs", "uri": {"location": f"file://{tiny}/pairs.jsonl"}}],
            "max_sequence_length": 64, "validation": {"fraction": 0.2},
        },
        checkpoint={"every_steps": 3},
        outputs=[{"name": "adapter", "type": "PEFT"}],
        tracking={
            "wandb": {"project": "bots", "mode": "Offline", "group": "night", "tags": ["tiny"]},
            "mlflow": {"tracking_uri": f"file://{tiny}/mlflow", "experiment": "bots"},
            "tensorboard": {},
        },
    )  # fmt: skip
    gangs = []
    for name, moment, signal in (("killed", 5, 9), ("stopped", 8, 15)):
        gang = Gang.start(zygote, tiny / f"tracked-{name}", config)
        gang.wait_for(lambda event, moment=moment: event["event"] == "checkpoint" and event["step"] >= moment - 2)
        gang.wait_for(lambda event, moment=moment: event["event"] == "step" and event["step"] >= moment)
        gang.kill(0, signal)
        gang.wait()
        gangs.append(gang)
    gangs.append(Gang.start(zygote, tiny / "tracked-last", config).succeed())
    assert gangs[-1].events("resume")[0]["step"] >= 3
    steps, validations = {}, {}
    for gang in gangs:
        assert not [event for event in gang.events("warning") if "tracking" in event["message"]]
        steps |= {event["step"]: event for event in gang.events("step")}
        validations |= {event["step"]: event["validationLoss"] for event in gang.events("validation")}
    folder = tiny / "runs" / "tracked"
    return {
        "config": load_config(config), "folder": folder, "steps": steps, "validations": validations, "gangs": gangs,
        "mlflow": f"file://{tiny}/mlflow",
    }  # fmt: skip


def test_tensorboard_reads_each_step_once(run: dict[str, Any]) -> None:
    read = EventAccumulator(str(run["folder"] / "tensorboard"))
    read.Reload()
    for name, key in (("loss", "loss"), ("learning_rate", "learningRate"), ("grad_norm", "gradNorm")):
        told = [(event.step, event.value) for event in read.Scalars(name)]
        assert told == [(step, pytest.approx(run["steps"][step][key])) for step in range(1, STEPS + 1)]
    told = {event.step: event.value for event in read.Scalars("validation_loss")}
    assert told == pytest.approx(run["validations"])
    assert len(read.Scalars("validation_loss")) == len(told) == 2
    texts = read.Tags()["tensors"]
    assert {"config/text_summary", "state/text_summary", "model/adapter/text_summary"} <= set(texts)
    assert b"max_sequence_length: 64" in read.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]
    assert read.Tensors("state/text_summary")[-1].tensor_proto.string_val == [b"Complete"]


def test_mlflow_has_one_run_with_each_step_once(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=run["mlflow"])
    experiment = client.get_experiment_by_name("bots")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    told = [(metric.step, metric.value) for metric in sorted(history, key=lambda metric: metric.step)]
    assert told == [(step, run["steps"][step]["loss"]) for step in range(1, STEPS + 1)]
    history = client.get_metric_history(found.info.run_id, "validation_loss")
    assert {metric.step: metric.value for metric in history} == run["validations"]
    assert len(history) == 2
    assert (found.info.run_name, found.info.status) == ("tracked", "FINISHED")
    assert found.data.params == flat(run["config"].model_dump(mode="json", exclude_none=True))
    assert found.data.params["training.max_steps"] == str(STEPS)
    outputs = run["gangs"][-1].message()["outputs"]
    assert found.data.tags["kubetune.model.adapter"] == outputs[0]["uri"]
    assert found.data.tags["kubetune.model.adapter.digest"] == outputs[0]["digest"]
    assert found.data.tags["kubetune.checkpoint.checkpoint"].endswith(f"/checkpoints/step-{STEPS}")
    assert found.data.tags["kubetune.state"] == "Complete"


def test_wandb_folders_of_all_attempts_are_one_run_with_each_step_once(run: dict[str, Any]) -> None:
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415 (a slow import)

    logs = sorted((run["folder"] / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 3, "one of each attempt, the killed one too"
    assert len({log.name for log in logs}) == 1, "one identity"
    rows = [row for log in logs for row in history(log)]
    told = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert told == [(step, run["steps"][step]["loss"]) for step in range(1, STEPS + 1)]
    assert {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row} == run["validations"]
    written = [Record.FromString(content) for content in records(logs[-1].read_bytes())]
    [begun] = [record.run for record in written if record.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name, begun.run_group, list(begun.tags)) == (
        "bots",
        "tracked",
        "night",
        ["tiny"],
    )
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["training"]["max_steps"] == STEPS
    artifacts = [record.artifact for record in written if record.WhichOneof("record_type") == "artifact"]
    places = {made.name.partition("-")[2]: made.manifest.contents for made in artifacts}
    uri = run["gangs"][-1].message()["outputs"][0]["uri"]
    assert {entry.ref for entry in places["adapter"]} > {f"{uri}/adapter_model.safetensors", f"{uri}/README.md"}
    assert {entry.ref.partition("/checkpoints/")[2].partition("/")[0] for entry in places["checkpoint"]} == {
        f"step-{STEPS}"
    }
    exits = [record.exit.exit_code for record in written if record.WhichOneof("record_type") == "exit"]
    assert exits == [0]


def test_wandb_takes_the_folders_for_what_it_wrote(run: dict[str, Any]) -> None:
    folders = sorted(str(path) for path in (run["folder"] / "wandb").iterdir())
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Would sync 3 run(s)" in done.stdout + done.stderr


def test_a_stopped_attempt_says_so(run: dict[str, Any]) -> None:
    stopped = run["gangs"][1]
    assert stopped.codes == [75]
    logs = sorted((run["folder"] / "wandb").glob("offline-run-*/run-*.wandb"))
    last = max(row["step"] for row in history(logs[1]))
    assert last == stopped.message()["step"], "its last step is in the run's folder"
