"""The file that a run writes, locked against other runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from bhfast.errors import StorageError
from bhfast.storage.files import journal_path
from bhfast.trace.format import format_bytes


class OutputFile:
    """The trace file of a run while it grows: ``NAME.partial``, locked against other runs.

    Entering creates it. ``NAME`` itself stays untouched until the trace is complete. Leaving removes ``NAME.partial``
    unless something in it is worth keeping.

    Args:
        path: the final name.
        overwrite: whether to replace an existing ``NAME``, and a ``NAME.partial`` left by an earlier run.

    Attributes:
        fd: of ``NAME.partial``, open for reading and writing.
        is_worth_keeping: whether ``NAME.partial`` can be recovered, so that it must stay if it could not be finished.

    Raises:
        StorageError: on entering, if ``NAME`` or ``NAME.partial`` exists, or the folder is not writable.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite = overwrite
        self.is_worth_keeping = False

    def __enter__(self) -> OutputFile:
        if self.path.is_dir():
            raise StorageError(f"cannot write the trace {self.path}: it is a folder; name a file with --out")
        if self.path.exists() and not self.overwrite:
            raise StorageError(
                f"the trace {self.path} exists; pass --overwrite to replace it, or choose another file with --out"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = self._open()
        except OSError as error:
            raise StorageError(
                f"cannot write the trace {self.path}: {error.strerror}; choose another place with --out"
            ) from None
        return self

    def _open(self) -> int:
        exists = self.partial.exists()
        fd = lock(self.partial, os.O_CREAT)
        if exists and not self.overwrite:
            os.close(fd)
            keep = "delete it"
            if journal_path(self.partial).exists():
                keep = f"keep its steps with python -m bhfast.recover {self.partial}, delete it,"
            raise StorageError(
                f"{self.partial} was left by a run that did not finish; {keep} or pass --overwrite to replace it, "
                "or choose another file with --out"
            )
        journal_path(self.partial).unlink(missing_ok=True)
        os.ftruncate(fd, 0)
        return fd

    def reserve(self, size: int) -> None:
        """Reserve ``size`` bytes of disk in total, so that the trace cannot run out of space.

        Raises:
            StorageError: the disk is too small.
        """
        if (free := self.free()) < size:
            raise StorageError(
                f"the disk of {self.path.parent} is too small for the trace: {format_bytes(size)} wanted, "
                f"{format_bytes(free)} free; free some, choose another place with --out, or record less with "
                "--record-every or --steps"
            )
        if size and hasattr(os, "posix_fallocate"):  # it refuses 0
            try:
                os.posix_fallocate(self.fd, 0, size)
            except OSError as error:
                raise StorageError(
                    f"cannot reserve {format_bytes(size)} for the trace {self.path}: {error.strerror}; "
                    "choose another place with --out"
                ) from None

    def free(self) -> int:
        """Return how many bytes of disk the trace can use, including those it has."""
        return shutil.disk_usage(self.path.parent).free + os.fstat(self.fd).st_blocks * 512

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.is_worth_keeping:
            with contextlib.suppress(FileNotFoundError):  # renamed if it was finished
                self.partial.unlink()
        os.close(self.fd)


def lock(partial: Path, flags: int = 0) -> int:
    """Open ``partial`` and lock it against other runs; return the file descriptor.

    Raises:
        OSError: it cannot be opened.
        StorageError: another run is writing it.
    """
    fd = os.open(partial, os.O_RDWR | flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StorageError(
            f"{partial} is being written by another run; wait for it, or choose another file with --out"
        ) from None
    return fd
