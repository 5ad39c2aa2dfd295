"""Records on their way from a device to the host: a ring on the device, a side stream, pinned memory.

A kernel writes each record to the next slot of a ring of two halves. When one half is full, a side stream copies it to
the host while the other half fills. The streams meet by events; the host never waits for the device in the loop.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.transfer.lanes import Lane, Ticket

HALF_BYTES = 4 << 20  # large enough for the full bandwidth of the bus


def half_size(record_bytes: int, records: int) -> int:
    """Return how many records one half of a ring holds: some megabytes, at least 2, no more than there will be."""
    return min(max(2, HALF_BYTES // max(record_bytes, 1)), max(2, records))


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
