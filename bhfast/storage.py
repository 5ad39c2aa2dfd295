"""Where a recording grows: in memory, until it is written as a whole, or straight into the file.

Both kinds of storage hand out host tensors whose axis 0 is a ring of slots: record r of a tensor is made in slot
``r % slots``. In memory there is one for every record.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from bhfast.errors import StorageError
from bhfast.journal import journal_path, sync_folder, write_at
from bhfast.ring import Ticket, host_tensor
from bhfast.trace import (
    bytes_of,
    checksum_metadata,
    checksums,
    encode_header,
    format_bytes,
    place,
    records_per_checksum,
)

STORAGES = ("auto", "memory", "stream")


class Claim:
    """A trace file that this run will write: ``NAME.partial``, locked against other runs.

    Entering creates it. ``NAME`` itself is not touched before the trace is complete. Leaving removes ``NAME.partial``,
    if nothing in it is worth keeping.

    Args:
        path: the final name.
        overwrite: whether ``NAME``, and a ``NAME.partial`` that an earlier run left, may be replaced.

    Attributes:
        is_worth_keeping: whether ``NAME.partial`` can be recovered, and must stay if it could not be finished.

    Raises:
        StorageError: on entering, if ``NAME`` or ``NAME.partial`` exists, or the folder is not writable.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite = overwrite
        self.is_worth_keeping = False

    def __enter__(self) -> Claim:
        if self.path.is_dir():
            raise StorageError(f"cannot write the trace {self.path}: it is a folder; name a file with --out")
        if self.path.exists() and not self.overwrite:
            raise StorageError(
                f"the trace {self.path} exists; pass --overwrite to replace it, or choose another file with --out"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = self._open()
        except OSError as error:
            raise StorageError(
                f"cannot write the trace {self.path}: {error.strerror}; choose another place with --out"
            ) from None
        return self

    def _open(self) -> int:
        exists = self.partial.exists()
        fd = lock(self.partial, os.O_CREAT)
        if exists and not self.overwrite:
            os.close(fd)
            keep = "delete it"
            if journal_path(self.partial).exists():
                keep = f"keep its steps with python -m bhfast.recover {self.partial}, delete it,"
            raise StorageError(
                f"{self.partial} was left by a run that did not finish; {keep} or pass --overwrite to replace it, "
                "or choose another file with --out"
            )
        journal_path(self.partial).unlink(missing_ok=True)
        os.ftruncate(fd, 0)
        return fd

    def reserve(self, size: int) -> None:
        """Reserve ``size`` bytes of disk in all, so that the trace cannot fail for want of space.

        Raises:
            StorageError: the disk is too small.
        """
        if (free := self.free()) < size:
            raise StorageError(
                f"the disk of {self.path.parent} is too small for the trace: {format_bytes(size)} wanted, "
                f"{format_bytes(free)} free; free some, choose another place with --out, or record less with "
                "--record-every or --steps"
            )
        if size and hasattr(os, "posix_fallocate"):  # which takes no 0
            try:
                os.posix_fallocate(self.fd, 0, size)
            except OSError as error:
                raise StorageError(
                    f"cannot reserve {format_bytes(size)} for the trace {self.path}: {error.strerror}; "
                    "choose another place with --out"
                ) from None

    def free(self) -> int:
        """Return how many bytes of disk there are for the trace, what it has already included."""
        return shutil.disk_usage(self.path.parent).free + os.fstat(self.fd).st_blocks * 512

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.is_worth_keeping:
            with contextlib.suppress(FileNotFoundError):  # gone if it was finished
                self.partial.unlink()
        os.close(self.fd)


def lock(partial: Path, flags: int = 0) -> int:
    """Open ``partial`` and lock it against other runs; return the file descriptor.

    Raises:
        OSError: it cannot be opened.
        StorageError: another run is writing it.
    """
    fd = os.open(partial, os.O_RDWR | flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StorageError(
            f"{partial} is being written by another run; wait for it, or choose another file with --out"
        ) from None
    return fd


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


class MemoryStorage:
    """Keeps all records in memory, and writes them as a whole. See :class:`Storage`."""

    failure = None

    def __init__(self, claim: Claim, *, records: int, every: int) -> None:
        self.claim = claim
        self.room = self.capacity = records
        self.committed = self.waits = 0
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self._every = every

    def add(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, blank: float | None, *, group: int, first: int
    ) -> Tensor:
        tensor = host_tensor((self.capacity, *shape), dtype)
        self.claim.reserve(tensor.nbytes + sum(x.nbytes for x in self.tensors.values()))
        self.tensors[name] = tensor
        return tensor if blank is None else tensor.fill_(blank)

    def set_constant(self, name: str, value: Tensor) -> None:
        self.constants[name] = value

    def wait(self, record: int) -> None:
        pass

    def is_due(self, records: int) -> bool:
        return False

    def submit(self, records: int, tickets: Sequence[Ticket]) -> None:
        pass

    def settle(self, records: int) -> int:
        self._records = records
        return records

    def save(self, metadata: Mapping[str, str], path: Path) -> None:
        tensors = {name: tensor[: self._records] for name, tensor in self.tensors.items()}
        tensors |= {"recorded_steps": torch.arange(self._records) * self._every, **self.constants}
        write_trace(self.claim, tensors, metadata, path)
        self.committed = self._records

    def close(self) -> None:
        pass


def write_trace(claim: Claim, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a whole trace, sync it and give it its final name.

    Nothing is copied: the bytes go from the tensors to the file. Nobody may write to the tensors meanwhile.

    Args:
        claim: of this file.
        tensors: contiguous CPU tensors by name.
        metadata: for the header's ``__metadata__``.
        path: the final name, in the same folder.

    Raises:
        StorageError: the disk filled up or failed; the tensors are as they were.
    """
    each = records_per_checksum(max(map(len, (x for x in tensors.values() if x.dim())), default=1), len(tensors))
    sums = {name: checksums(tensor, each) for name, tensor in tensors.items()}
    entries = place(tensors)
    header = encode_header(entries, {**metadata, **checksum_metadata(sums, each)})
    try:
        write_at(claim.fd, memoryview(header), 0)
        for name, entry in entries.items():
            write_at(claim.fd, bytes_of(tensors[name]), len(header) + entry.offset)
        os.ftruncate(claim.fd, len(header) + max((entry.end for entry in entries.values()), default=0))
        os.fsync(claim.fd)
        os.replace(claim.partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"writing the trace {path} failed: {error.strerror}; nothing was saved") from error
