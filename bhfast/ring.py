"""Records on their way from a device to the host: a ring on the device, a side stream, pinned memory.

A kernel writes each record to the next slot of a ring of two halves. When one half is full, a side stream copies it to
the host while the other half fills. The streams meet by events; the host never waits for the device in the loop.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

HALF_BYTES = 4 << 20  # large enough for the full bandwidth of the bus
PIN_PIECE = 256 << 20  # bytes pinned at once: other calls to the driver wait that long
PAGE = mmap.PAGESIZE


def host_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialised host memory of exactly this size, from the start of a page, in huge pages where there are.

    Pages are taken when they are first written to.
    """
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize)
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
    """Carries copies from a device to the host beside the computation, in the order they are asked for.

    Attributes:
        waits: how often a copy had to wait for its host memory to be ready.
    """

    waits: int

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
        """Wait, on the host, until all copies are done."""
        ...

    def close(self) -> None:
        """Let go of the host tensors, when nothing is being copied any more."""
        ...


class CudaLane:
    """A side stream, and host memory that is pinned in the background."""

    def __init__(self, device: torch.device) -> None:
        self.waits = 0
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pinner = Pinner(_cuda_register, torch.cuda.cudart().cudaHostUnregister)

    def add(self, host: Tensor) -> None:
        self.pinner.add([host])

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Ticket:
        for host, _ in pairs:
            self.waits += self.pinner.wait(host)
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            for pair in pairs:
                for host, slots in split(*pair):
                    host.copy_(slots, non_blocking=True)
        return self.stream.record_event()

    def hold(self, ticket: Ticket) -> None:
        assert isinstance(ticket, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def drain(self) -> None:
        self.stream.synchronize()

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
    """

    def __init__(self, lane: Lane, half: int) -> None:
        self.half = half
        self._lane = lane
        self._full = 0  # how often both halves were
        self._pairs: list[tuple[Tensor, Tensor]] = []  # host [records, ...], slots [2 * half, ...]
        self._tickets: list[Ticket | None] = [None, None]  # the last copies out of each half
        self._turned = 0  # records that are copied out, or are on their way

    def add(self, host: Tensor, device: torch.device) -> Tensor:
        """Return slots for the records that shall go to ``host``, from the half that is now being filled.

        Args:
            host: ``[records, ...]``; what it holds of that half already stays, unless it is recorded anew.
        """
        slots = torch.empty((2 * self.half, *host.shape[1:]), dtype=host.dtype, device=device)
        now = host[self._turned : self._turned + self.half]
        first = self._turned % (2 * self.half)
        slots[first : first + len(now)] = now.to(device)
        self._pairs.append((host, slots))
        self._lane.add(host)
        return slots

    @property
    def stalls(self) -> int:
        """How often the computation had to wait: for a slot, or for the host's memory."""
        return self._full + self._lane.waits

    @property
    def room(self) -> int:
        """The number of the first record that needs a :meth:`turn` before it is written."""
        return self._turned + self.half

    def turn(self) -> None:
        """Send the full half to the host, and make sure of the other one."""
        self._send(self.half)
        ticket = self._tickets[self._turned // self.half % 2]
        if ticket is not None:
            self._full += not ticket.query()
            self._lane.hold(ticket)

    def drain(self, records: int) -> None:
        """Bring everything up to ``records`` records to the host, and wait for it."""
        self._send(max(0, records - self._turned))
        self._lane.drain()

    def _send(self, count: int) -> None:
        first = self._turned % (2 * self.half)
        pairs = [
            (host[self._turned : self._turned + count], slots[first : first + count]) for host, slots in self._pairs
        ]
        self._tickets[self._turned // self.half % 2] = self._lane.copy(pairs)
        self._turned += count


# ---------------------------------------------------------------------------------------------------------------------
# Pinned memory


def split(host: Tensor, slots: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a copy to part of a :func:`host_tensor` where it would cross from one pinned piece to the next.

    CUDA takes memory that was registered in two pieces for two.
    """
    start = host.storage_offset() * host.itemsize
    end = start + host.nbytes
    cuts = range(start - start % PIN_PIECE + PIN_PIECE, end, PIN_PIECE)
    if not cuts:
        yield host, slots
        return
    to, source = (x.flatten().view(torch.uint8) for x in (host, slots))
    for low, high in pairwise([start, *cuts, end]):
        yield to[low - start : high - start], source[low - start : high - start]


class Pinner:
    """Pins host memory in the background, exactly and piece by piece, while the first steps run.

    Where memory cannot be pinned, copies to it are slower, but right.

    Args:
        register: called with an address and a number of bytes; returns an error, or None.
        unregister: called with the address of each registered piece, when all is done.

    Attributes:
        error: why some memory could not be pinned; None if all could.
    """

    def __init__(self, register: Callable[[int, int], str | None], unregister: Callable[[int], object]) -> None:
        self.error: str | None = None
        self._register = register
        self._unregister = unregister
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int]] = []  # addresses and sizes still to be pinned, in order
        self._pinned: list[int] = []
        self._closing = False
        self._thread = threading.Thread(target=self._pin, name="bhfast-pin", daemon=True)
        self._thread.start()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Pin these tensors of :func:`host_tensor`: the first piece of each, then the second of each, and so on."""
        pieces = [
            (offset, tensor.data_ptr() + offset, min(PIN_PIECE, tensor.nbytes - offset))
            for tensor in tensors
            for offset in range(0, tensor.nbytes, PIN_PIECE)
        ]
        with self._changed:
            self._queue += [(address, size) for _, address, size in sorted(pieces)]
            self._changed.notify_all()

    def wait(self, tensor: Tensor) -> bool:
        """Wait until the memory of ``tensor`` is pinned, or cannot be; return whether there was a wait."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes

        def is_pending() -> bool:
            return any(address < end and start < address + size for address, size in self._queue)

        with self._changed:
            waits = is_pending()
            while is_pending():
                self._changed.wait()
        return waits

    def close(self) -> None:
        """Stop, and unpin everything. Nothing may be copying to the memory any more."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()
        for address in self._pinned:
            self._unregister(address)

    def _pin(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                address, size = self._queue[0]
            try:
                error = self._register(address, size)
            except Exception as unforeseen:
                error = str(unforeseen)
            with self._changed:
                if error is None:
                    self._pinned.append(address)
                else:
                    self.error = error
                if self._queue:
                    self._queue.pop(0)
                self._changed.notify_all()
