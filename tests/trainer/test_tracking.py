"""Trackers never stop a run: they are told what there is to tell when they can be, and a dead one warns once."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kubetune_trainer import tracking
from kubetune_trainer.config import FineTuneConfig, Wandb
from kubetune_trainer.errors import ConfigError
from kubetune_trainer.report import report
from kubetune_trainer.storage import open_store, scratch_dir, upload_tree
from kubetune_trainer.tracking import Artifact, Begun, Outbox, Row, numbers_of, run_id, tracked
from kubetune_trainer.tracking.wandb_run import WandbRun, history, last_steps


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KUBETUNE_SCRATCH", str(tmp_path / "scratch"))
    scratch_dir.cache_clear()
    yield
    scratch_dir.cache_clear()


def config(folder: Path, *, uid: str = "u1", **blocks: Any) -> FineTuneConfig:
    values = {
        "run": {"name": "run", "uid": uid, "directory": f"file://{folder}/run", "cache": f"file://{folder}/cache"},
        "workspace": {"uri": f"file://{folder}"},
        "model": {"uri": {"location": f"file://{folder}/model"}},
        "dataset": {"sources": [{"name": "a", "uri": {"location": "s3://data/a.jsonl"}}]},
        "training": {"max_steps": 3},
    }
    return FineTuneConfig.model_validate({**values, **blocks})


def test_no_library_of_a_tracker_is_imported_unless_the_config_names_it() -> None:
    code = (
        "import sys, kubetune_trainer.tracking\n"
        "print([name for name in ('wandb', 'mlflow', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


DEAD = """
import json, sys, time
from kubetune_trainer import tracking
from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.report import report
from kubetune_trainer.tracking import wandb_run

tracking.CLOSE_SECONDS, wandb_run.INIT_SECONDS = 6.0, 4
longest = 0.0
with tracking.tracked(FineTuneConfig.model_validate_json(sys.argv[1]), is_first=True) as settle:
    report("start", step=0, total_steps=50)
    for step in range(1, 51):
        began = time.monotonic()
        report("step", step=step, loss=1.0)
        longest = max(longest, time.monotonic() - began)
    settle()
    ended = time.monotonic()
report("waited", longest=longest, close=time.monotonic() - ended)
"""


@pytest.mark.parametrize("case", ["mlflow, nobody listens", "mlflow, nobody answers", "wandb, nobody listens"])
def test_a_dead_server_warns_once_and_holds_nothing_up(case: str, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if case.endswith("answers"):
            server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        blocks = {"mlflow": {"tracking_uri": uri, "experiment": "e"}, "wandb": {"project": "p", "base_url": uri}}
        name = case.partition(",")[0]
        run = config(tmp_path, tracking={name: blocks[name]})
        quick = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "WANDB_API_KEY": "k" * 40}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", DEAD, run.model_dump_json()], env={**os.environ, **quick}, timeout=60,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert time.monotonic() - began < 40, "nor does the process that ends"
    events = [json.loads(line) for line in done.stdout.splitlines()]
    [waited] = [event for event in events if event["event"] == "waited"]
    assert waited["longest"] < 1.0, "a report waits for no tracker"
    assert waited["close"] < 10.0
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert 1 <= len(warnings) <= 2, "one of the server, and where there was no time left, one of the end"
    starts = (f"tracking.{name} cannot be told: ", f"tracking by {name} did not end within")
    assert all(text.startswith(starts) for text in warnings)
    assert len([event for event in events if event["event"] == "step"]) == 50


class Stumbling:
    """A tracker that fails a number of times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.told: list[int] = []
        self.state = ""

    def open(self, begun: Begun) -> None:
        self.begun = begun

    def log(self, rows: list[Row]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route")
        self.told += [row.step for row in rows]

    def refer(self, artifact: Artifact) -> None:
        self.artifact = artifact

    def files(self) -> None:
        return None

    def close(self, state: str) -> None:
        self.state = state


def test_what_could_not_be_told_is_told_later_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.05)
    tracker = Stumbling(failures=3)
    outbox = Outbox("mlflow", tracker, config=config(tmp_path))
    outbox.begin(step=4)
    for step in range(5, 25):
        outbox.put(Row(step=step, time=0.0, numbers={"loss": 1.0}))
        time.sleep(0.02)
    assert outbox.ask(lambda: outbox.close("Complete")).wait(5)
    assert (tracker.told, tracker.state, tracker.begun.step) == (list(range(5, 25)), "Complete", 4)
    assert capfd.readouterr().out.count("tracking.mlflow cannot be told: ConnectionError: no route") == 1


@pytest.mark.parametrize(("error", "state"), [(None, "Complete"), (ConfigError("x"), "Failed")])
def test_the_end_of_a_run_is_told(
    error: Exception | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Stumbling(failures=0)
    monkeypatch.setattr(tracking, "trackers", lambda _: iter([("mlflow", tracker)]))
    try:
        with tracked(config(tmp_path), is_first=True):
            report("start", step=0)
            report("checkpoint", step=2, uri="s3://runs/step-2")
            if error is not None:
                raise error
    except ConfigError:
        pass
    assert tracker.state == state
    assert (tracker.artifact.name, tracker.artifact.uri) == ("checkpoint", "s3://runs/step-2")


def test_a_validations_numbers_have_names_of_their_own() -> None:
    fields = {"step": 3, "validation_loss": 0.5, "rewards_margin": 1, "note": "x", "ok": True}
    assert numbers_of("validation", fields) == {"validation_loss": 0.5, "validation_rewards_margin": 1.0}
    assert numbers_of("step", {"step": 3, "attempt": 1, "loss": 2}) == {"loss": 2.0}


def test_a_runs_identity_is_its_jobs_and_that_of_a_local_run_goes_with_its_folder(tmp_path: Path) -> None:
    assert run_id(config(tmp_path, uid="a")) == run_id(config(tmp_path, uid="a")) != run_id(config(tmp_path, uid="b"))
    local = run_id(config(tmp_path, uid="local"))
    assert run_id(config(tmp_path, uid="local")) == local
    (tmp_path / "run" / "tracking.id").unlink()
    assert run_id(config(tmp_path, uid="local")) != local


def test_who_waits_for_a_tracker_finds_its_failure_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def slowly(_: str, *, message: str) -> None:
        time.sleep(0.2)
        told.append(message)

    def fail() -> None:
        raise OSError("nobody listens")

    monkeypatch.setattr(tracking, "report", slowly)
    outbox = Outbox("mlflow", Stumbling(failures=0), config=config(tmp_path))
    assert outbox.ask(fail).wait(10)
    assert told == ["tracking.mlflow cannot be told: OSError: nobody listens"]


def rows(*told: int | str) -> list[Row]:
    """Rows of steps, and of validations where the step is a text."""
    names = {int: "loss", str: "validation_loss"}
    return [Row(step=int(step), time=0.0, numbers={names[type(step)]: float(step)}) for step in told]


def test_an_attempt_tells_the_validation_that_the_one_before_was_stopped_in(tmp_path: Path) -> None:
    folder = f"file://{tmp_path}/run/wandb"
    attempts = [rows(1, 2, "2", 3, 4), rows(3, 4, "4", 5, 6, "6"), rows(5, 6, "6")]
    for number, told in enumerate(attempts):
        scratch = tmp_path / f"attempt-{number}"
        scratch.mkdir()
        run = WandbRun(Wandb(project="p", mode="Offline"))
        run.open(Begun(run_id="r", step=2 * number, config=config(tmp_path), scratch=scratch, folder=folder))
        run.log(told)
        files = run.files()
        assert files is not None
        upload_tree(open_store(folder), files, f"{number}-{files.name}")
        run.close("Interrupted")
    logs = sorted((tmp_path / "run" / "wandb").glob("*/run-r.wandb"))
    told = [row for log in logs for row in history(log)]
    assert [row["step"] for row in told if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {row["step"]: row["validation_loss"] for row in told if "validation_loss" in row} == {2: 2, 4: 4, 6: 6}
    assert len(told) == 9, "each once"
    assert [last_steps(log) for log in logs] == [
        {"step": 4, "validation_step": 2},
        {"step": 6, "validation_step": 6},
        {},
    ]
