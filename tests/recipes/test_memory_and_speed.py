"""What saves memory or time leaves the numbers what they were, on one rank and on two, and goes on exactly."""

from pathlib import Path
from typing import Any

import pytest

from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_answers, write_config

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


@pytest.mark.timeout(900)  # compiles for a minute on a machine that does nothing else
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


@pytest.mark.parametrize(
    ("switches", "near"),
    [
        ({"optimizer": "AdamW8bit"}, 0.01),
        ({"optimizer": "AdamW4bit"}, 0.05),
        ({"precision": "BF16", "stochastic_rounding": True}, 0.05),
        ({"optimizer_in_backward": True, "optimizer": "AdamW8bit", "micro_batch_size": 2}, 0.01),
    ],
    ids=["8bit", "4bit", "rounding", "in backward"],
)
def test_optimizers_with_less_state_learn_as_adamw_does_and_go_on_bit_for_bit(
    zygote: Zygote, place: Path, switches: dict[str, Any], near: float
) -> None:
    path = config(
        place, tuning="Full", lora=None, training={"learning_rate": 3e-3, **switches, "max_steps": STEPS},
        checkpoint={"every_steps": 3, "keep": 2, "mode": "Sync"},
    )  # fmt: skip
    plain = config(place, "plain", tuning="Full", lora=None, training={"learning_rate": 3e-3, "max_grad_norm": 1e9})
    unclipped = () if "optimizer_in_backward" in switches else ("training.max_grad_norm=1e9",)

    def course(path: Path, name: str, *overrides: str, ranks: int = 2) -> dict[int, tuple[float, float]]:
        overrides = (f"run.name={name}", *overrides)
        return curve(Gang.start(zygote, place / name, path, *overrides, ranks=ranks))

    wanted, whole = course(plain, "plain", ranks=1), course(path, "whole", *unclipped)
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/whole/checkpoints/step-3"
    assert course(path, "again", *unclipped, begin) == {step: whole[step] for step in range(4, STEPS + 1)}
    assert whole[STEPS][0] < whole[1][0] * 0.95, "it learns"
    assert [loss for loss, _ in whole.values()] == pytest.approx([loss for loss, _ in wanted.values()], rel=near)
    if "optimizer_in_backward" not in switches:  # which accumulates nothing, and so needs as many ranks
        alone = course(path, "alone", *unclipped, begin, ranks=1)
        assert alone[STEPS][0] == pytest.approx(whole[STEPS][0], rel=1e-2 if "precision" in switches else 1e-5)


@pytest.mark.parametrize("recipe", ["finetune", "dpo", "kto", "distill"])
def test_steps_in_backward_and_offloaded_activations_are_those_of_an_ordinary_run_bit_for_bit(
    zygote: Zygote, place: Path, recipe: str
) -> None:
    blocks: dict[str, Any] = {"tuning": "Full", "lora": None, "training": {"max_steps": 4}}
    path = config(place, **blocks)
    answers = write_answers(place / "answers.jsonl", pairs=place / "preferences.jsonl")
    overrides = {
        "finetune": [],
        "dpo": ["recipe=ORPO", f"dataset.sources.0.uri.location=file://{place}/preferences.jsonl"],
        "kto": ["recipe=KTO", f"dataset.sources.0.uri.location=file://{answers}"],
        "distill": ["recipe=Distillation", f"distillation.teacher.uri.location=file://{place}/model"],
    }[recipe]
    for ranks in (1, 2) if recipe == "finetune" else (2,):
        size = f"training.global_batch_size={2 * ranks}"
        plain, stepped, offloaded, away = (
            curve(
                Gang.start(
                    zygote, place / f"{name}-{ranks}", path, *overrides, size, *switches, f"run.name={name}-{ranks}",
                    ranks=ranks, recipe=recipe, before="tests.recipes.offload_on_cpu",
                )
            )
            for name, switches in (
                ("plain", ["training.max_grad_norm=1e9"]),
                ("stepped", ["training.optimizer_in_backward=true"]),
                ("offloaded", ["training.max_grad_norm=1e9", "training.activation_offload=true"]),
                ("away", ["training.optimizer_in_backward=true", "training.cpu_offload=true"]),
            )
        )  # fmt: skip
        assert list(plain) == [1, 2, 3, 4]
        assert (offloaded, away) == (plain, stepped)
        assert {step: loss for step, (loss, _) in stepped.items()} == {step: loss for step, (loss, _) in plain.items()}
        for step, (_, norm) in stepped.items():
            assert norm == pytest.approx(plain[step][1], rel=1e-12)


@pytest.mark.parametrize(
    "blocks",
    [
        {"tuning": "Full", "lora": None, "training": {"optimizer": "AdamW8bit", "learning_rate": 3e-3}},
        {"tuning": "DoRA", "training": {"activation_checkpointing": "Selective", "micro_batch_size": 1}},
    ],
    ids=["all weights, state in 8 bits", "adapters"],
)
def test_weights_in_host_memory_train_go_on_and_are_exported_as_others_bit_for_bit(
    zygote: Zygote, place: Path, blocks: dict[str, Any]
) -> None:
    path = config(
        place, **blocks, checkpoint={"every_steps": 3, "keep": 2, "mode": "Sync"},
        outputs=[{"name": "merged", "type": "HuggingFace"}],
    )  # fmt: skip
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/away/checkpoints/step-3"

    def course(name: str, *overrides: str) -> dict[int, tuple[float, float]]:
        return curve(Gang.start(zygote, place / name, path, f"run.name={name}", *overrides, ranks=2))

    plain, away = course("plain"), course("away", "training.cpu_offload=true")
    assert away == plain
    assert course("again", "training.cpu_offload=true", begin) == {step: plain[step] for step in range(4, STEPS + 1)}
    assert course("back", begin) == {step: plain[step] for step in range(4, STEPS + 1)}, "whatever saved it"
    outputs = [place / "runs" / name / "outputs" / "merged" / "model.safetensors" for name in ("plain", "again")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_cpu_leaves_activations_where_they_are_and_says_so(zygote: Zygote, place: Path) -> None:
    path = config(place, training={"max_steps": 1, "activation_offload": True, "cpu_offload": True})
    gang = Gang.start(zygote, place / "ranks", path).succeed()
    words = sorted(warning["message"].partition(":")[0] for warning in gang.events("warning"))
    assert words == [
        "training.activation_offload has nothing to do on a CPU",
        "training.cpu_offload saves nothing on a CPU",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.optimizer_in_backward=true", "training.max_grad_norm=1"], "max_grad_norm must not be set with"),
        (["training.optimizer_in_backward=true"], "training.global_batch_size must be ranks x"),
        (["training.stochastic_rounding=true"], "precision must be BF16 with stochastic_rounding, got FP32"),
        (["training.compile=Blocks", "training.parallelism.tensor=2"], "parallelism.tensor must be 1 with compile"),
        (
            ["training.parallelism.tensor=2", "training.cpu_offload=true"],
            "parallelism.tensor must be 1 with cpu_offload",
        ),
        (["tuning=QLoRA", "training.cpu_offload=true"], "training.cpu_offload must be false with tuning QLoRA"),
        (["training.compile=Blocks", "training.activation_offload=true"], "compile must be None with activation_off"),
    ],
)
def test_switches_that_do_not_go_together_are_refused(
    zygote: Zygote, place: Path, overrides: list[str], words: str
) -> None:
    gang = Gang.start(zygote, place / "ranks", config(place), *overrides)
    assert gang.wait() == [64], gang.stderr()
    assert words in gang.message()["message"]
