"""What a run leaves behind, and the exit code and message of every way in which it can end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import yaml
from gguf import GGUFReader
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kubetune_trainer import load_model, load_tokenizer
from kubetune_trainer.export.gguf import load_gguf
from tests.cluster.paths import ROOT
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config
from tests.s3 import endpoint_of

OUTPUTS = [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}]


def test_a_lora_run_reports_its_course_and_leaves_a_model_and_an_adapter(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", outputs=OUTPUTS)
    gang = Gang.start(
        zygote, place / "ranks", config, "dataset.validation.fraction=0.2", "training.validate_every_steps=5",
        "checkpoint.every_steps=4", "checkpoint.keep=2", ranks=2,
    ).succeed()  # fmt: skip

    phases = [event["phase"] for event in gang.events("phase")]
    assert phases == ["Downloading", "Loading", "Training", "Exporting"]
    start = gang.events("start")[0]
    assert (start["step"], start["totalSteps"], start["worldSize"], start["device"]) == (0, 12, 2, "cpu")
    assert 0 < start["trainableParameters"] < start["parameters"]
    assert [event["step"] for event in gang.events("validation")] == [5, 10, 12]
    last = gang.events("step")[-1]
    assert last["step"] == last["totalSteps"] == 12
    assert last["etaSeconds"] == 0
    assert last["tokensPerSecond"] > 0
    assert gang.events()[-1]["event"] == "done"

    run = place / "runs" / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-12", "step-8"]
    assert (run / "logs" / "attempt-1.jsonl").read_text().count('"event": "step"') == 12
    message = gang.message()
    assert (message["result"], message["exitCode"]) == ("Complete", 0)
    assert message["progress"]["loss"] == last["loss"]
    for output in message["outputs"]:
        folder = Path(output["uri"].removeprefix("file://"))
        files = [path for path in folder.iterdir() if path.name not in {"lineage.json", "README.md"}]
        assert output["bytes"] == sum(path.stat().st_size for path in files)
        assert output["digest"].startswith("sha256:")
    merged, base = (load_file(folder / "model.safetensors") for folder in (run / "outputs" / "merged", place / "model"))
    changed = {name for name in base if not merged[name].equal(base[name])}
    assert changed == {name for name in base if "_proj" in name}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (run / "outputs" / "merged" / name).read_bytes() == (place / "model" / name).read_bytes()
    card = (run / "outputs" / "adapter" / "README.md").read_text()
    assert f"| Validation loss, last | {gang.events('validation')[-1]['validationLoss']:.6g} |" in card
    assert f"| Training loss, last step | {last['loss']:.6g} |" in card


def test_outputs_keep_the_template_that_the_data_was_written_with(zygote: Zygote, place: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    outputs = [*OUTPUTS, {"name": "small", "type": "GGUF", "gguf": {"type": "F16"}}]
    config = write_config(place / "run.yaml", outputs=outputs)
    values = yaml.safe_load(config.read_text())
    values["dataset"]["chat_template"] = template
    config.write_text(yaml.safe_dump(values))
    Gang.start(zygote, place / "ranks", config, "training.max_steps=1").succeed()
    made = place / "runs" / "run" / "outputs"
    assert load_tokenizer(place / "model").chat_template != template
    for name in ("merged", "small"):
        assert load_tokenizer(made / name).chat_template == template
    theirs = AutoTokenizer.from_pretrained(made / "merged")
    assert theirs.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False) == "<|user|>\ncat<|end|>\n"
    assert (made / "adapter" / "chat_template.jinja").read_text() == template
    [file] = (made / "small").glob("*.gguf")
    assert GGUFReader(file).fields["tokenizer.chat_template"].contents() == template


def test_a_merged_output_says_how_far_it_is_from_its_adapters(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", outputs=OUTPUTS)
    gang = Gang.start(zygote, place / "ranks", config, "training.max_steps=3", ranks=2).succeed()
    merge = gang.events("merge")[0]
    assert merge["output"] == "merged"
    assert 0 < merge["difference"] < 1e-5 < merge["bound"]
    merged, adapter = gang.message()["outputs"]
    assert float(merged["mergeDifference"]) == pytest.approx(merge["difference"], rel=0.01)
    assert "mergeDifference" not in adapter
    lineage = json.loads((place / "runs" / "run" / "lineage.json").read_text())
    assert lineage["outputs"][0]["mergeDifference"] == merged["mergeDifference"]


def test_a_merge_that_goes_wrong_fails_the_run_before_anything_is_stored(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", outputs=OUTPUTS)
    gang = Gang.start(zygote, place / "ranks", config, ranks=2, before="tests.recipes.wrong_merge")
    assert gang.wait() == [65, 78], gang.stderr()
    assert "merged weights must compute what the adapters do" in gang.message()["message"]
    assert not (place / "runs" / "run" / "outputs").exists()


def test_full_tuning_changes_every_weight(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", tuning="Full", lora=None, outputs=OUTPUTS[:1])
    gang = Gang.start(zygote, place / "ranks", config, f"outputs.0.uri=file://{place}/mine", ranks=2).succeed()
    base, trained = load_file(place / "model" / "model.safetensors"), load_file(place / "mine" / "model.safetensors")
    assert not [name for name in base if trained[name].equal(base[name])]
    losses = list(gang.losses().values())
    assert losses[-1] < losses[0]


def test_every_format_is_made_from_the_merged_model_and_an_adapter_can_be_gone_on_from(
    zygote: Zygote, place: Path
) -> None:
    outputs = [
        *OUTPUTS,
        {"name": "llama", "type": "GGUF", "gguf": {"type": "F16"}},
        {"name": "engine", "type": "CompressedTensors", "scheme": "Int8WeightOnly"},
    ]
    first = Gang.start(zygote, place / "1", write_config(place / "first.yaml", outputs=outputs), ranks=2).succeed()
    assert [output["type"] for output in first.message()["outputs"]] == [output["type"] for output in outputs]
    made = place / "runs" / "first" / "outputs"
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        merged = load_model(made / "merged", dtype=torch.float32)(tokens)
        torch.testing.assert_close(load_gguf(made / "llama")(tokens), merged, atol=0.02, rtol=0)
        torch.testing.assert_close(load_model(made / "engine", dtype=torch.float32)(tokens), merged, atol=0.1, rtol=0)

    uri = {"uri": {"location": f"file://{place}/model"}}
    models = {
        "merged": {"uri": {"location": f"file://{made}/merged"}},
        "adapter": {**uri, "adapter": {"location": f"file://{made}/adapter"}},
    }
    losses = {}
    for name, model in models.items():
        config = write_config(place / f"on-{name}.yaml", model=model, outputs=OUTPUTS[:1])
        losses[name] = Gang.start(zygote, place / name, config, "training.max_steps=2").succeed().losses()
    assert losses["merged"] == losses["adapter"]
    lineage = json.loads((place / "runs" / "on-adapter" / "outputs" / "merged" / "lineage.json").read_text())
    assert lineage["parents"][0]["name"] == "first"
    assert lineage["adapter"]["digest"] == first.message()["outputs"][1]["digest"]


def test_an_output_that_the_model_cannot_have_is_refused_before_training(zygote: Zygote, place: Path) -> None:
    tokenizer = json.loads((place / "model" / "tokenizer.json").read_text())
    (place / "model" / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": {"type": "NFKC"}}))
    config = write_config(place / "run.yaml", outputs=[{"name": "llama", "type": "GGUF", "gguf": {"type": "Q8_0"}}])
    gang = Gang.start(zygote, place / "ranks", config)
    assert gang.wait() == [65], gang.stderr()
    assert "output llama: " in gang.message()["message"]
    assert "normalizer must be null or NFC" in gang.message()["message"]
    assert gang.events("step") == []


@pytest.mark.parametrize(
    ("overrides", "codes", "reason", "words"),
    [
        (["training.global_batch_size=5"], [64, 64], "ConfigInvalid", "must be divisible by ranks"),
        (["training.max_stps=5"], [64, 64], "ConfigInvalid", "training.max_stps is not a field"),
        (["checkpoint.resume_from.uri=file:///nowhere"], [64, 78], "ConfigInvalid", "must hold a complete checkpoint"),
        (["dataset.sources.0.uri.location=file://broken.jsonl"], [65, 78], "DataInvalid", "broken.jsonl"),
        (["model.uri.location=file://empty"], [65, 78], "DataInvalid", "config.json"),
        (["training.learning_rate=1e30", "training.precision=FP32"], [77, 77], "NonFiniteLoss", ", over rows "),
    ],
    ids=["batch", "field", "resume", "data", "model", "loss"],
)  # fmt: skip
def test_a_failure_ends_with_its_exit_code_and_its_message(  # noqa: PLR0917 (fixtures and columns of the table)
    zygote: Zygote, place: Path, overrides: Sequence[str], codes: list[int], reason: str, words: str
) -> None:
    (place / "broken.jsonl").write_text('{"messages": [\n')
    (place / "empty").mkdir()
    (place / "empty" / "README.md").touch()
    config = write_config(place / "run.yaml")
    absolute = [override.replace("file://broken", f"file://{place}/broken") for override in overrides]
    absolute = [override.replace("file://empty", f"file://{place}/empty") for override in absolute]
    gang = Gang.start(zygote, place / "ranks", config, *absolute, ranks=2)
    assert gang.wait() == codes, gang.stderr()
    message = gang.message()
    assert (message["result"], message["exitCode"], message["reason"]) == ("Failed", codes[0], reason)
    assert words in message["message"]
    assert gang.events("error")[0]["message"] == message["message"]


def test_a_run_on_s3_is_killed_and_goes_on_without_the_first_ranks_disk(
    zygote: Zygote, place: Path, s3_server: ThreadedMotoServer
) -> None:
    config, s3 = s3_config(place, s3_server)
    first = Gang.start(zygote, place / "first", config, ranks=2, environment=s3)
    first.wait_for(lambda event: event["event"] == "checkpoint")
    first.kill(0)
    assert first.wait() == [-signal.SIGKILL, 78]

    second = Gang.start(zygote, place / "second", config, ranks=2, environment=s3).succeed()
    assert second.events("resume")[0]["uri"].startswith("s3://team/runs/run/checkpoints/step-")
    assert second.message()["outputs"][0]["uri"] == "s3://team/runs/run/outputs/merged"
    keys = s3_keys(s3_server)
    assert "runs/run/outputs/merged/model.safetensors" in keys
    assert "runs/run/logs/attempt-1.jsonl" in keys
    complete = [key for key in keys if key.endswith("/COMPLETE") and "/checkpoints/" in key]
    assert len(complete) == 2, "two are kept"


def test_training_goes_on_while_s3_is_down_and_the_checkpoint_is_tried_again(
    zygote: Zygote, place: Path, s3_server: ThreadedMotoServer
) -> None:
    config, s3 = s3_config(place, s3_server)
    gang = Gang.start(zygote, place / "ranks", config, "training.max_steps=40", environment=s3)
    gang.wait_for(lambda event: event["event"] == "start")
    host, port = s3_server.get_host_and_port()
    s3_server.stop()
    gang.wait_for(lambda event: event["event"] == "step" and event["step"] >= 8)
    assert gang.events("checkpoint") == [], "it trains on without one"
    back = ThreadedMotoServer(ip_address=host, port=port)  # moto keeps its buckets in the process
    back.start()
    try:
        gang.succeed()
        assert gang.events("checkpoint")
        assert gang.events("checkpoint")[-1]["step"] == 40
    finally:
        back.stop()


def test_storage_that_does_not_answer_is_worth_another_attempt(zygote: Zygote, place: Path) -> None:
    config, s3 = s3_config(place, None)
    gang = Gang.start(zygote, place / "ranks", config, environment=s3)
    assert gang.wait() == [69], gang.stderr()
    assert gang.message()["reason"] == "StorageUnavailable"


def test_the_launcher_runs_a_gang_and_passes_on_a_stop(place: Path) -> None:
    config = write_config(place / "run.yaml")
    environment = {
        **os.environ, "PET_NPROC_PER_NODE": "2", "KUBETUNE_TERMINATION_LOG": str(place / "termination-log"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [
            sys.executable, "-m", "kubetune_trainer.launch", "finetune", "--config", str(config),
            "training.max_steps=5000",
        ],
        env=environment, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "step":
            break
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    message = json.loads((place / "termination-log").read_bytes())
    assert message["result"] == "Preempted"
    assert (place / "runs" / "run" / "checkpoints" / f"step-{message['step']}" / "COMPLETE").exists()


def test_torchrun_runs_the_recipe_by_hand(place: Path) -> None:
    config = write_config(place / "run.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "recipes/finetune.py"),
            "--config", str(config), "training.max_steps=2",
        ],
        env=environment, cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]
    assert not list(place.glob("kubetune-*")), "scratch is removed"


def s3_config(place: Path, server: ThreadedMotoServer | None) -> tuple[Path, dict[str, str]]:
    """A run whose model, data and workspace are in S3, and the environment of its ranks."""
    endpoint = "http://127.0.0.1:9"
    if server is not None:
        endpoint = endpoint_of(server)
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        for bucket in ("team", "data"):
            client.create_bucket(Bucket=bucket)
        for path in (*(place / "model").iterdir(), place / "pairs.jsonl"):
            client.upload_file(str(path), "data", path.relative_to(place).as_posix())
    config = write_config(
        place / "run.yaml",
        model={"uri": {"location": "s3://data/model"}},
        dataset={
            "sources": [{"name": "pairs", "uri": {"location": "s3://data/pairs.jsonl"}}], "max_sequence_length": 64,
        },
        storage={"s3": {"endpoint": endpoint, "region": "us-east-1"}},
        workspace={"uri": "s3://team/runs"},
        checkpoint={"every_steps": 3, "keep": 2},
        outputs=OUTPUTS[:1],
    )  # fmt: skip
    return config, {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


def s3_keys(server: ThreadedMotoServer) -> list[str]:
    endpoint = endpoint_of(server)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    listed: dict[str, Any] = client.list_objects_v2(Bucket="team")
    return [entry["Key"] for entry in listed["Contents"]]
