"""Activations that wait in host memory until backward needs them, copied beside the computation (arXiv 2101.06840).

What a block keeps for backward is copied to pinned memory on a stream of its own while the next block computes, and
freed on the device when both are done. When backward comes to a block, the copies of the one before it set out, so that
they have arrived when their turn comes. So the device holds the activations of two blocks at a time, and the host those
of all. Whole storages travel, each once, however many operators keep a part of it; weights, and what all blocks share,
stay. On the device's side it is memory of the stream that computes, which waits for a copy before it lets memory go and
before it reads: what is needed at most does not depend on how far the CPU is ahead.

The numbers are the same, bit for bit. The streams need CUDA, where this was not run by us; the tests give it a CPU,
whose copies are at once.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST_BYTES: Final = 2**16
"""A smaller storage stays: to send it costs more than it takes."""


class ActivationOffload:
    """Keeps a model's activations in host memory; its blocks share one.

    Args:
        device: Where the model computes.
        smallest_bytes: Storages with less than this stay where they are.
    """

    def __init__(self, device: torch.device, *, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.smallest_bytes = smallest_bytes
        self._lanes = _Lanes(device)
        self._latest: _Shelf | None = None

    @contextmanager
    def block(self, *, but: Iterable[object]) -> Iterator[None]:
        """Send away what is kept for backward while a block computes.

        Args:
            but: Tensors that stay, and whatever stands between them.
        """
        before, shelf = self._latest, _Shelf(self, self._lanes, but, before=self._latest)
        with saved_tensors_hooks(shelf.pack, _unpack):
            yield
        self._lanes.mark_sent(shelf)
        if before is not None:
            before.let_go()
        self._latest = shelf


class _Lanes:
    """The ways between a device and the host: on CUDA a stream each, elsewhere a copy at once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._on_cuda = device, device.type == "cuda"
        if self._on_cuda:
            self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, here: Tensor) -> Tensor:
        """Begin to copy to the host."""
        if not self._on_cuda:
            return here.clone()
        away = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            away.copy_(here, non_blocking=True)
        return away

    def mark_sent(self, shelf: "_Shelf") -> None:
        """Remember the moment at which all that was sent so far is there."""
        if self._on_cuda:
            shelf.sent = self._out.record_event()

    def fetch(self, stored: Iterable["_Stored"]) -> torch.cuda.Event | None:
        """Begin to copy back; return the moment at which all of it is there."""
        if not self._on_cuda:
            for each in stored:
                each.here = each.away.clone()
            return None
        for each in stored:
            each.here = torch.empty(each.away.shape, dtype=each.away.dtype, device=self.device)
            # Behind what may still read the memory that it was given.
            self._back.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._back):
                each.here.copy_(each.away, non_blocking=True)
        return self._back.record_event()

    def wait(self, moment: torch.cuda.Event | None) -> None:
        """Let the computation wait for a moment."""
        if moment is not None:
            torch.cuda.current_stream(self.device).wait_event(moment)


class _Shelf:
    """What one block keeps. Autograd holds it through what is stored, and this holds none of that: no cycles."""

    def __init__(
        self, owner: ActivationOffload, lanes: _Lanes, but: Iterable[object], *, before: "_Shelf | None"
    ) -> None:
        self.sent: torch.cuda.Event | None = None
        self._smallest_bytes, self._lanes = owner.smallest_bytes, lanes
        self._staying = {each.untyped_storage().data_ptr() for each in but if isinstance(each, Tensor)}
        self._stored: WeakValueDictionary[int, _Stored] = WeakValueDictionary()
        self._before: ReferenceType[_Shelf] | None = None if before is None else ref(before)
        self._is_coming, self._arrived = False, None

    def pack(self, tensor: Tensor) -> "Tensor | _Part":
        """Take what autograd wants to keep."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if type(tensor) is not Tensor or storage.nbytes() < self._smallest_bytes or place in self._staying:
            return tensor
        stored = self._stored.get(place)
        if stored is None:
            here = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            stored = self._stored[place] = _Stored(self, here=here, away=self._lanes.send(here))
        return _Part(stored, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def let_go(self) -> None:
        """Free the device's memory, once all is sent."""
        self._lanes.wait(self.sent)
        self._is_coming = False
        for each in self._stored.values():
            each.here = None

    def fetch(self) -> None:
        """Have all copied back that is still needed and not on the device."""
        if not self._is_coming:
            self._is_coming = True
            self._arrived = self._lanes.fetch([each for each in self._stored.values() if each.here is None])

    def opened(self) -> None:
        """Wait for what is on its way, and have the shelf before this one fetched, whose turn is next."""
        self.fetch()
        self._lanes.wait(self._arrived)
        self._arrived = None
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()


@dataclass(eq=False)
class _Stored:
    """A storage's bytes, on the device while they are needed there, and in the host's memory."""

    shelf: _Shelf
    here: Tensor | None
    away: Tensor


@dataclass(frozen=True)
class _Part:
    """A tensor of a storage, as autograd holds it."""

    stored: _Stored
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _unpack(packed: "Tensor | _Part") -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    packed.stored.shelf.opened()
    here = packed.stored.here
    assert here is not None, "the shelf was fetched"
    empty = torch.empty(0, dtype=packed.dtype, device=here.device)
    return empty.set_(here.untyped_storage(), packed.offset, packed.size, packed.stride)
