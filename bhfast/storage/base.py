"""Where a recording grows: in memory, until it is written as a whole, or straight into the file.

Both kinds of storage hand out host tensors whose axis 0 is a ring of slots: record r of a tensor is made in slot
``r % slots``. In memory there is one for every record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bhfast.transfer.lanes import Ticket

STORAGES = ("auto", "memory", "stream")


class Storage(Protocol):
    """What a recorder needs of a storage.

    Attributes:
        room: the number of the first record that has no free slot yet.
        capacity: how many records there can be.
        committed: how many records are safe, whatever happens to this process.
        waits: how often the recording had to wait for the disk.
        failure: what has befallen the writing, in words; None if it goes on.
    """

    capacity: int
    committed: int
    waits: int

    @property
    def room(self) -> int: ...

    @property
    def failure(self) -> str | None: ...

    def add(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, blank: float | None, *, group: int, first: int
    ) -> Tensor:
        """Return a tensor ``[slots, *shape]`` to make records in.

        Args:
            blank: what records hold that are not written; None if every one is.
            group: records that are sent from a device together: ``slots`` is a multiple of it, if there are fewer than
                records.
            first: the record at hand; those before it are blank.

        Raises:
            StorageError: it does not fit on the disk.
        """
        ...

    def set_constant(self, name: str, value: Tensor) -> None:
        """Keep a tensor of the whole run."""
        ...

    def wait(self, record: int) -> None:
        """Wait until ``record`` has a free slot, so that ``room`` is above it.

        Raises:
            StorageError: the disk filled up or failed.
        """
        ...

    def is_due(self, records: int) -> bool:
        """Return whether it is time for :meth:`submit`, if so many records are final.

        Raises:
            StorageError: the disk filled up or failed.
        """
        ...

    def submit(self, records: int, tickets: Sequence[Ticket]) -> None:
        """Say that all records below ``records`` are final once ``tickets`` are done.

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
        """Let go of threads and files."""
        ...


@dataclass(frozen=True)
class Stats:
    """Figures of a recording.

    Attributes:
        steps: the last step that is recorded.
        records: how many records there are, step 0 included.
        committed: how many of them are safe in the file, whatever happens to the process.
        bytes: of all records.
        waits: how often the run had to wait for the recording: for the disk, or for copies from a GPU. Complete after
            the block.
        seconds: since the block was entered, up to its end.
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
