"""A recording that is kept in memory, until it is written as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bhfast.errors import StorageError
from bhfast.storage.claim import Claim
from bhfast.storage.files import sync_folder, write_at
from bhfast.trace.checksums import checksum_metadata, checksums, records_per_checksum
from bhfast.trace.format import bytes_of, encode_header, place
from bhfast.transfer.host_memory import host_tensor
from bhfast.transfer.lanes import Ticket


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
