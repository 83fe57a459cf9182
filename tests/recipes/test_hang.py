"""A run of which one rank stands still is ended by its launcher and loses no checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.paths import ROOT
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import config_of


def test_ranks_that_stand_still_are_ended_and_the_next_attempt_goes_on(zygote: Zygote, place: Path) -> None:
    config = config_of(place, "finetune")
    peaceful = Gang.start(zygote, place / "peaceful", config, "run.name=peaceful", ranks=2).succeed()
    checkpoints = ("checkpoint.every_steps=2", "checkpoint.mode=Sync")
    script = ROOT / "tests" / "recipes" / "standing_still.py"
    environment = {
        "PET_NPROC_PER_NODE": "2", "KUBETUNE_TERMINATION_LOG": str(place / "message"), "KUBETUNE_HANG_SECONDS": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'trainer_image'}", "TEST_STILL_AT": "4",
    }  # fmt: skip
    still = subprocess.run(
        [sys.executable, "-m", "kubetune_trainer.launch", str(script), "--config", str(config), *checkpoints],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert still.returncode == 76, still.stderr
    message = json.loads((place / "message").read_bytes())
    assert (message["result"], message["reason"]) == ("Failed", "Hang")
    assert "in exchange_or_stand_still" in still.stderr, "where the one stands"
    assert "in gather_vector" in still.stderr, "where the other waits"
    found = [json.loads(line) for line in still.stdout.splitlines()]
    losses = {event["step"]: event["loss"] for event in found if event["event"] == "step"}
    again = Gang.start(zygote, place / "again", config, *checkpoints, ranks=2).succeed()
    assert again.events("resume")[0]["step"] == 2
    assert losses | again.losses() == peaceful.losses()
