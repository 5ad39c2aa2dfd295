"""What all programs share: how they print and how they end."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from bhfast.errors import BhfastError, printable


class ParserWanted(list[str]):
    """In place of a program's arguments: makes its ``main`` leave its parser here, and do nothing else.

    Attributes:
        parser: of the program.
    """

    parser: argparse.ArgumentParser


def run_program(
    parser: argparse.ArgumentParser, program: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parse the arguments, run the program, and return its exit status.

    A :class:`BhfastError` ends it with one line on stderr, which names flags, and status 2; Ctrl-C with status 130.

    Args:
        parser: its ``prog`` is the name of the program in error messages.
        program: takes the parsed arguments; returns the exit status.
        argv: the arguments; None for ``sys.argv[1:]``.
    """
    if isinstance(argv, ParserWanted):
        argv.parser = parser
        return 0
    with lasting_streams():
        try:
            return program(parser.parse_args(argv))
        except BhfastError as error:
            print(f"{parser.prog}: error: {printable(error.with_flags)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Keep stdin, stdout and stderr usable inside the block, whatever happens at their other ends.

    A stream that is closed becomes the null device. Otherwise a trace could get its file descriptor, and output would
    end up in the trace. Output to a reader that has gone away, a closed terminal or a full disk is dropped instead of
    ending the run.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = _LastingStream(sys.stdout or open(1, "w", closefd=False))  # type: ignore[assignment]
    sys.stderr = _LastingStream(sys.stderr or open(2, "w", closefd=False))  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = streams


class _LastingStream:
    """Writes to a text stream; once that fails, to the null device."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Connect the file descriptor to the null device, so that flushing what the stream still holds cannot fail."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
