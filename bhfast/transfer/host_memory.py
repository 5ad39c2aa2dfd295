"""Host memory for records, prepared in the background."""

from __future__ import annotations

import ctypes
import heapq
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

PIN_PIECE = 64 << 20  # bytes pinned at once: other calls to the driver wait meanwhile
POPULATE_PIECE = 256 << 10  # bytes of pages touched at once: other changes to the address space wait meanwhile


def host_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialized host memory of exactly this size, starting at a page, in huge pages if the system has them.

    The system provides a page when it is first written to.
    """
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, count * dtype.itemsize, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


def split(host: Tensor, slots: Tensor, piece: int = PIN_PIECE) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a copy into part of a :func:`host_tensor` where it would cross from one pinned piece to the next.

    To CUDA, memory that was registered in two pieces is two separate blocks.
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


class MemoryPreparer:
    """Prepares host memory in the background, piece by piece, while the first steps run.

    It pins memory that a GPU copies to, or touches pages before the run writes to them (:func:`page_prefaulter`).
    Memory that cannot be prepared still works, but more slowly.

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
        self._current: tuple[int, int, int] | None = None
        self._done: list[int] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="bhfast-memory", daemon=True)
        self._thread.start()

    def add(self, tensor: Tensor) -> None:
        """Prepare a :func:`host_tensor`. The first piece of every tensor comes first, then the second, and so on."""
        with self._changed:
            for offset in range(0, tensor.nbytes, self._piece):
                size = min(self._piece, tensor.nbytes - offset)
                heapq.heappush(self._queue, (offset, tensor.data_ptr() + offset, size))
            self._changed.notify_all()

    def wait(self, tensor: Tensor) -> bool:
        """Wait until the memory of ``tensor`` is ready, or could not be prepared; return whether there was a wait."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes

        def is_pending() -> bool:
            pieces = [*self._queue, self._current] if self._current else self._queue
            return any(address < end and start < address + size for _, address, size in pieces)

        with self._changed:
            waits = is_pending()
            while is_pending():
                self._changed.wait()
        return waits

    def close(self) -> None:
        """Stop and undo everything. Nothing may be copying to the memory any more."""
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
                self._current = heapq.heappop(self._queue)
            _, address, size = self._current
            try:
                error = self._prepare(address, size)
            except Exception as unforeseen:
                error = str(unforeseen)
            with self._changed:
                self._current = None
                if error is None:
                    self._done.append(address)
                else:
                    self.error = error
                self._changed.notify_all()


def page_prefaulter() -> MemoryPreparer:
    """Return a preparer that touches pages of host memory before the run does, because the first write is slow.

    It does nothing if the system has no call for this. Linux has one since 5.14.
    """
    return MemoryPreparer(_populate, lambda address: None, POPULATE_PIECE)


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
