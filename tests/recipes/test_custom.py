"""A script of one's own in place of a recipe: the example's loss, stopped by the launcher and gone on with."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_operator.cli import recipes
from tests.cluster.paths import ROOT
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config

STEPS = 10


@pytest.fixture(scope="module")
def focal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of examples/custom.yaml, as its ConfigMap is mounted."""
    objects = yaml.safe_load_all((ROOT / "examples" / "custom.yaml").read_text())
    (script,) = [each["data"]["focal.py"] for each in objects if each["metadata"]["name"] == "focal" and "data" in each]
    path = tmp_path_factory.mktemp("focal") / "focal.py"
    path.write_text(script)
    return path


def custom_config(folder: Path, name: str, script: Path, **blocks: Any) -> Path:
    training = {
        "max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-2, "precision": "FP32",
    }  # fmt: skip
    own = {"recipe": "Custom", "custom": {"script": {"path": str(script)}}, "training": training}
    return write_config(folder / f"{name}.yaml", **own | blocks)


def test_a_changed_loss_is_launched_stopped_and_gone_on_with_bit_for_bit(
    zygote: Zygote, tiny: Path, focal: Path, tmp_path: Path
) -> None:
    config, gamma = custom_config(tiny, "focal", focal, checkpoint={"every_steps": 2}), ("--gamma", "2.0")
    whole = Gang.start(zygote, tmp_path / "whole", config, "run.name=focal-whole", *gamma, script=focal).succeed()
    assert list(whole.losses()) == list(range(1, STEPS + 1))
    assert whole.losses()[STEPS] < whole.losses()[1]

    command = [sys.executable, "-m", "kubetune_trainer.launch", str(focal), "--config", str(config), *gamma]
    environment = {"KUBETUNE_TERMINATION_LOG": str(tmp_path / "message"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT / "trainer_image")
    found: dict[int, float] = {}
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launched:
        assert launched.stdout is not None
        for line in launched.stdout:
            event = json.loads(line)
            if event["event"] == "step":
                found[event["step"]] = event["loss"]
                if event["step"] == 3:
                    launched.send_signal(signal.SIGTERM)
        _, err = launched.communicate(timeout=60)
    assert launched.returncode == 75, err
    message = json.loads((tmp_path / "message").read_bytes())
    assert (message["result"], message["step"]) == ("Preempted", max(found))

    second = Gang.start(zygote, tmp_path / "second", config, *gamma, script=focal).succeed()
    assert second.events("resume")[0]["step"] == max(found) < STEPS
    assert found | second.losses() == whole.losses()
    assert second.message()["result"] == "Complete"
    lineage = json.loads((tiny / "runs" / "focal" / "lineage.json").read_text())
    assert lineage["scriptDigest"] == f"sha256:{hashlib.sha256(focal.read_bytes()).hexdigest()}"


def test_a_copied_recipe_is_accepted_and_without_gamma_the_focal_loss_is_its_cross_entropy(
    zygote: Zygote, tiny: Path, focal: Path, tmp_path: Path
) -> None:
    mine = recipes.copy("finetune", destination=tmp_path / "mine.py")
    config = custom_config(tiny, "mine", mine)
    plain = Gang.start(zygote, tmp_path / "plain", config, script=mine).succeed().losses()
    arguments = ("run.name=mine-focal", "--gamma")
    same = Gang.start(zygote, tmp_path / "same", config, *arguments, "0", script=focal).succeed().losses()
    assert same == pytest.approx(plain, rel=1e-5)
    other = Gang.start(
        zygote, tmp_path / "other", config, "training.max_steps=1", "run.name=mine-2", "--gamma", "2", script=focal
    )
    assert other.succeed().losses()[1] < plain[1]


def test_a_copied_recipe_for_pairs_has_its_settings(zygote: Zygote, tiny: Path, tmp_path: Path) -> None:
    mine = recipes.copy("dpo", destination=tmp_path / "mine.py")
    source = {"name": "pairs", "uri": {"location": f"file://{tiny}/preferences.jsonl"}, "format": "Preference"}
    dataset = {"sources": [source], "max_sequence_length": 64}
    config = custom_config(tiny, "mine-dpo", mine, dataset=dataset, dpo={"beta": 0.2})
    gang = Gang.start(zygote, tmp_path / "dpo", config, "training.max_steps=2", script=mine).succeed()
    assert gang.losses()[1] == pytest.approx(0.69315, abs=1e-4), "log 2: the model is its own reference"
    assert "rewardsMargin" in gang.events("step")[0]


def test_arguments_that_nobody_reads_are_refused(zygote: Zygote, tiny: Path, focal: Path, tmp_path: Path) -> None:
    config = custom_config(tiny, "strange", focal)
    gang = Gang.start(zygote, tmp_path / "strange", config, "--delta", "1", script=focal)
    assert gang.wait() == [64], gang.stderr()
    assert "arguments must be --config and field=value, got --delta" in gang.message()["message"]


def test_a_changed_script_says_so_when_it_goes_on(zygote: Zygote, tiny: Path, focal: Path, tmp_path: Path) -> None:
    config = custom_config(tiny, "changed", focal)
    Gang.start(zygote, tmp_path / "before", config, "training.max_steps=2", script=focal).succeed()
    changed = tmp_path / "mine.py"
    changed.write_text(focal.read_text().replace("default=2.0", "default=1.0"))
    for script, warned in ((focal, False), (changed, True)):
        gang = Gang.start(zygote, tmp_path / script.stem, config, "training.max_steps=2", script=script).succeed()
        told = [event["message"] for event in gang.events("warning")]
        assert any("saved under another config or script" in message for message in told) == warned
