"""How a batch is cut into micro batches, ranks and packs changes nothing in what is computed."""

import json
import signal
from pathlib import Path

import pytest

from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import config_of, write_config, write_model

STEPS = 20
SAMPLES = 16
RELATIVE = 1e-6


def full_batch_config(folder: Path) -> Path:
    """Every step sees every sample, so that packed and unpacked steps have the same ones."""
    lines = (folder / "pairs.jsonl").read_text().splitlines()[:SAMPLES]
    (folder / "few.jsonl").write_text("\n".join(lines))
    return write_config(
        folder / "full.yaml",
        dataset={
            "sources": [{"name": "few", "uri": {"location": f"file://{folder}/few.jsonl"}}],
            "max_sequence_length": 64, "packing": "None",
        },
        training={
            "max_steps": STEPS, "global_batch_size": SAMPLES, "micro_batch_size": 4, "learning_rate": 1e-3,
            "precision": "FP32",
        },
    )  # fmt: skip


def curve(gang: Gang) -> dict[int, tuple[float, float]]:
    return curve_of(gang.succeed())


def curve_of(gang: Gang) -> dict[int, tuple[float, float]]:
    return {event["step"]: (event["loss"], event["gradNorm"]) for event in gang.events("step")}


@pytest.fixture(scope="module")
def base(zygote: Zygote, tiny: Path) -> dict[int, tuple[float, float]]:
    """One rank, micro batches of four samples."""
    return curve(Gang.start(zygote, tiny / "base", full_batch_config(tiny), "run.name=base"))


def test_loss_and_gradient_norm_do_not_depend_on_the_micro_batch(
    zygote: Zygote, tiny: Path, base: dict[int, tuple[float, float]]
) -> None:
    overrides = ("run.name=whole", f"training.micro_batch_size={SAMPLES}")
    assert_same(base, curve(Gang.start(zygote, tiny / "whole", full_batch_config(tiny), *overrides)))


def test_loss_and_gradient_norm_do_not_depend_on_the_number_of_ranks(
    zygote: Zygote, tiny: Path, base: dict[int, tuple[float, float]]
) -> None:
    two = Gang.start(zygote, tiny / "two", full_batch_config(tiny), "run.name=two", ranks=2)
    assert_same(base, curve(two))


@pytest.mark.parametrize(("replicate", "tensor"), [(2, 2), (1, 2)])
def test_loss_and_gradient_norm_do_not_depend_on_how_ranks_share_the_model(
    zygote: Zygote, tiny: Path, base: dict[int, tuple[float, float]], replicate: int, tensor: int
) -> None:
    name, ranks = f"shared-{replicate}-{tensor}", replicate * tensor
    shared = (f"training.parallelism.replicate={replicate}", f"training.parallelism.tensor={tensor}")
    gang = Gang.start(zygote, tiny / name, full_batch_config(tiny), f"run.name={name}", *shared, ranks=ranks)
    assert_same(base, curve(gang))


def test_a_run_that_split_its_layers_goes_on_where_nothing_is_split(
    zygote: Zygote, tiny: Path, base: dict[int, tuple[float, float]]
) -> None:
    config = full_batch_config(tiny)
    first = Gang.start(zygote, tiny / "split", config, "run.name=moved", "training.parallelism.tensor=2", ranks=2)
    first.wait_for(lambda event: event["event"] == "step" and event["step"] >= STEPS // 2)
    first.kill(1, signal.SIGTERM)
    assert first.wait() == [75, 75], first.stderr()
    second = Gang.start(zygote, tiny / "moved", config, "run.name=moved").succeed()
    assert not second.events("warning"), "it is the same run"
    assert_same(base, {**curve_of(first), **curve_of(second)})


def test_loss_and_gradient_norm_do_not_depend_on_packing(
    zygote: Zygote, tiny: Path, base: dict[int, tuple[float, float]]
) -> None:
    config = full_batch_config(tiny)
    overrides = ("run.name=packed", "dataset.packing=BestFit")
    Gang.start(zygote, tiny / "prepared", config, *overrides, recipe="prepare").succeed()
    rows = json.loads((tiny / "runs" / "packed" / "prepared.json").read_text())["train"]["rows"]
    assert rows < SAMPLES / 2, "samples share rows"
    batch = (f"training.global_batch_size={rows}", "training.micro_batch_size=1")
    assert_same(base, curve(Gang.start(zygote, tiny / "packed", config, *overrides, *batch)))


def assert_same(base: dict[int, tuple[float, float]], other: dict[int, tuple[float, float]]) -> None:
    assert list(base) == list(other) == list(range(1, STEPS + 1))
    for step, values in base.items():
        assert other[step] == pytest.approx(values, rel=RELATIVE), f"step {step}"
    assert base[STEPS][0] < base[1][0], "it learns"


@pytest.mark.parametrize(("length", "warned"), [(32, False), (64, True)])
def test_positions_that_change_with_the_longest_document_are_told(
    zygote: Zygote, tmp_path: Path, tiny: Path, length: int, *, warned: bool
) -> None:
    write_model(tmp_path / "model", rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=32)
    (tmp_path / "pairs.jsonl").write_bytes((tiny / "pairs.jsonl").read_bytes())
    config = config_of(tmp_path, "finetune", max_steps=1)
    gang = Gang.start(zygote, tmp_path / "ranks", config, f"dataset.max_sequence_length={length}").succeed()
    told = [event["message"] for event in gang.events("warning")]
    assert any("dynamic positions change beyond 32 tokens" in message for message in told) == warned
