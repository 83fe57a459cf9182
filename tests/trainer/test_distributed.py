"""Ranks agree on a step's totals, notice lost peers, and stop where nothing is lost."""

import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from kubetune_trainer import distributed as module
from kubetune_trainer import report
from kubetune_trainer.distributed import (
    StepTotals,
    StopSignal,
    broadcast_object,
    exchange,
    is_peer_loss,
    join_world,
    peer_losses,
    wait_for_name,
)
from kubetune_trainer.errors import DataError, PeerLostError
from tests.trainer.waiting_ranks import COLLECTIVE_SECONDS, WORK_SECONDS, run


@pytest.fixture
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_one_process_without_an_environment_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module.ALONE:
        monkeypatch.delenv(name, raising=False)
    with join_world() as world:
        assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
        assert world.is_first
        assert world.is_first_of_node
        assert broadcast_object({"a": 1}) == {"a": 1}
        totals = exchange(trained_tokens=4, tokens=9, loss_sum=10.0, stop=True, uploaded_step=-7)
        assert totals == StepTotals(trained_tokens=4, tokens=9, loss_sum=10.0, stop=True, save=False, uploaded_step=-7)
        assert totals.loss == 2.5
    assert not dist.is_initialized()
    assert not module.ALONE.keys() & os.environ.keys(), "accelerate would meet the ranks of a world that is no more"


def test_a_step_without_trained_tokens_has_loss_zero() -> None:
    totals = StepTotals(trained_tokens=0, tokens=8, loss_sum=0.0, stop=False, save=False, uploaded_step=0)
    assert totals.loss == 0.0


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("Connection reset by peer"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (NotImplementedError("gloo does not do this"), False),
    ],
)
def test_a_lost_peer_is_told_from_a_bug(error: RuntimeError, lost: bool) -> None:
    assert is_peer_loss(error) is lost


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1\nFailed to CUDA calloc 608 bytes: out of memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 100 bytes from file </model>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["torch", "CUDA", "cuBLAS", "NCCL", "C++", "mmap", "kernel"],
)
def test_words_for_too_little_memory_are_out_of_memory_and_no_lost_peer(error: Exception) -> None:
    known = report._known(error)
    assert known is not None
    assert (known.exit_code, known.reason) == (71, "OutOfMemory")
    assert not is_peer_loss(error)


def test_memory_that_torch_does_not_get_on_a_cpu_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(2**50)
    known = report._known(on_cpu.value)
    assert known is not None
    assert (known.exit_code, known.reason) == (71, "OutOfMemory")
    assert report._known(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_an_error_of_a_collective_is_a_lost_peer_only_among_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "[/third_party/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.1.0.7]:54506. This is typically …"
    )
    error = RuntimeError(words)
    with pytest.raises(RuntimeError, match="closed by peer"), peer_losses():
        raise error
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)
    with (
        pytest.raises(PeerLostError, match=r"rank 1 lost a peer: Connection closed by peer \[10.1.0.7\]:54506$"),
        peer_losses(),
    ):
        raise error
    with pytest.raises(DataError), peer_losses():
        raise DataError("Connection closed by peer, says a file's name")


def test_a_name_that_resolves_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([socket.gaierror(-2, "Name or service not known"), socket.gaierror(-3, "try again"), None])

    def resolve(*_: object) -> list[object]:
        answer = next(answers)
        if answer is not None:
            raise answer
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    wait_for_name("job-0.job", seconds=5)
    assert next(answers, "none left") == "none left"


def test_a_name_that_never_resolves_is_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(PeerLostError, match=r"host job-0\.job did not resolve within 0 s"):
        wait_for_name("job-0.job", seconds=0.1)


def test_peers_that_do_not_come_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDEZVOUS_SECONDS", 0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PeerLostError, match="rank 0 of 2 did not meet the others"), join_world():
        pass


def ranks_with(first: str, *, folder: Path) -> list[str]:
    """What came of rank 1, and of rank 0 if it was left to end, where rank 0 works, dies, stops or fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tests.trainer.waiting_ranks"])
    ranks = [context.Process(target=run, args=(rank, port, folder, first)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    ranks[1].join(timeout=120)
    if first != "works":
        ranks[0].kill()
    for rank in ranks:
        rank.join(timeout=120)
        rank.kill()
    return [path.read_text() for path in sorted(folder.iterdir())]


def test_a_rank_that_works_is_waited_for_however_long(tmp_path: Path) -> None:
    assert WORK_SECONDS > COLLECTIVE_SECONDS
    waited = [float(outcome.removeprefix("waited ")) for outcome in ranks_with("works", folder=tmp_path)]
    assert len(waited) == 2
    assert min(waited) >= WORK_SECONDS - 1, "rank 1 may enter a little later"


@pytest.mark.parametrize(("first", "seconds"), [("dies", 4), ("fails", 4), ("stops", COLLECTIVE_SECONDS + 4)])
def test_a_rank_that_does_not_come_any_more_is_a_lost_peer(tmp_path: Path, first: str, seconds: float) -> None:
    [outcome] = ranks_with(first, folder=tmp_path)
    after, _, message = outcome.removeprefix("lost after ").partition(": ")
    assert message.startswith("rank 1 lost a peer: ")
    assert float(after) < seconds


@pytest.mark.usefixtures("sigterm")
def test_a_stop_leaves_at_once_but_not_while_training() -> None:
    left, lock = list[str](), threading.Lock()

    def leave() -> None:
        with lock:
            left.append("left")

    stop = StopSignal(leave=leave)
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert left == []
    assert left == ["left"], "a stop that came too late for the ranks to agree on ends the process after training"
    with lock:  # as a thread holds one that reports while it is interrupted
        os.kill(os.getpid(), signal.SIGTERM)
        [leaving] = [thread for thread in threading.enumerate() if thread.name == "leave"]
        assert left == ["left"]
    leaving.join(timeout=10)
    assert left == ["left", "left"]
