"""What a rank says of itself while it trains; what its launcher makes of that is in test_launch.py."""

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kubetune_trainer import heartbeat
from kubetune_trainer.distributed import COLLECTIVE_SECONDS, StopSignal
from kubetune_trainer.heartbeat import sign_of_life, sign_of_step, unwatched, watched

LIMIT = 100.0
FIRST = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A clock that stands still; `clock.now` sets it."""
    clock = SimpleNamespace(now=5000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(heartbeat, "time", clock)
    yield clock
    assert heartbeat._watch == []


@pytest.fixture
def patience(clock: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """How long the next sign may take from now on; infinite where none is expected."""
    path = tmp_path / "heartbeat"
    monkeypatch.setenv("KUBETUNE_HEARTBEAT", str(path))
    monkeypatch.setenv("KUBETUNE_HANG_SECONDS", str(LIMIT))

    def left() -> float:
        return path.stat().st_mtime - clock.now if path.exists() else math.inf

    return left


def test_signs_are_expected_from_the_first_to_the_end_of_training(patience: Callable[[], float]) -> None:
    sign_of_life()
    assert patience() == math.inf, "before training"
    with watched(first_seconds=FIRST):
        assert patience() == math.inf, "a script that gives no sign is not watched"
        sign_of_step()
        assert patience() == FIRST, "of one that tells steps alone the first says nothing yet"
        sign_of_step()
        assert patience() == LIMIT
    assert patience() == math.inf
    sign_of_life()
    assert patience() == math.inf


def test_a_sign_is_told_with_the_moment_of_the_next(
    clock: SimpleNamespace, patience: Callable[[], float], tmp_path: Path
) -> None:
    with watched(first_seconds=FIRST):
        sign_of_life()
        sign_of_step()
        clock.now += 60
        assert patience() == LIMIT - 60
        sign_of_life()
        assert patience() == LIMIT
        assert (tmp_path / "heartbeat").stat().st_atime == clock.now


def test_slow_micro_batches_have_the_time_that_they_need(clock: SimpleNamespace, patience: Callable[[], float]) -> None:
    with watched(first_seconds=FIRST):
        for pause in (80.0, 50.0, 70.0):
            sign_of_life()
            clock.now += pause
        sign_of_step()
        assert patience() == 3 * 80.0


def test_nothing_is_expected_while_something_with_limits_of_its_own_is_waited_for(
    clock: SimpleNamespace, patience: Callable[[], float]
) -> None:
    with watched(first_seconds=FIRST):
        sign_of_life()
        sign_of_step()
        with unwatched():
            assert patience() > 1e6
            with unwatched():
                clock.now += 5000
            assert patience() > 1e6, "the outer block goes on"
        assert patience() == LIMIT
        sign_of_step()
        assert patience() == LIMIT, "how long it waited says nothing of micro batches"


def test_waiting_before_the_first_sign_expects_none(patience: Callable[[], float]) -> None:
    with watched(first_seconds=FIRST):
        with unwatched():
            assert patience() == math.inf
        assert patience() == math.inf


@pytest.mark.parametrize("missing", ["KUBETUNE_HEARTBEAT", "KUBETUNE_HANG_SECONDS"])
def test_without_a_limit_or_somebody_to_look_there_is_no_sign(
    patience: Callable[[], float], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    with watched(first_seconds=FIRST):
        sign_of_life()
        sign_of_step()
        assert patience() == math.inf


def test_training_goes_on_without_its_file(patience: Callable[[], float], tmp_path: Path) -> None:
    with watched(first_seconds=FIRST):
        sign_of_life()
        sign_of_step()
        (tmp_path / "heartbeat").unlink()
        tmp_path.rename(tmp_path.with_name("gone"))
        sign_of_step()
        assert patience() == math.inf


def test_the_first_step_has_longer_than_a_collective_whose_error_says_more(patience: Callable[[], float]) -> None:
    former = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignal(leave=lambda: None).deferred():
            sign_of_life()
            assert patience() > COLLECTIVE_SECONDS
    finally:
        signal.signal(signal.SIGTERM, former)
