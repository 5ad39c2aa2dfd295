"""Where a recording grows: in memory until all of it is written at the end, or straight into the file.

Both kinds of storage hand out host tensors whose axis 0 is a ring of slots: record r of a tensor is written to slot
``r % slots``. The memory storage has one slot for every record. A tensor that is recorded at key frames only has an
entry, and a slot, for these records alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bhfast.trace.format import KEYFRAME_STEPS
from bhfast.transfer.copy_stream import Ticket

STORAGES = ("auto", "memory", "stream")


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor of the trace with one entry per record: its name, and the shape and dtype of a record.

    Attributes:
        name: in the file.
        shape, dtype: of one record.
        fill: what a record holds if nothing is written to it; None if every record is written.
        start: what record 0 of a tensor that is added later holds; None for ``fill``.
        stride: only record 0, each record that is a multiple of this, and, if :meth:`Storage.add_last` adds it, the
            last one have an entry in the tensor. An entry has no ``fill`` if this is more than 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None = None
    start: float | None = None
    stride: int = 1

    def entries(self, records: int) -> int:
        """Return how many of the first ``records`` records have an entry."""
        return -(-records // self.stride)

    @property
    def nbytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_record(self) -> int:
        """Bytes for each record, on average, rounded up."""
        return -(-self.nbytes // self.stride)

    @property
    def is_zero_at_first(self) -> bool:
        """Whether records hold zeros until something is written to them."""
        return not self.fill and not self.start

    def unwritten(self, low: int, high: int) -> Tensor:
        """Return the records ``[low, high)`` as they are before anything is written: ``[high - low, *shape]``."""
        records = torch.full((high - low, *self.shape), self.fill or 0.0, dtype=self.dtype)
        if low == 0 < high and self.start is not None:
            records[0] = self.start
        return records


def steps_of(records: int, every: int, start_step: int, strides: set[int], *, has_last: bool) -> dict[str, Tensor]:
    """Return the tensors that say which steps are recorded, and which of them are key frames, if there are any.

    Args:
        records: how many there are.
        every: how many steps apart.
        start_step: the step of record 0.
        strides: of all tensors; at most one is larger than 1.
        has_last: whether the last record was added to the key frames.
    """
    steps = start_step + torch.arange(records) * every
    found = {"recorded_steps": steps}
    for stride in strides - {1}:
        frames = steps[::stride].contiguous()
        found[KEYFRAME_STEPS] = torch.cat([frames, steps[-1:]]) if has_last else frames
    return found


class Storage(Protocol):
    """What a recorder needs from a storage.

    Attributes:
        room: the number of the first record that has no free slot yet.
        capacity: how many records there can be.
        committed: how many records are safe in the file, whatever happens to this process.
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
        """Return host memory ``[slots, *shape]`` to make a tensor's entries in: entry e goes to slot ``e % slots``.

        Args:
            tensor: what to record.
            group: how many records are sent from a device together. ``slots`` is a multiple of it, unless there is a
                slot for every record.
            first: the current record; earlier ones hold the tensor's fill value.

        Raises:
            StorageError: the tensor does not fit on the disk.
        """
        ...

    def set_constant(self, name: str, value: Tensor) -> None:
        """Store a tensor of the whole run."""
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
        """Wait until ``records`` records are stored; return how many can be saved, which is fewer after a failure."""
        ...

    def add_last(self) -> bool:
        """Add the last record to tensors with a stride that lack it: it is in the slot after their last entry.

        Called after :meth:`settle`. A disk that fails now loses that entry only.

        Returns:
            Whether it was added.
        """
        ...

    def save(self, metadata: Mapping[str, str], path: Path) -> None:
        """Write the trace ``path``, with as many records as :meth:`settle` returned.

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
        bytes: the size of all records.
        waits: how often the run had to wait for the recording: for the disk, or for copies from a GPU. Complete once
            the recording has ended.
        seconds: from the start of the recording to its end, or to now.
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
