"""A trace in several parts: each time a run is resumed, its recording goes on in a new file.

The parts of ``run.safetensors`` are that file itself, ``run.part-00002.safetensors``, ``run.part-00003.safetensors``
and so on. Each is a complete trace. Record 0 of a part, its seam, is the state from which it goes on; the parts before
it have a record of the same step. What they recorded after that step is left out: it was done again. The metadata of a
part say which file it continues, by the CRC-32 of that file's header.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bhfast.errors import DamageError, TraceError
from bhfast.trace.checksums import without_checksums
from bhfast.trace.format import HEADER_CHECKSUM, KEYFRAME_STEPS, KEYFRAMES, bytes_of
from bhfast.trace.lazy import LazyTensor
from bhfast.trace.opening import open_file
from bhfast.trace.reader import Trace
from bhfast.trace.tensors import TraceTensor

SERIES = "series"  # key of the metadata
HAS_GRAD = ".has_grad"  # ends the name of a tensor that is there only if a gradient was missing


class Part(NamedTuple):
    """A part of a series.

    Attributes:
        trace: the file.
        records: which of its records the series has; it has the key frames of the same steps.
    """

    trace: Trace
    records: range


def part_path(path: Path, number: int) -> Path:
    """Return the name of a part of the series that begins with ``path``; numbers start at 1."""
    return path if number == 1 else path.with_name(f"{path.stem}.part-{number:05}{path.suffix}")


def series_metadata(path: Path, before: Trace) -> dict[str, str]:
    """Return the metadata of a part.

    Args:
        path: of the first part.
        before: the part before it.

    Raises:
        TraceError: that has no checksum of its header.
    """
    checksum = before.metadata.get(HEADER_CHECKSUM)
    if checksum is None:
        raise TraceError(f"{before.path} cannot be continued: its header has no checksum (format version 1)")
    return {SERIES: json.dumps({"first": path.name, "continues": checksum})}


def continues(part: Path, path: Path) -> bool:
    """Return whether a file is a part of the series that begins with ``path``, as far as it can be read."""
    try:
        return part.exists() and open_file(part).json(SERIES).get("first") == path.name
    except TraceError:
        return False


def open_parts(path: Path) -> list[Trace]:
    """Open all parts of the series that begins with ``path``; only that file, if nothing continues it.

    Raises:
        TraceError: a part is missing, does not continue the one before it, or cannot be read.
        DamageError: a part is damaged.
    """
    parts = [open_file(path)]
    pattern = re.compile(rf"{re.escape(path.stem)}\.part-(\d{{5}}){re.escape(path.suffix)}")
    names = path.parent.glob(f"{glob.escape(path.stem)}.part-?????{glob.escape(path.suffix)}")
    numbers = sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name.name)))
    for number in numbers:
        trace = open_file(part_path(path, number))
        told = trace.json(SERIES)
        if told.get("first") != path.name:
            continue  # something else
        if number != len(parts) + 1:
            raise TraceError(f"{part_path(path, len(parts) + 1)} is missing: {trace.path} goes on where it ends")
        if told.get("continues") != parts[-1].metadata.get(HEADER_CHECKSUM):
            raise TraceError(
                f"{trace.path} does not continue {parts[-1].path}, which was replaced since: move one of them to "
                "another folder"
            )
        parts.append(trace)
    return parts


def joined_parts(traces: Sequence[Trace]) -> list[Part]:
    """Return which records of each part the series has: in all, each step once.

    Raises:
        DamageError: a part does not start at a step of those before it.
    """
    parts: list[Part] = []
    for trace in traces:
        if not parts:
            parts.append(Part(trace, range(len(trace.steps))))
            continue
        seam = int(trace.steps[0])
        kept = [Part(own, range(r.start, _count(own, r, seam))) for own, r in parts]
        kept = [part for part in kept if part.records]
        if not kept or int(kept[-1].trace.steps[kept[-1].records[-1]]) != seam:
            raise DamageError(f"{trace.path} starts at step {seam}, which the parts before it did not record")
        parts = [*kept, Part(trace, range(1, len(trace.steps)))]
    return parts


def _count(trace: Trace, records: range, step: int) -> int:
    """Return how many of a part's records are of steps up to ``step``, and at most as many as ``records`` has."""
    return min(records.stop, int(torch.searchsorted(trace.steps.as_subclass(Tensor), step, right=True)))


def open_series(path: Path) -> Trace:
    """Open a trace with all its parts as one.

    Raises:
        TraceError, DamageError: see :func:`open_parts`.
    """
    return joined(path, open_parts(path))


def joined(path: Path, traces: Sequence[Trace]) -> Trace:
    """Return the parts of a series as one trace; of one part, the part itself.

    Its metadata are those of the last part, without the description of the optimizer, which holds for one part only.

    Raises:
        DamageError: they do not fit together.
    """
    if len(traces) == 1:
        return traces[0]
    try:
        parts = joined_parts(traces)
        fields = {key for trace in traces for p in trace.optimizer["params"].values() for key in p["keys"].values()}
        names = dict.fromkeys(name for part in parts for name in part.trace)
        tensors = {name: _joined(parts, name, is_field=name in fields) for name in names}
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DamageError(f"{path}: its parts do not fit together ({error})") from None
    own = (SERIES, "optimizer")
    metadata = {key: text for key, text in without_checksums(traces[-1].metadata).items() if key not in own}
    return Trace(path, tensors, metadata)


def state_that_differs(trace: Trace, record: int, values: Mapping[str, Tensor]) -> str | None:
    """Return the first tensor whose record is not bit for bit this value; None if all are.

    Args:
        values: by name, without the axis of records.
    """
    for name, value in values.items():
        if bytes_of(trace[name][record].contiguous()) != bytes_of(value.contiguous()):
            return name
    return None


def seam_difference(path: Path, traces: Sequence[Trace]) -> str | None:
    """Return where the last part of a series does not start with a state of the parts before it; None if it does."""
    *before, last = traces
    earlier, seam = joined(path, before), int(last.steps[0])
    keys = [key for p in last.optimizer["params"].values() for field, key in p["keys"].items() if field != "grad"]
    record = int(torch.searchsorted(earlier.steps.as_subclass(Tensor), seam))
    name = state_that_differs(earlier, record, {key: last[key][0] for key in keys if key in earlier})
    return name and f"{last.path.name} does not start with the {name} that step {seam} ended with"


def _joined(parts: Sequence[Part], name: str, *, is_field: bool) -> Any:
    """Return a tensor of the series: of all records, of all key frames, or, of the whole run, that of the last part."""
    owners = [part.trace for part in parts if name in part.trace]
    if name == KEYFRAME_STEPS or name.endswith(KEYFRAMES):
        if len(owners) < len(parts):
            raise ValueError(f"{name} is in only some parts")
        pieces = [Piece(part.trace[name], frames) for part, frames in _frames(parts)]
    elif name.endswith(".rows") or any(not x.dim() or len(x) != len(t.steps) for t in owners for x in [t[name]]):
        return owners[-1][name]
    else:
        pieces = [Piece(part.trace.get(name), part.records) for part in parts]
    shapes = {(x.dtype, tuple(x.shape[1:])) for x, _ in pieces if x is not None}
    if len(shapes) > 1:
        raise ValueError(f"{name} has different shapes or dtypes")
    ((dtype, shape),) = shapes
    tensor = SeriesTensor(pieces, shape, dtype, _fill(name, dtype, is_field=is_field))
    if tensor.dim() > 1:
        return tensor
    whole = tensor[:]
    if name.endswith(HAS_GRAD) and name not in parts[0].trace:
        whole[:1] = False
    return whole


def _fill(name: str, dtype: torch.dtype, *, is_field: bool) -> float:
    """Return what a tensor holds in the records of parts that do not have it."""
    if name.endswith(HAS_GRAD):
        return True
    return math.nan if (dtype.is_floating_point or dtype.is_complex) and not is_field else 0


def _frames(parts: Sequence[Part]) -> Iterator[tuple[Part, range]]:
    """Yield the key frames of each part that the series has. The seam is one, unless the part before has it as one."""
    last = -1
    for part in parts:
        steps = part.trace[KEYFRAME_STEPS].as_subclass(Tensor)
        end = int(part.trace.steps[part.records.stop - 1])
        first, stop = (int(torch.searchsorted(steps, step, right=True)) for step in (last, end))
        last = int(steps[stop - 1]) if stop > first else last
        yield part, range(first, stop)


class Piece(NamedTuple):
    """Some records of a tensor that one part has.

    Attributes:
        tensor: in that part; None if it does not have it.
        records: consecutive.
    """

    tensor: Any
    records: range


class SeriesTensor(LazyTensor):
    """A tensor of several parts, one after the other. Indexing it reads only the parts that the index touches.

    Args:
        pieces: in order.
        shape: of a record.
        dtype: of all pieces.
        fill: what records hold that no part has.
    """

    kind = "joined"

    def __init__(self, pieces: Sequence[Piece], shape: Sequence[int], dtype: torch.dtype, fill: float) -> None:
        super().__init__((sum(len(piece.records) for piece in pieces), *shape), dtype)
        self._pieces = pieces
        self._fill = fill

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        wanted = torch.arange(len(self))[steps]
        rows = [high - low, *self.shape[2:]] if self.dim() > 1 else []
        found = torch.empty((len(wanted), *rows), dtype=self.dtype)
        base = 0
        for tensor, records in self._pieces:
            at = ((wanted >= base) & (wanted < base + len(records))).nonzero()[:, 0]
            if len(at):
                index = wanted[at] - base + records.start
                found[_consecutive(at)] = self._fill if tensor is None else _part(tensor, index, low, high)
            base += len(records)
        return found.as_subclass(TraceTensor)

    def first(self, records: int) -> SeriesTensor:
        pieces = []
        for tensor, own in self._pieces:
            pieces.append(Piece(tensor, own[:records]))
            records -= len(pieces[-1].records)
        return SeriesTensor(pieces, self.shape[1:], self.dtype, self._fill)


def _part(tensor: Any, records: Tensor, low: int, high: int) -> Tensor:
    index = _consecutive(records)
    found = tensor[index, low:high] if tensor.dim() > 1 else tensor[index]
    return found.as_subclass(Tensor)


def _consecutive(index: Tensor) -> slice | Tensor:
    """Return an index as a slice, which reads without a copy, if it is of consecutive records."""
    first, last = int(index[0]), int(index[-1])
    is_range = last - first == len(index) - 1 and bool((index.diff() == 1).all())
    return slice(first, last + 1) if is_range else index
