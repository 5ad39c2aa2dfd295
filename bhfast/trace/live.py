"""Reads what is committed of a run that is still going on, or that was killed.

The file is read piece by piece instead of being mapped into memory: when the run ends, its records may move within the
file, or the file is emptied after they were copied to another one. Every such change is announced in the journal, or
shows in the journal's removal, before it happens. So a read counts only if the journal says the same before and after
it. Nothing is written or locked.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace.checksums import checksum_metadata
from bhfast.trace.format import bytes_of
from bhfast.trace.journal import is_at, journal_path, parse
from bhfast.trace.lazy import LazyTensor, wanted_records
from bhfast.trace.opening import add_keyframes, open_file
from bhfast.trace.reader import Trace
from bhfast.trace.tensors import TraceTensor

CHUNK = 1 << 16  # bytes of the journal that are read at once
PATIENCE = 2.0  # seconds that a trace may take to get its name after its journal was removed
POLL = 0.001  # seconds


def open_partial(partial: Path) -> Trace:
    """Open ``NAME.partial``: with its journal, which shows what is committed, or complete and only not renamed yet.

    Raises:
        TraceError: it does not exist, its run keeps its records in memory, or its journal cannot be read.
    """
    if journal_path(partial).exists():
        return LiveTrace(CommittedFile(partial))
    if not partial.exists():
        raise _missing(partial)
    try:
        return open_file(partial)
    except TraceError:
        raise TraceError(
            f"{partial} has no journal, so there is nothing to read: its run keeps its records in memory until it ends "
            "(--storage memory), or has only just begun or ended"
        ) from None


def _missing(partial: Path) -> TraceError:
    path = partial.with_suffix("")
    way_out = f"its run has ended; open {path}" if path.exists() else "No such file or directory"
    return TraceError(f"cannot open the trace {partial}: {way_out}")


def has_writer(partial: Path) -> bool:
    """Return whether a run that goes on holds its lock on ``NAME.partial``.

    If no run does, this takes the lock, and gives it back at once.
    """
    try:
        fd = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class CommittedFile:
    """``NAME.partial`` and its journal, open for reading while a run writes them.

    Args:
        partial: the file.

    Attributes:
        partial: see above.
        state: what the journal said at the last :meth:`look`.

    Raises:
        TraceError: they cannot be read.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self._path = journal_path(partial)
        self._ended: Trace | None = None
        descriptors: list[int] = []
        weakref.finalize(self, _close, descriptors)
        try:
            for path in (self._path, partial):
                descriptors.append(os.open(path, os.O_RDONLY))
        except FileNotFoundError:
            raise _missing(partial) from None
        except OSError as error:
            raise TraceError(f"cannot open {error.filename}: {error.strerror}") from None
        self._journal, self._fd = descriptors
        text = self._text(0)
        if b"\n" not in text:
            raise TraceError(f"{partial} holds nothing yet: its run has only just begun")
        self.state = parse(self._path, text)
        self.look()

    def _text(self, start: int) -> bytes:
        """Return what the journal says from byte ``start`` on; the zeros after it are disk space in reserve."""
        parts = []
        while chunk := os.pread(self._journal, CHUNK, start):
            text, zeros, _ = chunk.partition(b"\0")
            parts.append(text)
            start += len(chunk)
            if zeros:
                break
        return b"".join(parts)

    def look(self) -> None:
        """Read what was added to the journal.

        Raises:
            TraceError: the journal is damaged.
        """
        parse(self._path, self._text(self.state.end), self.state)
        self.state.settle_collapse(os.fstat(self._fd).st_size)

    def entries(self, name: str) -> int:
        """Return how many entries of a tensor are committed."""
        return self.state.entries(self.state.tensors[name].tensor)

    @property
    def is_in_place(self) -> bool:
        """Whether the journal still has its name; if not, the run has ended, or the file belongs to another one."""
        return is_at(self._journal, self._path)

    def read(self, name: str, records: Sequence[int], low: int, high: int, target: Tensor) -> bool:
        """Read rows ``low`` to ``high`` of some entries of a tensor; return False if the file has them no longer.

        Args:
            target: ``[n, high - low, ...]``, contiguous.
        """
        own = self.state.tensors[name]
        row = own.nbytes // (own.tensor.shape[0] if own.tensor.shape else 1)
        each, view = (high - low) * row, bytes_of(target)
        is_one_piece = each == own.nbytes and isinstance(records, range) and records.step == 1
        pieces = [(records[0], len(view))] if is_one_piece else [(record, each) for record in records]
        while True:
            self.look()
            offset, done, is_whole = own.offset, 0, True
            assert offset is not None
            for record, size in pieces:
                at = self.state.start["header"] + offset + record * own.nbytes + low * row
                is_whole = is_whole and self._fill(view[done : done + size], at)
                done += size
            self.look()
            if not self.is_in_place:
                return False
            if own.offset == offset:
                return is_whole

    def _fill(self, target: memoryview, offset: int) -> bool:
        """Read bytes of the file; return False if it ends before."""
        while target:
            count = os.preadv(self._fd, [target], offset)
            if not count:
                return False
            target, offset = target[count:], offset + count
        return True

    def ended(self) -> Trace:
        """Return the trace that the run, or recovering it, has made of the file.

        Raises:
            TraceError: it is not where it should be.
        """
        until = time.monotonic() + PATIENCE
        while self._ended is None:
            self.look()
            self._ended = next((trace for path in self._names() if (trace := self._trace(path))), None)
            if self._ended is None and time.monotonic() > until:
                names = " or ".join(map(str, self._names()))
                raise TraceError(f"the run that wrote {self.partial} has ended, but its trace is not in {names}")
            time.sleep(0 if self._ended else POLL)
        return self._ended

    def _names(self) -> list[Path]:
        """Return the names that the trace may get."""
        path = self.partial.with_suffix("")
        steps = self.state.steps["recorded_steps"]
        cut = [path.with_name(f"{path.stem}.cut-at-{int(steps[-1])}{path.suffix}")] if len(steps) else []
        return [path, *cut]

    def _trace(self, path: Path) -> Trace | None:
        """Open a trace if it has the checksums of all that this file has; return None if it has not."""
        try:
            trace = open_file(path)
            each = int(trace.metadata.get("crc32_records", "1"))
            sums = checksum_metadata(self.state.checksums(self.state.outside, each), each)
            return trace if trace.json("crc32") == json.loads(sums["crc32"]) else None
        except (TraceError, ValueError):
            return None


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


class LiveTensor(LazyTensor):
    """The committed records of a tensor, as of the last :meth:`LiveTrace.refresh`. Indexing it reads the file.

    Args:
        file: where they are.
        name: of the tensor.
        shape, dtype: of all records.
    """

    kind = "live"

    def __init__(self, file: CommittedFile, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._file = file
        self._name = name

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        records = wanted_records(steps, len(self))
        shape = [len(records), high - low, *self.shape[2:]] if self.dim() > 1 else [len(records)]
        found = torch.empty(shape, dtype=self.dtype)
        if found.numel() and not self._file.read(self._name, records, low, high, found):
            whole = self._file.ended()[self._name]
            self._require(len(whole))
            found = whole[: len(self)][steps, low:high] if self.dim() > 1 else whole[: len(self)][steps]
        self._require(self._file.entries(self._name))
        return found.as_subclass(TraceTensor)

    def _require(self, entries: int) -> None:
        if entries < len(self):
            raise TraceError(
                f"{self._file.partial} was cut to fewer records when it was recovered, as the next one is damaged: "
                "refresh() the trace"
            )

    def as_subclass(self, cls: type[Tensor]) -> LiveTensor:
        """Return itself, so that it can take the place of a tensor of a mapped file where only indexing is wanted."""
        return self

    def first(self, records: int) -> LiveTensor:
        return LiveTensor(self._file, self._name, (records, *self.shape[1:]), self.dtype)


class LiveTrace(Trace):
    """The committed records of a run that is still going on; see :func:`bhfast.open_trace`.

    The records are those of the moment when it was opened or last refreshed. Tensors read before stay as they are.

    Args:
        file: what the run writes.
    """

    def __init__(self, file: CommittedFile) -> None:
        self._file: CommittedFile | None = file
        self._show_committed(file)

    @property
    def is_live(self) -> bool:
        return self._file is not None

    def _show_committed(self, file: CommittedFile) -> None:
        state = file.state
        tensors: dict[str, Any] = {}
        for own, _ in state.in_file:
            shape = (state.entries(own.tensor), *own.tensor.shape)
            tensors[own.tensor.name] = LiveTensor(file, own.tensor.name, shape, own.tensor.dtype)
        tensors |= {name: x.as_subclass(TraceTensor) for name, x in state.outside.items()}
        super().__init__(file.partial, tensors, dict(state.metadata))
        add_keyframes(self)

    def refresh(self) -> int:
        """Show what is committed now. Once the run has ended, this becomes the trace that it made.

        Returns:
            The number of records.

        Raises:
            TraceError: the run has ended, but its trace is not where it should be; or the journal is damaged.
        """
        if self._file is not None:
            self._file.look()
            if self._file.is_in_place:
                self._show_committed(self._file)
            else:
                self._become(self._file.ended())
                self._file = None
        return len(self.steps)

    def _become(self, trace: Trace) -> None:
        super().__init__(trace.path, trace._tensors, trace.metadata, trace._header)
        add_keyframes(self)
