"""The launcher ends with the code and the message of the rank that failed first, and passes SIGTERM on."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from kubetune_trainer.launch import default_route_interface, find_recipe

SCRIPT = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def message(**fields):
    with open(os.environ["KUBETUNE_TERMINATION_LOG"], "w") as file:
        json.dump(fields, file)
"""


def start(tmp_path: Path, body: str, *, processes: int = 2, **environment: str) -> subprocess.Popen[str]:
    """Starts the launcher on a few lines that every rank runs."""
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT + textwrap.dedent(body))
    wanted = {
        "KUBETUNE_TERMINATION_LOG": str(tmp_path / "termination-log"), "PET_NPROC_PER_NODE": str(processes),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "kubetune_trainer.launch", str(script), "--config", "config.yaml", "a.b=c"],
        env={**os.environ, **wanted, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], tmp_path: Path) -> tuple[int, dict[str, Any], str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, json.loads((tmp_path / "termination-log").read_bytes()), out, err


def launch(tmp_path: Path, body: str, **options: Any) -> tuple[int, dict[str, Any], str, str]:
    return finish(start(tmp_path, body, **options), tmp_path)


def test_one_process_needs_no_environment(tmp_path: Path) -> None:
    body = """
        print(json.dumps({key: os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
            "MASTER_ADDR")} | {"arguments": sys.argv[1:]}))
        message(result="Prepared", rows=3)
    """
    code, record, out, _ = launch(tmp_path, body, PET_NPROC_PER_NODE="")
    assert code == 0
    assert record == {"result": "Prepared", "rows": 3}
    assert json.loads(out) == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "arguments": ["--config", "config.yaml", "a.b=c"],
    }  # fmt: skip


def test_ranks_count_on_from_the_node_and_share_its_cpus(tmp_path: Path) -> None:
    body = """
        time.sleep(0.2 * rank)
        sys.stderr.write(" ".join(os.environ[key] for key in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE",
            "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")) + "\\n")
        print("rank 1's own words")
    """
    node = {
        "PET_NNODES": "3", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-0.job", "PET_MASTER_PORT": "29500",
        "KUBETUNE_CPUS": "5", "OMP_NUM_THREADS": "",
    }  # fmt: skip
    code, _, out, err = launch(tmp_path, body, **node)
    assert code == 0
    assert "2 0 1 6 job-0.job 29500 2\n" in err
    assert "3 1 1 6 job-0.job 29500 2\n" in err
    assert out == "", "stdout belongs to global rank 0"


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (("message(result='Failed', reason='DataInvalid', rank=1) if rank else time.sleep(0.5)\n"
         "sys.exit(65 if rank else 78)"), 65, {"reason": "DataInvalid", "rank": 1}),
        ("time.sleep(0.5 * rank)\nmessage(result='Failed', rank=rank)\nsys.exit(78 if rank == 0 else 77)",
         77, {"rank": 1}),
        ("sys.exit(78)", 78, {"reason": "PeerLost"}),
        ("time.sleep(0.5 * (1 - rank))\nos.kill(os.getpid(), 9) if rank else sys.exit(78)", 137,
         {"reason": "Crashed", "message": "rank 1 was killed by SIGKILL"}),
        ("sys.exit(3)", 3, {"reason": "Crashed"}),
        (("time.sleep(0.5 * (1 - rank))\nif rank: sys.stderr.write('ProcessGroupNCCL.cpp: watchdog')\n"
          "sys.stderr.flush()\nos.abort() if rank else sys.exit(71)"), 71, {"reason": "Crashed"}),
        ("sys.stderr.write('double free')\nsys.stderr.flush()\nos.abort()", 134, {"reason": "Crashed"}),
        ("raise ValueError('oops')", 1, {"reason": "Crashed"}),
    ],
    ids=["failure, then lost peers", "a lost peer first", "lost peers alone", "killed", "a code of its own",
         "lost peers by NCCL's watchdog", "aborted", "bug"],
)  # fmt: skip
def test_the_code_and_message_are_those_of_the_rank_that_failed_first_and_not_by_a_peer(
    tmp_path: Path, body: str, code: int, told: dict[str, Any]
) -> None:
    returned, record, _, _ = launch(tmp_path, body)
    assert returned == code
    assert record["result"] == "Failed"
    assert {key: record.get(key) for key in told} == told


def test_a_failure_carries_the_end_of_that_ranks_stderr(tmp_path: Path) -> None:
    body = (
        "sys.stderr.write('x' * 100_000 + f'the end of rank {rank}') if rank else time.sleep(0.5)\nsys.exit(rank * 5)"
    )
    code, record, _, err = launch(tmp_path, body)
    assert code == 5
    assert record["logTail"].endswith("the end of rank 1")
    assert len(record["logTail"]) == 2048
    assert len(err) > 100_000, "stderr is passed on whole"


def test_a_rank_that_does_not_notice_the_failure_is_killed_after_a_while(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT + "sys.exit(64) if rank else time.sleep(60)")
    impatient = (
        "import sys; from kubetune_trainer import launch; launch.LINGER_SECONDS = 0.5;"
        f"sys.exit(launch.main([{str(script)!r}]))"
    )
    began = time.monotonic()
    environment = {**os.environ, "PET_NPROC_PER_NODE": "2"}
    assert subprocess.run([sys.executable, "-c", impatient], env=environment, check=False).returncode == 64
    assert time.monotonic() - began < 10


def test_sigterm_reaches_every_rank_and_they_have_time_to_save(tmp_path: Path) -> None:
    body = """
        def save(*_):
            time.sleep(0.5)
            message(result="Preempted", step=12)
            sys.stderr.write("saved\\n")
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        sys.stderr.write("ready\\n"); sys.stderr.flush()
        time.sleep(30)
    """
    process = start(tmp_path, body)
    assert process.stderr is not None
    for _ in range(2):
        assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    code, record, _, err = finish(process, tmp_path)
    assert code == 75
    assert record == {"result": "Preempted", "step": 12}
    assert err.count("saved") == 2


def test_a_stop_before_the_ranks_can_listen_is_a_preemption(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.stderr.write('up\\n'); sys.stderr.flush(); time.sleep(30)", processes=1)
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    code, record, _, _ = finish(process, tmp_path)
    assert (code, record["result"]) == (75, "Preempted")


def test_a_launcher_that_was_held_and_goes_on_stops_nothing(tmp_path: Path) -> None:
    body = """
        sys.stderr.write("up\\n"); sys.stderr.flush()
        time.sleep(4)
        message(result="Complete", rows=3)
    """
    process = start(tmp_path, body)
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)  # longer than it waits for a signal at once
    process.send_signal(signal.SIGCONT)
    code, record, _, _ = finish(process, tmp_path)
    assert (code, record) == (0, {"result": "Complete", "rows": 3})


def test_no_rank_outlives_the_launcher(tmp_path: Path) -> None:
    process = start(tmp_path, "sys.stderr.write(f'{os.getpid()}\\n'); sys.stderr.flush(); time.sleep(60)", processes=1)
    assert process.stderr is not None
    rank = int(process.stderr.readline())
    process.kill()
    process.communicate()
    for _ in range(100):
        if not Path(f"/proc/{rank}").exists() or "Z" in Path(f"/proc/{rank}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail(f"rank process {rank} is still there")


def test_orphans_of_a_rank_are_reaped(tmp_path: Path) -> None:
    """As PID 1 the launcher adopts them; here prctl makes it their subreaper."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(0.2)\n"
        "    os._exit(0)\n"
        "os.wait(); time.sleep(1.0)\n"
        "children = open(f'/proc/{os.getppid()}/task/{os.getppid()}/children').read().split()\n"
        "raise SystemExit(0 if children == [str(os.getpid())] else 9)\n"
    )
    starter = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(36, 1); from kubetune_trainer.launch import main;"
        f"sys.exit(main([{str(script)!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", starter], check=False, timeout=30).returncode == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PET_NNODES": "two"}, "PET_NNODES must be a number, got 'two'"),
        ({"PET_NNODES": "2"}, "PET_MASTER_ADDR must be set for PET_NNODES=2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_a_config_error(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    code, record, _, err = launch(tmp_path, "", **environment)
    assert code == 64
    assert record["message"] == message
    assert message in err


def test_a_recipe_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    assert find_recipe("finetune").name == "finetune.py"
    script = tmp_path / "mine.py"
    script.touch()
    assert find_recipe(str(script)) == script


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(Exception, match=r"must be one of .*finetune.*, got finetun"):
        find_recipe("finetun")


def test_the_interface_of_the_default_route_is_found(tmp_path: Path) -> None:
    table = tmp_path / "route"
    table.write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
        "lo\t0000007F\t00000000\t0001\t0\t0\t0\t000000FF\n"
        "eth1\t00000000\t0100F40A\t0003\t0\t0\t0\t00000000\n"
    )
    assert default_route_interface(table) == "eth1"
    assert default_route_interface(tmp_path / "none") is None


HANGS = """
    import threading
    from kubetune_trainer.heartbeat import sign_of_step, unwatched, watched
    def stand_still():
        threading.Event().wait()
"""
IMPATIENT = {"KUBETUNE_HANG_SECONDS": "1"}


def test_a_rank_that_hangs_in_training_is_ended_and_says_where(tmp_path: Path) -> None:
    body = (
        HANGS
        + """
    with watched(first_seconds=1):
        sign_of_step()
        stand_still()
    """
    )
    code, record, _, err = launch(tmp_path, body, processes=1, **IMPATIENT)
    assert code == 76
    assert {key: record[key] for key in ("result", "exitCode", "reason", "rank")} == {
        "result": "Failed", "exitCode": 76, "reason": "Hang", "rank": 0,
    }  # fmt: skip
    assert re.fullmatch(r"rank 0 made no progress in training for \d+ s", record["message"])
    assert "hangTimeoutSeconds" in record["hint"]
    assert "in stand_still" in record["logTail"]
    assert "in stand_still" in err


def test_a_rank_that_cannot_even_say_where_it_hangs_is_ended_too(tmp_path: Path) -> None:
    body = (
        HANGS
        + """
    with watched(first_seconds=1):
        sign_of_step()
        os.kill(os.getpid(), signal.SIGSTOP) if rank else stand_still()
    """
    )
    code, record, _, _ = launch(tmp_path, body, **IMPATIENT)
    assert (code, record["reason"]) == (76, "Hang")


def test_a_rank_that_is_late_for_a_reason_is_left_alone(tmp_path: Path) -> None:
    body = (
        HANGS
        + """
    time.sleep(8 if rank == 0 else 0)
    with watched(first_seconds=1):
        time.sleep(8 if rank == 1 else 0)
        sign_of_step()
        with unwatched():
            time.sleep(8 if rank == 2 else 0)
        for _ in range(20 if rank == 3 else 0):
            sign_of_step()
            time.sleep(0.4)
    time.sleep(8 if rank == 4 else 0)
    message(result="Complete")
    """
    )
    code, record, _, err = launch(tmp_path, body, processes=5, **IMPATIENT)
    assert (code, record) == (0, {"result": "Complete"}), err


def test_a_node_that_was_held_has_no_rank_that_hangs(tmp_path: Path) -> None:
    body = (
        HANGS
        + """
    with watched(first_seconds=2):
        print(os.getpid(), flush=True)
        for _ in range(50):
            sign_of_step()
            time.sleep(0.2)
    message(result="Complete")
    """
    )
    process = start(tmp_path, body, processes=1, KUBETUNE_HANG_SECONDS="2")
    assert process.stdout is not None
    rank = int(process.stdout.readline())
    time.sleep(1)
    for pid in (process.pid, rank):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(1)  # the launcher finds the rank's sign overdue, and no look after the next will
    os.kill(rank, signal.SIGCONT)
    code, record, _, _ = finish(process, tmp_path)
    assert (code, record) == (0, {"result": "Complete"})
