"""Streaming: a thread writes each record to its place in the file during the run, in constant memory."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bhfast.errors import ConfigError, RecordingWarning, StorageError, TraceError
from bhfast.storage.files import sync, sync_folder, write_at
from bhfast.storage.finish import finish, safe
from bhfast.storage.journal import Journal, constant_event, encode, tensor_event
from bhfast.storage.output import OutputFile
from bhfast.trace.checksums import MAX_CHECKSUMS, checksums
from bhfast.trace.format import bytes_of, format_bytes
from bhfast.trace.journal import VERSION, journal_path, read_journal
from bhfast.trace.recorded import RecordedTensor
from bhfast.transfer.copy_stream import Ticket
from bhfast.transfer.host_memory import host_tensor

SMALL = 64  # bytes: smaller records go to the journal
BUFFER = 32 << 20  # bytes of records that may wait for the disk
COMMIT_SECONDS = 1.0  # between two commits when few records arrive
KEYFRAME_SLOTS = 2  # key frames of a tensor that may wait for the disk
LEAST_RECORDS = 16  # that the disk must have room for, if the number of steps is not known
MOST_RECORDS = 1 << 24  # to make room for, if the number of steps is not known
HEADER_ENTRY = 200  # bytes, at most, of a tensor's entry without its name
HEADER_SLACK = 64 << 10  # bytes for logged values and constants
BASE64_CHECKSUM = 16 / 3  # characters of a CRC-32 in base64
LOGGED_TENSORS = 4  # tensors beyond the known ones whose checksums the header has room for
HEADER_BLOCK = 4096
MAX_REGIONS = 4 << 40  # bytes in all: far below the largest file that file systems allow
POLL = 0.001  # seconds


def slots_of(size: int, group: int, records: int, buffer_bytes: int = BUFFER) -> int:
    """Return how many records of a tensor to hold in memory: a multiple of ``group``, and no more than needed.

    Args:
        size: bytes per record of all tensors known at the start, or of this tensor if that is more.
        group: see :meth:`StreamStorage.add`.
        records: the largest possible number of records.
        buffer_bytes: bytes of records that may wait for the disk.
    """
    return min(max(2, buffer_bytes // (group * max(1, size))), -(-records // group)) * group


class _BufferedTensor(NamedTuple):
    tensor: RecordedTensor
    offset: int | None  # of record 0 after the header; None: records go to the journal
    host: Tensor  # [slots, *shape]
    first: int  # earlier records were never in a slot

    def parts(self, low: int, high: int) -> Iterator[Tensor]:
        """Yield the entries of the records from ``low`` to ``high``, in contiguous pieces."""
        low, high = self.tensor.entries(low), self.tensor.entries(high)
        if low < self.first:
            yield self.tensor.unwritten(low, min(self.first, high))
            low = min(self.first, high)
        while low < high:
            at = low % len(self.host)
            count = min(high - low, len(self.host) - at)
            yield self.host[at : at + count]
            low += count


def _start_journal(output: OutputFile, start: Mapping[str, Any]) -> Journal:
    try:
        journal = Journal(journal_path(output.partial))
        try:
            journal.append({"start": start})
        except OSError:
            journal.close()
            raise
    except OSError as error:
        raise StorageError(
            f"cannot write the journal of the trace {output.path}: {error.strerror}", "choose another place with path="
        ) from None
    sync_folder(output.partial.parent)
    return journal


def _most_records(output: OutputFile, size: int) -> int:
    """Return how many records fit on the disk, and into half of the file size that the system allows."""
    import resource  # not on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    free = min(output.free(), MAX_REGIONS)
    free = free if limit == resource.RLIM_INFINITY else min(free, limit // 2)
    return min(free // size, MOST_RECORDS)


class StreamStorage:
    """Writes records in the background, in order, and commits them. See :class:`bhfast.storage.base.Storage`.

    Each tensor has its own region of the file from the start, with its records side by side, so no data is moved at the
    end. If the number of records is not known, each region has room for as many as the disk can hold, in a sparse file.
    :mod:`bhfast.storage.journal` keeps track of what is committed.

    If the writer fails, the next call to the storage raises its error.

    Args:
        output: the file to write.
        records: how many there will be; None if that is not known.
        every: how many steps apart they are.
        start_step: the step of record 0.
        names: bytes per record of the tensors known at the start, by name.
        metadata: for the header's ``__metadata__``.
        buffer_bytes: bytes of records that may wait for the disk.
        commit_seconds: seconds between two commits when few records arrive.

    Raises:
        StorageError: the disk is too small.
    """

    def __init__(
        self,
        output: OutputFile,
        *,
        records: int | None,
        every: int,
        start_step: int = 0,
        names: Mapping[str, int],
        metadata: Mapping[str, str],
        buffer_bytes: int = BUFFER,
        commit_seconds: float = COMMIT_SECONDS,
    ) -> None:
        self.output = output
        self.committed = self.waits = 0
        self._buffer_bytes = buffer_bytes
        self._commit_seconds = commit_seconds
        self.slots = sys.maxsize  # of the tensor that has the fewest
        size = max(1, sum(names.values()))
        self._is_open_ended = records is None
        self.capacity = records if records is not None else _most_records(output, size)
        if self.capacity < LEAST_RECORDS and self._is_open_ended:
            raise StorageError(
                f"the disk of {output.path.parent} is too small for the trace: there is room for {self.capacity} "
                f"records of {format_bytes(size)}",
                "free some, or choose another place with path=",
            )
        sums = int(min(MAX_CHECKSUMS, self.capacity * (len(names) + LOGGED_TENSORS)) * BASE64_CHECKSUM)
        text = sum(map(len, names)) + HEADER_ENTRY * len(names) + len(json.dumps(dict(metadata)))
        self._header = -(-(sums + text + HEADER_SLACK) // HEADER_BLOCK) * HEADER_BLOCK
        self._header_left = HEADER_SLACK + sum(map(len, names)) + HEADER_ENTRY * len(names)
        self._size = size
        self._end = 0  # of the last region, after the header
        self._metadata = dict(metadata)
        self._changed = threading.Condition()
        self._events: deque[dict[str, Any]] = deque()  # for the journal
        self._tensors: dict[str, _BufferedTensor] = {}
        self._submitted = 0
        self._submitted_at = time.monotonic()
        self._tickets: list[Ticket] = []
        self._stopping = False
        self._error: BaseException | None = None
        output.reserve(self._header)
        start = {
            "version": VERSION,
            "every": every,
            "start_step": start_step,
            "records": records,
            "header": self._header,
            "metadata": self._metadata,
        }
        self._journal = _start_journal(output, start)
        self._thread = threading.Thread(target=self._work, name="bhfast-writer", daemon=True)
        self._thread.start()

    # -----------------------------------------------------------------------------------------------------------------
    # The recorder's side

    @property
    def room(self) -> int:
        return min(self.committed + self.slots, self.capacity)

    def add(self, tensor: RecordedTensor, *, group: int, first: int) -> Tensor:
        self._use_header(tensor.name)
        offset = self._make_region(tensor) if tensor.nbytes >= SMALL else None
        slots = slots_of(max(tensor.nbytes, self._size), group, self.capacity, self._buffer_bytes)
        slots = KEYFRAME_SLOTS if tensor.stride > 1 else slots
        host = host_tensor((slots, *tensor.shape), tensor.dtype)
        if tensor.fill is not None:
            host.fill_(tensor.fill)
        with self._changed:
            self._check()
            self.slots = min(self.slots, slots * tensor.stride)
            self._tensors[tensor.name] = _BufferedTensor(tensor, offset, host, first)
            self._events.append(tensor_event(tensor, offset))
        return host

    def _make_region(self, tensor: RecordedTensor) -> int:
        """Reserve a region for a tensor's records; return its offset after the header."""
        offset = self._end + -self._end % tensor.dtype.itemsize
        self._end = offset + (tensor.entries(self.capacity) + (tensor.stride > 1)) * tensor.nbytes
        if self._is_open_ended:
            try:
                os.ftruncate(self.output.fd, self._header + self._end)
            except OSError as error:
                raise StorageError(
                    f"cannot make room for {tensor.name} in the trace {self.output.path}: {error.strerror}",
                    "pass steps=, or choose another place with path=",
                ) from None
        else:
            self.output.reserve(self._header + self._end)
        return offset

    def _use_header(self, name: str) -> None:
        self._header_left -= len(json.dumps(name)) + HEADER_ENTRY
        if self._header_left < 0:
            raise ConfigError(f"there is no room for {name} in the header: log fewer names, or pass steps=")

    def set_constant(self, name: str, value: Tensor) -> None:
        self._use_header(name)
        with self._changed:
            self._events.append(constant_event(name, value.detach().cpu().contiguous()))

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        with self._changed:
            self._events.append({"metadata": dict(metadata)})

    def wait(self, record: int) -> None:
        if record >= self.capacity:
            raise StorageError(
                f"the trace {self.output.path} is full: it has the {self.capacity:,} records that the disk had room "
                "for at the start; pass steps= if you know it"
            )
        with self._changed:
            self.waits += record >= self.room
            while record >= self.room:
                self._check()
                self._changed.wait()
            self._check()

    def is_due(self, records: int) -> bool:
        self._check()
        new = records - self._submitted
        return new >= self.slots // 4 or (new > 0 and time.monotonic() - self._submitted_at >= self._commit_seconds)

    def submit(self, records: int, tickets: Sequence[Ticket]) -> None:
        with self._changed:
            self._check()
            self._submitted = records
            self._submitted_at = time.monotonic()
            self._tickets = list(tickets)
            self._changed.notify_all()

    def flush(self) -> None:
        with self._changed:
            while self.committed < self._submitted:
                self._check()
                self._changed.wait()
            self._check()

    def _check(self) -> None:
        """Raise StorageError if the writer thread has failed."""
        if self._error is not None:
            if not self._is_in_place:
                fate = "nothing can be saved"
            elif self.committed:
                fate = f"{safe(self.committed, self.output.partial)}, to become a shorter trace when the recording ends"
            else:
                fate = "nothing was committed yet"
            raise StorageError(f"{self.failure}; {fate}") from self._error

    @property
    def _is_in_place(self) -> bool:
        return self.output.is_in_place and self._journal.is_in_place

    def _deleted(self) -> StorageError:
        return StorageError(f"{self.output.partial} or its journal was deleted or replaced during the run")

    @property
    def failure(self) -> str | None:
        if self._error is None:
            return None
        reason = str(self._error) if isinstance(self._error, StorageError) else repr(self._error)
        reason = getattr(self._error, "strerror", None) or reason
        return f"writing the trace {self.output.path} failed: {reason}"

    def settle(self, records: int) -> int:
        self._stop(records)
        if not self._is_in_place:
            self._error = self._error or self._deleted()
            return 0
        if self._error is not None:
            with suppress(TraceError):  # the last commit may have failed after its line was written
                self.committed = read_journal(self.output.partial).records
        return self.committed

    def add_last(self) -> bool:
        if self._error is not None:
            return False  # the journal's end is uncertain
        sums, values = {}, {}
        try:
            for name, own in self._tensors.items():
                if own.tensor.stride == 1:
                    continue
                entry = own.tensor.entries(self.committed)
                value = own.host[entry % len(own.host)]
                if own.offset is None:
                    values[name] = encode(bytes_of(value))
                    continue
                write_at(self.output.fd, bytes_of(value), self._header + own.offset + entry * own.tensor.nbytes)
                sums[name] = encode(checksums(value.reshape(1, -1)).tobytes())
            sync(self.output.fd)
            self._journal.append({"last": True, "crc32": sums, "values": values})
        except OSError as error:
            with suppress(TraceError):
                if read_journal(self.output.partial).has_last:
                    return True  # only the sync has failed
            warnings.warn(
                f"the last key frame of {self.output.path} could not be written: {error.strerror}; the others and all "
                "gradients are there",
                RecordingWarning,
                stacklevel=2,
            )
            return False
        return True

    def _stop(self, records: int) -> None:
        with self._changed:
            self._submitted = max(records, self.committed)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def save(self, metadata: Mapping[str, str], path: Path) -> None:
        self.output.is_worth_keeping = True
        finish(self.output.partial, path, metadata if metadata != self._metadata else None)
        self.output.is_worth_keeping = False

    def close(self) -> None:
        self._stop(self.committed)
        self._tensors.clear()
        self._journal.close()

    # -----------------------------------------------------------------------------------------------------------------
    # The writer's side

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    while self._submitted == self.committed and not self._stopping:
                        self._changed.wait()
                    records, tickets = self._submitted, self._tickets
                    events = [self._events.popleft() for _ in range(len(self._events))]
                    tensors = dict(self._tensors)
                    is_last = self._stopping
                for ticket in tickets:
                    while not ticket.query():
                        time.sleep(POLL)
                self._commit(records, events, tensors)
                if not self._is_in_place:
                    raise self._deleted()
                if is_last:
                    return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _commit(self, records: int, events: Sequence[dict[str, Any]], tensors: Mapping[str, _BufferedTensor]) -> None:
        for event in events:
            if event.get("offset") is not None:
                own = tensors[event["tensor"]]
                if own.offset is not None:
                    _write_unwritten(self.output.fd, own, self._header + own.offset, self.committed, self._buffer_bytes)
            self._journal.append(event)
        if records == self.committed:
            return
        sums, values = {}, {}
        for name, own in tensors.items():
            parts = list(own.parts(self.committed, records))
            if own.offset is None:
                values[name] = encode(b"".join(map(bytes_of, parts)))
                continue
            at = self._header + own.offset + own.tensor.entries(self.committed) * own.tensor.nbytes
            for part in parts:
                write_at(self.output.fd, bytes_of(part), at)
                at += part.nbytes
            sums[name] = encode(b"".join(checksums(part.view(len(part), -1)).tobytes() for part in parts))
        sync(self.output.fd)
        self._journal.append({"records": records, "crc32": sums, "values": values})
        for own in tensors.values():
            if own.tensor.fill is not None:
                for part in own.parts(max(self.committed, own.first), records):
                    part.fill_(own.tensor.fill)
        with self._changed:
            self.committed = records
            self._changed.notify_all()


def _write_unwritten(fd: int, own: _BufferedTensor, offset: int, records: int, buffer_bytes: int) -> None:
    """Write the records that were committed before the tensor existed, unless they are zeros, as the file is."""
    tensor = own.tensor
    if tensor.is_zero_at_first:
        return
    each = max(1, buffer_bytes // tensor.nbytes)
    for low in range(0, records, each):
        unwritten = tensor.unwritten(low, min(low + each, records))
        write_at(fd, bytes_of(unwritten), offset + low * tensor.nbytes)
