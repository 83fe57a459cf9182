"""A look into some steps leaves a trace in the run's folder, and changes nothing else."""

import gzip
import json
from pathlib import Path

from kubetune_trainer.config import load_config
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config


def test_the_trace_holds_the_steps_that_were_asked_for_with_their_operations(zygote: Zygote, place: Path) -> None:
    training = {"max_steps": 5, "global_batch_size": 4, "micro_batch_size": 2}
    config = write_config(place / "run.yaml", training=training)
    plain = Gang.start(zygote, place / "plain", config, "run.name=plain")
    looked = Gang.start(
        zygote, place / "looked", config, "training.profile.start_step=2", "training.profile.memory=true"
    )
    assert looked.succeed().losses() == plain.succeed().losses()
    [event] = looked.events("profile")
    assert (event["firstStep"], event["step"]) == (2, 3)
    assert plain.events("profile") == []
    path = Path(event["uri"].removeprefix("file://"))
    assert path == place / "runs" / "run" / "profile" / "steps-2-3.pt.trace.json.gz"
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = [each["name"] for each in trace["traceEvents"] if each.get("cat") == "cpu_op"]
    multiplications = [name for name in names if name in {"aten::mm", "aten::matmul", "aten::linear"}]
    assert len(multiplications) >= 2 * 2 * 14, "two steps of two micro batches through two layers of seven matrices"
    optimizer = [each["name"] for each in trace["traceEvents"] if str(each["name"]).startswith("Optimizer.step")]
    assert len(optimizer) == 2
    warned = [event["message"] for event in looked.events("warning")]
    assert warned == ["training.profile.memory needs CUDA; the trace has the CPU's allocations instead"]
    assert any(each["name"] == "[memory]" for each in trace["traceEvents"])


def test_steps_that_an_earlier_attempt_did_are_not_looked_into(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", training={"max_steps": 4, "global_batch_size": 2})
    looking = ("training.profile.start_step=1", "training.profile.num_steps=2")
    Gang.start(zygote, place / "first", config, "training.max_steps=3", "training.scheduler=Constant").succeed()
    again = Gang.start(zygote, place / "again", config, "training.scheduler=Constant", *looking).succeed()
    assert list(again.losses()) == [4]
    assert again.events("profile") == []
    assert load_config(config).training_digest() == load_config(config, overrides=looking).training_digest()


def test_a_look_ends_with_the_run_at_the_latest(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", training={"max_steps": 3, "global_batch_size": 2})
    looking = ("training.profile.start_step=2", "training.profile.num_steps=10")
    gang = Gang.start(zygote, place / "long", config, *looking).succeed()
    [event] = gang.events("profile")
    assert (event["firstStep"], event["step"]) == (2, 3)
    assert Path(event["uri"].removeprefix("file://")).name == "steps-2-3.pt.trace.json.gz"


def test_a_look_that_would_begin_after_the_run_is_told(zygote: Zygote, place: Path) -> None:
    config = write_config(place / "run.yaml", training={"max_steps": 2, "global_batch_size": 2})
    gang = Gang.start(zygote, place / "late", config, "training.profile.start_step=3").succeed()
    assert gang.events("profile") == []
    warned = [event["message"] for event in gang.events("warning")]
    assert warned == ["training.profile.start_step must be at most the run's 2 steps for a profile, got 3"]
