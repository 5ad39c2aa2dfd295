"""The file that a run writes, locked against other runs.

The lock is an ``flock`` on the open file: it ends with the process that holds it, however that ends. A forked child
shares its parent's open files, and would keep the lock when the parent is killed, so every child closes them at once.
Children do not inherit POSIX record locks, but a process loses those when it closes the file anywhere, and two
recordings in one process would not see each other's.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from bhfast.errors import StorageError
from bhfast.locks import open_locked, release
from bhfast.storage.files import copy_path, remove
from bhfast.storage.journal import may_hold_records
from bhfast.trace.format import format_bytes
from bhfast.trace.journal import is_at, journal_path

PATIENCE = 0.05  # seconds to wait for the lock: a reader that asks whether a run goes on has it for an instant
POLL = 0.001  # seconds


class OutputFile:
    """The trace file of a run while it grows: ``NAME.partial``, locked against other runs.

    Entering creates it. ``NAME`` itself stays untouched until the trace is complete. Leaving removes ``NAME.partial``
    and its journal, unless something in them is worth keeping. In a forked child leaving does nothing.

    Args:
        path: the final name.
        overwrite: whether to replace an existing ``NAME``, and a ``NAME.partial`` left by an earlier run.

    Attributes:
        fd: the file descriptor of ``NAME.partial``, open for reading and writing.
        is_worth_keeping: whether ``NAME.partial`` can be recovered, so that it must stay if it could not be finished.

    Raises:
        StorageError: on entering, if ``NAME`` exists, if there is a ``NAME.partial`` that may hold records, or if the
            folder is not writable.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite = overwrite
        self.is_worth_keeping = False
        self._process = os.getpid()

    def __enter__(self) -> OutputFile:
        if self.path.is_dir():
            raise StorageError(f"cannot write the trace {self.path}: it is a folder", "name a file with path=")
        if self.path.exists() and not self.overwrite:
            raise StorageError(
                f"the trace {self.path} exists", "pass overwrite=True to replace it, or choose another file with path="
            )
        self.fd = self._open()
        return self

    def _open(self) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = lock(self.partial, os.O_CREAT)
            try:
                self._clear(fd)
            except BaseException:
                if os.fstat(fd).st_size == 0:
                    remove(fd, self.partial)
                unlock(fd)
                raise
        except OSError as error:
            raise StorageError(
                f"cannot write the trace {self.path}: {error.strerror}", "choose another place with path="
            ) from None
        return fd

    def _clear(self, fd: int) -> None:
        if not self.overwrite and may_hold_records(self.partial):
            has_steps = journal_path(self.partial).exists()
            keep = f"; keep its steps with python -m bhfast.recover {self.partial}" if has_steps else ""
            way_out = "delete it, pass overwrite=True to replace it, or choose another file with path="
            raise StorageError(
                f"{self.partial} was left by a run that did not finish{keep}", f"or {way_out}" if has_steps else way_out
            )
        os.ftruncate(fd, 0)
        journal_path(self.partial).unlink(missing_ok=True)
        copy_path(self.partial).unlink(missing_ok=True)

    @property
    def is_in_place(self) -> bool:
        """Whether ``NAME.partial`` is still the file that was opened."""
        return is_at(self.fd, self.partial)

    def restore(self) -> None:
        """Create an empty ``NAME.partial`` again if it was deleted, alone or with its folder.

        Raises:
            StorageError: as on entering.
        """
        if not self.is_in_place:
            lost, self.fd = self.fd, self._open()
            unlock(lost)

    def reserve(self, size: int) -> None:
        """Reserve ``size`` bytes of disk in total, so that the trace cannot run out of space.

        Raises:
            StorageError: the disk is too small.
        """
        try:
            if (free := self.free()) < size:
                raise StorageError(
                    f"the disk of {self.path.parent} is too small for the trace: {format_bytes(size)} wanted, "
                    f"{format_bytes(free)} free",
                    "free some, choose another place with path=, or record less with every= or steps=",
                )
            if size and hasattr(os, "posix_fallocate"):  # it refuses 0
                os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            raise StorageError(
                f"cannot reserve {format_bytes(size)} for the trace {self.path}: {error.strerror}",
                "choose another place with path=",
            ) from None

    def free(self) -> int:
        """Return how many bytes of disk the trace can use, including those it already has."""
        return shutil.disk_usage(self.path.parent).free + os.fstat(self.fd).st_blocks * 512

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:
            return
        if not self.is_worth_keeping:
            remove(self.fd, self.partial)
        unlock(self.fd)


_locked: set[int] = set()  # file descriptors


def lock(partial: Path, flags: int = 0) -> int:
    """Open ``partial`` and lock it against other runs; return the file descriptor.

    Raises:
        OSError: it cannot be opened.
        StorageError: another run is writing it.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fd = open_locked(partial, flags, wait=False)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(POLL)
                continue
            raise StorageError(
                f"{partial} is being written by another run", "wait for it, or choose another file with path="
            ) from None
        try:
            if is_at(fd, partial):
                break
        except OSError:
            os.close(fd)
            raise
        os.close(fd)  # between the two calls another run finished it; now it is that run's trace
    _locked.add(fd)
    return fd


def unlock(fd: int) -> None:
    """Close what :func:`lock` has opened."""
    with suppress(OSError):  # closing would unlock too, but not while a child is being forked
        release(fd)
    _locked.discard(fd)
    os.close(fd)


def _close_in_child() -> None:
    while _locked:
        os.close(_locked.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
