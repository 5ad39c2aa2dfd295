"""Locked files. A lock ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bhfast.errors import StorageError

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # type: ignore[assignment]


def open_locked(path: Path, flags: int = 0, *, wait: bool) -> int:
    """Open a file for reading and writing, locked against all others; return the file descriptor.

    Args:
        path: the file.
        flags: of ``os.open``, such as ``os.O_CREAT``.
        wait: whether to wait until others unlock it.

    Raises:
        BlockingIOError: the file is locked, and ``wait`` is false.
        OSError: the file cannot be opened, or its file system has no locks.
        StorageError: this system has no such locks.
    """
    if fcntl is None:
        raise StorageError(
            f"cannot write {path}: this needs the file locks of POSIX, which {sys.platform} does not have; "
            "read traces here, and record them on Linux, on macOS or in WSL"
        )
    fd = os.open(path, os.O_RDWR | flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file; if none does, this takes it, and gives it back at once."""
    if fcntl is None:
        return False
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def release(fd: int) -> None:
    """Unlock an open file, in forked children too.

    Raises:
        OSError: it cannot be unlocked.
    """
    fcntl.flock(fd, fcntl.LOCK_UN)
