"""Records on their way from a device to the host: a ring on the device, a side stream, pinned memory.

A kernel writes each record to the next slot of a ring of two halves. When one half is full, a side stream copies it to
the host while the other half fills. The streams meet by events; the host never waits for the device in the loop.
"""

from __future__ import annotations

import ctypes
import heapq
import mmap
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HALF_BYTES = 4 << 20  # large enough for the full bandwidth of the bus
PIN_PIECE = 64 << 20  # bytes pinned at once: other calls to the driver wait that long
POPULATE_PIECE = 256 << 10  # bytes of pages taken at once: other changes to the address space wait that long
PAGE = mmap.PAGESIZE


def host_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialised host memory of exactly this size, from the start of a page, in huge pages where there are.

    Pages are taken when they are first written to.
    """
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


def half_size(record_bytes: int, records: int) -> int:
    """Return how many records one half of a ring holds: some megabytes, at least 2, no more than there will be."""
    return min(max(2, HALF_BYTES // max(record_bytes, 1)), max(2, records))


# ---------------------------------------------------------------------------------------------------------------------
# Lanes


class Ticket(Protocol):
    """Stands for copies that were asked for. Torch's CUDA events are tickets."""

    def query(self) -> bool:
        """Whether they are done."""
        ...


class Lane(Protocol):
    """Carries copies from a device to the host beside the computation, in the order they are asked for."""

    @property
    def waits(self) -> int:
        """How often the computation had to wait: for a copy out of a slot it needs, or for memory to copy to.

        Complete after :meth:`drain`.
        """
        ...

    def add(self, host: Tensor) -> None:
        """Make a tensor of :func:`host_tensor` ready to be copied to."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Ticket:
        """Copy each second tensor to the first, as it is after all the computation issued so far."""
        ...

    def hold(self, ticket: Ticket) -> None:
        """Let the computation issued from now on wait until the ticket's copies are done."""
        ...

    def drain(self) -> None:
        """Wait, on the host, until the computation and all copies are done."""
        ...

    def close(self) -> None:
        """Let go of the host tensors, when nothing is being copied any more."""
        ...


class Meetings:
    """Counts how often the computation came to a place before the copy it needs was done.

    The host is far ahead of the device: only when both events of a meeting are over can it know which came first.
    """

    def __init__(self) -> None:
        self.waits = 0
        self._ahead: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def add(self, arrived: torch.cuda.Event, copied: torch.cuda.Event) -> None:
        """Note a meeting to come, and settle those that are over."""
        self.settle()
        self._ahead.append((arrived, copied))

    def settle(self) -> None:
        while self._ahead and all(event.query() for event in self._ahead[0]):
            arrived, copied = self._ahead.popleft()
            self.waits += arrived.elapsed_time(copied) > 0

    def __len__(self) -> int:
        return len(self._ahead)


class CudaLane:
    """A side stream, and host memory that is pinned in the background."""

    def __init__(self, device: torch.device) -> None:
        self._waits_for_memory = 0
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._meetings = Meetings()
        self.pinner = Preparer(_cuda_register, torch.cuda.cudart().cudaHostUnregister, PIN_PIECE)

    def add(self, host: Tensor) -> None:
        self.pinner.add(host)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Ticket:
        for host, _ in pairs:
            self._waits_for_memory += self.pinner.wait(host)
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            for pair in pairs:
                for host, slots in split(*pair):
                    host.copy_(slots, non_blocking=True)
        return self.stream.record_event(torch.cuda.Event(enable_timing=True))

    def hold(self, ticket: Ticket) -> None:
        assert isinstance(ticket, torch.cuda.Event)
        stream = torch.cuda.current_stream(self.device)
        self._meetings.add(stream.record_event(torch.cuda.Event(enable_timing=True)), ticket)
        stream.wait_event(ticket)

    @property
    def waits(self) -> int:
        return self._waits_for_memory + self._meetings.waits

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)
        self._meetings.settle()

    def close(self) -> None:
        self.pinner.close()


def make_lane(device: torch.device) -> Lane | None:
    """Return a new lane from ``device``; None if what is on it can be recorded in the host's memory at once."""
    return CudaLane(device) if device.type == "cuda" else None


def _cuda_register(address: int, size: int) -> str | None:
    portable = 1
    error = torch.cuda.cudart().cudaHostRegister(address, size, portable)
    return None if int(error) == 0 else f"cudaHostRegister of {size} bytes: {error}"


# ---------------------------------------------------------------------------------------------------------------------
# The ring


class Ring:
    """Slots for records on a device, and the tensors on the host that they end up in.

    Record r of a tensor goes to slot ``r % (2 * half)``. Records are written in order, one after the other.

    Args:
        lane: what carries the copies.
        half: how many records one half has.
        first: the number of the record at hand when the ring is made.
    """

    def __init__(self, lane: Lane, half: int, first: int = 0) -> None:
        self.lane = lane
        self.half = half
        self.landed = 0  # records that are known to be on the host
        self._tracks: list[_Track] = []
        self._start = first - first % half  # the first record of the half that is being filled
        self._sent = self._start  # records that are on the host, or on their way
        self._tickets: deque[tuple[int, Ticket]] = deque()  # the copies under way, and where each ends
        self._last: Ticket | None = None  # of the last copy
        self._before: Ticket | None = None  # of the last copy out of the other half

    def add(self, host: Tensor, device: torch.device, blank: float | None = None) -> Tensor:
        """Return slots for the records that shall go to ``host``, from the half that is now being filled.

        Args:
            host: ``[records, ...]``, or a ring itself, whose length is a multiple of ``half``; what it holds of that
                half already stays, unless it is recorded anew.
            blank: what records hold that are not written; None if every one is.
        """
        slots = torch.empty((2 * self.half, *host.shape[1:]), dtype=host.dtype, device=device)
        at = self._start % len(host)
        now = host[at : at + self.half]
        first = self._start % (2 * self.half)
        slots[first : first + len(now)] = now.to(device)
        self._tracks.append(_Track(host, slots, blank))
        self.lane.add(host)
        return slots

    @property
    def room(self) -> int:
        """The number of the first record that needs a :meth:`turn` before it is written."""
        return self._start + self.half

    def send(self, records: int) -> Ticket | None:
        """Send all records below ``records``, of the half at hand, to the host; return the ticket of the last copy."""
        while self._tickets and self._tickets[0][1].query():
            self.landed = self._tickets.popleft()[0]
        if records > self._sent:
            first, count = self._sent % (2 * self.half), records - self._sent
            pairs = []
            for host, slots, _ in self._tracks:
                at = self._sent % len(host)
                pairs.append((host[at : at + count], slots[first : first + count]))
            self._last = self.lane.copy(pairs)
            self._tickets.append((records, self._last))
            self._sent = records
        return self._last

    def turn(self) -> None:
        """Send what is left of the full half, and make the other one ready to be written to."""
        self.send(self.room)
        if self._before is not None:
            self.lane.hold(self._before)
        self._before = self._last
        self._start += self.half
        first = self._start % (2 * self.half)
        for track in self._tracks:
            if track.blank is not None:
                track.slots[first : first + self.half].fill_(track.blank)

    def drain(self, records: int) -> None:
        """Bring everything up to ``records`` records to the host, and wait for it."""
        self.lane.drain()
        self.send(records)
        self.lane.drain()
        self.landed = self._sent


class _Track(NamedTuple):
    host: Tensor  # [records, ...]
    slots: Tensor  # [2 * half, ...]
    blank: float | None


# ---------------------------------------------------------------------------------------------------------------------
# Host memory in the background


def split(host: Tensor, slots: Tensor, piece: int = PIN_PIECE) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a copy to part of a :func:`host_tensor` where it would cross from one pinned piece of memory to the next.

    CUDA takes memory that was registered in two pieces for two.
    """
    start = host.storage_offset() * host.itemsize
    end = start + host.nbytes
    cuts = range(start - start % piece + piece, end, piece)
    if not cuts:
        yield host, slots
        return
    to, source = (x.flatten().view(torch.uint8) for x in (host, slots))
    for low, high in pairwise([start, *cuts, end]):
        yield to[low - start : high - start], source[low - start : high - start]


class Preparer:
    """Makes host memory ready in the background, piece by piece, while the first steps run.

    It pins memory that a GPU copies to, exactly as much as there is, or takes pages from the system before they are
    written to (:func:`populate`). Memory that cannot be prepared is slower, but right.

    Args:
        prepare: called with an address and a number of bytes; returns an error, or None.
        undo: called at the end with the address of each piece that was prepared.
        piece: bytes prepared at once.

    Attributes:
        error: why some memory could not be prepared; None if all could.
    """

    def __init__(self, prepare: Callable[[int, int], str | None], undo: Callable[[int], object], piece: int) -> None:
        self.error: str | None = None
        self._prepare = prepare
        self._undo = undo
        self._piece = piece
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int, int]] = []  # a heap: offset in its tensor, address, size
        self._at_hand: tuple[int, int, int] | None = None
        self._done: list[int] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="bhfast-memory", daemon=True)
        self._thread.start()

    def add(self, tensor: Tensor) -> None:
        """Prepare a tensor of :func:`host_tensor`; of all tensors the first piece, then the second, and so on."""
        with self._changed:
            for offset in range(0, tensor.nbytes, self._piece):
                size = min(self._piece, tensor.nbytes - offset)
                heapq.heappush(self._queue, (offset, tensor.data_ptr() + offset, size))
            self._changed.notify_all()

    def wait(self, tensor: Tensor) -> bool:
        """Wait until the memory of ``tensor`` is ready, or cannot be; return whether there was a wait."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes

        def is_pending() -> bool:
            pieces = [*self._queue, self._at_hand] if self._at_hand else self._queue
            return any(address < end and start < address + size for _, address, size in pieces)

        with self._changed:
            waits = is_pending()
            while is_pending():
                self._changed.wait()
        return waits

    def close(self) -> None:
        """Stop, and undo everything. Nothing may be copying to the memory any more."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()
        for address in self._done:
            self._undo(address)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                self._at_hand = heapq.heappop(self._queue)
            _, address, size = self._at_hand
            try:
                error = self._prepare(address, size)
            except Exception as unforeseen:
                error = str(unforeseen)
            with self._changed:
                self._at_hand = None
                if error is None:
                    self._done.append(address)
                else:
                    self.error = error
                self._changed.notify_all()


def populator() -> Preparer:
    """Return what takes the pages of host memory before the run writes to them, as a first write is slow.

    It gives up silently where the system has no such call: Linux has it since 5.14.
    """
    return Preparer(_populate, lambda address: None, POPULATE_PIECE)


def _populate(address: int, size: int) -> str | None:
    madv_populate_write = 23  # through ctypes, as mmap.madvise would hold the interpreter's lock meanwhile
    if sys.platform != "linux" or _libc().madvise(address, size, madv_populate_write) != 0:
        return "this system does not populate memory on request"
    return None


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
