"""Opens a trace: one file, or several files and the index that joins them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from bhfast.errors import DamageError, TraceError
from bhfast.trace.checksums import without_checksums
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES, bytes_of, parse_json
from bhfast.trace.live import open_partial
from bhfast.trace.opening import open_file
from bhfast.trace.reader import Trace
from bhfast.trace.series import open_series
from bhfast.trace.tensors import ShardedTensor, first_records

INDEX_FORMAT = "bhfast-trace-index"
INDEX_SUFFIX = ".index.json"


class Index(NamedTuple):
    """The content of an index, with its files opened.

    Attributes:
        trace: the files as one trace.
        files: by name, in the order of the index.
        shards: for each tensor that several files share, its ``shape`` and ``parts``, as in the index.
        weight_map: the file of each tensor; for a shared one, its first file.
    """

    trace: Trace
    files: dict[str, Trace]
    shards: dict[str, Any]
    weight_map: dict[str, str]


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a trace, any other safetensors file, or the ``.index.json`` of several, without reading the data.

    A trace that was continued (``Recorder(append=True)``) is opened with all its parts, by the name of the first one.
    Its tensors are read part by part when they are indexed. The name of a later part opens that part alone.

    The ``PATH.partial`` of a run that streams shows the records that are committed, while the run goes on or after it
    was killed. :meth:`bhfast.trace.Trace.refresh` adds those committed since, and returns how many there are. Once the
    run has ended, it becomes the finished trace, and ``trace.is_live`` is False. Reading never disturbs the run.

    Raises:
        TraceError: it does not exist, is not safetensors, or has a format version that this bhfast does not know.
        DamageError: it is truncated, or its header does not fit its data. (A kind of TraceError.)
    """
    path = Path(path)
    if path.suffix == ".partial":
        return open_partial(path)
    return open_index(path) if path.name.endswith(INDEX_SUFFIX) else open_series(path)


def open_index(path: Path) -> Trace:
    """Open the files that an index names, without reading their data. The trace has as many records as the shortest.

    Raises:
        TraceError, DamageError: see :func:`read_index`.
    """
    return read_index(path).trace


def read_index(path: Path) -> Index:
    """Read an index and open its files.

    Raises:
        TraceError: the index or one of the files cannot be read.
        DamageError: one of them is damaged, or they do not fit together.
    """
    try:
        index = parse_json(f"{path} is not an index: it", path.read_bytes())
    except OSError as error:
        raise TraceError(f"cannot open the index {path}: {error.strerror}") from None
    files: dict[str, Trace] = {}

    def opened(file: str) -> Trace:
        if file != Path(file).name:
            raise ValueError(f"{file!r} is not the name of a file")
        if file not in files:
            files[file] = open_file(path.with_name(file))
        return files[file]

    try:
        weight_map, shards = dict(index["weight_map"]), dict(index["shards"])
        whole = {name: opened(file)[name] for name, file in weight_map.items() if name not in shards}
        records = min(len(trace.steps) for trace in files.values())
        shared = {name: _join(name, shard, opened) for name, shard in shards.items()}
        for name, file in weight_map.items():  # key frames: their tensors of all steps are rebuilt, file by file
            logical = name.removesuffix(KEYFRAMES)
            if logical in files[file].rebuilt:
                if name in shards:
                    shared[logical] = _join(logical, shards[name], opened)
                else:
                    whole[logical] = files[file][logical]
        frames = _common_frames(files.values())
        records = min([records, *(len(tensor) for name, tensor in shared.items() if not name.endswith(KEYFRAMES))])
    except TraceError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamageError(f"{path} is corrupted, or is not the index of a trace: {error}") from None
    lengths = len(whole["recorded_steps"]) if "recorded_steps" in whole else records
    tensors = {**whole, **shared}
    for name, x in tensors.items():
        if name.endswith(KEYFRAMES) or name == KEYFRAME_STEPS:
            tensors[name] = first_records(x, frames)
        elif name in shared or (x.dim() and len(x) == lengths):
            tensors[name] = first_records(x, records)
    first = next(iter(files.values()))
    trace = Trace(path, tensors, without_checksums(first.metadata))
    for own in files.values():
        own.logged = trace
    return Index(trace, files, shards, weight_map)


def _common_frames(files: Iterable[Trace]) -> int:
    """Return how many key frames, from the first on, are of the same steps in all files."""
    steps = [trace[KEYFRAME_STEPS].tolist() for trace in files if KEYFRAME_STEPS in trace]
    return sum(1 for own in zip(*steps, strict=False) if len(set(own)) == 1)


def disagreements(index: Index) -> Iterator[str]:
    """Yield where an index and its files disagree, one line each: on names, shapes, offsets, or the number of records.

    :func:`read_index` has already checked that the parts of each tensor fit together.
    """
    for name, shard in index.shards.items():
        records = {part["shape"][0] for part in shard["parts"]} | {shard["shape"][0]}
        if records != {len(index.files[index.weight_map[name]][name])}:
            yield f"the index gives {name} {sorted(records)} records, but its first file has another number"
    for file, trace in index.files.items():
        listed = {name: _part_of(shard, file) for name, shard in index.shards.items()}
        listed = {name: part for name, part in listed.items() if part is not None}
        told = trace.json("shard")  # its "unlisted" are tensors that appeared during the run, in this file only
        if told.get("index") != index.trace.path.name:
            yield f"{file} belongs to the index {told.get('index')!r:.60}, not to {index.trace.path.name}"
        if told.get("tensors") != listed:
            yield f"{file} and the index disagree on the shapes or offsets of the parts in it"
        for name in trace.keys() - trace.rebuilt.keys() - listed.keys():
            home = index.files.get(index.weight_map.get(name, ""))
            if name in told.get("unlisted", ()) and home is None:
                continue
            if home is None or name in index.shards:
                yield f"{file} has a tensor {name} that the index does not name"
            elif not _agree(*(own[name][:-1] if name == KEYFRAME_STEPS else own[name] for own in (home, trace))):
                yield f"{file} and {index.weight_map[name]} have different {name}"


def _part_of(shard: dict[str, Any], file: str) -> dict[str, list[int]] | None:
    """Return the shape of a shared tensor and the offset of the part in ``file``, as the file's own metadata has it."""
    for part in shard["parts"]:
        if part["file"] == file:
            return {"shape": shard["shape"][1:], "offset": part["offset"][1:]}
    return None


def _agree(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, as far as the shorter one goes."""
    if one.dtype != other.dtype or one.shape[1:] != other.shape[1:]:
        return False
    records = min(len(one), len(other)) if one.dim() else None
    a, b = (x[:records] if records is not None else x for x in (one, other))
    return bytes_of(a.contiguous()) == bytes_of(b.contiguous())


def _join(name: str, shard: dict[str, Any], opened: Any) -> ShardedTensor:
    """Return a tensor that several files share, after checking that its parts cover it exactly."""
    parts, boxes = [], []
    _, *shape = shard["shape"]
    if not shape:
        raise ValueError(f"{name} has one axis, so files cannot share it")
    for part in shard["parts"]:
        tensor = opened(part["file"])[name]
        _, *offset = part["offset"]
        own = list(tensor.shape[1:])
        if len(offset) != len(shape) or list(part["shape"][1:]) != own:
            raise ValueError(f"{part['file']} has {name} with records of {own}, wanted {part['shape'][1:]}")
        if any(start < 0 or start + size > whole for start, size, whole in zip(offset, own, shape, strict=True)):
            raise ValueError(f"the part of {name} in {part['file']} lies outside of it")
        boxes.append([(start, start + size) for start, size in zip(offset, own, strict=True)])
        parts.append((tensor, [0, *offset]))
    if len({tensor.dtype for tensor, _ in parts}) > 1:
        raise ValueError(f"the parts of {name} have different dtypes")
    covered = sum(math.prod(high - low for low, high in box) for box in boxes)
    if covered != math.prod(shape):
        raise ValueError(f"the parts of {name} have {covered} elements, wanted {math.prod(shape)}")
    if _overlap(boxes):
        raise ValueError(f"the parts of {name} overlap")
    return ShardedTensor(parts, [min(len(tensor) for tensor, _ in parts), *shape])


def _overlap(boxes: Sequence[Sequence[tuple[int, int]]]) -> bool:
    """Return whether two boxes have an element in common. A box has a start and an end along every axis."""
    cuts = [sorted({end for span in spans for end in span}) for spans in zip(*boxes, strict=True)]
    cells = np.zeros([len(ends) for ends in cuts], dtype=int)  # each from one cut to the next
    for box in boxes:
        cells[tuple(slice(ends.index(low), ends.index(high)) for ends, (low, high) in zip(cuts, box, strict=True))] += 1
    return bool((cells > 1).any())
