"""SFT and QAT keep their numbers: losses of short runs in fp32, which a change of the method would change."""

from pathlib import Path
from typing import Any

import pytest

from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config

STEPS = 8
GOLDEN = {
    ("SFT", "LoRA"): (15.20286, 14.79390),
    ("SFT", "Full"): (15.20286, 14.76509),
    ("QAT", "LoRA"): (15.20248, 14.78833),
    ("QAT", "Full"): (15.20248, 14.76162),
}
"""Loss of the first and the last step, by recipe and tuning."""


@pytest.mark.parametrize(("recipe", "tuning"), GOLDEN)
def test_the_first_and_the_last_loss_are_what_they_were(zygote: Zygote, tiny: Path, recipe: str, tuning: str) -> None:
    name = f"golden-{recipe}-{tuning}".lower()
    blocks: dict[str, Any] = {"recipe": recipe, "tuning": tuning}
    if tuning == "Full":
        blocks["lora"] = None
    if recipe == "QAT":
        blocks["qat"] = {"scheme": "Int4WeightOnly", "group_size": 32}
    training = {
        "max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "precision": "FP32",
        "learning_rate": 1e-2 if tuning == "LoRA" else 1e-3,
    }  # fmt: skip
    config = write_config(tiny / f"{name}.yaml", **blocks, training=training)
    losses = Gang.start(zygote, tiny / name, config).succeed().losses()
    assert losses[STEPS] < losses[1], "it learns"
    assert (losses[1], losses[STEPS]) == pytest.approx(GOLDEN[recipe, tuning], abs=2e-4)
