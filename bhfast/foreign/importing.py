"""Makes a trace of another program's recording.

    python -m bhfast.import FILE --out TRACE [--keys embeddings=W,grads=G] [--bfloat16 NAMES] [--every N]

FILE is HDF5 or safetensors. Its tensors get the names that traces of the reference run have: those of ``--keys``, and
those with usual names; all others keep their names. Values stay as they are: bfloat16 that was kept as uint16 becomes
bfloat16 again, and no other value is converted unless it is exact. The trace has checksums, and its metadata say where
it comes from. It proves nothing of the run that was recorded; ``bhfast verify --optimizer ...`` replays it.

Exits 0 if it has made the trace, 2 if it could not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bhfast.cli import run_program
from bhfast.errors import ConfigError, TraceError
from bhfast.foreign.conversion import converted
from bhfast.foreign.names import USUAL, map_names, parse_keys
from bhfast.foreign.sources import Source, open_source
from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
from bhfast.trace.format import FORMAT, FORMAT_VERSION, PADDING, REFERENCE_NAMES, format_bytes

IMPORTED = "imported"  # key of the metadata


@dataclass(frozen=True)
class Imported:
    """What :func:`import_recording` made.

    Attributes:
        path: the trace.
        steps: of its records, int64 ``[R]``.
        names: for each of its tensors the name in the file, and what was done to it, in words.
        left_out: why something in the file is not in the trace, by name.
    """

    path: Path
    steps: Tensor
    names: dict[str, tuple[str, str]]
    left_out: dict[str, str]


def import_recording(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keys: Mapping[str, str] | None = None,
    bfloat16: Collection[str] = (),
    every: int | None = None,
    overwrite: bool = False,
) -> Imported:
    """Write the trace ``out`` of another program's recording, a few records at a time.

    Args:
        path: HDF5 or safetensors.
        keys: for names of tensors in the trace, those in the file.
        bfloat16: names in the trace of further tensors to keep as bfloat16. Of uint16 and int16 these are the bits;
            every value of float32 must be representable.
        every: record k is of step ``k * every``; None: the file has the steps.
        overwrite: whether to replace an existing file.

    Raises:
        ConfigError: an argument is out of range.
        TraceError: the file cannot be read, or its tensors do not fit together.
        StorageError: ``out`` exists, or the disk is too small or failed.
    """
    if every is not None and every < 1:
        raise ConfigError(f"every must be at least 1, got {every}")
    with open_source(Path(path)) as source:
        names = map_names(source, keys or {})
        _leave_out_odd_names(source, names)
        tensors = _tensors(source, names, bfloat16)
        _add_steps(source, tensors, every)
        _require_same_shapes(source, tensors)
        with OutputFile(out, overwrite=overwrite) as output:
            output.reserve(sum(tensor.nbytes for tensor in tensors.values()))
            write_trace(output, tensors, _metadata(source, names, tensors), output.path)
        said = {name: (names.get(name, ""), _done(source, names, name, x)) for name, x in tensors.items()}
        return Imported(output.path, tensors["recorded_steps"], said, source.left_out)


def _leave_out_odd_names(source: Source, names: dict[str, str]) -> None:
    for name in [*names]:
        if name.startswith((PADDING, "__")) or name.encode(errors="ignore").decode() != name:
            source.left_out[names.pop(name)] = "a trace cannot have its name"


def _tensors(source: Source, names: Mapping[str, str], bfloat16: Collection[str]) -> dict[str, Any]:
    if unknown := set(bfloat16) - names.keys():
        raise TraceError(f"the trace of {source.path} has no {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    try:
        return {name: converted(name, source.tensors[key], to_bfloat16=name in bfloat16) for name, key in names.items()}
    except TraceError as error:
        raise TraceError(f"{source.path}: {error}") from None


def _add_steps(source: Source, tensors: dict[str, Any], every: int | None) -> None:
    if every is not None:
        if "recorded_steps" in tensors:
            raise ConfigError(f"{source.path} says of which steps its records are, so it needs no --every")
        tensors["recorded_steps"] = torch.arange(len(tensors["embeddings"])) * every
    if "recorded_steps" not in tensors:
        raise TraceError(
            f"{source.path} does not say of which steps its records are: pass --every 1 if record k is of step k, "
            "or --keys recorded_steps=NAME"
        )
    steps = tensors["recorded_steps"]
    if steps.dim() != 1 or not len(steps) or bool((steps.diff() <= 0).any()) or int(steps[0]) < 0:
        raise TraceError(f"{source.path}: recorded_steps must increase, from 0 or more")


def _require_same_shapes(source: Source, tensors: Mapping[str, Any]) -> None:
    """Raise TraceError unless the tensors of known names have the same numbers of records, tokens and dimensions."""
    sizes: dict[str, tuple[int, str]] = {}  # of each axis, and a tensor that has it
    has_rows = "embeddings.rows" in tensors
    for name, (axes, _) in USUAL.items():
        if name not in tensors:
            continue
        shape = tuple(tensors[name].shape)
        if len(shape) != len(axes):
            raise TraceError(f"{source.path}: {name} must have {len(axes)} axes, got {list(shape)}")
        for axis, size in zip(axes, shape, strict=True):
            axis = f"{axis} of {name}" if has_rows and axis == "V" and name in ("logits", "token_counts") else axis
            wanted, like = sizes.setdefault(axis, (size, name))
            if size != wanted:
                whole = list(tensors[like].shape)
                raise TraceError(f"{source.path}: {name} is {list(shape)}, which does not fit {like}, {whole}")


def _metadata(source: Source, names: Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, str]:
    with open(source.path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    imported = {
        "file": source.path.name,
        "bytes": os.path.getsize(source.path),
        "sha256": sha256,
        "keys": {name: key for name, key in names.items() if name != key},
        "left_out": source.left_out,
        "attributes": source.attributes,
    }
    optimizer: dict[str, Any] = {
        "name": "unknown",
        "arithmetic": None,
        "reason": f"it was imported from {source.path.name}, which does not describe its optimizer: verify it with "
        "--optimizer and the settings",
        "groups": [{}],
        "params": {
            "embeddings": {
                "group": 0,
                "steps_done": int(tensors["recorded_steps"][0]),
                "keys": {field: key for field, key in REFERENCE_NAMES.items() if key in tensors},
            }
        },
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        IMPORTED: json.dumps(imported),
        "optimizer": json.dumps(optimizer),
    }


def _done(source: Source, names: Mapping[str, str], name: str, tensor: Any) -> str:
    own = str(tensor.dtype).removeprefix("torch.")
    if name not in names:
        return f"{own} {list(tensor.shape)}, from --every"
    before = str(source.tensors[names[name]].dtype).removeprefix("torch.")
    return f"{own} {list(tensor.shape)}" + (f", from {before}" if before != own else "")


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast import",
        description="Make a trace of another program's recording: HDF5 or safetensors, bfloat16 also as uint16.",
    )
    parser.add_argument("file", metavar="FILE", help="the recording")
    parser.add_argument("--out", metavar="TRACE", required=True, help="the file to write")
    parser.add_argument(
        "--keys",
        metavar="NAME=KEY,...",
        default="",
        help="which tensor of FILE becomes which of the trace, such as embeddings=W,grads=G; usual names are found",
    )
    parser.add_argument(
        "--bfloat16",
        metavar="NAME,...",
        default="",
        help="further tensors of the trace to keep as bfloat16, from uint16 or from float32 that is exact",
    )
    parser.add_argument(
        "--every", metavar="N", type=int, help="record k is of step k * N, for a FILE without recorded steps"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TRACE if it exists")
    return run_program(parser, _import_and_say, argv)


def _import_and_say(args: argparse.Namespace) -> int:
    done = import_recording(
        args.file,
        args.out,
        keys=parse_keys(args.keys),
        bfloat16=[name for name in args.bfloat16.split(",") if name],
        every=args.every,
        overwrite=args.overwrite,
    )
    for name, (key, what) in done.names.items():
        print(f"{name:<16}{f'{key}: ' if key not in ('', name) else ''}{what}")
    for key, reason in done.left_out.items():
        print(f"left out: {key}, because {reason}")
    size, last = format_bytes(os.path.getsize(done.path)), int(done.steps[-1])
    print(f"{done.path}: {size}, {len(done.steps):,} records, steps {int(done.steps[0]):,} to {last:,}")
    return 0
