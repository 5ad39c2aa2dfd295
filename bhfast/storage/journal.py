"""Writes the journal of a trace that is being streamed.

:mod:`bhfast.trace.journal` says what it is for, lists the lines, and reads them. ``NAME.partial`` and its journal hold
every committed step at any moment. :func:`bhfast.storage.finish.finish` turns them into an ordinary trace: at the end
of a run, or, through :mod:`bhfast.recover`, after one that was killed.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bhfast.errors import TraceError
from bhfast.storage.files import sync, write_at
from bhfast.trace.format import DTYPE_NAMES, bytes_of
from bhfast.trace.journal import is_at, journal_path, read_journal
from bhfast.trace.recorded import RecordedTensor

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


def tensor_event(tensor: RecordedTensor, offset: int | None) -> dict[str, Any]:
    """Return the journal's line for a new tensor; see :class:`bhfast.trace.journal.CommittedTensor`."""
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


def may_hold_records(partial: Path) -> bool:
    """Return False only if it is certain that ``partial`` holds no committed record."""
    if partial.stat().st_size == 0:
        return False
    try:
        return b"\n" in journal_path(partial).read_bytes() and read_journal(partial).records > 0
    except (OSError, TraceError):
        return True
