"""A compact trace made full: parameters and moments of every step, as if all had been recorded.

    python -m bhfast.expand COMPACT --out FULL

The full trace is, byte for byte, what a recording of the same run without key frames writes when it ends, if it is kept
in memory. (A full recording that is streamed has the same tensors in another order.) A trace that does not pass
``bhfast verify`` is not expanded. Exits 0 if it has made the trace, 2 if it could not.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from bhfast.cli import run_program
from bhfast.errors import TraceError
from bhfast.ops.checks import FIELDS
from bhfast.storage.convert import convert, files_of, size_of
from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
from bhfast.trace import Trace
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES, format_bytes
from bhfast.verify import verify


def expand(compact: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the full trace ``out`` of a compact one. It needs little memory, whatever their size.

    Of a series, each part is expanded; of an index, each file.

    Args:
        compact: one file, the first part of a series, or an index.
        out: in the same form.
        overwrite: whether to replace existing files.

    Returns:
        Its path.

    Raises:
        TraceError: ``compact`` cannot be read, is not compact, or is not proven by its replay; or ``out`` is not in its
            form.
        StorageError: ``out`` exists, or the disk is too small or failed.
    """
    compact, out = Path(compact), Path(out)
    for trace in files_of(compact):
        if not trace.keyframes:
            raise TraceError(f"{trace.path} cannot be expanded: it is not a recording with key frames")
    if (found := verify(compact)).status:
        raise TraceError(f"{compact} cannot be expanded: {found}")
    convert(compact, out, partial(_expand_file, overwrite), _renamed, overwrite=overwrite)
    return out


def _renamed(trace: Trace) -> dict[str, str]:
    return {name + KEYFRAMES: name for name in trace.rebuilt}


def _expand_file(overwrite: bool, trace: Trace, out: Path, metadata: dict[str, str]) -> None:
    order = [key for x in trace.optimizer["params"].values() for field in FIELDS if (key := x["keys"].get(field))]
    frames = {KEYFRAME_STEPS, *_renamed(trace)}
    tensors = {name: trace[name] for name in dict.fromkeys([*order, *trace]) if name not in frames}
    del metadata["keyframes"]
    with OutputFile(out, overwrite=overwrite) as output:
        output.reserve(sum(tensor.nbytes for tensor in tensors.values()))
        write_trace(output, tensors, metadata, output.path)


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast expand", description="Write the full trace of a compact one: every state of every step."
    )
    parser.add_argument("file", metavar="COMPACT", help="a trace recorded with key frames, or the index of one")
    parser.add_argument("--out", metavar="FULL", required=True, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FULL if it exists")
    return run_program(parser, _expand_and_say, argv)


def _expand_and_say(args: argparse.Namespace) -> int:
    path = expand(args.file, args.out, overwrite=args.overwrite)
    sizes = [format_bytes(size_of(file)) for file in (path, Path(args.file))]
    print(f"{path}: {sizes[0]}, expanded from {sizes[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
