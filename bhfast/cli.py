"""What all programs share: how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from bhfast.errors import BhfastError


def run_program(
    parser: argparse.ArgumentParser, program: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parse the arguments, run the program, and return its exit status.

    A :class:`BhfastError` ends it with one line on stderr and status 2.

    Args:
        parser: its ``prog`` is the name of the program in error messages.
        program: takes the parsed arguments; returns the exit status.
        argv: the arguments; None for those of the process.
    """
    try:
        return program(parser.parse_args(argv))
    except BhfastError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
