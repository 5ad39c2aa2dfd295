"""Where a recording grows: in memory until it is written as a whole, or straight into the file.

Both kinds of storage hand out host tensors whose axis 0 is a ring of slots: record r of a tensor is made in slot
``r % slots``. In memory there is one slot for every record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bhfast.transfer.copy_stream import Ticket

STORAGES = ("auto", "memory", "stream")


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor of the trace with one entry per record: the form that a recorded value has from its slot to the file.

    Attributes:
        name: in the file.
        shape, dtype: of one record.
        fill: what a record holds if nothing is written to it; None if every record is written.
        start: the same for record 0 of a tensor that is added later; None: ``fill``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None = None
    start: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_zero_at_first(self) -> bool:
        """Whether records hold zeros until something is written to them."""
        return not self.fill and not self.start

    def unwritten(self, low: int, high: int) -> Tensor:
        """Return the records from ``low`` to ``high`` as they are before anything is written to them."""
        records = torch.full((high - low, *self.shape), self.fill or 0.0, dtype=self.dtype)
        if low == 0 < high and self.start is not None:
            records[0] = self.start
        return records


class Storage(Protocol):
    """What a recorder needs of a storage.

    Attributes:
        room: the number of the first record that has no free slot yet.
        capacity: how many records there can be.
        committed: how many records are safe, whatever happens to this process.
        waits: how often the recording had to wait for the disk.
        failure: why writing failed; None while it is healthy.
    """

    capacity: int
    committed: int
    waits: int

    @property
    def room(self) -> int: ...

    @property
    def failure(self) -> str | None: ...

    def add(self, tensor: RecordedTensor, *, group: int, first: int) -> Tensor:
        """Return host memory ``[slots, *shape]`` to make a tensor's records in.

        Args:
            tensor: what to record.
            group: how many records are sent from a device together. ``slots`` is a multiple of it, unless there is one
                for every record.
            first: the current record; earlier ones stay unwritten.

        Raises:
            StorageError: it does not fit on the disk.
        """
        ...

    def set_constant(self, name: str, value: Tensor) -> None:
        """Keep a tensor of the whole run."""
        ...

    def wait(self, record: int) -> None:
        """Wait until ``record`` has a free slot, so that ``room`` is larger than it.

        Raises:
            StorageError: the disk filled up or failed.
        """
        ...

    def is_due(self, records: int) -> bool:
        """Return whether ``records`` final records are worth a :meth:`submit` now.

        Raises:
            StorageError: the disk filled up or failed.
        """
        ...

    def submit(self, records: int, tickets: Sequence[Ticket]) -> None:
        """Mark all records below ``records`` as final once ``tickets`` are done.

        Raises:
            StorageError: the disk filled up or failed.
        """
        ...

    def settle(self, records: int) -> int:
        """Wait for what was submitted, up to ``records``; return how many can be saved, fewer after a failure."""
        ...

    def save(self, metadata: Mapping[str, str], path: Path) -> None:
        """Write the trace ``path`` of the records that :meth:`settle` found.

        Raises:
            StorageError: the disk failed.
        """
        ...

    def close(self) -> None:
        """Stop threads and close files."""
        ...


@dataclass(frozen=True)
class Stats:
    """Figures of a recording.

    Attributes:
        steps: the last recorded step, counted from the start of the recording.
        records: how many records there are, record 0 included.
        committed: how many of them are safe in the file, whatever happens to the process.
        bytes: size of all records.
        waits: how often the run had to wait for the recording: for the disk, or for copies from a GPU. Complete once
            the recording has ended.
        seconds: from the start of the recording to now, or to its end.
    """

    steps: int
    records: int
    committed: int
    bytes: int
    waits: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0
