"""`kubetune run` with the real trainer: a tiny model, stopped in mid-training and gone on with."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kubetune_operator.api.finetunejob import parse_finetunejob
from kubetune_operator.api.manifest import dump_manifests
from kubetune_operator.cli.bundle import Bundle
from kubetune_operator.cli.local import local_config
from kubetune_operator.render.config import dump_config
from kubetune_trainer.claim import claim
from kubetune_trainer.config import FineTuneConfig, load_config
from kubetune_trainer.errors import ConfigError
from tests.api.test_finetunejob import manifest
from tests.recipes.tiny import write_messages, write_model


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A manifest for two nodes, with its model and data beside it."""
    write_model(tmp_path / "model")
    write_messages(tmp_path / "pairs.jsonl", samples=24, seed=1)
    text = dump_manifests(
        [
            manifest(
                spec__model__uri__location=f"file://{tmp_path}/model",
                spec__dataset={
                    "sources": [{"name": "pairs", "uri": {"location": f"file://{tmp_path}/pairs.jsonl"}}],
                    "maxSequenceLength": 64,
                },
                spec__training={"maxSteps": 12, "globalBatchSize": 4, "microBatchSize": 2},
                spec__compute={"nodes": 2},
                spec__workspace__uri=f"file://{tmp_path}/runs",
                spec__outputs=[{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}],
            )
        ]
    )
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def start(job: Path, *, before: Callable[[], None] | None = None) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "kubetune_operator.cli", "run", str(job)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=job.parent, preexec_fn=before, **streams)  # noqa: PLW1509


def test_a_run_stops_with_a_checkpoint_goes_on_and_leaves_its_outputs(job: Path) -> None:
    stopped = start(job)
    assert stopped.stdout is not None
    for line in stopped.stdout:
        if line.startswith("step 2/12"):
            stopped.send_signal(signal.SIGINT)
            break
    out, err = stopped.communicate(timeout=120)
    assert (stopped.returncode, err) == (75, ""), out
    step = out.rpartition("stopped after step ")[2].partition(",")[0]
    assert 2 <= int(step) < 12
    assert f"checkpoints/step-{step}; the same command goes on from there" in out

    out, err = start(job).communicate(timeout=240)
    assert f"resumed after step {step} from file://{job.parent}/runs/default/run7-local/checkpoints/step-{step}" in out
    assert f"step {int(step) + 1}/12  loss " in out
    assert f"step {step}/12  loss " not in out
    assert out.endswith("FineTuneJob default/run7 is complete\n"), err
    outputs = job.parent / "runs" / "default" / "run7-local" / "outputs"
    assert (outputs / "merged" / "model.safetensors").is_file()
    assert (outputs / "adapter" / "adapter_config.json").is_file()


def test_what_is_trained_is_evaluated_and_quantized_on_this_machine(job: Path) -> None:
    here = job.parent
    (here / "tasks").mkdir()
    (here / "tasks" / "pages.jsonl").write_text(json.dumps({"page": "the red cat sleeps here"}) + "\n")
    task = {
        "task": "pages", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "pages.jsonl"}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    (here / "tasks" / "pages.yaml").write_text(json.dumps(task))
    common = {
        "model": {"uri": {"location": f"file://{here}/model"}}, "workspace": {"uri": f"file://{here}/runs"},
    }  # fmt: skip
    tasks = {"name": "own", "uri": {"location": f"file://{here}/tasks"}}
    specs = {
        "EvalJob": {"tasks": [{"name": "pages"}], "taskFiles": [tasks]},
        "QuantizeJob": {"outputs": [{"name": "q8", "type": "GGUF", "gguf": {"type": "Q8_0"}}]},
    }
    for kind, spec in specs.items():
        about = {"apiVersion": "kubetune.dev/v1alpha1", "kind": kind, "metadata": {"name": "after"}}
        job.write_text(dump_manifests([about | {"spec": common | spec}]))
        process = start(job)
        out, err = process.communicate(timeout=240)
        assert (process.returncode, err) == (0, ""), out
        assert "started: " in out
        assert out.endswith(f"{kind} default/after is complete\n")


MEMORY_BYTES = 1_800_000_000
"""What each process of the next test may have: enough for 1024 rows at a time, too little for 2048."""


def test_a_run_out_of_memory_goes_on_with_smaller_micro_batches(job: Path) -> None:
    text = job.read_text().replace("microBatchSize: 2", "microBatchSize: 2048").replace("nodes: 2", "nodes: 1")
    job.write_text(text.replace("globalBatchSize: 4", "globalBatchSize: 2048").replace("maxSteps: 12", "maxSteps: 1"))
    limit = (MEMORY_BYTES, MEMORY_BYTES)
    ran = start(job, before=partial(resource.setrlimit, resource.RLIMIT_DATA, limit))
    out, err = ran.communicate(timeout=240)
    assert (ran.returncode, err) == (0, ""), out
    assert "out of memory: [enforce fail at" in out
    assert "another attempt has microBatchSize 1024 in place of 2048\n" in out
    assert "step 1/1  loss " in out


def test_a_changed_manifest_starts_anew_only_when_asked(tmp_path: Path) -> None:
    def config(epochs: int) -> FineTuneConfig:
        job = manifest(spec__workspace__uri=f"file://{tmp_path}", spec__training__epochs=epochs)
        bundle = Bundle(job=parse_finetunejob(job), manifest=job)
        (tmp_path / "config.yaml").write_text(dump_config(local_config(bundle, processes=1)))
        return load_config(tmp_path / "config.yaml")

    claim(config(3))
    claim(config(3))
    with pytest.raises(ConfigError, match="holds a run of another model, dataset, tuning or training"):
        claim(config(4))
    claim(config(4), fresh=True)
    with pytest.raises(ConfigError):
        claim(config(3))


def test_a_broken_line_of_data_is_named(job: Path) -> None:
    with (job.parent / "pairs.jsonl").open("a") as data:
        data.write('{"messages": [\n')
    refused = start(job)
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 65
    assert "pairs.jsonl" in err
    assert "line 25" in err
