"""A valid trace of a run that was killed while it streamed.

    python -m bhfast.recover FILE.partial

Checks every committed record against its checksum, makes a trace of all up to the first damaged one, and says how many
steps it holds. A run that kept its records in memory can be recovered if it was killed after it had written them all.
Exits 0 if it has made a trace, 2 if there is nothing to recover.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bhfast.cli import run_program
from bhfast.errors import StorageError, TraceError
from bhfast.storage.files import journal_path, sync_folder
from bhfast.storage.finish import check_records, finish
from bhfast.storage.journal import Journal, read_journal
from bhfast.storage.output import lock, unlock
from bhfast.trace import open_trace


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` has made.

    Attributes:
        path: the trace.
        records: how many it holds, step 0 included.
        last_step: the last one recorded.
        damaged: how many committed records were left out, as a checksum did not hold.
    """

    path: Path
    records: int
    last_step: int
    damaged: int


def recover(partial: str | os.PathLike[str]) -> Recovery:
    """Turn ``NAME.partial`` and its journal into ``NAME``, or ``STEM.cut-at-STEP`` beside it if there is one already.

    It may be interrupted, and run again.

    Raises:
        TraceError: there is nothing to recover.
        StorageError: a run is still writing it, or the disk failed.
    """
    partial = Path(partial)
    if partial.suffix != ".partial":
        raise TraceError(f"{partial} is no .partial: a run that was killed leaves NAME.partial and its journal")
    try:
        fd = lock(partial)
    except OSError as error:
        raise TraceError(f"cannot open {partial}: {error.strerror}") from None
    try:
        return _recover_from_journal(partial) if journal_path(partial).exists() else _recover_whole(partial)
    except OSError as error:
        raise StorageError(f"recovering {partial} failed: {error.strerror}; nothing is lost, try again") from error
    finally:
        unlock(fd)


def _recover_from_journal(partial: Path) -> Recovery:
    state = read_journal(partial)
    records = check_records(partial, state)
    if records == 0:
        raise TraceError(f"{partial} holds no committed record")
    damaged = state.records - records
    if damaged:
        with closing(Journal(journal_path(partial), state.end)) as journal:
            journal.append({"keep": records})
    last_step = int(state.steps[records - 1])
    path = _free_name(partial, last_step)
    finish(partial, path)
    return Recovery(path, records, last_step, damaged)


def _recover_whole(partial: Path) -> Recovery:
    """Name a trace that was written whole, and its journal removed, if it had one."""
    try:
        trace = open_trace(partial)
        is_whole = "crc32" in trace.metadata and not any(trace.damage())
    except TraceError:
        is_whole = False
    if not is_whole:
        raise TraceError(
            f"{partial} has no journal: its run kept the records in memory (--storage memory), and had not written all"
        )
    path = _free_name(partial, int(trace.steps[-1]))
    os.replace(partial, path)
    sync_folder(path.parent)
    return Recovery(path, len(trace.steps), int(trace.steps[-1]), 0)


def _free_name(partial: Path, last_step: int) -> Path:
    """Return the name for the trace of ``partial``."""
    path = partial.with_suffix("")
    if path.exists():
        path = path.with_name(f"{path.stem}.cut-at-{last_step}{path.suffix}")
    if path.exists():
        raise StorageError(f"{path} exists; move it away, then recover again")
    return path


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast recover", description="Make a trace of the committed steps of a run that was killed."
    )
    parser.add_argument("file", metavar="FILE.partial", help="what the run has left; its journal lies beside it")
    return run_program(parser, _recover_and_say, argv)


def _recover_and_say(args: argparse.Namespace) -> int:
    result = recover(args.file)
    if result.damaged:
        print(f"left out {result.damaged:,} records after step {result.last_step:,}: a checksum does not hold")
    print(f"{result.path}: {result.records:,} records, steps 0 to {result.last_step:,}; all checksums hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
