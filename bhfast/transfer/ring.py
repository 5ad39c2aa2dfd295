"""Transfers records from a device to the host: a ring on the device, a side stream, pinned memory.

A kernel writes each record to the next slot of a ring of two halves. When one half is full, a side stream copies it to
the host while the other half fills. Events synchronize the streams; the host never waits for the device in the loop.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.transfer.copy_stream import CopyStream, Ticket

HALF_BYTES = 4 << 20  # large enough for the full bandwidth of the bus


def half_size(record_bytes: int, records: int) -> int:
    """Return how many records one half of a ring holds: about 4 MB, at least 2, no more than there will be."""
    return min(max(2, HALF_BYTES // max(record_bytes, 1)), max(2, records))


class Ring:
    """Slots for records on a device, and the host tensors to which they are copied.

    Record r of a tensor goes to slot ``r % (2 * half)``. Records are written in order, one after the other.

    Args:
        stream: carries the copies.
        half: how many records one half has.
        first: the current record when the ring is made.
    """

    def __init__(self, stream: CopyStream, half: int, first: int = 0) -> None:
        self.stream = stream
        self.half = half
        self.landed = 0  # records that are known to be on the host
        self._tensors: list[_RingTensor] = []
        self._start = first - first % half  # the first record of the half that is being filled
        self._sent = self._start  # records that are on the host, or being copied
        self._tickets: deque[tuple[int, Ticket]] = (
            deque()
        )  # copies under way: the first record after each, and its ticket
        self._last: Ticket | None = None  # of the last copy
        self._before: Ticket | None = None  # of the last copy out of the other half

    def add(self, host: Tensor, device: torch.device, fill: float | None = None) -> Tensor:
        """Return slots for records that go to ``host``, starting with the half that is being filled.

        Args:
            host: ``[records, ...]``, or a ring whose length is a multiple of ``half``. Records of the current half that
                it already holds are kept, unless they are recorded again.
            fill: what a record holds if nothing is written to it; None if every record is written.

        Returns:
            ``[2 * half, ...]`` on ``device``.
        """
        slots = torch.empty((2 * self.half, *host.shape[1:]), dtype=host.dtype, device=device)
        at = self._start % len(host)
        now = host[at : at + self.half]
        first = self._start % (2 * self.half)
        slots[first : first + len(now)] = now.to(device)
        self._tensors.append(_RingTensor(host, slots, fill))
        self.stream.add(host)
        return slots

    @property
    def room(self) -> int:
        """The number of the first record that needs a :meth:`turn` before it is written."""
        return self._start + self.half

    def send(self, records: int) -> Ticket | None:
        """Send the records of the current half that are below ``records`` to the host; return the last ticket."""
        while self._tickets and self._tickets[0][1].query():
            self.landed = self._tickets.popleft()[0]
        if records > self._sent:
            first, count = self._sent % (2 * self.half), records - self._sent
            pairs = []
            for host, slots, _ in self._tensors:
                at = self._sent % len(host)
                pairs.append((host[at : at + count], slots[first : first + count]))
            self._last = self.stream.copy(pairs)
            self._tickets.append((records, self._last))
            self._sent = records
        return self._last

    def turn(self) -> None:
        """Send the rest of the full half, and make the other half ready for writing."""
        self.send(self.room)
        if self._before is not None:
            self.stream.hold(self._before)
        self._before = self._last
        self._start += self.half
        first = self._start % (2 * self.half)
        for tensor in self._tensors:
            if tensor.fill is not None:
                tensor.slots[first : first + self.half].fill_(tensor.fill)

    def drain(self, records: int) -> None:
        """Bring all records below ``records`` to the host, and wait until they are there."""
        self.stream.drain()
        self.send(records)
        self.stream.drain()
        self.landed = self._sent

    def close(self) -> None:
        """Release all tensors, and close the stream."""
        self.stream.close()
        self._tensors.clear()


class _RingTensor(NamedTuple):
    host: Tensor  # [records, ...]
    slots: Tensor  # [2 * half, ...]
    fill: float | None
