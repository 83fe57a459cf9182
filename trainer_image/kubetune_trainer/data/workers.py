"""Tokenizing with all cores: this process reads and writes, others encode, and the order is that of the records.

The others are programs of their own and not forks: whoever prepares may have threads, and need not be importable. Each
has one chunk at a time, so memory does not grow with the data; a process whose other side went away ends.
"""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kubetune_trainer.data.chunks import Chunk, ChunkEncoder, EncodedChunk
from kubetune_trainer.errors import DataError, DoesNotFitError

CHUNK_SAMPLES = 256
"""Records that travel together."""
ALONE_CHUNKS = 16
"""How many chunks this process encodes before it asks for help; a process takes a second to begin."""
MOST_WORKERS = 8
"""More than this and they wait for the one that reads and writes."""
QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def encode_chunks(chunks: Iterable[Chunk], encoder: ChunkEncoder) -> Iterator[EncodedChunk]:
    """Encodes chunks, a few here and many by processes of their own.

    Args:
        chunks: In order; what they raise comes after the results of the chunks before.
        encoder: Encodes one chunk.

    Raises:
        DataError: A record is wrong; of several wrong ones it is the first.
        DoesNotFitError: A process was killed, most likely for its memory.
    """
    waiting = iter(chunks)
    yield from map(encoder.encode, islice(waiting, ALONE_CHUNKS))
    following = next(waiting, None)
    if following is None:
        return
    waiting, number = chain([following], waiting), num_workers()
    if number == 1:
        yield from map(encoder.encode, waiting)
        return
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(encoder)) for _ in range(number)]
        yield from _in_turns(waiting, workers)


def num_workers() -> int:
    """Returns how many processes encode: one per core that this process may use, within a limit."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = QUOTA_FILE.read_text().partition(" ") if QUOTA_FILE.is_file() else ("max", "", "")
    if quota != "max":
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return min(cores, MOST_WORKERS)


def _in_turns(chunks: Iterator[Chunk], workers: Sequence["_Worker"]) -> Iterator[EncodedChunk]:
    """Gives every worker its next chunk when it has answered the last one."""
    given = answered = 0
    failure: DataError | None = None
    while failure is None:
        try:
            chunk = next(chunks, None)
        except DataError as error:
            failure, chunk = error, None
        if chunk is None:
            break
        if given - answered == len(workers):
            yield workers[answered % len(workers)].answer()
            answered += 1
        workers[given % len(workers)].give(chunk)
        given += 1
    while answered < given:
        yield workers[answered % len(workers)].answer()
        answered += 1
    if failure is not None:
        raise failure


class _Worker:
    """A process that encodes."""

    def __init__(self, encoder: ChunkEncoder) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=sys.stderr.fileno(),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
            )
        self._tell(encoder.parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def give(self, chunk: Chunk) -> None:
        """Hands it a chunk."""
        self._tell(chunk)

    def answer(self) -> EncodedChunk:
        """Waits for what became of its chunk."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if isinstance(answer, EncodedChunk):
            return answer
        message, hint = answer
        raise DataError(message, hint=hint)

    def _tell(self, what: Any) -> None:
        try:
            self._connection.send(what)
        except OSError as error:
            raise self._lost() from error

    def _lost(self) -> Exception:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            hint = "Give the pod more memory, or fewer cores: each has a process of its own."
            return DoesNotFitError("a process that tokenizes was killed, most likely for its memory", hint=hint)
        return RuntimeError(f"a process that tokenizes ended with code {code}")


def serve(connection: Connection) -> None:
    """Encodes chunks until the other side goes away; what a worker does."""
    encoder = ChunkEncoder(*connection.recv())
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        try:
            answer: EncodedChunk | tuple[str, str] = encoder.encode(chunk)
        except DataError as error:
            answer = str(error), error.hint
        connection.send(answer)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    serve(Connection(int(sys.argv[1])))
