"""The journal beside a trace that is being streamed: what of ``NAME.partial`` is committed, and how to finish it.

While a run streams into ``NAME.partial``, ``NAME.partial.journal`` says line by line what is in it. Data is on the disk
before the line that speaks of it, so at any moment the two files hold every committed step, and
:func:`bhfast.storage.finish.finish` makes an ordinary trace of them: at the end of a run, or, called by
:mod:`bhfast.recover`, after one that was killed.

Each line is a CRC-32, a space, and a JSON object with one of these keys; a line that does not fit its CRC ends the
journal:

    start      settings of the recording: every, header (bytes reserved for it), block (of the disk), metadata
    tensor     a tensor begins: name, dtype, shape of a record, blank, and its offset after the header; null if
               the values of its records are so small that the journal itself holds them
    constant   a tensor of the whole run: name, dtype, shape, data
    records    so many records are committed; crc32 of the new ones, by tensor; values of those the journal holds
    metadata   more of it
    keep       only so many records are to be kept, as the next one is damaged
    collapse   a range of blocks is being taken out of the file, which had this size before; null if that failed
    tail       what follows the records, and the header, are being written
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
from bhfast.storage.files import journal_path, sync, write_at
from bhfast.trace.checksums import checksums
from bhfast.trace.format import DTYPE_NAMES, DTYPES, bytes_of

VERSION = 1
AHEAD = 1 << 20  # bytes of disk that the journal has in hand, at least


class Journal:
    """A journal that is being written.

    A new one takes more of the disk than it needs. :func:`finish` gives that back first, so that there is room for the
    rest of the trace when the disk is full.

    Args:
        path: of the journal.
        end: how much of it there is already; 0 for a new one.
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
            self._reserved = 2 * (self.end + len(line)) + 2 * AHEAD
            os.posix_fallocate(self._fd, 0, self._reserved)
        write_at(self._fd, memoryview(line), self.end)
        sync(self._fd)
        self.end += len(line)

    def release(self) -> None:
        """Give back the disk that is not needed."""
        os.ftruncate(self._fd, self.end)

    def close(self) -> None:
        os.close(self._fd)


def encode(data: bytes | memoryview) -> str:
    """Return bytes as text, for the journal."""
    return base64.b64encode(data).decode()


@dataclass
class Track:
    """One tensor of a recording.

    Attributes:
        dtype, shape: of a record.
        blank: what records hold that nothing was logged for.
        offset: of record 0 after the header; None if the journal holds the values.
        sums: the CRC-32 of each committed record, in pieces; of tensors in the file.
        values: the committed records, in pieces; of tensors in the journal.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    blank: float
    offset: int | None
    sums: list[np.ndarray] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return math.prod(self.shape) * self.dtype.itemsize

    def describe(self) -> dict[str, Any]:
        return {
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
            "blank": self.blank,
            "offset": self.offset,
        }

    def blanks(self, records: int) -> Tensor:
        return torch.full((records, *self.shape), self.blank, dtype=self.dtype)


@dataclass
class State:
    """What a journal says."""

    start: dict[str, Any]
    metadata: dict[str, str]
    end: int = 0  # of the journal
    records: int = 0
    tracks: dict[str, Track] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    collapse: tuple[int, int, int] | None = None  # offset in the file, length, size before: may or may not be done

    @property
    def in_file(self) -> list[tuple[str, Track, int]]:
        """The tensors whose records are in the file, with their offsets after the header, in that order."""
        own = [(name, track, track.offset) for name, track in self.tracks.items() if track.offset is not None]
        return sorted(own, key=lambda item: item[2])


def read_journal(partial: Path) -> State:
    """Read the journal of ``partial``.

    Raises:
        TraceError: there is none, or it is not one.
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
            raise TraceError(f"{path} is no journal of version {VERSION}")
        if state.collapse is not None and partial.stat().st_size < state.collapse[2]:
            _collapsed(state, *state.collapse[:2])
    except OSError as error:
        raise TraceError(f"cannot open {partial}, which the journal is of: {error.strerror}") from None
    except TraceError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise TraceError(
            f"{path} is corrupted: what ends at byte {end} or follows is no event ({error!r:.200})"
        ) from None
    return state


def _events(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the events, and where each one's line ends, up to the first line that was not written whole."""
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
        track = Track(DTYPES[event["dtype"]], shape, float(event["blank"]), offset)
        if offset is None:
            track.values.append(bytes(bytes_of(track.blanks(state.records))))
        elif state.records:
            track.sums.append(np.repeat(checksums(track.blanks(1).flatten()), state.records))
        state.tracks[event["tensor"]] = track
    elif "constant" in event:
        raw = torch.frombuffer(bytearray(base64.b64decode(event["data"])) or bytearray(8), dtype=torch.uint8)
        dtype, count = DTYPES[event["dtype"]], math.prod(event["shape"])
        state.constants[event["constant"]] = raw[: count * dtype.itemsize].view(dtype).view(event["shape"])
    elif "records" in event:
        state.records = event["records"]
        for name, text in event["crc32"].items():
            state.tracks[name].sums.append(np.frombuffer(base64.b64decode(text), dtype="<u4"))
        for name, text in event["values"].items():
            state.tracks[name].values.append(base64.b64decode(text))
    elif "metadata" in event:
        state.metadata.update(event["metadata"])
    elif "keep" in event:
        state.records = event["keep"]
    elif "collapse" in event:
        if state.collapse is not None and event["collapse"] is not None:
            _collapsed(state, *state.collapse[:2])
        state.collapse = event["collapse"] and (*event["collapse"], event["size"])
    elif "tail" in event:
        if state.collapse is not None:
            _collapsed(state, *state.collapse[:2])
    else:
        raise ValueError("an unknown event")


def _collapsed(state: State, offset: int, length: int) -> None:
    state.collapse = None
    for _, track, at in state.in_file:
        if at + state.start["header"] > offset:
            track.offset = at - length
