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
from bhfast.storage.files import CHUNK
from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
from bhfast.trace import Trace, open_trace
from bhfast.trace.checksums import without_checksums
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES, bytes_of, format_bytes
from bhfast.trace.opening import open_file
from bhfast.trace.updates import STATE


def compact(
    full: str | os.PathLike[str], out: str | os.PathLike[str], *, keyframes: int, overwrite: bool = False
) -> Path:
    """Write the compact trace ``out`` of a full one, and prove it before it gets its name.

    Args:
        full: one file.
        out: may be ``full`` itself, with ``overwrite``.
        keyframes: each record that is a multiple of this becomes a key frame, and the last one.
        overwrite: whether to replace an existing file.

    Returns:
        Its path.

    Raises:
        ConfigError: ``keyframes`` is out of range.
        TraceError: ``full`` cannot be read or rebuilt, or is compact already.
        StorageError: ``out`` exists, or the disk is too small or failed.
    """
    if keyframes < 2:
        raise ConfigError(f"keyframes must be at least 2, got {keyframes}")
    trace = open_trace(full)
    reason = "it is compact already" if trace.keyframes else "its run goes on" if trace.is_live else None
    if "optimizer" not in trace.metadata or "recorded_steps" not in trace or "shard" in trace.metadata:
        reason = "it is not one file of a recording"
    if reason := reason or why_not(trace, trace):
        raise TraceError(f"{trace.path} cannot be made compact: {reason}")
    frames = [*range(0, len(trace.steps), keyframes)]
    frames += [len(trace.steps) - 1] if frames[-1] != len(trace.steps) - 1 else []
    states = [x["keys"][field] for x in trace.optimizer["params"].values() for field in STATE]
    tensors: dict[str, Tensor] = {}
    for name, tensor in trace.items():
        if name in states:
            tensors[name + KEYFRAMES] = tensor[frames].contiguous()
        else:
            tensors[name] = tensor
        if name == "recorded_steps":
            tensors[KEYFRAME_STEPS] = tensor[frames]
    with OutputFile(out, overwrite=overwrite) as output:
        output.reserve(sum(tensor.nbytes for tensor in tensors.values()))
        check = partial(_require_same_states, trace, states)
        write_trace(output, tensors, _metadata(trace, keyframes), output.path, check=check)
    return output.path


def _metadata(trace: Trace, keyframes: int) -> dict[str, str]:
    """Return the metadata of the compact trace, in the order in which a recorder writes them."""
    metadata: dict[str, str] = {}
    for key, text in without_checksums(trace.metadata).items():
        metadata |= {"keyframes": str(keyframes)} if key == "optimizer" else {}
        metadata[key] = text
    return metadata


def _require_same_states(full: Trace, states: list[str], written: Path) -> None:
    """Raise TraceError unless all states rebuilt from the file ``written`` have the bits of the full trace."""
    compact = open_file(written)
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
    parser.add_argument("file", metavar="FULL", help="a trace whose optimizer's arithmetic is known to the bit")
    parser.add_argument(
        "--keyframes", metavar="K", type=int, default=256, help="steps between key frames (default: 256)"
    )
    parser.add_argument("--out", metavar="COMPACT", required=True, help="the file to write; may be FULL")
    parser.add_argument("--overwrite", action="store_true", help="replace COMPACT if it exists")
    return run_program(parser, _compact_and_say, argv)


def _compact_and_say(args: argparse.Namespace) -> int:
    before = os.path.getsize(args.file)
    path = compact(args.file, args.out, keyframes=args.keyframes, overwrite=args.overwrite)
    after = os.path.getsize(path)
    print(f"{path}: {format_bytes(after)}, {after / before:.3f} of the full trace; all states were rebuilt and agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
