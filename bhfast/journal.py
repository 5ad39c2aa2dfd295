"""The journal beside a trace that is being streamed: what of ``NAME.partial`` is committed, and how to finish it.

While a run streams into ``NAME.partial``, ``NAME.partial.journal`` says line by line what is in it. Data is on the disk
before the line that speaks of it, so at any moment the two files hold every committed step, and :func:`finish` makes an
ordinary trace of them: at the end of a run, or, called by :mod:`bhfast.recover`, after one that was killed.

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
import ctypes
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

from bhfast.errors import StorageError, TraceError
from bhfast.trace import (
    ALIGNMENT,
    DTYPE_NAMES,
    DTYPES,
    Entry,
    bytes_of,
    checksum_metadata,
    checksums,
    encode_header,
    join_checksums,
    place,
    records_per_checksum,
)

VERSION = 1
AHEAD = 1 << 20  # bytes of disk that the journal has in hand, at least
CHUNK = 16 << 20  # bytes copied at once
WORTH_COPYING = 1 << 20  # bytes of gaps


def journal_path(partial: Path) -> Path:
    """Return the name of the journal of ``partial``."""
    return partial.with_name(partial.name + ".journal")


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


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, however little the system takes at once."""
    while data:
        written = os.pwrite(fd, data[:CHUNK], offset)
        data, offset = data[written:], offset + written


def sync(fd: int) -> None:
    """Wait until what was written is on the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


def encode(data: bytes | memoryview) -> str:
    """Return bytes as text, for the journal."""
    return base64.b64encode(data).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Reading a journal


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


# ---------------------------------------------------------------------------------------------------------------------
# Finishing


def finish(partial: Path, path: Path) -> None:
    """Make the trace ``path`` of what is committed in ``partial``, and remove the journal.

    If the run had the number of records that room was made for, they are where they belong, and only what follows them
    and the header is written. If it had fewer, there are gaps between the tensors. They are taken out of the file
    without moving data where the file system can do that (ext4, XFS); else the records are copied to a new file; and
    what gaps are left, also where there is no room for a copy, become padding.

    It may be interrupted at any point, and called again.

    Raises:
        StorageError: the disk failed; ``partial`` and its journal are still there.
        TraceError: the journal cannot be read.
    """
    state = read_journal(partial)
    journal = Journal(journal_path(partial), state.end)
    try:
        journal.release()
        with open(partial, "r+b", buffering=0) as file:
            can_collapse = _collapse_gaps(file.fileno(), state, journal)
            if not can_collapse and _gaps(state) > WORTH_COPYING and _has_room(partial, state):
                _copy(file.fileno(), partial, path, state)
            else:
                journal.append({"tail": True})
                _write_rest(file.fileno(), state)
                os.replace(partial, path)
        sync_folder(path.parent)
        journal.path.unlink()
        partial.unlink(missing_ok=True)  # it was copied
    except OSError as error:
        raise StorageError(
            f"finishing the trace {path} failed: {error.strerror}; {state.records:,} records are safe in {partial} and "
            f"{journal.path}: make room, then run python -m bhfast.recover {partial}"
        ) from error
    finally:
        journal.close()


def _gaps(state: State) -> int:
    """Return how many bytes of the records' part of the file hold none."""
    if not state.in_file:
        return 0
    _, last, offset = state.in_file[-1]
    used = sum(track.size for _, track, _ in state.in_file) * state.records
    return offset + state.records * last.size - used


def _collapse_gaps(fd: int, state: State, journal: Journal) -> bool:
    """Take the whole blocks of each gap out of the file, the last ones first; return whether the system can do it."""
    header, block = state.start["header"], os.fstat(fd).st_blksize
    for (_, track, at), (_, _, following) in reversed([*zip(state.in_file, state.in_file[1:], strict=False)]):
        start = -(-(header + at + state.records * track.size) // block) * block
        length = (header + following) // block * block - start
        if length <= 0:
            continue
        journal.append({"collapse": [start, length], "size": os.fstat(fd).st_size})
        if not _collapse_range(fd, start, length):
            journal.append({"collapse": None})
            return False
        _collapsed(state, start, length)
    return True


def _collapse_range(fd: int, offset: int, length: int) -> bool:
    """Remove a range of blocks from a file; return False where the file system cannot."""
    falloc_fl_collapse_range = 8
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc.fallocate(fd, falloc_fl_collapse_range, offset, length) == 0


def _has_room(partial: Path, state: State) -> bool:
    disk = os.statvfs(partial.parent)
    size = sum(track.size for track in state.tracks.values()) * state.records
    return disk.f_bavail * disk.f_frsize > state.start["header"] + size + AHEAD


def _copy(fd: int, partial: Path, path: Path, state: State) -> None:
    """Write the trace to a new file, without gaps."""
    header, offset = state.start["header"], 0
    target = partial.with_name(partial.name + ".copy")
    try:
        with open(target, "w+b", buffering=0) as file:
            for _, track, at in state.in_file:
                size = state.records * track.size
                for done in range(0, size, CHUNK):
                    data = os.pread(fd, min(CHUNK, size - done), header + at + done)
                    write_at(file.fileno(), memoryview(data), header + offset + done)
                track.offset = offset
                offset += size + -size % ALIGNMENT
            _write_rest(file.fileno(), state)
        os.replace(target, path)
    finally:
        target.unlink(missing_ok=True)


def _write_rest(fd: int, state: State) -> None:
    """Write all but the records in the file: those in the journal, constants, and the header."""
    header, records = state.start["header"], state.records
    entries = {name: Entry(track.dtype, (records, *track.shape), offset) for name, track, offset in state.in_file}
    end = max((entry.end for entry in entries.values()), default=0)
    tail = {name: _joined(track, records) for name, track in state.tracks.items() if track.offset is None}
    tail |= {"recorded_steps": torch.arange(records) * state.start["every"], **state.constants}
    places = place(tail, end + -end % ALIGNMENT)
    for name, entry in places.items():
        write_at(fd, bytes_of(tail[name]), header + entry.offset)
    entries |= places
    sums = {name: np.concatenate(track.sums)[:records] for name, track, _ in state.in_file}
    each = records_per_checksum(records, len(entries))
    while True:
        joined = {name: join_checksums(own, state.tracks[name].size, each) for name, own in sums.items()} | {
            name: checksums(x, each) for name, x in tail.items()
        }
        try:
            text = encode_header(entries, {**state.metadata, **checksum_metadata(joined, each)}, header)
            break
        except TraceError:
            if each > records:
                raise
            each *= 2
    write_at(fd, memoryview(text), 0)
    os.ftruncate(fd, header + max((entry.end for entry in entries.values()), default=0))
    os.fsync(fd)


def _joined(track: Track, records: int) -> Tensor:
    """Return the values that the journal holds: ``[records, *shape]``."""
    if not track.size:
        return torch.empty((records, *track.shape), dtype=track.dtype)
    data = bytearray(b"".join(track.values))
    return torch.frombuffer(data, dtype=track.dtype).view(-1, *track.shape)[:records]


def check_records(partial: Path, state: State) -> int:
    """Compare the committed records in the file with their checksums; return how many are good before the first bad."""
    good = state.records
    with open(partial, "rb", buffering=0) as file:
        for _, track, offset in state.in_file if good else ():
            wanted = np.concatenate(track.sums)
            each = max(1, CHUNK // max(1, track.size))
            for first in range(0, good, each):
                count = min(each, good - first)
                data = os.pread(file.fileno(), count * track.size, state.start["header"] + offset + first * track.size)
                data = data.ljust(count * track.size, b"\0")  # cut off
                found = checksums(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, -1))
                bad = np.flatnonzero(found != wanted[first : first + count])
                if len(bad):
                    good = first + int(bad[0])
                    break
    return good


def sync_folder(folder: Path) -> None:
    """Wait until a change of names in ``folder`` is on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
