"""`kubetune run`: what it starts, shows and ends with. The trainer here is a stand-in that keeps to the contract."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_operator.api.finetunejob import parse_finetunejob
from kubetune_operator.api.manifest import dump_manifests
from kubetune_operator.cli import local
from kubetune_operator.cli.bundle import load_bundle
from kubetune_operator.errors import SpecError
from tests.api.test_eval_and_quantize import MINIMAL
from tests.api.test_finetunejob import manifest

LAUNCHER = """
import json, os, signal, sys, time, pathlib
recipe, _, config = sys.argv[1:4]
here = pathlib.Path(__file__).parent
def say(**event): print(json.dumps(event), flush=True)
def end(code, **record):
    pathlib.Path(os.environ["KUBETUNE_TERMINATION_LOG"]).write_text(json.dumps(record))
    sys.exit(code)
def stop(*_):
    if "stopped" in wanted: end(wanted["stopped"], result="Failed")
    say(event="checkpoint", step=1, uri="file:///runs/step-1")
    end(75, result="Preempted", exitCode=75, message="stopped after step 1")
signal.signal(signal.SIGTERM, stop)
wanted = json.loads((here / "behaviour.json").read_text())
variables = {key: value for key, value in os.environ.items() if key.startswith(("PET_", "KUBETUNE_", "MY_"))}
secrets = pathlib.Path(os.environ.get("KUBETUNE_SECRETS_DIR", "/nonexistent"))
files = {str(path.relative_to(secrets)): path.read_text() for path in secrets.rglob("*") if path.is_file()}
call = {"recipe": recipe, "script": pathlib.Path(recipe).read_text() if recipe.endswith(".py") else ""}
call |= {"arguments": sys.argv[4:]}
call |= {"config": pathlib.Path(config).read_text(), "variables": variables, "files": files}
with (here / "calls.jsonl").open("a") as calls: calls.write(json.dumps(call) + "\\n")
sys.stderr.write("a line of the log\\n")
if recipe == "finetune":
    say(event="step", step=1, totalSteps=2, loss=1.5, tokensPerSecond=10.0, etaSeconds=1)
    if wanted.get("validates"): say(event="validation", step=1, validationLoss=1.25)
    if wanted.get("hang"): time.sleep(60)
end(wanted.get(recipe, 0), **wanted.get("record", {}))
"""


class Trainer:
    """A package `kubetune_trainer` whose launcher notes how it was called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "kubetune_trainer"
        self.folder.mkdir()
        (self.folder / "__init__.py").touch()
        (self.folder / "launch.py").write_text(LAUNCHER)
        (self.folder / "claim.py").touch()
        self.behaves()

    def behaves(self, **behaviour: Any) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    @property
    def calls(self) -> list[dict[str, Any]]:
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    for variable in ("KUBETUNE_SECRETS_DIR", "KUBETUNE_CONFIGMAPS_DIR", "KUBETUNE_PVC_DIR"):
        monkeypatch.delenv(variable, raising=False)
    return Trainer(tmp_path)


def write(folder: Path, *beside: dict[str, Any], **changes: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(dump_manifests([manifest(**changes), *beside]))
    return path


def test_prepare_and_finetune_run_on_the_operators_config(kubetune: Any, trainer: Trainer, tmp_path: Path) -> None:
    ran = kubetune("run", write(tmp_path))
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "1 node: run as 1 process on this machine",
        "step 1/2  loss 1.5  10 tokens/s  ETA 1s",
        "FineTuneJob default/run7 is complete",
    ]
    assert [call["recipe"] for call in trainer.calls] == ["prepare", "finetune"]
    config = yaml.safe_load(trainer.calls[0]["config"])
    assert config["run"] == {
        "namespace": "default", "name": "run7", "uid": "local", "num_nodes": 1, "processes_per_node": 1,
        "directory": "s3://team/runs/default/run7-local", "cache": "s3://team/runs/default/cache",
    }  # fmt: skip
    assert config["training"]["learning_rate"] == 2e-4


def test_a_script_beside_the_job_is_started_with_its_arguments(kubetune: Any, trainer: Trainer, tmp_path: Path) -> None:
    beside = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "focal"}, "data": {"focal.py": "pass\n"}}
    custom = {"script": {"configMap": {"name": "focal", "key": "focal.py"}}, "args": ["--gamma", "2.0"]}
    ran = kubetune("run", write(tmp_path, beside, spec__recipe="Custom", spec__custom=custom))
    assert ran.code == 0, ran.err
    prepare, work = trainer.calls
    assert (prepare["recipe"], prepare["arguments"]) == ("prepare", [])
    assert work["recipe"] == f"{work['variables']['KUBETUNE_CONFIGMAPS_DIR']}/focal/focal.py"
    assert (work["script"], work["arguments"]) == ("pass\n", ["--gamma", "2.0"])


def test_a_script_that_is_not_on_this_machine_is_told_before_anything_runs(
    kubetune: Any, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    custom = {"script": {"configMap": {"name": "focal", "key": "focal.py"}}}
    ran = kubetune("run", write(tmp_path, spec__recipe="Custom", spec__custom=custom))
    assert (ran.code, "needs ConfigMap focal with key focal.py in the same file" in ran.err) == (1, True)
    ran = kubetune("run", write(tmp_path, spec__recipe="Custom", spec__custom={"script": {"path": "/none/my.py"}}))
    assert (ran.code, "spec.custom.script.path: there is no /none/my.py on this machine" in ran.err) == (1, True)
    assert not (trainer.folder / "calls.jsonl").exists()
    (tmp_path / "focal").mkdir()
    (tmp_path / "focal" / "focal.py").write_text("pass\n")
    monkeypatch.setenv("KUBETUNE_CONFIGMAPS_DIR", str(tmp_path))
    assert kubetune("run", write(tmp_path, spec__recipe="Custom", spec__custom=custom)).code == 0
    assert trainer.calls[-1]["recipe"] == f"{tmp_path}/focal/focal.py"


def test_pods_become_processes(
    kubetune: Any, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "devices", lambda: 8)
    ran = kubetune("run", write(tmp_path, spec__compute={"nodes": 2, "accelerator": {"perNode": 2}}))
    assert ran.out.startswith("2 nodes x 2 nvidia.com/gpu: run as 4 processes on this machine\n")
    prepare, finetune = trainer.calls
    assert (prepare["variables"]["PET_NPROC_PER_NODE"], finetune["variables"]["PET_NPROC_PER_NODE"]) == ("1", "4")
    assert finetune["variables"]["PET_NNODES"] == "1"
    assert yaml.safe_load(finetune["config"])["run"]["processes_per_node"] == 4


@pytest.mark.parametrize(
    ("nodes", "batch", "micro", "limit", "processes"),
    [(1, 16, 1, 8, 1), (4, 16, 1, 8, 4), (4, 16, 1, 2, 2), (4, 16, 1, 3, 2), (6, 12, 2, 5, 3), (4, 16, 4, 1, 1)],
)
def test_the_machine_gets_as_many_processes_as_share_the_batch(
    nodes: int, batch: int, micro: int, limit: int, processes: int
) -> None:
    training = {"epochs": 1, "globalBatchSize": batch, "microBatchSize": micro}
    job = parse_finetunejob(manifest(spec__compute={"nodes": nodes}, spec__training=training))
    assert local.processes_for(job, limit=limit) == processes


def test_secrets_of_the_file_are_files_that_vanish(kubetune: Any, trainer: Trainer, tmp_path: Path) -> None:
    plain = {"kind": "Secret", "metadata": {"name": "s3"}, "stringData": {"AWS_ACCESS_KEY_ID": "me"}}
    coded = {"kind": "Secret", "metadata": {"name": "hf"}, "data": {"token": "c2VjcmV0"}}
    env = [{"name": "MY_TOKEN", "secretKeyRef": {"name": "hf", "key": "token"}}, {"name": "MY_PLAIN", "value": "1"}]
    assert kubetune("run", write(tmp_path, plain, coded, spec__compute={"env": env})).code == 0
    call = trainer.calls[0]
    assert call["files"] == {"s3/AWS_ACCESS_KEY_ID": "me", "hf/token": "secret"}
    assert (call["variables"]["MY_TOKEN"], call["variables"]["MY_PLAIN"]) == ("secret", "1")
    assert not Path(call["variables"]["KUBETUNE_SECRETS_DIR"]).exists()


def test_a_service_of_the_cluster_is_reached_at_another_address(
    kubetune: Any, trainer: Trainer, tmp_path: Path
) -> None:
    storage = {"s3": {"endpoint": "http://s3.storage:9000", "region": "us-east-1"}}
    ran = kubetune("run", write(tmp_path, spec__storage=storage), "--s3-endpoint", "http://127.0.0.1:9000")
    assert ran.code == 0
    config = yaml.safe_load(trainer.calls[0]["config"])
    assert config["storage"]["s3"] == {"endpoint": "http://127.0.0.1:9000", "region": "us-east-1"}


def test_what_stands_in_for_a_secret_is_said(kubetune: Any, trainer: Trainer, tmp_path: Path) -> None:
    storage = {"s3": {"credentialsSecret": {"name": "s3"}}}
    ran = kubetune("run", write(tmp_path, spec__storage=storage))
    assert "note: Secret s3 is not in the file; taking the AWS_… variables or profile of this environment" in ran.out
    assert "KUBETUNE_SECRETS_DIR" not in trainer.calls[0]["variables"]


@pytest.mark.parametrize(
    ("field", "block", "variable"),
    [
        ("tracking", {"wandb": {"project": "p", "apiKeySecret": {"name": "x", "key": "k"}}}, "WANDB_API_KEY"),
        (
            "tracking",
            {"mlflow": {"trackingUri": "http://m", "experiment": "e", "tokenSecret": {"name": "x", "key": "k"}}},
            "MLFLOW_TRACKING_TOKEN",
        ),
        ("pushToHub", {"repo": "a/b", "output": "merged", "tokenSecret": {"name": "x", "key": "k"}}, "HF_TOKEN"),
    ],
)
def test_each_token_has_a_variable_of_its_own_to_stand_in(
    kubetune: Any, trainer: Trainer, tmp_path: Path, field: str, block: dict[str, Any], *, variable: str
) -> None:
    ran = kubetune("run", write(tmp_path, **{f"spec__{field}": block}))
    assert f"note: Secret x is not in the file; taking {variable} of this environment" in ran.out
    assert trainer.calls


@pytest.mark.parametrize("stage", ["prepare", "finetune"])
def test_a_failure_ends_with_the_trainers_code_message_and_hint(
    stage: str, kubetune: Any, trainer: Trainer, tmp_path: Path
) -> None:
    record = {"result": "Failed", "exitCode": 65, "message": "train.jsonl, line 3: no JSON", "hint": "Mend the line."}
    trainer.behaves(**{stage: 65, "record": record})
    ran = kubetune("run", write(tmp_path))
    assert ran.code == 65
    assert ran.err == "error: FineTuneJob default/run7: train.jsonl, line 3: no JSON\nhint: Mend the line.\n"
    assert trainer.calls[-1]["recipe"] == stage


def test_a_crash_without_a_message_shows_the_end_of_the_log(kubetune: Any, trainer: Trainer, tmp_path: Path) -> None:
    trainer.behaves(prepare=1)
    ran = kubetune("run", write(tmp_path))
    assert (ran.code, ran.err.splitlines()) == (
        1,
        ["error: FineTuneJob default/run7: the trainer ended with exit code 1", "a line of the log"],
    )


@pytest.mark.usefixtures("trainer")
def test_verbose_shows_the_trainers_log(kubetune: Any, tmp_path: Path) -> None:
    assert "a line of the log" in kubetune("run", write(tmp_path), "--verbose").out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, trainer: Trainer, tmp_path: Path
) -> None:
    trainer.behaves(hang=True)
    command = [sys.executable, "-m", "kubetune_operator.cli", "run", str(write(tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 1/2"):
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (75, "")
    assert out.splitlines() == [
        "stopping: a checkpoint is written; once more to stop without",
        "checkpoint of step 1: file:///runs/step-1",
        "stopped after step 1, checkpoint file:///runs/step-1; the same command goes on from there",
    ]


def test_one_that_is_stopped_as_it_runs_out_of_memory_is_not_tried_again(trainer: Trainer, tmp_path: Path) -> None:
    trainer.behaves(hang=True, stopped=71)
    command = [sys.executable, "-m", "kubetune_operator.cli", "run", str(write(tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "step 1/2" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 71
    assert [call["recipe"] for call in trainer.calls] == ["prepare", "finetune"]


def test_a_batch_that_does_not_divide_starts_nothing(kubetune: Any, trainer: Trainer, tmp_path: Path) -> None:
    ran = kubetune("run", write(tmp_path, spec__training={"epochs": 1, "globalBatchSize": 3, "microBatchSize": 2}))
    assert (ran.code, "nearest: 2 or 4" in ran.err) == (1, True)
    assert not (trainer.folder / "calls.jsonl").exists()


@pytest.mark.usefixtures("trainer")
def test_a_claim_needs_a_folder(kubetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, spec__workspace__uri="pvc://claim/runs")
    refused = kubetune("run", path)
    assert (refused.code, "spec.workspace.uri: pvc:// needs KUBETUNE_PVC_DIR" in refused.err) == (1, True)
    monkeypatch.setenv("KUBETUNE_PVC_DIR", str(tmp_path))
    assert kubetune("run", path).code == 0


def test_a_job_reference_means_an_earlier_local_run(tmp_path: Path) -> None:
    first = manifest(
        metadata__name="stage-1", spec__outputs=[{"name": "m1", "type": "HuggingFace"}, {"name": "a1", "type": "PEFT"}]
    )
    second = manifest(
        metadata__name="stage-2",
        spec__model={"jobRef": {"kind": "FineTuneJob", "name": "stage-1"}},
        spec__checkpoint={"resumeFrom": {"jobRef": {"kind": "FineTuneJob", "name": "stage-1"}}},
        spec__lora={"adapter": {"jobRef": {"name": "stage-1"}}},
        spec__recipe="DPO",
        spec__dpo={"reference": {"jobRef": {"name": "stage-1", "output": "m1"}}},
    )
    path = tmp_path / "jobs.yaml"
    path.write_text(dump_manifests([first, second]))
    config = local.local_config(load_bundle(path, name="stage-2"), processes=1)
    assert config["model"] == {"uri": {"location": "s3://team/runs/default/stage-1-local/outputs/m1"}}
    assert config["dpo"]["reference"] == config["model"]
    assert config["lora"]["adapter"] == {"uri": {"location": "s3://team/runs/default/stage-1-local/outputs/a1"}}
    assert config["checkpoint"]["resume_from"] == {"uri": "s3://team/runs/default/stage-1-local/checkpoints"}

    path.write_text(dump_manifests([second]))
    with pytest.raises(SpecError, match=r"jobRef\.output: Required value"):
        local.local_config(load_bundle(path), processes=1)


def test_what_was_measured_is_known_at_the_end(trainer: Trainer, tmp_path: Path) -> None:
    trainer.behaves(validates=True)
    measured = local.outcome_of(load_bundle(write(tmp_path))).measured
    assert (measured["loss"], measured["validationLoss"], measured["tokensPerSecond"]) == (1.5, 1.25, 10.0)


def other(kind: str, name: str = "run7", **spec: Any) -> dict[str, Any]:
    """A job of another kind."""
    found: dict[str, Any] = yaml.safe_load(MINIMAL[kind])
    return found | {"metadata": {"name": name}, "spec": found["spec"] | spec}


@pytest.mark.parametrize(("kind", "recipe"), [("EvalJob", "eval_model"), ("QuantizeJob", "quantize")])
def test_other_kinds_run_their_own_recipe_in_a_folder_of_their_own(
    kubetune: Any, trainer: Trainer, tmp_path: Path, kind: str, recipe: str
) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(dump_manifests([manifest(), other(kind)]))
    assert kubetune("run", path).err == (
        f"error: {path}: holds finetunejob/run7, {kind.lower()}/run7; say which one with --name\n"
    )
    ran = kubetune("run", path, "--name", f"{kind}/run7")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, f"{kind} default/run7 is complete")
    assert [call["recipe"] for call in trainer.calls] == ["prepare", recipe]
    config = yaml.safe_load(trainer.calls[1]["config"])
    assert config["kind"] == kind
    assert config["run"]["directory"] != "s3://team/runs/default/run7-local"


def test_a_chain_in_one_file_runs_job_by_job(tmp_path: Path) -> None:
    quantized = {"kind": "QuantizeJob", "name": "small"}
    gate = {"name": "near", "task": "arc", "metric": "acc", "comparedTo": {"name": "before", "maxDrop": "0.01"}}
    path = tmp_path / "jobs.yaml"
    path.write_text(
        dump_manifests(
            [
                manifest(
                    metadata__name="bot", spec__outputs=[{"name": "m", "type": "HuggingFace", "uri": "s3://models/bot"}]
                ),
                other("QuantizeJob", "small", model={"jobRef": {"name": "bot"}}),
                other("EvalJob", "after", model={"jobRef": quantized}, gates=[gate]),
            ]
        )
    )
    small = local.local_config(load_bundle(path, name="small"), processes=1)
    assert small["model"] == {"uri": {"location": "s3://models/bot"}}
    after = local.local_config(load_bundle(path, name="after"), processes=1)
    assert after["model"]["uri"]["location"] == f"{small['run']['directory']}/outputs/int8"
    before = local.local_config(load_bundle(write_other(tmp_path, "before")), processes=1)
    assert after["gates"][0]["compared_to"]["directory"] == before["run"]["directory"]


def write_other(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(dump_manifests([other("EvalJob", name)]))
    return path


@pytest.mark.parametrize("kind", ["EvalJob", "QuantizeJob"])
def test_other_kinds_are_checked_and_rendered(kubetune: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(dump_manifests([other(kind)]))
    assert kubetune("validate", path).out == f"{kind} default/run7 is valid\n"
    objects = [each["kind"] for each in yaml.safe_load_all(kubetune("render", path).out)]
    assert objects == ["ConfigMap", "Job", "Job"]
    path.write_text(dump_manifests([other(kind, queue={"name": "team-a"})]))
    queued = list(yaml.safe_load_all(kubetune("render", path).out))[2]
    assert queued["spec"]["managedBy"] == "kubetune.dev/operator"
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"


def test_without_the_trainer_it_says_what_to_install(
    kubetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else name)
    ran = kubetune("run", write(tmp_path))
    assert ran.code == 1
    assert ran.err == "error: kubetune run: needs the trainer (torch not found): pip install 'kubetune[trainer]'\n"
