"""The demo's data is what its script writes, in one form, and nothing of the held-out part is trained."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.paths import ROOT

DATA = ROOT / "examples/data"
TOPICS = {"billing", "delivery", "defect", "return", "question"}
TRAIN, HELD_OUT = "tickets-train.jsonl", "tickets-heldout.jsonl"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def question(sample: dict[str, Any]) -> str:
    return sample["messages"][1]["content"]


@pytest.mark.parametrize("name", [TRAIN, HELD_OUT])
def test_the_script_writes_what_is_in_the_tree(name: str, tmp_path: Path) -> None:
    shutil.copy(DATA / "make_tickets.py", tmp_path)
    runpy.run_path(str(tmp_path / "make_tickets.py"), run_name="__main__")
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize(("name", "number"), [(TRAIN, 320), (HELD_OUT, 40)])
def test_every_answer_is_one_line_of_json_in_the_same_form(name: str, number: int) -> None:
    samples = read(name)
    assert len(samples) == number
    for sample in samples:
        assert [message["role"] for message in sample["messages"]] == ["system", "user", "assistant"]
        text = sample["messages"][2]["content"]
        answer = json.loads(text)
        assert text == json.dumps(answer)
        assert list(answer) == ["topic", "product", "urgent"]
        assert answer["topic"] in TOPICS
        assert answer["product"] in question(sample).lower()
        assert isinstance(answer["urgent"], bool)


def test_nothing_of_the_held_out_part_is_trained() -> None:
    assert not {question(sample).lower() for sample in read(TRAIN)} & {
        question(sample).lower() for sample in read(HELD_OUT)
    }


@pytest.mark.parametrize("name", [TRAIN, HELD_OUT])
def test_topics_and_urgency_are_balanced(name: str) -> None:
    answers = [json.loads(sample["messages"][2]["content"]) for sample in read(name)]
    for topic in TOPICS:
        urgent = [answer["urgent"] for answer in answers if answer["topic"] == topic]
        assert len(urgent) == len(answers) / 5
        assert sum(urgent) == len(urgent) / 2
