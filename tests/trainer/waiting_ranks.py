"""What each rank does in the tests of `waiting_for_all`: a spawned process can import this module."""

import os
import signal
import time
from pathlib import Path

from kubetune_trainer import distributed
from kubetune_trainer.distributed import gather_vector, join_world, waiting_for_all
from kubetune_trainer.errors import PeerLostError

COLLECTIVE_SECONDS = 6.0
WORK_SECONDS = 9.0


def run(rank: int, port: int, folder: Path, first: str) -> None:
    """Wait for rank 0, which works, dies, stops or fails; leave what came of it in `<folder>/<rank>`."""
    distributed.COLLECTIVE_SECONDS, distributed.SIGN_SECONDS = COLLECTIVE_SECONDS, 0.2
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    try:
        with join_world() as world:
            began = time.monotonic()
            with waiting_for_all():
                gather_vector([1.0])  # who waits may have a part in the work
                if world.is_first:
                    _be_first(first)
            waited = time.monotonic() - began
            with waiting_for_all():
                pass
            outcome = f"waited {waited:.1f}"
    except PeerLostError as error:
        outcome = f"lost after {time.monotonic() - began:.1f}: {error}"
    (folder / str(rank)).write_text(outcome)


def _be_first(how: str) -> None:
    if how == "works":
        time.sleep(WORK_SECONDS)
    elif how == "dies":
        os._exit(1)
    elif how == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "fails":
        raise SystemExit(1)
