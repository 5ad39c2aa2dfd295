"""Makes a valid trace of a run that was killed while it streamed.

    python -m bhfast.recover FILE.partial [--out TRACE]

Checks every committed record against its checksum, makes a trace of the records before the first damaged one, and says
how many there are. A run that kept its records in memory can be recovered only if it had written them all when it was
killed. Exits with 0 if it made a trace, with 2 if there is nothing to recover.
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
from bhfast.storage.files import remove, sync_folder
from bhfast.storage.finish import check_records, finish
from bhfast.storage.journal import Journal
from bhfast.storage.output import lock, unlock
from bhfast.trace.journal import journal_path, read_journal
from bhfast.trace.opening import open_file


@dataclass(frozen=True)
class Recovery:
    """What :func:`recover` made.

    Attributes:
        path: the trace.
        records: how many it holds, record 0 included.
        last_step: the step of its last record.
        damaged: how many committed records were left out, because the checksum of the first of them did not match.
    """

    path: Path
    records: int
    last_step: int
    damaged: int


def recover(
    partial: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, replace: bool = False
) -> Recovery:
    """Turn ``NAME.partial`` and its journal into ``NAME``, or into ``STEM.cut-at-STEP`` beside it if ``NAME`` exists.

    If it is interrupted, it can be run again.

    Args:
        partial: the file that a run left.
        out: another name for the trace, on the same file system, as the records stay where they are; it must be free.
        replace: whether to replace ``NAME`` if it has fewer records: for runs that go on with it.

    Raises:
        TraceError: there is nothing to recover.
        StorageError: a run is still writing it, ``out`` cannot be its name, or the disk failed.
    """
    partial, out = Path(partial), None if out is None else Path(out)
    if partial.suffix != ".partial":
        raise TraceError(f"{partial} is not a .partial file: a run that was killed leaves NAME.partial and its journal")
    try:
        fd = lock(partial)
    except OSError as error:
        raise TraceError(f"cannot open {partial}: {error.strerror}") from None
    try:
        if out is not None:
            _require_usable(out, partial, os.fstat(fd).st_dev)
        elif os.fstat(fd).st_size == 0 and partial.with_suffix("").exists():
            return _finish_removal(fd, partial)
        if journal_path(partial).exists():
            return _recover_from_journal(partial, out, replace)
        return _recover_whole(partial, out, replace)
    except OSError as error:
        raise StorageError(f"recovering {partial} failed: {error.strerror}; nothing is lost, try again") from error
    finally:
        unlock(fd)


def _require_usable(out: Path, partial: Path, device: int) -> None:
    """Check that the records, which are on ``device``, can get the name ``out``."""
    if out.suffix == ".partial" or out.name.startswith(partial.name):
        raise StorageError(f"{out} is a name for what a run leaves, not for a trace", "choose another file with out=")
    if out.exists():
        raise StorageError(f"{out} exists", "choose another file with out=")
    try:
        is_same = os.stat(out.parent).st_dev == device
    except OSError as error:
        raise StorageError(f"cannot make {out}: {error.strerror}", "choose another place with out=") from None
    if not is_same:
        raise StorageError(
            f"cannot make {out} without copying the records", "choose a place on their file system with out="
        )


def _recover_from_journal(partial: Path, out: Path | None, replace: bool) -> Recovery:
    state = read_journal(partial)
    had_last = state.has_last
    records = check_records(partial, state)
    if records == 0:
        raise TraceError(f"{partial} holds no committed record")
    damaged = state.records - records
    if damaged or state.has_last != had_last:
        with closing(Journal(journal_path(partial), state.end)) as journal:
            journal.append({"keep": records})
    last_step = int(state.steps["recorded_steps"][records - 1])
    path = out or _name(partial, last_step, records if replace else 0)
    finish(partial, path)
    return Recovery(path, records, last_step, damaged)


def _finish_removal(fd: int, partial: Path) -> Recovery:
    """Remove what is left of a run that made its trace, and was killed while it removed the rest."""
    trace = open_file(partial.with_suffix(""))
    remove(fd, partial)
    return Recovery(trace.path, len(trace.steps), int(trace.steps[-1]), 0)


def _recover_whole(partial: Path, out: Path | None, replace: bool) -> Recovery:
    """Rename a trace that was complete, and whose journal, if it had one, was already removed."""
    try:
        trace = open_file(partial)
        is_whole = "crc32" in trace.metadata and not any(trace.damage())
    except TraceError:
        is_whole = False
    if not is_whole:
        raise TraceError(
            f"{partial} has no journal: its run kept the records in memory (--storage memory), and was "
            "killed before it had written them all"
        )
    path = out or _name(partial, int(trace.steps[-1]), len(trace.steps) if replace else 0)
    os.replace(partial, path)
    sync_folder(path.parent)
    return Recovery(path, len(trace.steps), int(trace.steps[-1]), 0)


def _name(partial: Path, last_step: int, records: int) -> Path:
    """Return the name for the trace of ``partial``: that of a trace with less than ``records``, or one that is free."""
    path = partial.with_suffix("")
    if records and path.exists() and len(open_file(path).steps) < records:
        return path
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
    parser.add_argument(
        "file", metavar="FILE.partial", help="the file that the run left; its journal must be beside it"
    )
    parser.add_argument("--out", metavar="TRACE", help="the trace to make, on the same file system (default: FILE)")
    return run_program(parser, _recover_and_say, argv)


def _recover_and_say(args: argparse.Namespace) -> int:
    result = recover(args.file, out=args.out)
    if result.damaged:
        print(f"left out {result.damaged:,} records after step {result.last_step:,}: a checksum does not match")
    print(f"{result.path}: {result.records:,} records, steps 0 to {result.last_step:,}; all checksums match")
    return 0


if __name__ == "__main__":
    sys.exit(main())
