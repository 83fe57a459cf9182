"""What saves memory or time leaves the numbers what they were, on one rank and on two, and goes on exactly."""

from pathlib import Path
from typing import Any

import pytest

from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config

STEPS = 6


def config(folder: Path, name: str = "run", **blocks: Any) -> Path:
    """A run of a few steps in fp32, of packed rows, whose numbers can be compared closely."""
    given = blocks.pop("training", {})
    training = {
        "max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "FP32",
    }  # fmt: skip
    dataset = {
        "sources": [{"name": "pairs", "uri": {"location": f"file://{folder}/pairs.jsonl"}}], "max_sequence_length": 64,
    }  # fmt: skip
    return write_config(folder / f"{name}.yaml", dataset=dataset, training={**training, **given}, **blocks)


def curve(gang: Gang) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return {event["step"]: (event["loss"], event["gradNorm"]) for event in gang.succeed().events("step")}


def test_compiled_blocks_train_as_plain_ones_do_within_1e_5_and_go_on_bit_for_bit(zygote: Zygote, place: Path) -> None:
    shared = {"TORCHINDUCTOR_CACHE_DIR": str(place / "compiled"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    switches = {"compile": "Blocks", "activation_checkpointing": "Selective"}
    path = config(place, training=switches, checkpoint={"every_steps": 4, "keep": 2, "mode": "Sync"})

    def course(name: str, *overrides: str, ranks: int = 1) -> dict[int, tuple[float, float]]:
        overrides = (f"run.name={name}", *overrides)
        return curve(Gang.start(zygote, place / name, path, *overrides, ranks=ranks, environment=shared))

    plain = course("plain", "training.compile=None", "training.activation_checkpointing=None")
    whole = course("whole")
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/whole/checkpoints/step-4"
    again, spread = course("again", begin), course("spread", begin, ranks=2)
    assert whole[STEPS][0] < whole[1][0], "it learns"
    assert again == {step: whole[step] for step in range(5, STEPS + 1)}
    for step, values in plain.items():
        assert whole[step] == pytest.approx(values, rel=1e-5), f"step {step}"
        assert spread.get(step, values) == pytest.approx(values, rel=1e-5), f"step {step} on two ranks"
    assert list(spread) == list(again)
    assert any((place / "compiled").rglob("*.so")), "it was compiled"


def test_compiling_without_a_compiler_is_refused_before_anything_is_loaded(zygote: Zygote, place: Path) -> None:
    path = config(place, training={"compile": "Blocks"})
    gang = Gang.start(zygote, place / "ranks", path, environment={"CXX": "no-such-compiler"})
    assert gang.wait() == [64], gang.stderr()
    assert "training.compile must be None where no-such-compiler is not installed" in gang.message()["message"]
    assert gang.events("phase") == []
