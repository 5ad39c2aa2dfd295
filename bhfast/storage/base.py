"""Where a recording grows: in memory until all of it is written at the end, or straight into the file.

Both kinds of storage hand out host tensors whose axis 0 is a ring of slots: record r of a tensor is written to slot
``r % slots``. The memory storage has one slot for every record. A tensor that is recorded at key frames only has an
entry, and a slot, for these records alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from bhfast.trace.recorded import RecordedTensor
from bhfast.transfer.copy_stream import Ticket

STORAGES = ("auto", "memory", "stream")


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

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Add to the file's metadata, no later than the records that are submitted from now on."""
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

    def flush(self) -> None:
        """Wait until the records that were submitted are safe in the file; a storage in memory has nothing to wait for.

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
