"""Progress leaves a process as JSON lines, metrics and a message that fits into Kubernetes' 4 KiB."""

import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kubetune_trainer.report import fit, write_termination_message
from tests.ports import free_ports

PEER = "from kubetune_trainer.report import run, report, serve_metrics, open_log\n"


def run_script(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a few lines as a recipe's main."""
    script = PEER + "def main(arguments):\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\nrun(main)\n"
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_stdout_carries_json_lines_with_camel_case_keys_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "attempt-1.jsonl"
    done = run_script(f"""
        from pathlib import Path
        open_log(Path({str(log)!r}))
        print("a library's chatter")
        report("step", step=3, total_steps=9, loss=1.2839473724365234, grad_norm=float("nan"))
    """)
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert list(record)[:2] == ["event", "time"]
    assert record == {
        "event": "step", "time": record["time"], "step": 3, "totalSteps": 9, "loss": 1.2839473724365234,
        "gradNorm": "nan",
    }  # fmt: skip
    assert "a library's chatter" in done.stderr
    assert log.read_text() == done.stdout


def test_only_global_rank_0_reports() -> None:
    assert run_script('report("step", step=1)\nprint("x")', RANK="1").stdout == ""


@pytest.mark.parametrize(
    ("error", "exit_code", "reason"),
    [
        ('kubetune_trainer.errors.ConfigError("spec wrong", hint="mend it")', 64, "ConfigInvalid"),
        ('kubetune_trainer.errors.DataError("spec wrong", hint="mend it")', 65, "DataInvalid"),
        ('kubetune_trainer.errors.StorageError("spec wrong", hint="mend it")', 69, "StorageUnavailable"),
        ('kubetune_trainer.errors.NonFiniteLossError("spec wrong", hint="mend it")', 77, "NonFiniteLoss"),
        ('kubetune_trainer.errors.PeerLostError("spec wrong", hint="mend it")', 78, "PeerLost"),
        (f'OSError({errno.ENOSPC}, "spec wrong", "/scratch/x")', 66, "DoesNotFit"),
        ('MemoryError("spec wrong")', 71, "OutOfMemory"),
        ('ZeroDivisionError("spec wrong")', 1, "Crashed"),
    ],
)
def test_an_error_reaches_the_exit_code_the_event_and_the_termination_message(
    tmp_path: Path, error: str, exit_code: int, reason: str
) -> None:
    message = tmp_path / "termination-log"
    done = run_script(f"import kubetune_trainer.errors\nraise {error}", KUBETUNE_TERMINATION_LOG=str(message))
    assert done.returncode == exit_code
    event, record = json.loads(done.stdout), json.loads(message.read_bytes())
    assert (event["event"], record["result"]) == ("error", "Failed")
    for told in (event, record):
        assert (told["exitCode"], told["reason"], told["rank"]) == (exit_code, reason, 0)
    assert ("Traceback" in done.stderr) == (reason == "Crashed")
    assert "spec wrong" in done.stderr or "/scratch/x" in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_preemption_is_no_failure_and_says_how_far_it_came(tmp_path: Path, rank: str) -> None:
    message = tmp_path / "termination-log"
    body = 'from kubetune_trainer.errors import PreemptedError\nreport("step", step=7)\nraise PreemptedError("asked")'
    done = run_script(body, KUBETUNE_TERMINATION_LOG=str(message), RANK=rank)
    assert done.returncode == 75
    record = json.loads(message.read_bytes())
    assert (record["result"], record["reason"], record["step"]) == ("Preempted", "Preempted", 7)


def test_rank_0_serves_the_last_step_to_prometheus() -> None:
    [port] = free_ports(1)
    body = f"""
        import urllib.request
        serve_metrics()
        report("step", step=12, loss=1.5, tokens_per_second=800.5, epoch=0.5, eta_seconds=3)
        report("checkpointFailed", step=10, message="x")
        text = urllib.request.urlopen("http://127.0.0.1:{port}/metrics").read().decode()
        print(text)
    """
    done = run_script(body, KUBETUNE_METRICS_PORT=str(port))
    assert done.returncode == 0, done.stderr
    for line in ("step 12.0", "loss 1.5", "tokens_per_second 800.5", "checkpoint_failures_total 1.0"):
        assert f"kubetune_trainer_{line}\n" in done.stderr


def test_a_taken_metrics_port_only_warns() -> None:
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        done = run_script("serve_metrics()", KUBETUNE_METRICS_PORT=str(holder.getsockname()[1]))
    assert done.returncode == 0
    assert json.loads(done.stdout)["event"] == "warning"


@pytest.mark.parametrize("letter", ["x", "é", "\n", "🙂"])
def test_a_message_is_cut_to_4_kib_from_the_old_end_of_the_log(letter: str) -> None:
    record = {"result": "Failed", "exitCode": 65, "message": "the cause", "logTail": letter * 9000 + "the end"}
    cut = fit(record)
    assert len(cut) <= 4096
    told = json.loads(cut)
    assert told["logTail"].endswith("the end")
    assert told["message"] == "the cause"
    assert len(cut) > 3000, "more was cut than had to be"


def test_a_long_message_keeps_its_beginning() -> None:
    told = json.loads(fit({"result": "Failed", "message": "the cause " + "x" * 9000, "hint": "y" * 9000}))
    assert told["message"].startswith("the cause")


def test_nothing_is_written_where_nobody_made_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBETUNE_TERMINATION_LOG", raising=False)
    monkeypatch.setattr("kubetune_trainer.report.DEFAULT_TERMINATION_LOG", str(tmp_path / "termination-log"))
    write_termination_message("Complete")
    assert list(tmp_path.iterdir()) == []
