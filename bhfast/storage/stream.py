"""Streaming: a thread writes each record into its place in the file while the run goes on, in flat memory."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import ConfigError, StorageError
from bhfast.storage.claim import Claim
from bhfast.storage.files import journal_path, sync, write_at
from bhfast.storage.finish import finish
from bhfast.storage.journal import VERSION, Journal, Track, encode
from bhfast.trace.checksums import MAX_CHECKSUMS, checksums
from bhfast.trace.format import bytes_of, format_bytes
from bhfast.transfer.host_memory import host_tensor
from bhfast.transfer.lanes import Ticket

SMALL = 64  # bytes: records below it go to the journal
BUFFER = 32 << 20  # bytes of records that may wait for the disk
COMMIT_SECONDS = 1.0  # between two commits, where records are slow to come
LEAST_RECORDS = 16  # that a disk must have room for
MOST_RECORDS = 1 << 24  # that room is made for, if their number is not known
HEADER_ENTRY = 200  # bytes, beside the name
HEADER_SLACK = 64 << 10  # bytes for what is logged, and constants
HEADER_BLOCK = 4096
MAX_REGIONS = 4 << 40  # bytes: far below what file systems allow in one file
POLL = 0.001  # seconds


def slots_of(size: int, group: int, records: int, buffer_bytes: int = BUFFER) -> int:
    """Return how many records of a tensor the host's memory holds: a multiple of ``group``, no more than needed.

    Args:
        size: bytes of a record of all tensors known at the start, or of this one if it is larger.
        group: see :meth:`StreamStorage.add`.
        records: how many there can be.
        buffer_bytes: of all records that may wait for the disk.
    """
    return min(max(2, buffer_bytes // (group * max(1, size))), -(-records // group)) * group


class _Tensor(NamedTuple):
    track: Track
    host: Tensor  # [slots, *shape]
    is_blanked: bool
    first: int  # the records before it are blank, and never were in a slot

    def parts(self, low: int, high: int) -> Iterator[Tensor]:
        """Yield the records from ``low`` to ``high``, in contiguous pieces."""
        if low < self.first:
            yield self.track.blanks(min(self.first, high) - low)
            low = min(self.first, high)
        while low < high:
            at = low % len(self.host)
            count = min(high - low, len(self.host) - at)
            yield self.host[at : at + count]
            low += count


class StreamStorage:
    """Writes records in the background, in order, and commits them. See :class:`bhfast.storage.base.Storage`.

    The records of a tensor have their place in the file from the start, one after the other, so that nothing moves in
    the end. If the number of records is not known, there is place for as many as the disk can hold, in a file that has
    holes where nothing is written yet. :mod:`bhfast.storage.journal` has what is committed.

    A failure of the writer is raised by whatever the recording does next.

    Args:
        claim: of the file.
        records: how many there will be; None if that is not known.
        every: how many steps apart they are.
        names: of the tensors whose size is known, with the bytes of a record of each.
        metadata: for the header's ``__metadata__``.
        buffer_bytes: of records that may wait for the disk.
        commit_seconds: between two commits, where records are slow to come.

    Raises:
        StorageError: the disk is too small.
    """

    def __init__(
        self,
        claim: Claim,
        *,
        records: int | None,
        every: int,
        names: Mapping[str, int],
        metadata: Mapping[str, str],
        buffer_bytes: int = BUFFER,
        commit_seconds: float = COMMIT_SECONDS,
    ) -> None:
        self.claim = claim
        self.committed = self.waits = 0
        self._buffer_bytes = buffer_bytes
        self._commit_seconds = commit_seconds
        self.slots = 1 << 62  # the fewest that a tensor has
        size = max(1, sum(names.values()))
        self._is_open_ended = records is None
        self.capacity = records if records is not None else self._most_records(size)
        if self.capacity < LEAST_RECORDS and self._is_open_ended:
            raise StorageError(
                f"the disk of {claim.path.parent} is too small for the trace: there is room for {self.capacity} "
                f"records of {format_bytes(size)}; free some, or choose another place with --out"
            )
        sums = min(MAX_CHECKSUMS, self.capacity * (len(names) + 4)) * 16 // 3
        text = sum(map(len, names)) + HEADER_ENTRY * len(names) + len(json.dumps(dict(metadata)))
        self._header = -(-(sums + text + HEADER_SLACK) // HEADER_BLOCK) * HEADER_BLOCK
        self._header_left = HEADER_SLACK + sum(map(len, names)) + HEADER_ENTRY * len(names)
        self._size = size
        self._end = 0  # of the last region, after the header
        self._metadata = dict(metadata)
        self._changed = threading.Condition()
        self._events: deque[dict[str, Any]] = deque()  # for the journal
        self._tensors: dict[str, _Tensor] = {}
        self._submitted = 0
        self._submitted_at = time.monotonic()
        self._tickets: list[Ticket] = []
        self._stopping = False
        self._error: BaseException | None = None
        claim.reserve(self._header)
        self._journal = Journal(journal_path(claim.partial))
        start = {
            "version": VERSION,
            "every": every,
            "records": records,
            "header": self._header,
            "metadata": self._metadata,
        }
        self._journal.append({"start": start})
        self._thread = threading.Thread(target=self._work, name="bhfast-writer", daemon=True)
        self._thread.start()

    def _most_records(self, size: int) -> int:
        """Return how many records the disk can hold, and half of a file of the size that is allowed."""
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        free = min(self.claim.free(), MAX_REGIONS)
        free = free if limit == resource.RLIM_INFINITY else min(free, limit // 2)
        return min(free // size, MOST_RECORDS)

    # -----------------------------------------------------------------------------------------------------------------
    # The recorder's side

    @property
    def room(self) -> int:
        return min(self.committed + self.slots, self.capacity)

    def add(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, blank: float | None, *, group: int, first: int
    ) -> Tensor:
        track = Track(dtype, tuple(shape), blank or 0.0, None)
        self._use_header(name)
        if track.size >= SMALL:
            track.offset = self._end + -self._end % dtype.itemsize
            self._end = track.offset + self.capacity * track.size
            if self._is_open_ended:
                try:
                    os.ftruncate(self.claim.fd, self._header + self._end)
                except OSError as error:
                    raise StorageError(
                        f"cannot make room for {name} in the trace {self.claim.path}: {error.strerror}; "
                        "say steps=, or choose another place with --out"
                    ) from None
            else:
                self.claim.reserve(self._header + self._end)
        slots = slots_of(max(track.size, self._size), group, self.capacity, self._buffer_bytes)
        host = host_tensor((slots, *shape), dtype)
        if blank is not None:
            host.fill_(blank)
        with self._changed:
            self._check()
            self.slots = min(self.slots, slots)
            self._tensors[name] = _Tensor(track, host, blank is not None, first)
            self._events.append({"tensor": name, **track.describe()})
        return host

    def _use_header(self, name: str) -> None:
        self._header_left -= len(json.dumps(name)) + HEADER_ENTRY
        if self._header_left < 0:
            raise ConfigError(f"there is no room for {name} in the header: log fewer names, or with steps= known")

    def set_constant(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        track = Track(value.dtype, tuple(value.shape), 0.0, None)
        self._use_header(name)
        with self._changed:
            self._events.append({**track.describe(), "constant": name, "data": encode(bytes_of(value))})

    def wait(self, record: int) -> None:
        if record >= self.capacity:
            raise StorageError(
                f"the trace {self.claim.path} is full: it has the {self.capacity:,} records that the disk had room for "
                "when it was begun; say steps= if you know it"
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

    def _check(self) -> None:
        """Raise what has befallen the writer."""
        if self._error is not None:
            safe = "nothing was committed yet"
            if self.committed:
                safe = (
                    f"{self.committed:,} records are safe in {self.claim.partial}, and become a shorter trace when the "
                    "recording ends"
                )
            raise StorageError(f"{self.failure}; {safe}") from self._error

    @property
    def failure(self) -> str | None:
        if self._error is None:
            return None
        reason = getattr(self._error, "strerror", None) or repr(self._error)
        return f"writing the trace {self.claim.path} failed: {reason}"

    def settle(self, records: int) -> int:
        with self._changed:
            self._submitted = max(records, self.committed)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        return self.committed

    def save(self, metadata: Mapping[str, str], path: Path) -> None:
        self.claim.is_worth_keeping = True
        if metadata != self._metadata:
            self._journal.append({"metadata": dict(metadata)})
        finish(self.claim.partial, path)
        self.claim.is_worth_keeping = False

    def close(self) -> None:
        self.settle(self.committed)
        self._journal.close()
        if not self.claim.is_worth_keeping:
            journal_path(self.claim.partial).unlink(missing_ok=True)

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
                if is_last:
                    return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _commit(self, records: int, events: Sequence[dict[str, Any]], tensors: Mapping[str, _Tensor]) -> None:
        for event in events:
            if event.get("offset") is not None:
                self._write_blanks(tensors[event["tensor"]].track)
            self._journal.append(event)
        if records == self.committed:
            return
        sums, values = {}, {}
        for name, tensor in tensors.items():
            track = tensor.track
            parts = list(tensor.parts(self.committed, records))
            if track.offset is None:
                values[name] = encode(b"".join(map(bytes_of, parts)))
                continue
            at = self._header + track.offset + self.committed * track.size
            for part in parts:
                write_at(self.claim.fd, bytes_of(part), at)
                at += part.nbytes
            sums[name] = encode(np.concatenate([checksums(part.view(len(part), -1)) for part in parts]).tobytes())
        sync(self.claim.fd)
        self._journal.append({"records": records, "crc32": sums, "values": values})
        for tensor in tensors.values():
            if tensor.is_blanked:
                for part in tensor.parts(max(self.committed, tensor.first), records):
                    part.fill_(tensor.track.blank)
        with self._changed:
            self.committed = records
            self._changed.notify_all()

    def _write_blanks(self, track: Track) -> None:
        """Fill the records that were committed before the tensor was known; zeros are there already."""
        if track.blank == 0 or track.offset is None:
            return
        each = max(1, self._buffer_bytes // track.size)
        for first in range(0, self.committed, each):
            blanks = track.blanks(min(each, self.committed - first))
            write_at(self.claim.fd, bytes_of(blanks), self._header + track.offset + first * track.size)
