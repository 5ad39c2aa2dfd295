"""Writes a trace for other programs: Rerun, TensorBoard, or tables as CSV or Parquet.

    python -m bhfast.export FILE --to rerun|csv|parquet|tensorboard --out PATH [--param NAME]

FILE may be a trace of any form, also the ``.partial`` of a run that goes on. It is read a few records at a time, so it
may be larger than memory. PATH must not exist; it appears when it is complete.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from bhfast.cli import run_program
from bhfast.errors import BhfastError, StorageError, printable
from bhfast.export.values import source_of
from bhfast.trace import open_trace

NEEDS = {  # by target: the package that it needs, its name for pip, and the extra that brings it
    "csv": None,
    "parquet": ("pyarrow", "pyarrow", "parquet"),
    "rerun": ("rerun", "rerun-sdk", "rerun"),
    "tensorboard": ("tensorboard", "tensorboard", "tensorboard"),
}


def export(file: str | os.PathLike[str], to: str, out: Path, param: str | None = None) -> list[str]:
    """Write a trace for another program.

    Args:
        file: the trace.
        to: a key of ``NEEDS``.
        out: the folder or, for Rerun, the file to write.
        param: the parameter whose rows are the tokens; None if there is but one.

    Returns:
        What was left out, a line each.

    Raises:
        TraceError: the trace cannot be read, or has no such parameter.
        StorageError: ``out`` exists, or cannot be written.
        BhfastError: the package that this needs is not installed.
    """
    if needed := NEEDS[to]:
        try:
            import_module(needed[0])
        except ImportError:
            raise BhfastError(f"--to {to} needs {needed[1]}: pip install 'bhfast[{needed[2]}]'") from None
    source = source_of(open_trace(file), param)
    writer = import_module(f"bhfast.export.{to}_writer")
    with _complete(out) as partial:
        notes = writer.write(source, partial)
    return [*([source.note] if source.note else []), *notes]


@contextmanager
def _complete(out: Path) -> Iterator[Path]:
    """Let the block write another path, which is renamed to ``out`` when it is complete, and removed if it fails.

    Raises:
        StorageError: ``out`` exists, or cannot be written.
    """
    if out.exists():
        raise StorageError(f"{out} exists: remove it, or choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{out.name}.", suffix=".partial", dir=out.parent) as folder:
            partial = Path(folder) / out.name
            yield partial
            os.rename(partial, out)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="bhfast export", description="Write a trace for other programs.")
    parser.add_argument("file", metavar="FILE", help="a trace, the .index.json of several files, or a .partial")
    parser.add_argument("--to", required=True, choices=NEEDS, help="what to write")
    parser.add_argument(
        "--out", metavar="PATH", type=Path, required=True, help="a new folder; for rerun, a new file (.rrd)"
    )
    parser.add_argument("--param", metavar="NAME", help="the parameter whose rows are the tokens, if there are several")
    return run_program(parser, _export_and_say, argv)


def _export_and_say(args: argparse.Namespace) -> int:
    notes = export(args.file, args.to, args.out, args.param)
    print(printable(args.out), *(f"left out: {printable(note)}" for note in notes), sep="\n")
    return 0
