"""A recording that stays in memory until all of it is written at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from bhfast.errors import StorageError
from bhfast.storage.files import sync_folder, write_at
from bhfast.storage.output import OutputFile
from bhfast.trace.checksums import checksum_metadata, checksums, records_per_checksum
from bhfast.trace.format import bytes_of, encode_header, place
from bhfast.trace.recorded import RecordedTensor, steps_of
from bhfast.transfer.copy_stream import Ticket
from bhfast.transfer.host_memory import host_tensor


class MemoryStorage:
    """Keeps all records in memory, and writes them at the end. See :class:`bhfast.storage.base.Storage`."""

    failure = None

    def __init__(self, output: OutputFile, *, records: int, every: int, start_step: int = 0) -> None:
        self.output = output
        self.room = self.capacity = records
        self.committed = self.waits = 0
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self._recorded: dict[str, RecordedTensor] = {}
        self._has_last = False
        self._every = every
        self._start_step = start_step

    def add(self, tensor: RecordedTensor, *, group: int, first: int) -> Tensor:
        slots = tensor.entries(self.capacity) + (tensor.stride > 1)
        records = host_tensor((slots, *tensor.shape), tensor.dtype)
        self.output.reserve(records.nbytes + sum(x.nbytes for x in self.tensors.values()))
        self.tensors[tensor.name] = records
        self._recorded[tensor.name] = tensor
        if tensor.fill is not None:
            records.fill_(tensor.fill)
            records[:1] = tensor.unwritten(0, 1)
        return records

    def set_constant(self, name: str, value: Tensor) -> None:
        self.constants[name] = value

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        pass  # save() gets all of it

    def wait(self, record: int) -> None:
        pass

    def is_due(self, records: int) -> bool:
        return False

    def submit(self, records: int, tickets: Sequence[Ticket]) -> None:
        pass

    def settle(self, records: int) -> int:
        self._records = records
        return records

    def add_last(self) -> None:
        self._has_last = True

    def save(self, metadata: Mapping[str, str], path: Path) -> None:
        tensors = {
            name: self.tensors[name][: tensor.entries(self._records) + (self._has_last and tensor.stride > 1)]
            for name, tensor in self._recorded.items()
        }
        strides = {tensor.stride for tensor in self._recorded.values()}
        tensors |= {
            **steps_of(self._records, self._every, self._start_step, strides, has_last=self._has_last),
            **self.constants,
        }
        self.output.restore()
        write_trace(self.output, tensors, metadata, path)
        self.committed = self._records

    def close(self) -> None:
        self.tensors.clear()


def write_trace(output: OutputFile, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a whole trace, sync it, and give it its final name.

    Nothing is copied: the bytes go straight from the tensors to the file. Do not write to the tensors meanwhile.

    Args:
        output: the file to write.
        tensors: contiguous CPU tensors by name.
        metadata: for the header's ``__metadata__``.
        path: the final name, in the same folder.

    Raises:
        StorageError: the disk filled up or failed; the tensors are unchanged.
    """
    each = records_per_checksum(max(map(len, (x for x in tensors.values() if x.dim())), default=1), len(tensors))
    sums = {name: checksums(tensor, each) for name, tensor in tensors.items()}
    entries = place(tensors)
    header = encode_header(entries, {**metadata, **checksum_metadata(sums, each)})
    try:
        write_at(output.fd, memoryview(header), 0)
        for name, entry in entries.items():
            write_at(output.fd, bytes_of(tensors[name]), len(header) + entry.offset)
        os.ftruncate(output.fd, len(header) + max((entry.end for entry in entries.values()), default=0))
        os.fsync(output.fd)
    except OSError as error:
        raise StorageError(f"writing the trace {path} failed: {error.strerror}; nothing was saved") from error
    output.is_worth_keeping = True
    try:
        os.replace(output.partial, path)
    except OSError as error:
        raise StorageError(
            f"renaming the trace to {path} failed: {error.strerror}; it is complete in {output.partial}: run "
            f"python -m bhfast.recover {output.partial}"
        ) from error
    output.is_worth_keeping = False
    sync_folder(path.parent)
