"""Reading and writing files: exactly the bytes wanted, at an offset, and safely onto the disk."""

from __future__ import annotations

import errno
import os
import warnings
from contextlib import suppress
from pathlib import Path

from bhfast.errors import RecordingWarning
from bhfast.trace.journal import is_at, journal_path

CHUNK = 16 << 20  # bytes copied at once


def copy_path(partial: Path) -> Path:
    """Return the name of the file to which the records of ``partial`` are copied to close its gaps."""
    return partial.with_name(partial.name + ".copy")


def remove(fd: int, partial: Path) -> None:
    """Remove the open, locked file ``partial``, its journal and its copy, unless ``partial`` names another file by now.

    First it is emptied, so that it neither fills the disk nor stops the next run if removing it fails. It goes last: as
    long as it is there, its lock keeps other runs from having a journal and a copy of the same names.
    """
    with suppress(OSError):
        if not is_at(fd, partial):
            return
    with suppress(OSError):
        os.ftruncate(fd, 0)
    for path in (journal_path(partial), copy_path(partial), partial):
        with suppress(OSError):
            path.unlink()


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Read exactly ``size`` bytes.

    Raises:
        OSError: the file cannot be read, or ends before that.
    """
    data = os.pread(fd, size, offset)
    if len(data) < size:
        raise OSError(errno.EIO, f"the file was cut off at byte {offset + len(data)}")
    return data


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data``, in as many calls as it takes."""
    while data:
        written = os.pwrite(fd, data[:CHUNK], offset)
        data, offset = data[written:], offset + written


def sync(fd: int) -> None:
    """Wait until what was written is on the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(folder: Path) -> None:
    """Wait until changed names in ``folder`` are on the disk; warn if that fails."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        warnings.warn(
            f"cannot sync the folder {folder}: {error.strerror}; a power failure now may lose its newest files",
            RecordingWarning,
            stacklevel=2,
        )
