"""`kubetune estimate`: memory by part from config.json alone, whether it fits, and what would."""

import json
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.api.manifest import dump_manifests
from tests.api.test_eval_and_quantize import manifest as manifest_of
from tests.api.test_finetunejob import manifest

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip
PARAMETERS = 1_235_814_400  # as its model card says
GIB = 2**30


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """All weights of a model of which there is no more than its config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_1B))
    training = {"maxSteps": 1, "globalBatchSize": 16, "microBatchSize": 8}
    made = manifest(
        spec__model__uri__location=f"file://{tmp_path}/model", spec__tuning="Full", spec__lora=None,
        spec__training=training, spec__outputs=[{"name": "merged", "type": "HuggingFace"}],
    )  # fmt: skip
    made["spec"].pop("lora", None)
    path = tmp_path / "job.yaml"
    path.write_text(dump_manifests([made]))
    return path


def sizes(text: str) -> dict[str, float]:
    told = [line.rstrip() for line in text.splitlines() if " a device " not in line]
    rows = [line.rsplit(maxsplit=2) for line in told if line.endswith(" GiB")]
    return {name.strip(): float(size) for name, size, _ in rows}


def test_the_parts_are_told_with_what_would_fit(job: Path, kubetune: Any) -> None:
    ran = kubetune("estimate", job, "--device-memory", "24GiB", "--suggest")
    assert ran.code == 1, ran.err
    found = sizes(ran.out)
    assert found["weights"] == found["gradients"] == pytest.approx(4 * PARAMETERS / GIB, abs=0.01)
    assert found["optimizer"] == pytest.approx(8 * PARAMETERS / GIB, abs=0.01)
    assert found["total"] == pytest.approx(sum(size for name, size in found.items() if name != "total"), abs=0.05)
    assert "FineTuneJob default/run7 does not fit a device of 24.00 GiB\n" in ran.out
    changes = [line.split() for line in ran.out.splitlines() if line.rstrip().endswith(("yes", "no"))]
    assert changes[0][:2] == ["training.microBatchSize:", "1"]
    assert "AdamW8bit" in ran.out
    assert "ffload" not in ran.out, "the job has no accelerator"
    assert ["tuning:", "LoRA,"] in [each[:2] for each in changes if each[-1] == "yes"]


def test_with_an_accelerator_the_hosts_memory_is_told_and_suggested(job: Path, kubetune: Any) -> None:
    text = job.read_text()
    job.write_text(
        text.replace("  training:\n", "  compute: {accelerator: {resource: nvidia.com/gpu, perNode: 1}}\n  training:\n")
    )
    ran = kubetune("estimate", job, "--device-memory", "24GiB", "--suggest")
    assert "training.activationOffload" in ran.out
    assert "training.cpuOffload" in ran.out
    job.write_text(job.read_text().replace("  training:\n", "  training:\n    cpuOffload: true\n"))
    ran = kubetune("estimate", job)
    assert "weights" not in {name for name, size in sizes(ran.out).items() if size}
    assert f"and in the host's memory {16 * PARAMETERS / GIB:.2f} GiB\n" in ran.out, "also gradients and two moments"


def test_what_fits_exits_with_0(job: Path, kubetune: Any) -> None:
    ran = kubetune("estimate", job, "--device-memory", "80GB")
    assert (ran.code, ran.err) == (0, "")
    assert "fits a device of 74.51 GiB" in ran.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-memory", "much"], "--device-memory must be a size such as 24GiB or 80GB, got 'much'"),
        (["--device-memory", "infGiB"], "--device-memory must be a size such as 24GiB or 80GB, got 'infGiB'"),
        (["--device-memory", "1e400"], "--device-memory must be a size such as 24GiB or 80GB, got '1e400'"),
        (["--device-memory", "NaN"], "--device-memory must be a size such as 24GiB or 80GB, got 'NaN'"),
        (["--suggest"], "--suggest needs --device-memory, for example 24GiB"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str, job: Path, kubetune: Any) -> None:
    ran = kubetune("estimate", job, *options)
    assert ran.code == 1
    assert message in ran.err


def test_a_missing_config_json_and_a_job_that_trains_nothing_are_named(
    job: Path, tmp_path: Path, kubetune: Any
) -> None:
    (tmp_path / "model" / "config.json").unlink()
    ran = kubetune("estimate", job)
    assert ran.code == 1
    assert "config.json" in ran.err
    other = tmp_path / "eval.yaml"
    other.write_text(dump_manifests([manifest_of("EvalJob")]))
    assert "needs a FineTuneJob, got EvalJob" in kubetune("estimate", other).err
