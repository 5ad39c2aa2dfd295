"""Forked children of a test: for what kills, limits or interrupts a process, without another import of torch."""

from __future__ import annotations

import os
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


def status_of(pid: int) -> int:
    """Wait for a child; return its exit status, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
