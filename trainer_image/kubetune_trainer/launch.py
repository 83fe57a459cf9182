"""PID 1 of a trainer container: starts the ranks of one node, passes signals on, and ends with the code that matters.

    python -m kubetune_trainer.launch finetune --config config.yaml training.max_steps=10

The ranks are plain child processes with the environment that torchrun gives. torch's elastic agent is not used: what it
adds (restarts within the pod, dynamic membership) is the operator's business here, where a gang restarts as a whole;
what it lacks is what a pod needs, the exit code of the rank that failed first; and it would import torch in PID 1,
seconds before the ranks could begin to do the same.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kubetune_trainer.errors import ConfigError, HangError, PeerLostError, PreemptedError
from kubetune_trainer.heartbeat import DUMP_SIGNAL
from kubetune_trainer.names import (
    ENV_CPUS,
    ENV_HEARTBEAT,
    ENV_SCRATCH,
    ENV_TERMINATION_LOG,
    ExitCode,
)
from kubetune_trainer.report import write_termination_record
from kubetune_trainer.software import recipe_folders

LINGER_SECONDS: Final = 10.0
"""How long the other ranks of a node have, after one failed, to notice it and end by themselves."""
SILENT_LOOKS: Final = 5
"""How many looks in a row must find a rank silent for too long: it may have been held together with this process."""
DUMP_SECONDS: Final = 2.0
"""How long a rank that hangs has to write the stacks of its threads."""
TAIL_BYTES: Final = 2048
"""How much of a rank's stderr is kept for the termination message."""
_NCCL_GIVES_UP: Final = re.compile(rb"ProcessGroupNCCL|NCCL watchdog|Watchdog caught")
"""What torch says where a collective of NCCL's fails: it aborts the process from a thread of its own, so that no error
of ours tells that a peer was lost. Not run by us on a GPU."""
_PR_SET_PDEATHSIG: Final = 1
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_SIGNALS: Final = (signal.SIGCHLD, *_STOP_SIGNALS)


@dataclass(frozen=True)
class Gang:
    """The ranks of the whole job, and which of them are this node's."""

    num_nodes: int
    processes_per_node: int
    node_rank: int
    master_addr: str
    master_port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Gang":
        """Reads the PET_ variables of the pod; without them it is one process on one node.

        Raises:
            ConfigError: A variable is not a number, or several nodes have no address to meet at.
        """
        num_nodes = _number(environment, "PET_NNODES", 1)
        address = environment.get("PET_MASTER_ADDR", "")
        if num_nodes > 1 and not address:
            raise ConfigError(f"PET_MASTER_ADDR must be set for PET_NNODES={num_nodes}")
        port = _number(environment, "PET_MASTER_PORT", 0) or (29500 if num_nodes > 1 else _free_port())
        return cls(
            num_nodes=num_nodes,
            processes_per_node=_number(environment, "PET_NPROC_PER_NODE", 1),
            node_rank=_number(environment, "PET_NODE_RANK", 0),
            master_addr=address or "127.0.0.1",
            master_port=port,
        )

    @property
    def world_size(self) -> int:
        """The number of ranks in the job."""
        return self.num_nodes * self.processes_per_node

    def rank_environment(self, local_rank: int) -> dict[str, str]:
        """What torchrun would set for this rank."""
        return {
            "RANK": str(self.node_rank * self.processes_per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.processes_per_node),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass
class Rank:
    """One child process and what is known of its end."""

    rank: int
    process: subprocess.Popen[bytes]
    message_path: Path
    heartbeat: Path
    stderr: deque[bytes] = field(default_factory=deque)
    reader: threading.Thread | None = None
    code: int | None = None
    overdue: bool = False
    """Killed from here, because another rank had failed and this one did not end by itself."""
    silent_looks: int = 0
    hung_seconds: float | None = None
    """Killed from here, because for so long it had given no sign of life."""

    @property
    def exit_code(self) -> int:
        """As a shell tells it: a signal n is 128 + n."""
        if self.hung_seconds is not None:
            return ExitCode.HANG
        code = self.code or 0
        if code == -signal.SIGABRT and _NCCL_GIVES_UP.search(b"".join(self.stderr)):
            return ExitCode.PEER_LOST
        return code if code >= 0 else 128 - code

    def hangs(self) -> bool:
        """Whether its sign of life is overdue, and has been for some looks."""
        try:
            times = self.heartbeat.stat()
        except OSError:
            return False
        self.silent_looks = self.silent_looks + 1 if time.monotonic() > times.st_mtime else 0
        if self.code is not None or self.silent_looks < SILENT_LOOKS:
            return False
        self.hung_seconds = time.monotonic() - times.st_atime
        return True

    def tail(self) -> str:
        """The end of its stderr."""
        if self.reader is not None:
            self.reader.join(timeout=1)
        return b"".join(self.stderr)[-TAIL_BYTES:].decode("utf-8", "replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a recipe on this node and returns the container's exit code."""
    parser = argparse.ArgumentParser(prog="kubetune_trainer.launch", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="prepare, finetune, generate, or the path of a script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to the recipe")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kubetune-launch-") as folder:
        try:
            gang = Gang.from_environment(os.environ)
            command = [sys.executable, str(find_recipe(options.recipe)), *options.arguments]
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            write_termination_record(_failed(error.exit_code, error.reason, str(error)))
            return error.exit_code
        return run(gang, command, folder=Path(folder))


def find_recipe(name: str) -> Path:
    """The script of a packaged recipe's name, or the script at a path.

    Raises:
        ConfigError: There is no such recipe; names those that there are.
    """
    folders = recipe_folders()
    for candidate in (*(folder / f"{name}.py" for folder in folders), Path(name)):
        if candidate.suffix == ".py" and candidate.is_file():
            return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    raise ConfigError(f"recipe must be one of {', '.join(known)} or the path of a script, got {name}")


def run(gang: Gang, command: Sequence[str], *, folder: Path) -> int:
    """Starts this node's ranks, waits for all of them, and writes the termination message.

    Args:
        gang: The job's ranks.
        command: What every rank runs.
        folder: Holds each rank's own message until the one that matters is known.
    """
    # Signals are taken one by one from sigtimedwait, so no handler interrupts anything.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    environment = {**os.environ, **node_environment(gang, os.environ, scratch=folder)}
    ranks = [_start(gang, command, environment, local, folder) for local in range(gang.processes_per_node)]
    for rank in ranks:
        rank.reader = threading.Thread(target=_forward_stderr, args=(rank,), daemon=True)
        rank.reader.start()
    order, stopped = _wait(ranks)
    code, record = conclude(order, stopped=stopped)
    write_termination_record(record)
    return code


def node_environment(gang: Gang, environment: Mapping[str, str], *, scratch: Path) -> dict[str, str]:
    """What every rank of this node needs beside its own numbers, where it is not set already."""
    cpus = int(environment.get(ENV_CPUS) or len(os.sched_getaffinity(0)))
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cpus // gang.processes_per_node)),
        ENV_SCRATCH: str(scratch / "scratch"),
        "TQDM_DISABLE": "1",  # bars of libraries would push everything else out of the log's tail
    }
    interface = default_route_interface()
    if gang.num_nodes > 1 and interface:
        wanted["GLOO_SOCKET_IFNAME"] = interface
    missing = {key: value for key, value in wanted.items() if not environment.get(key)}
    if ENV_SCRATCH in missing:
        Path(missing[ENV_SCRATCH]).mkdir()
    return missing


def default_route_interface(table: Path = Path("/proc/net/route")) -> str | None:
    """The interface of the default route: the pod's network, the one that its peers can reach."""
    try:
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
    except OSError:
        return None
    return next((row[0] for row in rows if len(row) > 7 and row[1] == "00000000" and row[7] == "00000000"), None)


def conclude(order: Sequence[Rank], *, stopped: bool) -> tuple[int, dict[str, Any]]:
    """The node's exit code and termination message: those of the rank that failed first and not because of a peer.

    Args:
        order: The ranks in the order in which they ended.
        stopped: Whether the node was asked to stop.
    """
    failed = [rank for rank in order if rank.exit_code != ExitCode.DONE]
    if not failed:
        first = min(order, key=lambda rank: rank.rank)
        return ExitCode.DONE, _message_of(first) or {"result": "Complete"}
    own = [rank for rank in failed if rank.exit_code != ExitCode.PEER_LOST and not rank.overdue]
    culprit = (own or failed)[0]
    if stopped and culprit.code == -signal.SIGTERM:
        return ExitCode.PREEMPTED, _stopped_early(culprit)
    record = _message_of(culprit) or _describe_death(culprit)
    if record.get("result") == "Failed" and not record.get("logTail"):
        record["logTail"] = culprit.tail()
    return culprit.exit_code, record


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name} must be a number, got {text!r}")
    return int(text)


def _free_port() -> int:
    """A port below those that the kernel gives to connections, none of which can take it before rank 0 listens."""
    for port in random.sample(range(10_000, 30_000), k=1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError("PET_MASTER_PORT must be set: no free port was found between 10000 and 30000")


def _start(gang: Gang, command: Sequence[str], environment: Mapping[str, str], local_rank: int, folder: Path) -> Rank:
    own = gang.rank_environment(local_rank)
    message_path, heartbeat = folder / f"message-{local_rank}.json", folder / f"heartbeat-{local_rank}"
    process = subprocess.Popen(
        command,
        env={**environment, **own, ENV_TERMINATION_LOG: str(message_path), ENV_HEARTBEAT: str(heartbeat)},
        stdin=subprocess.DEVNULL,
        stdout=None if own["RANK"] == "0" else subprocess.PIPE,
        stderr=subprocess.PIPE if own["RANK"] == "0" else subprocess.STDOUT,
        process_group=0,  # a terminal's Ctrl-C reaches this process alone, which passes it on as SIGTERM
        preexec_fn=_prepare_child,  # noqa: PLW1509 (no thread runs yet)
    )
    return Rank(rank=int(own["RANK"]), process=process, message_path=message_path, heartbeat=heartbeat)


def _prepare_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives this process


def _forward_stderr(rank: Rank) -> None:
    """Passes on what a rank writes and keeps its end."""
    stream = rank.process.stderr or rank.process.stdout
    kept = 0
    while stream is not None and (chunk := os.read(stream.fileno(), 65536)):
        sys.stderr.buffer.write(chunk)
        sys.stderr.buffer.flush()
        rank.stderr.append(chunk)
        kept += len(chunk)
        while kept - len(rank.stderr[0]) > TAIL_BYTES:
            kept -= len(rank.stderr.popleft())


def _wait(ranks: Sequence[Rank]) -> tuple[list[Rank], bool]:
    """Reaps until every rank has ended; returns them in the order of their ends, and whether a stop was asked for."""
    order: list[Rank] = []
    stopped, deadline = False, float("inf")
    while len(order) < len(ranks):
        caught = signal.sigtimedwait(_SIGNALS, min(1.0, max(0.0, deadline - time.monotonic())))
        # Held for longer than it waits (SIGSTOP, a debugger), CPython 3.11 returns what was on its stack: any number.
        if caught is not None and caught.si_signo in _STOP_SIGNALS:
            stopped = True
            _signal_all(ranks, signal.SIGTERM)
        for rank in _reap(ranks):
            order.append(rank)
            # A preempted rank's peers are writing the same checkpoint: Kubernetes' grace period bounds them.
            if rank.exit_code not in (ExitCode.DONE, ExitCode.PREEMPTED):
                deadline = min(deadline, time.monotonic() + LINGER_SECONDS)
        _end_hung([rank for rank in ranks if rank.hangs()])
        if time.monotonic() >= deadline:
            for rank in ranks:
                rank.overdue = rank.overdue or rank.code is None
            _signal_all(ranks, signal.SIGKILL)
    return order, stopped


def _end_hung(hung: Sequence[Rank]) -> None:
    """Ends ranks that hang, once they have written where."""
    if hung:
        _signal_all(hung, DUMP_SIGNAL)
        time.sleep(DUMP_SECONDS)
        _signal_all(hung, signal.SIGKILL)


def _reap(ranks: Sequence[Rank]) -> list[Rank]:
    """Collects every ended child, adopted orphans too: PID 1 inherits them."""
    ended = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        for rank in ranks:
            if rank.process.pid == pid:
                rank.code = rank.process.returncode = os.waitstatus_to_exitcode(status)
                ended.append(rank)


def _signal_all(ranks: Sequence[Rank], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.code is None:
            os.kill(rank.process.pid, number)


def _message_of(rank: Rank) -> dict[str, Any] | None:
    try:
        record = json.loads(rank.message_path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _stopped_early(rank: Rank) -> dict[str, Any]:
    return {
        "result": "Preempted",
        "exitCode": int(ExitCode.PREEMPTED),
        "reason": PreemptedError.reason,
        "message": "stopped before training began; nothing was lost",
        "rank": rank.rank,
    }


def _describe_death(rank: Rank) -> dict[str, Any]:
    """The message of a rank that could not write its own."""
    if rank.hung_seconds is not None:
        message = f"rank {rank.rank} made no progress in training for {rank.hung_seconds:.0f} s"
        hint = "Its log has the stack of each thread. A job that needs that long sets lifecycle.hangTimeoutSeconds."
        return _failed(rank.exit_code, HangError.reason, message, rank=rank.rank, hint=hint)
    if rank.exit_code == ExitCode.PEER_LOST:
        return _failed(rank.exit_code, PeerLostError.reason, f"rank {rank.rank} lost a peer", rank=rank.rank)
    if rank.code is not None and rank.code < 0:
        name = signal.Signals(-rank.code).name
        hint = "Out of memory is the usual cause: see the container's limits." if rank.code == -signal.SIGKILL else ""
        return _failed(rank.exit_code, "Crashed", f"rank {rank.rank} was killed by {name}", rank=rank.rank, hint=hint)
    message = f"rank {rank.rank} ended with exit code {rank.exit_code}"
    return _failed(rank.exit_code, "Crashed", message, rank=rank.rank)


def _failed(exit_code: int, reason: str, message: str, **more: Any) -> dict[str, Any]:
    told = {key: value for key, value in more.items() if value != ""}
    return {"result": "Failed", "exitCode": int(exit_code), "reason": reason, "message": message, **told}


if __name__ == "__main__":
    sys.exit(main())
