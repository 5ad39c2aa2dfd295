"""Reads the journal of a trace that is being streamed: what is committed in ``NAME.partial``.

While a run streams into ``NAME.partial``, ``NAME.partial.journal`` says line by line what that file holds. Data is on
the disk before the line that mentions it, so the two files hold every committed step at any moment.
:mod:`bhfast.storage.journal` writes the lines.

Each line is a CRC-32, a space, and a JSON object with one of these keys. The first line that does not match its CRC
ends the journal:

    start      settings of the recording: every, start_step, records (null: unknown), header (bytes reserved for it),
               metadata
    tensor     a new tensor: name, dtype, shape of a record, what unwritten records hold (blank; start for record 0),
               and its offset after the header (null: its records are so small that the journal itself holds them);
               stride, if only some records have an entry in it
    constant   a tensor of the whole run: name, dtype, shape, data
    records    how many records are committed; crc32 of the new ones, by tensor; values of tensors in the journal
    metadata   more metadata
    last       the last record was added to the tensors with a stride: their crc32, and values, like those of records
    keep       keep only this many records, because the next one is damaged, and no last one
    collapse   a range of blocks is being removed from the file, which had this size before (null: that failed)
    tail       the header and everything after the records are being written
"""

from __future__ import annotations

import base64
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace.checksums import checksums, join_checksums
from bhfast.trace.format import DTYPES, bytes_of
from bhfast.trace.recorded import RecordedTensor, steps_of

VERSION = 1


def journal_path(partial: Path) -> Path:
    """Return the name of the journal of ``partial``."""
    return partial.with_name(partial.name + ".journal")


def is_at(fd: int, path: Path) -> bool:
    """Return whether ``path`` still names the open file ``fd``: it may have been renamed, deleted or replaced."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


@dataclass
class CommittedTensor:
    """The committed records of a tensor.

    Attributes:
        tensor: its name, and the shape and dtype of a record.
        offset: where record 0 starts, in bytes after the header; None if the journal holds the records.
        sums: CRC-32s of the committed records, in pieces; for tensors in the file.
        values: the committed records, in pieces; for tensors in the journal.
    """

    tensor: RecordedTensor
    offset: int | None
    sums: list[np.ndarray] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return self.tensor.nbytes

    def joined(self, entries: int) -> Tensor:
        """Return the entries of a tensor that the journal holds: ``[entries, *shape]``."""
        shape, dtype = self.tensor.shape, self.tensor.dtype
        if not self.nbytes or not entries:
            return torch.empty((entries, *shape), dtype=dtype)
        return torch.frombuffer(bytearray(b"".join(self.values)), dtype=dtype).view(-1, *shape)[:entries]


@dataclass
class State:
    """The content of a journal, as far as it was read."""

    start: dict[str, Any]
    metadata: dict[str, str]
    end: int = 0  # of the journal
    records: int = 0
    tensors: dict[str, CommittedTensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    has_last: bool = False  # whether tensors with a stride have an entry of the last record
    is_whole: bool = False  # whether the records are where they stay: only the header and what follows them is written
    collapse: tuple[int, int, int] | None = None  # offset in the file, length, size before: perhaps already done

    @property
    def in_file(self) -> list[tuple[CommittedTensor, int]]:
        """The tensors whose records are in the file, with their offsets after the header, in that order."""
        own = [(tensor, tensor.offset) for tensor in self.tensors.values() if tensor.offset is not None]
        return sorted(own, key=lambda item: item[1])

    def entries(self, tensor: RecordedTensor) -> int:
        """Return how many entries of a tensor are committed."""
        return tensor.entries(self.records) + (self.has_last and tensor.stride > 1)

    @property
    def steps(self) -> dict[str, Tensor]:
        """The tensors that say which steps are recorded; see :func:`bhfast.trace.recorded.steps_of`."""
        strides = {own.tensor.stride for own in self.tensors.values()}
        start_step = self.start.get("start_step", 0)
        return steps_of(self.records, self.start["every"], start_step, strides, has_last=self.has_last)

    @property
    def outside(self) -> dict[str, Tensor]:
        """The tensors whose data is not in the file, by name: those in the journal, the steps, and the constants."""
        own = {name: x.joined(self.entries(x.tensor)) for name, x in self.tensors.items() if x.offset is None}
        return {**own, **self.steps, **self.constants}

    def checksums(self, outside: Mapping[str, Tensor], each: int) -> dict[str, np.ndarray]:
        """Return the CRC-32s of all tensors, by name, as the finished trace has them.

        Args:
            outside: see above.
            each: how many records share one.
        """
        found = {}
        for own, _ in self.in_file:
            sums = np.concatenate(own.sums)[: self.entries(own.tensor)]
            found[own.tensor.name] = join_checksums(sums, own.nbytes, each)
        return found | {name: checksums(x, each) for name, x in outside.items()}

    def settle_collapse(self, size: int) -> None:
        """If the journal ends while a range of blocks was being removed, see from the file's size if it is gone."""
        if self.collapse is not None and size < self.collapse[2]:
            self.finish_collapse()

    def finish_collapse(self) -> None:
        """If a range of blocks was being removed, correct the offsets after it: the range is gone."""
        if self.collapse is None:
            return
        offset, length, _ = self.collapse
        self.collapse = None
        for tensor, at in self.in_file:
            if at + self.start["header"] > offset:
                tensor.offset = at - length


def read_journal(partial: Path) -> State:
    """Read the journal of ``partial``.

    Raises:
        TraceError: it does not exist, or cannot be read.
    """
    path = journal_path(partial)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"cannot read the journal {path}: {error.strerror}") from None
    state = parse(path, data)
    try:
        state.settle_collapse(partial.stat().st_size)
    except OSError as error:
        raise TraceError(f"cannot open {partial}, the file of this journal: {error.strerror}") from None
    return state


def parse(path: Path, data: bytes, state: State | None = None) -> State:
    """Parse the lines of a journal, up to the first one that is not complete.

    Args:
        path: the journal, for error messages.
        data: its content; with ``state``, its content from ``state.end`` on.
        state: what the lines before ``data`` say, which this updates.

    Raises:
        TraceError: it is not a journal, or is damaged.
    """
    first = end = 0 if state is None else state.end
    try:
        for event, length in _events(data):
            if state is None:
                state = State(event["start"], dict(event["start"]["metadata"]))
                if event["start"]["version"] != VERSION:
                    break
            else:
                _apply(state, event)
            state.end = end = first + length
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise TraceError(
            f"{path} is corrupted: at or after byte {end} there is an invalid line ({error!r:.200})"
        ) from None
    if state is None or state.start["version"] != VERSION:
        raise TraceError(f"{path} is not a journal of version {VERSION}")
    return state


def _events(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each event and the offset where its line ends, up to the first line that is not complete."""
    start = 0
    while (stop := data.find(b"\n", start)) >= 0:
        line = data[start:stop]
        if line[:8] != b"%08x" % zlib.crc32(line[9:]):
            return
        start = stop + 1
        yield json.loads(line[9:]), start


def _apply(state: State, event: dict[str, Any]) -> None:
    if "tensor" in event:
        shape, offset = tuple(event["shape"]), event["offset"]
        start = None if event.get("start") is None else float(event["start"])
        own = DTYPES[event["dtype"]], float(event["blank"]), start, int(event.get("stride", 1))
        tensor = RecordedTensor(event["tensor"], shape, *own)
        committed = CommittedTensor(tensor, offset)
        if offset is None:
            committed.values.append(bytes(bytes_of(tensor.unwritten(0, state.records))))
        elif state.records:
            first, other = (checksums(tensor.unwritten(i, i + 1).flatten()) for i in (0, 1))
            committed.sums += [first, np.repeat(other, state.records - 1)]
        state.tensors[tensor.name] = committed
    elif "constant" in event:
        raw = torch.frombuffer(bytearray(base64.b64decode(event["data"])) or bytearray(8), dtype=torch.uint8)
        dtype, count = DTYPES[event["dtype"]], math.prod(event["shape"])
        state.constants[event["constant"]] = raw[: count * dtype.itemsize].view(dtype).view(event["shape"])
    elif "records" in event or "last" in event:
        state.records = event.get("records", state.records)
        state.has_last = "last" in event
        for name, text in event["crc32"].items():
            state.tensors[name].sums.append(np.frombuffer(base64.b64decode(text), dtype="<u4"))
        for name, text in event["values"].items():
            state.tensors[name].values.append(base64.b64decode(text))
    elif "metadata" in event:
        state.metadata.update(event["metadata"])
    elif "keep" in event:
        state.records, state.has_last = event["keep"], False
    elif "collapse" in event and event["collapse"] is None:
        state.collapse = None
    elif "collapse" in event:
        state.finish_collapse()
        offset, length = map(int, event["collapse"])
        state.collapse = (offset, length, int(event["size"]))
    elif "tail" in event:
        state.finish_collapse()
        state.is_whole = True
    else:
        raise ValueError("unknown key")
