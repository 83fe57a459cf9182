"""A run that is killed, at whatever moment, goes on with the numbers that it would have had."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.gang import Gang, Zygote, steps
from tests.recipes.tiny import write_config

STEPS = 18
EVERY = 3
RANKS = 2


@pytest.fixture(scope="module")
def golden(zygote: Zygote, tiny: Path) -> dict[int, float]:
    """Every step's loss of a run that nobody disturbs."""
    gang = Gang.start(zygote, tiny / "golden", demanding_config(tiny), "run.name=golden", ranks=RANKS).succeed()
    losses = gang.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] * 0.8, "it learns, so a wrong resume would show"
    return losses


def demanding_config(folder: Path) -> Path:
    """All that has state of its own: dropout, packing, accumulation, two sources, a schedule, several epochs."""
    sources = [
        {"name": name, "uri": {"location": f"file://{folder}/{name}.jsonl"}, "weight": weight}
        for name, weight in (("pairs", 1.0), ("more", 1.5))
    ]
    training: dict[str, Any] = {
        "max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 2e-2, "scheduler": "Cosine",
        "warmup_steps": 3, "precision": "BF16Mixed", "weight_decay": 0.01,
    }  # fmt: skip
    return write_config(
        folder / "demanding.yaml",
        dataset={"sources": sources, "max_sequence_length": 64, "packing": "BestFit"},
        lora={"rank": 4, "alpha": 8, "dropout": 0.1},
        training=training,
        checkpoint={"every_steps": EVERY, "keep": 2, "mode": "Async"},
    )


def test_killed_five_times_every_step_has_the_undisturbed_runs_loss_bit_for_bit(
    zygote: Zygote, tiny: Path, golden: dict[int, float]
) -> None:
    rng = random.Random(3)  # noqa: S311 (a seed that can be repeated)
    # Between checkpoints, and while one is under way: it is copied after a multiple of EVERY, and written after that.
    moments = sorted([*rng.sample(range(4, STEPS - 1), 3), EVERY * 2, EVERY * 4])
    gangs: list[Gang] = []
    for number, moment in enumerate(moments):
        gang = Gang.start(zygote, tiny / f"killed-{number}", demanding_config(tiny), "run.name=killed", ranks=RANKS)
        gangs.append(gang)
        gang.wait_for(lambda event, moment=moment: event["event"] == "step" and event["step"] >= moment)
        gang.kill(number % RANKS)
        codes = gang.wait()
        assert codes[number % RANKS] == -signal.SIGKILL, "it was killed in the middle"
        assert codes[1 - number % RANKS] == 78, gang.stderr()
    gangs.append(
        Gang.start(zygote, tiny / "killed-last", demanding_config(tiny), "run.name=killed", ranks=RANKS).succeed()
    )

    assert len([gang for gang in gangs if gang.events("resume")]) >= 4
    assert {step: {loss} for step, loss in golden.items()} == steps(gangs)
    trained = sum(len(gang.losses()) for gang in gangs)
    assert trained < STEPS + len(moments) * 4 * EVERY, "checkpoints save work"


def test_sigterm_saves_the_step_in_flight_on_all_ranks_and_exits_75(
    zygote: Zygote, tiny: Path, golden: dict[int, float]
) -> None:
    config = demanding_config(tiny)
    first = Gang.start(zygote, tiny / "stopped-0", config, "run.name=stopped", ranks=RANKS)
    first.wait_for(lambda event: event["event"] == "step" and event["step"] >= 6)
    first.kill(1, signal.SIGTERM)
    assert first.wait() == [75, 75], first.stderr()
    last = max(first.losses())
    assert first.message()["result"] == "Preempted"
    assert first.message()["step"] == last < STEPS
    assert first.events("checkpoint")[-1]["step"] == last

    second = Gang.start(zygote, tiny / "stopped-1", config, "run.name=stopped", ranks=RANKS).succeed()
    assert second.events("resume")[0]["step"] == last
    assert min(second.losses()) == last + 1
    assert {step: {loss} for step, loss in golden.items()} == steps([first, second])


def test_a_finished_run_started_again_trains_nothing_and_exports_again(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", outputs=[{"name": "merged", "type": "HuggingFace"}])
    first = Gang.start(zygote, place / "first", config).succeed()
    again = Gang.start(zygote, place / "again", config).succeed()
    assert again.events("step") == []
    assert again.message()["outputs"] == first.message()["outputs"] != []
    assert again.message()["progress"] == first.message()["progress"]
    assert again.message()["progress"]["step"] == 12


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    zygote: Zygote, tiny: Path, golden: dict[int, float]
) -> None:
    config = demanding_config(tiny)
    first = Gang.start(zygote, tiny / "damaged-0", config, "run.name=damaged", ranks=RANKS).succeed()
    before, last = [event["step"] for event in first.events("checkpoint")][-2:]
    newest = tiny / "runs" / "damaged" / "checkpoints" / f"step-{last}"
    shard = newest / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:100])
    second = Gang.start(zygote, tiny / "damaged-1", config, "run.name=damaged", ranks=RANKS).succeed()
    warned = f"checkpoint file://{newest} is damaged and passed over: __1_0.distcp has 100 bytes of "
    assert any(event["message"].startswith(warned) for event in second.events("warning"))
    assert second.events("resume")[0]["step"] == before
    assert list(second.losses()) == list(range(before + 1, STEPS + 1))
    assert {step: {loss} for step, loss in golden.items()} == steps([first, second])
    assert (newest / "COMPLETE").exists(), "it was written again"
    assert shard.stat().st_size > 100


def test_dora_with_a_faster_second_matrix_goes_on_bit_for_bit(zygote: Zygote, place: Path) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "rank_stabilized": True, "learning_rate_ratio": 4.0}
    outputs = [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}]
    config = write_config(
        place / "run.yaml", tuning="DoRA", lora=lora, outputs=outputs, checkpoint={"every_steps": 3, "mode": "Sync"}
    )
    whole = Gang.start(zygote, place / "whole", config, "run.name=whole", ranks=RANKS).succeed()
    assert whole.losses()[12] < whole.losses()[1] * 0.9, "it learns"
    killed = Gang.start(zygote, place / "killed", config, ranks=RANKS)
    killed.wait_for(lambda event: event["event"] == "step" and event["step"] >= 5)
    killed.kill(1)
    killed.wait()
    gone_on = Gang.start(zygote, place / "on", config, ranks=RANKS).succeed()
    assert gone_on.events("resume")
    assert steps([killed, gone_on]) == {step: {loss} for step, loss in whole.losses().items()}
    digests = [[output["digest"] for output in gang.message()["outputs"]] for gang in (whole, gone_on)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("tuning", ["LoRA", "Full"])
def test_a_run_goes_from_two_ranks_to_one_to_four_with_the_losses_of_one_that_nobody_disturbs(
    zygote: Zygote, place: Path, tuning: str
) -> None:
    """To rounding: sums of fp32 are taken in another order on another number of ranks."""
    training = {
        "max_steps": 9, "global_batch_size": 8, "precision": "FP32", "scheduler": "Constant",
        "learning_rate": 1e-2 if tuning == "LoRA" else 1e-3,
    }  # fmt: skip
    lora = {"rank": 4, "alpha": 8} if tuning == "LoRA" else None
    config = write_config(place / "run.yaml", training=training, tuning=tuning, lora=lora)
    whole = Gang.start(zygote, place / "whole", config, "run.name=whole", ranks=2)
    found: dict[int, float] = {}
    for last, ranks in ((3, 2), (6, 1), (9, 4)):
        gang = Gang.start(zygote, place / f"to-{last}", config, f"training.max_steps={last}", ranks=ranks).succeed()
        assert list(gang.losses()) == [last - 2, last - 1, last]
        found |= gang.losses()
    losses = whole.succeed().losses()
    assert losses[9] < losses[1]
    assert found == pytest.approx(losses, rel=1e-6)


def test_a_run_can_begin_with_another_runs_checkpoint(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml")
    Gang.start(zygote, place / "first", config, "training.max_steps=4", "run.name=first").succeed()
    for uri in ("runs/first/checkpoints", "runs/first/checkpoints/step-4"):
        name = uri.replace("/", "-")
        second = Gang.start(
            zygote, place / name, config, "training.max_steps=6", f"run.name={name}",
            f"checkpoint.resume_from.uri=file://{place}/{uri}",
        ).succeed()  # fmt: skip
        assert second.events("resume")[0]["step"] == 4
        assert list(second.losses()) == [5, 6]
        assert (place / "runs" / name / "checkpoints" / "step-6" / "COMPLETE").exists()


@pytest.mark.parametrize("steps", [3, 4])
def test_another_runs_checkpoint_that_leaves_no_step_is_refused(zygote: Zygote, place: Path, steps: int) -> None:
    config = write_config(place / "run.yaml")
    Gang.start(zygote, place / "first", config, "training.max_steps=4", "run.name=first").succeed()
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/first/checkpoints"
    gang = Gang.start(zygote, place / "second", config, f"training.max_steps={steps}", begin, ranks=RANKS)
    assert gang.wait() == [64, 78], "rank 0 finds it while it prepares"
    assert gang.message()["message"] == (
        f"FineTuneJob local/run: checkpoint.resume_from must be of a step below the run's total of {steps}, "
        f"got step 4 of file://{place}/runs/first/checkpoints/step-4"
    )


def test_a_run_that_began_with_anothers_checkpoint_finishes_again(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml")
    Gang.start(zygote, place / "first", config, "training.max_steps=4", "run.name=first").succeed()
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/first/checkpoints"
    for name, trained in (("second", [5, 6]), ("again", [])):
        gang = Gang.start(zygote, place / name, config, "training.max_steps=6", begin).succeed()
        assert list(gang.losses()) == trained


def test_a_run_has_neither_anothers_validation_loss_nor_its_lineage_without_held_out_data(
    zygote: Zygote, place: Path
) -> None:
    sources = [{"name": "seen", "uri": {"location": f"file://{place}/pairs.jsonl"}}]
    held = [{"name": "held", "uri": {"location": f"file://{place}/more.jsonl"}}]
    dataset = {"sources": sources, "validation": {"sources": held}, "max_sequence_length": 64}
    config = write_config(place / "run.yaml", dataset=dataset)
    first = Gang.start(zygote, place / "first", config, "training.max_steps=4", "run.name=first").succeed()
    assert first.message()["progress"]["validationLoss"] > 0
    told = json.loads((place / "runs" / "first" / "lineage.json").read_text())["sources"]
    assert [(each["name"], each.get("use")) for each in told] == [("seen", None), ("held", "validation")]
    assert told[1]["location"].endswith("more.jsonl")
    assert told[1].get("etag") or told[1].get("digest")
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/first/checkpoints"
    second = Gang.start(zygote, place / "second", config, "training.max_steps=6", "dataset.validation=null", begin)
    assert "validationLoss" not in second.succeed().message()["progress"]


def test_a_checkpoint_of_another_config_says_at_which_step_training_goes_on(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml")
    Gang.start(zygote, place / "first", config, "training.max_steps=4", "run.name=first").succeed()
    begin = f"checkpoint.resume_from.uri=file://{place}/runs/first/checkpoints"
    gang = Gang.start(zygote, place / "second", config, "training.max_steps=5", "training.seed=1", begin).succeed()
    told = "was saved under another config or script: training goes on after step 4, with the rows that this run has"
    assert any(told in event["message"] for event in gang.events("warning"))
