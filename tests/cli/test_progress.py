"""The trainer's events as a person reads them."""

import io
from typing import Any

import pytest
from rich.console import Console

from kubetune_operator.cli.progress import Display, describe, parse_event

STEP = {
    "event": "step",
    "step": 3,
    "totalSteps": 90,
    "loss": 1.2839473724365234,
    "tokensPerSecond": 812.3,
    "etaSeconds": 412,
}


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (STEP, "step 3/90  loss 1.284  812.3 tokens/s  ETA 6m52s"),
        ({"event": "validation", "step": 20, "validationLoss": 1.5}, "validation after step 20: loss 1.5"),
        ({"event": "checkpoint", "step": 20, "uri": "s3://a/20", "seconds": 1}, "checkpoint of step 20: s3://a/20"),
        (
            {"event": "checkpointFailed", "step": 20, "message": "no answer"},
            "warning: no checkpoint of step 20, training goes on: no answer",
        ),
        (
            {"event": "earlyStop", "step": 60, "bestValidationStep": 30},
            "training ends early, after step 60: no validation was better than that after step 30",
        ),
        ({"event": "resume", "step": 20, "uri": "s3://a/step-20"}, "resumed after step 20 from s3://a/step-20"),
        (
            {"event": "output", "name": "merged", "type": "HuggingFace", "uri": "s3://a/m", "bytes": 269_060_552},
            "output merged (HuggingFace): s3://a/m, 269.1 MB",
        ),
        (
            {"event": "output", "name": "a", "type": "PEFT", "uri": "s3://a", "bytes": 9},
            "output a (PEFT): s3://a, 9 bytes",
        ),
        (
            {"event": "progress", "done": 120, "total": 800, "tokensPerSecond": 95.2, "etaSeconds": 41},
            "120/800  95.2 tokens/s  ETA 41s",
        ),
        ({"event": "progress", "done": 3, "total": 9}, "3/9"),
        (
            {"event": "result", "task": "arc", "metric": "acc", "filter": "none", "value": 0.41, "stderr": 0.01,
             "samples": 200},
            "arc acc: 0.41 ± 0.01 on 200 samples",
        ),
        ({"event": "gate", "name": "better", "passed": False, "message": "it fell"}, "gate better failed: it fell"),
        ({"event": "gate", "name": "close", "passed": True}, "gate close passed"),
        ({"event": "warning", "message": "3 samples are cut"}, "warning: 3 samples are cut"),
        ({"event": "phase", "phase": "Downloading"}, "downloading"),
        ({"event": "done", "step": 90}, "done after step 90"),
        ({"event": "novelty", "time": 1.0, "a": 1}, "novelty a=1"),
        ({"event": "prepare", "stage": "Packing"}, "packing"),
        (
            {"event": "start", "step": 0, "totalSteps": 9, "worldSize": 2, "device": "cpu", "parameters": 9000,
             "trainableParameters": 90},
            "90 of 9,000 parameters are trained, from step 0 to 9, by 2 x cpu",
        ),
        ({"event": "start", "attempt": 1, "answered": 3, "worldSize": 2}, "started: 3 answered, 2 world size"),
        ({"event": "start", "attempt": 2, "total": 30}, "started: 30 total"),
        ({"event": "start", "trainableParameters": "all"}, "start trainableParameters=all"),
        ({"event": "step", "step": 1, "etaSeconds": "soon"}, "step step=1 etaSeconds=soon"),
        ({"event": "done", "attempt": 1}, "done"),
        (
            {"event": "prepare", "stage": "Prepared", "rows": 10, "droppedSamples": 0},
            "prepared: 10 rows, 0 dropped samples",
        ),
    ],
)  # fmt: skip
def test_an_event_is_a_sentence(event: dict[str, Any], sentence: str) -> None:
    assert describe(event) == sentence


@pytest.mark.parametrize("line", ["", "a warning of a library", "{", '{"a": 1}', "[1]", '{"event": 3}'])
def test_other_lines_are_no_events(line: str) -> None:
    assert parse_event(line) is None


def shown(*, terminal: bool) -> tuple[str, Display]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    lines = [
        '{"event":"step","step":1,"totalSteps":2,"loss":1.5,"tokensPerSecond":10.0,"etaSeconds":5}\n',
        "a [bold]library[/bold] says\n",
        '{"event":"checkpoint","step":1,"uri":"s3://a/step-1","seconds":1.0}\n',
        '{"event":"step","step":2,"totalSteps":2,"loss":1.25,"tokensPerSecond":10.0,"etaSeconds":0}\n',
    ]
    with Display(console) as display:
        display.show_lines(lines)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), display


def test_where_nobody_looks_every_step_is_a_line() -> None:
    text, display = shown(terminal=False)
    assert text.splitlines() == [
        "step 1/2  loss 1.5  10 tokens/s  ETA 5s",
        "a [bold]library[/bold] says",
        "checkpoint of step 1: s3://a/step-1",
        "step 2/2  loss 1.25  10 tokens/s  ETA 0s",
    ]
    assert (display.step, display.last_checkpoint) == (2, "s3://a/step-1")


def test_on_a_terminal_steps_move_a_bar_and_the_rest_stays_above_it() -> None:
    text, _ = shown(terminal=True)
    assert "checkpoint of step 1: s3://a/step-1" in text
    assert "2/2" in text
    assert "loss 1.25" in text
    assert "step 2/2" not in text
