"""Writing to files: all of it, at its place, and onto the disk."""

from __future__ import annotations

import os
from pathlib import Path

CHUNK = 16 << 20  # bytes copied at once


def journal_path(partial: Path) -> Path:
    """Return the name of the journal of ``partial``."""
    return partial.with_name(partial.name + ".journal")


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, however little the system takes at once."""
    while data:
        written = os.pwrite(fd, data[:CHUNK], offset)
        data, offset = data[written:], offset + written


def sync(fd: int) -> None:
    """Wait until what was written is on the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    """Wait until a change of names in ``folder`` is on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
