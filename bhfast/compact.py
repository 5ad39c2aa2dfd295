"""A full trace made compact: gradients at every step, parameters and moments at key frames only.

    python -m bhfast.compact FULL --keyframes K --out COMPACT

Nothing is lost: before the compact trace gets its name, all that it leaves out is rebuilt from it and compared with the
full one, bit for bit. ``bhfast expand`` is the way back. Exits 0 if it has made the trace, 2 if it could not.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from torch import Tensor

from bhfast.cli import run_program
from bhfast.errors import ConfigError, TraceError
from bhfast.replay import why_not
from bhfast.storage.convert import convert, files_of, size_of
from bhfast.storage.files import CHUNK
from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
from bhfast.trace import Trace
from bhfast.trace.format import CHANGED, KEYFRAME_STEPS, KEYFRAMES, bytes_of, format_bytes
from bhfast.trace.opening import open_file
from bhfast.trace.series import SERIES
from bhfast.trace.updates import STATE


def compact(
    full: str | os.PathLike[str], out: str | os.PathLike[str], *, keyframes: int, overwrite: bool = False
) -> Path:
    """Write the compact trace ``out`` of a full one, and prove it before it gets its name.

    Of a series, each part becomes compact; of an index, each file.

    Args:
        full: one file, the first part of a series, or an index.
        out: in the same form; of one file, it may be ``full`` itself, with ``overwrite``.
        keyframes: each record that is a multiple of this becomes a key frame, and the last one.
        overwrite: whether to replace existing files.

    Returns:
        Its path.

    Raises:
        ConfigError: ``keyframes`` is out of range.
        TraceError: ``full`` cannot be read or rebuilt, or is compact already; or ``out`` is not in its form.
        StorageError: ``out`` exists, or the disk is too small or failed.
    """
    full, out = Path(full), Path(out)
    if keyframes < 2:
        raise ConfigError(f"keyframes must be at least 2, got {keyframes}")
    for trace in files_of(full):
        reason = "it is compact already" if trace.keyframes else "its run goes on" if trace.is_live else None
        if "optimizer" not in trace.metadata or "recorded_steps" not in trace:
            reason = "it is not the file of a recording"
        elif changed := next((key for key in _renamed(trace) if key + CHANGED in trace), None):
            reason = f"the loop changed {changed} after a step ({changed + CHANGED} says in which records)"
        if reason := reason or why_not(trace, trace.logged):
            raise TraceError(f"{trace.path} cannot be made compact: {reason}")
    convert(full, out, partial(_compact_file, keyframes, overwrite), _renamed, overwrite=overwrite)
    return out


def _renamed(trace: Trace) -> dict[str, str]:
    keys = [param["keys"][field] for param in trace.optimizer["params"].values() for field in STATE]
    return {key: key + KEYFRAMES for key in keys}


def _compact_file(keyframes: int, overwrite: bool, trace: Trace, out: Path, metadata: dict[str, str]) -> None:
    frames = [*range(0, len(trace.steps), keyframes)]
    frames += [len(trace.steps) - 1] if frames[-1] != len(trace.steps) - 1 else []
    renamed = _renamed(trace)
    tensors: dict[str, Tensor] = {}
    for name, tensor in trace.items():
        tensors[renamed.get(name, name)] = tensor[frames].contiguous() if name in renamed else tensor
        if name == "recorded_steps":
            tensors[KEYFRAME_STEPS] = tensor[frames]
    with OutputFile(out, overwrite=overwrite) as output:
        output.reserve(sum(tensor.nbytes for tensor in tensors.values()))
        check = partial(_require_same_states, trace, list(renamed))
        write_trace(output, tensors, _with_keyframes(metadata, keyframes), output.path, check=check)


def _with_keyframes(metadata: dict[str, str], keyframes: int) -> dict[str, str]:
    """Return the metadata of the compact trace, in the order in which a recorder writes them."""
    found: dict[str, str] = {}
    for key, text in metadata.items():
        if key in (SERIES, "optimizer"):
            found.setdefault("keyframes", str(keyframes))
        found[key] = text
    return found


def _require_same_states(full: Trace, states: list[str], written: Path) -> None:
    """Raise TraceError unless all states rebuilt from the file ``written`` have the bits of the full trace."""
    compact = open_file(written)
    compact.logged = full.logged  # one of several files may have no learning rates
    for name in states:
        recorded, rebuilt = full[name], compact[name]
        each = max(1, CHUNK // max(1, recorded[:1].nbytes))
        for first in range(0, len(recorded), each):
            records = slice(first, first + each)
            try:
                is_same = bytes_of(recorded[records].contiguous()) == bytes_of(rebuilt[records])
            except TraceError:  # what was rebuilt does not lead to the next key frame
                is_same = False
            if not is_same:
                raise TraceError(
                    f"{full.path} cannot be made compact: from step {int(full.steps[first]):,} on, {name} does not "
                    "follow from the gradients; bhfast verify says more"
                )


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast compact",
        description="Write the compact trace of a full one: gradients of every step, parameters and moments at key "
        "frames only. All that is left out is rebuilt and compared first.",
    )
    parser.add_argument(
        "file", metavar="FULL", help="a trace whose optimizer's arithmetic is known to the bit, or the index of one"
    )
    parser.add_argument(
        "--keyframes", metavar="K", type=int, default=256, help="steps between key frames (default: 256)"
    )
    parser.add_argument(
        "--out", metavar="COMPACT", required=True, help="the file to write; may be FULL, if that is one file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace COMPACT if it exists")
    return run_program(parser, _compact_and_say, argv)


def _compact_and_say(args: argparse.Namespace) -> int:
    before = size_of(Path(args.file))
    path = compact(args.file, args.out, keyframes=args.keyframes, overwrite=args.overwrite)
    after = size_of(path)
    print(f"{path}: {format_bytes(after)}, {after / before:.3f} of the full trace; all states were rebuilt and agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
