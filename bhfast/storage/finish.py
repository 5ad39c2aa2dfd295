"""Turns committed records into an ordinary trace."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from bhfast.errors import StorageError, TraceError
from bhfast.storage.files import CHUNK, copy_path, read_at, remove, sync_folder, write_at
from bhfast.storage.journal import AHEAD, Journal
from bhfast.trace.checksums import checksum_metadata, checksums, records_per_checksum
from bhfast.trace.format import ALIGNMENT, Entry, bytes_of, encode_header, place
from bhfast.trace.journal import CommittedTensor, State, journal_path, read_journal

WORTH_COPYING = 1 << 20  # bytes of gaps


def finish(partial: Path, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Turn the committed records in ``partial`` into the trace ``path``, and remove the journal.

    If the run had as many records as it reserved room for, they are in place, and only the header and the small tensors
    after them are written. If it had fewer, there are gaps between the tensors. If the file system can remove blocks
    from a file (ext4, XFS), the gaps are removed without moving data; otherwise the records are copied to a new file.
    Gaps that remain, because they are small or there is no room for a copy, become padding.

    It may be interrupted at any point: :func:`bhfast.recover.recover` continues from there. ``partial`` must be locked.

    Args:
        partial: the file as the run left it.
        path: the name of the trace.
        metadata: entries to add to that of the journal.

    Raises:
        StorageError: the disk failed; the committed records can still be recovered.
        TraceError: the journal cannot be read.
    """
    state = read_journal(partial)
    try:
        with closing(Journal(journal_path(partial), state.end)) as journal:
            _finish(partial, path, state, journal, metadata or {})
    except OSError as error:
        raise StorageError(
            f"finishing the trace {path} failed: {error.strerror}; {safe(state.records, partial)}: make room, then run "
            f"python -m bhfast.recover {partial}"
        ) from error
    sync_folder(path.parent)


def _finish(partial: Path, path: Path, state: State, journal: Journal, metadata: Mapping[str, str]) -> None:
    if metadata:
        journal.append({"metadata": dict(metadata)})
        state.metadata.update(metadata)
    journal.release()
    with open(partial, "r+b", buffering=0) as file:
        can_collapse = _collapse_gaps(file.fileno(), state, journal)
        if not can_collapse and _gaps(state) > WORTH_COPYING and _has_room(partial, state):
            _copy(file.fileno(), partial, path, state)
            remove(file.fileno(), partial)
            return
        journal.append({"tail": True})
        _write_rest(file.fileno(), state)
    with suppress(OSError):  # first, as once `partial` has its new name the next run may have a journal here
        journal.path.unlink()
    os.replace(partial, path)


def safe(records: int, partial: Path) -> str:
    """Return the part of a message that says that committed records are safe."""
    return f"{records:,} {'record is' if records == 1 else 'records are'} safe in {partial}"


def _gaps(state: State) -> int:
    """Return how many bytes of gaps there are between the tensors in the file."""
    if not state.in_file:
        return 0
    last, offset = state.in_file[-1]
    return offset + _size(state, last) - sum(_size(state, own) for own, _ in state.in_file)


def _size(state: State, own: CommittedTensor) -> int:
    """Return how many bytes are committed of a tensor."""
    return state.entries(own.tensor) * own.nbytes


def _collapse_gaps(fd: int, state: State, journal: Journal) -> bool:
    """Remove the whole blocks of each gap, the last gap first; return False if the file system cannot."""
    header, block = state.start["header"], os.fstat(fd).st_blksize
    for (tensor, at), (_, following) in reversed([*pairwise(state.in_file)]):
        start = -(-(header + at + _size(state, tensor)) // block) * block
        length = (header + following) // block * block - start
        if length <= 0:
            continue
        size = os.fstat(fd).st_size
        journal.append({"collapse": [start, length], "size": size})
        if not _collapse_range(fd, start, length):
            journal.append({"collapse": None})
            return False
        state.collapse = (start, length, size)
        state.finish_collapse()
    return True


def _collapse_range(fd: int, offset: int, length: int) -> bool:
    """Remove a range of blocks from a file; return False if the file system cannot."""
    falloc_fl_collapse_range = 8
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc.fallocate(fd, falloc_fl_collapse_range, offset, length) == 0


def _has_room(partial: Path, state: State) -> bool:
    disk = os.statvfs(partial.parent)
    size = sum(_size(state, own) for own in state.tensors.values())
    return disk.f_bavail * disk.f_frsize > state.start["header"] + size + AHEAD


def _copy(fd: int, partial: Path, path: Path, state: State) -> None:
    """Write the trace to a new file, without gaps."""
    header, offset = state.start["header"], 0
    target = copy_path(partial)
    try:
        with open(target, "w+b", buffering=0) as file:
            for tensor, at in state.in_file:
                size = _size(state, tensor)
                for done in range(0, size, CHUNK):
                    data = read_at(fd, min(CHUNK, size - done), header + at + done)
                    write_at(file.fileno(), memoryview(data), header + offset + done)
                tensor.offset = offset
                offset += size + -size % ALIGNMENT
            _write_rest(file.fileno(), state)
        os.replace(target, path)
    except BaseException:
        with suppress(OSError):
            target.unlink()
        raise


def _write_rest(fd: int, state: State) -> None:
    """Write everything except the records already in the file: those in the journal, constants, and the header."""
    header, records = state.start["header"], state.records
    entries = {
        own.tensor.name: Entry(own.tensor.dtype, (state.entries(own.tensor), *own.tensor.shape), offset)
        for own, offset in state.in_file
    }
    end = max((entry.end for entry in entries.values()), default=0)
    tail = state.outside
    places = place(tail, end + -end % ALIGNMENT)
    for name, entry in places.items():
        write_at(fd, bytes_of(tail[name]), header + entry.offset)
    entries |= places
    each = records_per_checksum(records, len(entries))
    while True:
        sums = checksum_metadata(state.checksums(tail, each), each)
        try:
            text = encode_header(entries, {**state.metadata, **sums}, header)
            break
        except TraceError:
            if each > records:
                raise
            each *= 2
    write_at(fd, memoryview(text), 0)
    os.ftruncate(fd, header + max((entry.end for entry in entries.values()), default=0))
    os.fsync(fd)


def check_records(partial: Path, state: State) -> int:
    """Compare what is committed in the file with its checksums; return how many records are good before a bad one.

    A bad entry that was added for the last record costs this entry only: it is no longer part of ``state`` then.
    """
    good = state.records
    with open(partial, "rb", buffering=0) as file:
        for own, offset in state.in_file if good else ():
            at = state.start["header"] + offset
            bad = _first_bad(file.fileno(), own, at, own.tensor.entries(good))
            if bad is not None:
                good = bad * own.tensor.stride
            elif state.has_last and own.tensor.stride > 1:
                entries = state.entries(own.tensor)
                state.has_last = _first_bad(file.fileno(), own, at, entries) is None
    return good


def _first_bad(fd: int, own: CommittedTensor, at: int, entries: int) -> int | None:
    """Return the first of ``entries`` from byte ``at`` on whose checksum does not hold; None if all are good."""
    size, wanted = own.nbytes, np.concatenate(own.sums)
    each = max(1, CHUNK // max(1, size))
    for first in range(0, entries, each):
        count = min(each, entries - first)
        data = os.pread(fd, count * size, at + first * size)
        data = data.ljust(count * size, b"\0")  # the file may be cut off
        found = checksums(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, -1))
        bad = np.flatnonzero(found != wanted[first : first + count])
        if len(bad):
            return first + int(bad[0])
    return None
