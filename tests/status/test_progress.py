"""From the log of rank 0 to progress and checkpoint."""

import json
from datetime import UTC, datetime
from typing import Any

from kubetune_operator.api.finetunejob import LastCheckpoint, Progress
from kubetune_operator.progress import read_tail, update_checkpoint, update_progress

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def log(*events: dict[str, Any]) -> str:
    return "\n".join(json.dumps(event) for event in events)


def test_the_newest_event_of_each_kind_counts_and_other_lines_are_passed_over() -> None:
    text = 'ms": 3}\nWARNING something\n{"event": "step"}\n' + log(
        {"event": "step", "step": 1, "loss": 2.0}, {"event": "validation", "step": 1, "validationLoss": 1.75},
        {"event": "step", "step": 2, "loss": 1.5},
    ) + '\n{"event":"step","step":3,'  # fmt: skip
    progress = update_progress(None, tail=read_tail(text), now=NOW)
    assert progress is not None
    assert (progress.step, progress.loss, progress.validation_loss) == (2, "1.5000", "1.7500")
    assert progress.updated_at == "2026-01-01T12:00:00Z"


def test_a_log_without_news_leaves_the_progress_as_it_is() -> None:
    text = log({"event": "step", "step": 2, "loss": 1.5})
    before = update_progress(None, tail=read_tail(text), now=NOW)
    after = update_progress(before, tail=read_tail(text), now=NOW.replace(hour=13))
    assert after is before
    assert update_progress(None, tail=read_tail("nothing"), now=NOW) is None


def test_a_resumed_run_may_go_back_to_an_earlier_step() -> None:
    before = Progress(step=9, total_steps=10, loss="1.0000")
    tail = read_tail(log({"event": "start", "attempt": 2, "step": 5, "totalSteps": 10}))
    progress = update_progress(before, tail=tail, now=NOW)
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.loss) == (5, 10, "1.0000")


def test_a_loss_that_is_no_number_is_left_out() -> None:
    progress = update_progress(None, tail=read_tail('{"event": "step", "step": 3, "loss": null}'), now=NOW)
    assert progress == Progress(step=3, updated_at="2026-01-01T12:00:00Z")


def test_the_checkpoint_is_the_last_one_written_or_resumed_from() -> None:
    written = {"event": "checkpoint", "time": 1760000000.0, "step": 10, "uri": "s3://b/step-10", "seconds": 1.0}
    expected = LastCheckpoint(step=10, uri="s3://b/step-10", time="2025-10-09T08:53:20Z")
    found = update_checkpoint(None, tail=read_tail(log(written)), now=NOW)
    assert found == expected
    assert update_checkpoint(found, tail=read_tail(log(written)), now=NOW) is found
    resumed = {"event": "resume", "time": 1760000000.0, "step": 5, "uri": "s3://b/step-5"}
    assert update_checkpoint(found, tail=read_tail(log(resumed)), now=NOW) == LastCheckpoint(
        step=5, uri="s3://b/step-5", time="2025-10-09T08:53:20Z"
    )
