"""A recording that stays in memory until all of it is written at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
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

    def flush(self) -> None:
        pass

    def settle(self, records: int) -> int:
        self._records = records
        return records

    def add_last(self) -> bool:
        self._has_last = True
        return True

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
