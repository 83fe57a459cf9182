"""The ranks of a run: how they meet, what they tell each other every step, how they stop, and how a lost peer shows.

A gang is restarted whole, so the rendezvous is static (MASTER_ADDR and MASTER_PORT) and nothing here handles ranks that
come or go in the middle.
"""

import atexit
import errno
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from kubetune_trainer.errors import PeerLostError, TrainerError, is_out_of_memory
from kubetune_trainer.heartbeat import watched
from kubetune_trainer.names import ENV_SCRATCH

RENDEZVOUS_SECONDS: Final = 300.0
"""How long a rank waits for its peers: their pods may be scheduled, and pull an image, a few minutes later."""
COLLECTIVE_SECONDS: Final = 1800.0
"""How long a collective may take: by then a peer that does not answer is lost, though its connections are open."""
PATIENCE: Final = timedelta(hours=12)
"""How long a collective of a `patient_group` may take."""
SIGN_SECONDS: Final = 10.0
"""How often a rank that others wait for in `waiting_for_all` gives a sign of life."""

ALONE: Final = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
}  # fmt: skip
"""Torchrun's environment, of one process without it."""

_PEER_LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|timed out|timeout|tcpstore",
    re.IGNORECASE,
)
_T = TypeVar("_T")
_joined: "list[World]" = []
"""The world that this process is in, while it is in one: for `exchange`, as torch keeps its default group."""
_signs: "list[dist.ProcessGroup]" = []
"""All ranks of that world once more, for `waiting_for_all`: its signs must not mix with other collectives."""


@dataclass(frozen=True)
class World:
    """This rank among the others, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    tensor: int = 1
    """Ranks of a tensor group, which compute the same rows together."""

    @property
    def data_rank(self) -> int:
        """Which of the groups that see rows of their own this rank belongs to."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """How many groups see rows of their own."""
        return self.size // self.tensor

    @property
    def is_first(self) -> bool:
        """Whether this is global rank 0, which reports, lists checkpoints and exports."""
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        """Whether this rank downloads for its node."""
        return self.local_rank == 0


@contextmanager
def join_world(*, tensor: int = 1) -> Iterator[World]:
    """Meets the other ranks; one process without torchrun's environment is a world of its own.

    Args:
        tensor: Ranks that compute the same rows together.

    Raises:
        PeerLostError: The others did not come in time, or, while the block runs, one of them went away.
    """
    unset = {name: alone for name, alone in ALONE.items() if name not in os.environ}
    os.environ.update(unset)
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with peer_losses():
            _meet("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", rank, size)
            _share_scratch(is_first=rank == 0)
            world = World(
                rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=device, tensor=tensor
            )
            _joined.append(world)
            if size > 1:
                _signs.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_SECONDS)))
            yield world
    finally:
        _joined.clear()
        _signs.clear()
        for name in unset:  # to other libraries in this process they would mean that torchrun started it
            os.environ.pop(name, None)
    dist.destroy_process_group()


def _meet(backend: str, rank: int, size: int) -> None:
    wait_for_name(os.environ["MASTER_ADDR"], seconds=RENDEZVOUS_SECONDS)
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))))
    except RuntimeError as error:
        raise PeerLostError(
            f"rank {rank} of {size} did not meet the others at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            f" within {RENDEZVOUS_SECONDS:.0f} s: {error}",
        ) from error
    store.set_timeout(timedelta(seconds=RENDEZVOUS_SECONDS))
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
    )


def _share_scratch(*, is_first: bool) -> None:
    """Gives the ranks that torchrun started by hand one scratch folder, as launch and pods have; it goes at the end."""
    if not broadcast_object(os.environ.get(ENV_SCRATCH)):
        os.environ[ENV_SCRATCH] = broadcast_object(tempfile.mkdtemp(prefix="kubetune-") if is_first else None)
        atexit.register(shutil.rmtree, os.environ[ENV_SCRATCH], ignore_errors=True)


def wait_for_name(host: str, *, seconds: float) -> None:
    """Waits until a host name resolves: a pod's name appears in DNS some seconds after the pod.

    Raises:
        PeerLostError: It does not, in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise PeerLostError(f"host {host} did not resolve within {seconds:.0f} s: {error}") from error
            time.sleep(0.25)
        else:
            return


@contextmanager
def peer_losses() -> Iterator[None]:
    """Turns the errors of collectives, which surface wherever one is waited for, into PeerLostError."""
    try:
        yield
    except TrainerError:
        raise
    except RuntimeError as error:
        if dist.is_initialized() and dist.get_world_size() > 1 and is_peer_loss(error):
            raise PeerLostError(f"rank {dist.get_rank()} lost a peer: {_words_of(error)}") from error
        raise
    except ConnectionError as error:
        if error.errno in (errno.ECONNRESET, errno.EPIPE) and dist.is_initialized():
            raise PeerLostError(f"a rank lost a peer: {error}") from error
        raise


def _words_of(error: RuntimeError) -> str:
    """What happened, without gloo's source position before it and its advice after it."""
    first_line = str(error).partition("\n")[0]
    return re.sub(r"^\[[^]]*\.(cc|cpp|h):\d+\] ", "", first_line).partition(". This is typically")[0]


def is_peer_loss(error: RuntimeError) -> bool:
    """Whether an error is what a collective raises when a rank at its other end is gone.

    Gloo raises plain RuntimeErrors, so its words are all there is to go by. A collective that finds no memory on this
    rank has lost nobody.
    """
    if is_out_of_memory(error) or isinstance(error, NotImplementedError | RecursionError):
        return False
    return isinstance(error, dist.DistError) or bool(_PEER_LOST.search(str(error)))


def patient_group() -> "dist.ProcessGroup":
    """All ranks once more, for collectives in which one waits for as long as another works.

    A rank whose connections close is missed at once here too. All ranks have to call it.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def broadcast_object(value: _T | None, *, group: "dist.ProcessGroup | None" = None) -> _T:
    """Rank 0's value, on every rank."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]  # type: ignore[no-any-return]


@contextmanager
def waiting_for_all() -> Iterator[None]:
    """Ends when every rank has come to the block's end, however long one of them works in it.

    A collective would end for good after COLLECTIVE_SECONDS. Here the ranks give each other signs of life: one whose
    connections close is missed at once, one that is silent after COLLECTIVE_SECONDS. Who works notices at the end.

    Raises:
        RuntimeError: Another rank is gone; where the world was joined this becomes PeerLostError.
    """
    if not _signs:
        yield
        return
    is_here, has_failed = threading.Event(), threading.Event()
    losses: list[RuntimeError] = []
    signs = threading.Thread(target=_give_signs, args=(is_here, has_failed, losses), name="signs", daemon=True)
    signs.start()
    try:
        yield
    except BaseException:
        has_failed.set()  # no sign from now on: the others learn it when this process ends
        raise
    finally:
        is_here.set()
    signs.join()
    if losses:
        raise losses[0]


def made_by_first(world: World, make: Callable[[], _T]) -> _T:
    """Makes something on rank 0, however long that takes, and hands it to every rank."""
    with waiting_for_all():
        made = make() if world.is_first else None
    return broadcast_object(made)


def brought_to_node(world: World, bring: Callable[[], _T]) -> _T:
    """Returns what `bring` does; the first rank of each node calls it before the others, which find its files there."""
    with waiting_for_all():
        brought = bring() if world.is_first_of_node else None
    return bring() if brought is None else brought


def _give_signs(is_here: threading.Event, has_failed: threading.Event, losses: list[RuntimeError]) -> None:
    try:
        all_here = False
        while not all_here:
            is_here.wait(SIGN_SECONDS)
            if has_failed.is_set():
                return
            all_here = bool(gather_vector([float(is_here.is_set())], group=_signs[0]).all())
    except RuntimeError as error:
        losses.append(error)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_number(tensor: torch.Tensor) -> int:
    """Returns which of a tensor's parts this rank has, from 0; ranks with copies of a part have the same number."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh, number = tensor.device_mesh, 0
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            number = number * mesh.size(axis) + mesh.get_local_rank(axis)
    return number


def gather_vector(values: list[float], *, group: "dist.ProcessGroup | None" = None) -> torch.Tensor:
    """Every rank's few numbers, in rank order: (ranks, len(values)) in fp64 on the CPU.

    Sums over its first axis are the same on every rank, bit for bit.
    """
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = torch.empty(dist.get_world_size() * len(values), dtype=torch.float64)
    dist.all_gather_single(everyone, mine, group=group)
    return everyone.view(-1, len(values))


def gather_objects(value: _T, *, group: "dist.ProcessGroup | None" = None) -> list[_T]:
    """Every rank's value in rank order, on rank 0; empty on the others."""
    everyone: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, everyone or None, group=group)
    return everyone


class SharedCounters:
    """Numbers that any rank may raise at any time, without waiting for the others.

    Args:
        name: All ranks make them under the same name, which nothing else in the run has.
    """

    def __init__(self, name: str) -> None:
        self._store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 (torch has no public way to ask)
        self._name = name

    def add(self, counter: str, amount: int) -> int:
        """Raises a counter, which begins at 0, and returns what it is now."""
        return int(self._store.add(f"{self._name}/{counter}", amount))


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know of a step after their one exchange."""

    trained_tokens: int
    """Tokens that carry loss, over all ranks and micro batches."""
    tokens: int
    """All tokens but padding."""
    loss_sum: float
    """Sum of the ranks' losses."""
    stop: bool
    """Some rank was asked to stop."""
    save: bool
    """Rank 0 finds that a checkpoint is due."""
    uploaded_step: int
    """The newest checkpoint that every rank has uploaded; negative when a rank gave that one up."""
    measures: tuple[float, ...] = ()
    """Sums of what else a recipe counts."""

    @property
    def loss(self) -> float:
        """Mean loss over the trained tokens, where the ranks gave the sum over theirs."""
        return self.loss_sum / max(1, self.trained_tokens)


def exchange(
    *,
    trained_tokens: int,
    tokens: int,
    loss_sum: float,
    stop: bool = False,
    save: bool = False,
    uploaded_step: int = 0,
    measures: Sequence[float] = (),
) -> StepTotals:
    """The one small collective of a step beside FSDP's own: each rank's part in, the totals out."""
    columns = gather_vector(
        [float(trained_tokens), float(tokens), loss_sum, float(stop), float(save), float(uploaded_step), *measures]
    )
    # The ranks of a tensor group have seen the same rows: one of them counts. Any rank may be told to stop.
    total = columns[:: _joined[0].tensor if _joined else 1].sum(dim=0).tolist()
    return StepTotals(
        trained_tokens=int(total[0]),
        tokens=int(total[1]),
        loss_sum=total[2],
        stop=columns[:, 3].sum().item() > 0,
        save=total[4] > 0,
        uploaded_step=int(columns[:, 5].min().item()),
        measures=tuple(total[6:]),
    )


class StopSignal:
    """SIGTERM, which Kubernetes sends before it takes a pod away.

    While training it becomes a flag that the ranks exchange, so that all stop at the same step. At any other time there
    is nothing to save that is not saved already, and the process ends at once.
    """

    def __init__(self, *, leave: Callable[[], object]) -> None:
        """Listens from now on.

        Args:
            leave: Called, with no arguments, to end the process outside of training.
        """
        self.requested = False
        self._training = False
        self._leave = leave
        signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, a signal only sets `requested`; one that nobody heeded ends the process after it.

        The block is training: signs of life are expected in it.
        """
        self._training = True
        with watched(first_seconds=2 * COLLECTIVE_SECONDS):  # what collectives say of a hang in the first step is more
            yield
        self._training = False
        if self.requested:
            self._leave()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if not self._training:  # in a thread: the one that is interrupted may hold locks that leaving needs
            threading.Thread(target=self._leave, name="leave", daemon=True).start()
