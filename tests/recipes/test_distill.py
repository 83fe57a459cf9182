"""Distillation: the loss is the plain one, it learns, and its numbers depend on the rows of a step alone."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from kubetune_trainer import load_model
from kubetune_trainer.data.sampler import collate
from kubetune_trainer.data.store import DataStore
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config, write_messages, write_model

STEPS = 8
SAMPLES = 8
RELATIVE = 1e-5
"""Sums are taken in another order on another number of ranks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a wider and deeper teacher that reads the same tokens, and as many samples as a step has."""
    folder = tmp_path_factory.mktemp("distill")
    write_model(folder / "model")
    write_model(folder / "teacher", hidden_size=96, num_hidden_layers=3, tie_word_embeddings=False)
    write_messages(folder / "pairs.jsonl", samples=SAMPLES, seed=7)
    return folder


def run(zygote: Zygote, folder: Path, name: str, *overrides: str, ranks: int = 1, **blocks: Any) -> Gang:
    training = {
        "max_steps": STEPS, "global_batch_size": SAMPLES, "micro_batch_size": 2, "learning_rate": 1e-2,
        "precision": "FP32", "scheduler": "Constant",
    }  # fmt: skip
    source = {"name": "pairs", "uri": {"location": f"file://{folder}/pairs.jsonl"}}
    given: dict[str, Any] = {
        "recipe": "Distillation",
        "distillation": {"teacher": {"uri": {"location": f"file://{folder}/teacher"}}, "temperature": 2.0},
        "dataset": {"sources": [source], "max_sequence_length": 64, "packing": "None"},
        "training": training,
    }
    config = write_config(folder / f"{name}.yaml", **given | blocks)
    return Gang.start(zygote, folder / name, config, *overrides, ranks=ranks, recipe="distill")


def curve(gang: Gang) -> dict[int, list[float]]:
    told = ("loss", "gradNorm", "divergence", "crossEntropy")
    return {event["step"]: [event[name] for name in told] for event in gang.succeed().events("step")}


GOLDEN = {"Forward": (11.64097, 5.77471), "Symmetric": (13.59163, 6.18652)}
"""Loss of the first and the last step with LoRA; a change of them is a change of the method."""


@pytest.mark.parametrize(
    ("divergence", "tuning"), [("Forward", "LoRA"), ("Reverse", "Full"), ("Symmetric", "LoRA"), ("Forward", "DoRA")]
)
def test_it_learns_the_same_however_a_step_is_divided(
    zygote: Zygote, folder: Path, divergence: str, tuning: str
) -> None:
    blocks: dict[str, Any] = {"tuning": tuning} | ({"lora": None} if tuning == "Full" else {})
    name, asked = f"{divergence}-{tuning}".lower(), f"distillation.divergence={divergence}"
    whole = curve(run(zygote, folder, name, asked, f"training.micro_batch_size={SAMPLES}", **blocks))
    divided = curve(run(zygote, folder, f"{name}-2", asked, ranks=2, **blocks))
    assert list(whole) == list(range(1, STEPS + 1))
    assert whole[STEPS][0] < whole[1][0], "it learns"
    for step, values in whole.items():
        assert divided[step] == pytest.approx(values, rel=RELATIVE, abs=1e-6), f"step {step}"
    if tuning == "LoRA":
        assert (whole[1][0], whole[STEPS][0]) == pytest.approx(GOLDEN[divergence], abs=2e-4)


def test_the_first_loss_is_that_of_both_models_whole_logits(zygote: Zygote, folder: Path) -> None:
    gang = run(zygote, folder, "plain", "training.max_steps=1", "distillation.weight=0.3").succeed()
    prepared = json.loads((folder / "runs" / "plain" / "prepared.json").read_text())
    data = DataStore.open(Path(prepared["train"]["location"].removeprefix("file://")))
    batch = collate([data[row] for row in range(len(data))], pad_id=0)
    trained = batch.labels != -100
    with torch.no_grad():
        told, taught = (
            load_model(folder / name, dtype=torch.float32)(batch.tokens, documents_BT=batch.documents)[trained]
            for name in ("model", "teacher")
        )
    mine, other = (logits.div(2.0).log_softmax(-1) for logits in (told, taught))
    divergence = functional.kl_div(mine, other, reduction="sum", log_target=True) * 2.0**2 / trained.sum()
    cross_entropy = functional.cross_entropy(told, batch.labels[trained].long())
    (step,) = gang.events("step")
    wanted = [0.3 * divergence + 0.7 * cross_entropy, divergence, cross_entropy]
    found = [step[name] for name in ("loss", "divergence", "crossEntropy")]
    assert found == pytest.approx([value.item() for value in wanted], rel=1e-5)


def test_packed_rows_have_the_same_loss(zygote: Zygote, folder: Path) -> None:
    apart = curve(run(zygote, folder, "apart", "training.max_steps=3"))
    overrides = ("training.max_steps=3", "dataset.packing=BestFit", "run.name=packed")
    config = folder / "apart.yaml"
    Gang.start(zygote, folder / "prepared", config, *overrides, recipe="prepare").succeed()
    rows = json.loads((folder / "runs" / "packed" / "prepared.json").read_text())["train"]["rows"]
    assert rows < SAMPLES, "samples share rows"
    batch = (f"training.global_batch_size={rows}", "training.micro_batch_size=1")
    packed = curve(Gang.start(zygote, folder / "packed", config, *overrides, *batch, recipe="distill"))
    for step, values in apart.items():
        assert packed[step] == pytest.approx(values, rel=RELATIVE, abs=1e-6), f"step {step}"


@pytest.mark.parametrize("tuning", ["LoRA", "Full"])
def test_a_stopped_run_goes_on_bit_for_bit(zygote: Zygote, folder: Path, tuning: str) -> None:
    blocks: dict[str, Any] = {"tuning": tuning, "lora": {"rank": 4, "dropout": 0.1} if tuning == "LoRA" else None}
    name = f"stopped-{tuning}".lower()
    whole = run(zygote, folder, f"{name}-whole", **blocks).succeed().losses()
    first = run(zygote, folder, name, "run.name=" + name, **blocks)
    first.wait_for(lambda event: event["event"] == "step" and event["step"] >= 2)
    first.kill(0, signal.SIGTERM)
    assert first.wait() == [75], first.stderr()
    second = run(zygote, folder, f"{name}-again", "run.name=" + name, **blocks).succeed()
    assert second.events("resume")[0]["step"] == max(first.losses())
    assert first.losses() | second.losses() == whole


def test_a_teacher_that_reads_other_tokens_is_refused_before_anything_is_trained(zygote: Zygote, folder: Path) -> None:
    strange = write_model(folder / "strange")
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġzebra"] = vocabulary.pop("Ġcat")
    tokenizer["model"]["merges"] = []
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    gang = run(zygote, folder, "refused", f"distillation.teacher.uri.location=file://{strange}")
    assert gang.wait() == [64], gang.stderr()
    told = gang.message()
    assert "distillation.teacher must have the tokenizer of the model, got 'Ġcat' as id None" in told["message"]
    assert told["hint"] == f"The model is file://{folder}/model, distillation.teacher is file://{strange}."
