"""Every side of every benchmark whose libraries are here runs for one small step, so that the tables stay runnable."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.tiny import write_model

FOLDER = Path(__file__).parent.parent / "benchmarks"
SLOW = {"compile Blocks"}  # a compiler runs, as in recipes/test_memory_and_speed.py
TABLES = ("checkpoint", "lora", "sft", "full", "mfu", "packing", "loss", "load", "decode")
SMALL = {"steps": 1, "batch": 2, "rows": 1, "length": 16, "tokens": 8, "prompt": 4, "vocabulary": 50, "width": 8}
SMALL |= {"samples": 4, "threads": 1, "rank": 2}


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a shape that three ranks can share, and whose rows can be packed."""
    shape = {"hidden_size": 192, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
    return str(write_model(tmp_path_factory.mktemp("benchmarks") / "model", **shape))


@pytest.mark.filterwarnings("ignore")  # the peers warn of their own ways
@pytest.mark.parametrize("name", TABLES)
def test_each_side_of_a_table_runs_one_small_step(name: str, model: str) -> None:
    table = importlib.import_module(name).TABLE
    here = [side for side in table.sides if table.sides[side].environment is None]
    row = table.rows[0]
    settings: dict[str, Any] = {**row.settings, **{key: SMALL[key] for key in SMALL if key in row.settings}}
    settings |= {"threads": 1, "precision": "FP32"} | ({"model": model} if "model" in settings else {})
    found = {side: table.sides[side].run(settings) for side in row.sides if side in here}
    assert all(isinstance(value, float | int) and value >= 0 for each in found.values() for value in each.values())
    losses = [each["loss"] for each in found.values() if "loss" in each]
    assert losses == pytest.approx([losses[0]] * len(losses) if losses else [], rel=2e-4)
    for ratio in table.ratios if name != "mfu" else []:  # which derives its measure from all sides
        assert ratio.measure in found[ratio.side]


@pytest.mark.parametrize("number", range(3))
def test_each_side_of_the_ladder_runs_one_small_step(number: int, model: str) -> None:
    """In a process of its own, as it is measured: in one that has run others its memory says nothing."""
    import harness  # noqa: PLC0415 (only importable beside the tables)

    table = importlib.import_module("ladder").TABLE
    row = table.rows[number]
    settings = row.settings | {key: SMALL[key] for key in SMALL if key in row.settings} | {"model": model, "threads": 1}
    found = {side: harness.start_side(table, side, settings) for side in row.sides if side not in SLOW}
    assert all(each["tokensPerSecond"] > 0 and each["peakBytes"] > 0 for each in found.values())
    harness.check_losses(row, found)
    for ratio in (each for each in table.ratios if each.row == number):
        assert ratio.measure in found[ratio.side]


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_table_writes_its_section_and_prints_its_ratios(
    *, has_bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import harness  # noqa: PLC0415 (only importable beside the tables)

    results = tmp_path / "RESULTS.md"
    results.write_text("# Results\n\n## other\n\nkept\n\n## tiny\n\nold\n")
    measured = {"ours": [4.0, 5.0], "peer": [2.0, 1.0]}
    rounds = {name: iter(values) for name, values in measured.items()}

    def start_side(_: Any, name: str, __: Any) -> dict[str, Any]:
        return {"tokensPerSecond": next(rounds[name]), "calibration": [1.0, 1.05]}

    table = harness.Table(
        name="tiny",
        file=__file__,
        title="A title.",
        notes="Notes.",
        sides={name: harness.Side(run=dict) for name in measured},
        rows=[harness.Row(name="one", settings={}, sides=tuple(measured))],
        ratios=[harness.Ratio(name="speed", row=0, measure="tokensPerSecond", peer="peer", target=">= 2.6")],
        rounds=2,
    )
    monkeypatch.setattr(harness, "RESULTS", results)
    monkeypatch.setattr(harness, "has_bf16", lambda: has_bf16)
    monkeypatch.setattr(harness, "start_side", start_side)
    monkeypatch.setattr(sys, "argv", ["tiny.py"])
    monkeypatch.setenv(harness.CLOCK_VARIABLE, "wall")
    harness.run_table(table)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"table": "tiny", "speed": 2.5}
    text = results.read_text()
    assert "kept" in text
    assert ("old" in text) is not has_bf16, "what was measured with bf16 stands beside it"
    assert ("## tiny, without bf16 arithmetic" in text) is not has_bf16
    assert "| speed | 2.5 | >= 2.6 | missed |" in text


def test_a_round_in_which_the_machine_was_busy_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import harness  # noqa: PLC0415 (as above)

    rates = iter([(9.0, 1.2), (3.0, 1.0), (4.0, 1.0)])

    def start_side(*_: Any) -> dict[str, Any]:
        rate, slowest = next(rates)
        return {"tokensPerSecond": rate, "calibration": [1.0, slowest]}

    row = harness.Row(name="one", settings={}, sides=("ours",))
    table = harness.Table(
        name="tiny", file="", title="", notes="", sides={"ours": harness.Side(run=dict)}, rows=[row], ratios=[]
    )
    monkeypatch.setattr(harness, "start_side", start_side)
    found = harness.run_row(table, row, rounds=2, threads=1, drift_allowed=0.1)
    assert found["ours"]["tokensPerSecond"] == 4.0
    assert found["ours"]["rounds"] == 2
