"""Forked children of a test: for what kills, limits or interrupts a process, without another import of torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)


def fork(work: Callable[[], object], errors: Path | None = None) -> int:
    """Run ``work`` in a forked process, which exits with 1 after an exception, told to ``errors``; return its pid."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    except BaseException:
        text = traceback.format_exc()
        sys.stderr.write(text) if errors is None else errors.write_text(text)
        sys.stderr.flush()
    finally:
        os._exit(status)


def end_as_a_program(status: int = 0) -> None:
    """End a forked process with all that Python does at its end: what fails then is said, and changes the status."""
    ctypes.pythonapi.Py_Exit(status)


def status_of(pid: int) -> int:
    """Wait for a child; return its exit status, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Program:
    """A program that runs in a forked child, with pipes for its standard streams; used like a ``subprocess.Popen``.

    The child has no time limit but ``SECONDS``: it is killed then, so a test may wait for it to end.

    Args:
        main: returns the exit status, or None for 0.
        environment: variables that are set in the child.
    """

    SECONDS = 100

    def __init__(self, main: Callable[[], int | None], **environment: str) -> None:
        (child_in, stdin), (stdout, child_out), (stderr, child_err) = (os.pipe() for _ in range(3))

        def run() -> None:
            signal.alarm(self.SECONDS)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
            os.setpgid(0, 0)
            os.environ.update(environment)
            for fd in (stdin, stdout, stderr):
                os.close(fd)
            for number, fd in enumerate((child_in, child_out, child_err)):
                os.dup2(fd, number)
                os.close(fd)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=1, closefd=False)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
            raise SystemExit(main())

        self.pid = fork(run)
        self.returncode: int | None = None
        for fd in (child_in, child_out, child_err):
            os.close(fd)
        self.stdin = os.fdopen(stdin, "w")
        self.stdout, self.stderr = os.fdopen(stdout), os.fdopen(stderr)

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Wait for the end; return what the child has printed to stdout and stderr, less than a pipe holds."""
        with self.stdin, self.stdout, self.stderr:
            said = self.stdout.read(), self.stderr.read()
        self.wait()
        return said
