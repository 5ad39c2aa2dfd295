"""The journal of a trace that is being streamed: what is committed in ``NAME.partial``, and how to finish it.

While a run streams into ``NAME.partial``, ``NAME.partial.journal`` says line by line what that file holds. Data is on
the disk before the line that mentions it, so the two files hold every committed step at any moment.
:func:`bhfast.storage.finish.finish` turns them into an ordinary trace: at the end of a run, or, through
:mod:`bhfast.recover`, after one that was killed.

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
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.storage.base import RecordedTensor, steps_of
from bhfast.storage.files import is_at, journal_path, sync, write_at
from bhfast.trace.checksums import checksums
from bhfast.trace.format import DTYPE_NAMES, DTYPES, bytes_of

VERSION = 1
AHEAD = 1 << 20  # bytes of disk that the journal always has in reserve, at least


class Journal:
    """A journal that is being written.

    A new journal reserves more disk space than it needs. :func:`bhfast.storage.finish.finish` gives that back first, so
    that there is room for the rest of the trace even if the disk is full.

    Args:
        path: the journal's file.
        end: its length so far, in bytes; 0 for a new one.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        self.path = path
        self.end = end
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if end else os.O_TRUNC), 0o644)
        self._reserved = 0 if end == 0 and hasattr(os, "posix_fallocate") else sys.maxsize

    def append(self, event: Mapping[str, Any]) -> None:
        """Add a line, and wait until it is on the disk."""
        text = json.dumps(event, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        if self.end + len(line) > self._reserved - AHEAD:
            wanted = 2 * (self.end + len(line)) + 2 * AHEAD
            os.posix_fallocate(self._fd, 0, wanted)
            self._reserved = wanted
        write_at(self._fd, memoryview(line), self.end)
        sync(self._fd)
        self.end += len(line)

    def release(self) -> None:
        """Give back the reserved disk space."""
        os.ftruncate(self._fd, self.end)

    @property
    def is_in_place(self) -> bool:
        """Whether the file still has its name."""
        return is_at(self._fd, self.path)

    def close(self) -> None:
        os.close(self._fd)


def encode(data: bytes | memoryview) -> str:
    """Return bytes as text, for the journal."""
    return base64.b64encode(data).decode()


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


def tensor_event(tensor: RecordedTensor, offset: int | None) -> dict[str, Any]:
    """Return the journal's line for a new tensor; see :class:`CommittedTensor`."""
    return {
        "tensor": tensor.name,
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "blank": tensor.fill or 0.0,
        "start": tensor.start,
        "offset": offset,
        **({"stride": tensor.stride} if tensor.stride > 1 else {}),
    }


def constant_event(name: str, value: Tensor) -> dict[str, Any]:
    """Return the journal's line for a tensor of the whole run, contiguous and on the CPU."""
    return {
        "constant": name,
        "dtype": DTYPE_NAMES[value.dtype],
        "shape": list(value.shape),
        "data": encode(bytes_of(value)),
    }


@dataclass
class State:
    """The content of a journal."""

    start: dict[str, Any]
    metadata: dict[str, str]
    end: int = 0  # of the journal
    records: int = 0
    tensors: dict[str, CommittedTensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    has_last: bool = False  # whether tensors with a stride have an entry of the last record
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
        """The tensors that say which steps are recorded; see :func:`bhfast.storage.base.steps_of`."""
        strides = {own.tensor.stride for own in self.tensors.values()}
        start_step = self.start.get("start_step", 0)
        return steps_of(self.records, self.start["every"], start_step, strides, has_last=self.has_last)

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
    state = None
    end = 0
    try:
        for event, end in _events(data):
            if state is None:
                state = State(event["start"], dict(event["start"]["metadata"]))
                if event["start"]["version"] != VERSION:
                    break
            else:
                _apply(state, event)
            state.end = end
        if state is None or state.start["version"] != VERSION:
            raise TraceError(f"{path} is not a journal of version {VERSION}")
        if state.collapse is not None and partial.stat().st_size < state.collapse[2]:
            state.finish_collapse()
    except OSError as error:
        raise TraceError(f"cannot open {partial}, the file of this journal: {error.strerror}") from None
    except TraceError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise TraceError(
            f"{path} is corrupted: at or after byte {end} there is an invalid line ({error!r:.200})"
        ) from None
    return state


def may_hold_records(partial: Path) -> bool:
    """Return False only if it is certain that ``partial`` holds no committed record."""
    if partial.stat().st_size == 0:
        return False
    try:
        return b"\n" in journal_path(partial).read_bytes() and read_journal(partial).records > 0
    except (OSError, TraceError):
        return True


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
    elif "collapse" in event:
        if event["collapse"] is not None:
            state.finish_collapse()
        state.collapse = event["collapse"] and (*event["collapse"], event["size"])
    elif "tail" in event:
        state.finish_collapse()
    else:
        raise ValueError("unknown key")
