"""Opening a trace: one file, or several and the index that joins them, with tensors that span them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace.format import parse_json
from bhfast.trace.reader import Trace, TraceTensor, open_file

INDEX_FORMAT = "bhfast-trace-index"
INDEX_SUFFIX = ".index.json"


class ShardedTensor:
    """A tensor that several files share, read part by part: only the shards that a slice touches.

    It is indexed as a tensor ``[R, ...]`` is, and gives tensors.

    Args:
        parts: each with its offset in the whole, axis 0 included.
        shape: of the whole.

    Attributes:
        shape, dtype: of the whole.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Sequence[int]]], shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = parts[0][0].dtype
        self._parts = parts

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        if index and any(x is Ellipsis or x is None for x in index):
            return self._read(slice(None), 0, self.shape[1])[index]
        rest: list[Any]
        step, *rest = index or (slice(None),)
        steps = slice(step, step + 1 or None) if isinstance(step, int) else step
        if isinstance(step, int) and not -len(self) <= step < len(self):
            raise IndexError(f"index {step} is out of bounds for {len(self)} records")
        low, high = 0, self.shape[1]
        if rest and isinstance(rest[0], int):
            row = range(high)[rest[0]]
            low, high, rest[0] = row, row + 1, 0
        elif rest and isinstance(rest[0], slice) and rest[0].step in (None, 1):
            low, high, _ = rest[0].indices(high)
            rest[0] = slice(None)
        found = self._read(steps, low, max(low, high))
        return found[(0 if isinstance(step, int) else slice(None), *rest)]

    def _read(self, steps: Any, low: int, high: int) -> Tensor:
        """Return the rows from ``low`` to ``high`` of some steps."""
        whole: Tensor | None = None
        for part, (_, first, *columns) in self._parts:
            rows = part[:, max(low, first) - first : max(0, min(high, first + part.shape[1]) - first)][steps]
            if whole is None:
                whole = torch.empty((len(rows), high - low, *self.shape[2:]), dtype=self.dtype)
            at = max(first - low, 0)
            target = whole[:, at : at + rows.shape[1]]
            for axis, start in enumerate(columns, start=2):
                target = target.narrow(axis, start, rows.shape[axis])
            target.copy_(rows)
        assert whole is not None
        return whole.as_subclass(TraceTensor)

    def first(self, records: int) -> ShardedTensor:
        """Return the first ``records`` records, unread."""
        return ShardedTensor([(part[:records], offset) for part, offset in self._parts], [records, *self.shape[1:]])

    def numpy(self) -> np.ndarray:
        """Return the whole as a numpy array; see :meth:`bhfast.trace.TraceTensor.numpy`."""
        return self[:].numpy()


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a trace, or any safetensors file, or the ``.index.json`` of several, without reading its data.

    Raises:
        TraceError: it is not there, not safetensors, truncated, or its header does not fit its data.
    """
    path = Path(path)
    return open_index(path) if path.name.endswith(".index.json") else open_file(path)


def open_index(path: Path) -> Trace:
    """Open the files that an index names, without reading their data. All have as many records as the shortest.

    Raises:
        TraceError: the index or one of the files is missing or damaged, or they do not fit together.
    """
    try:
        index = parse_json(f"{path} is no index: it", path.read_bytes())
    except OSError as error:
        raise TraceError(f"cannot open the index {path}: {error.strerror}") from None
    traces: dict[str, Trace] = {}

    def opened(file: str) -> Trace:
        if file != Path(file).name:
            raise ValueError(f"{file!r} is no name of a file")
        if file not in traces:
            traces[file] = open_trace(path.with_name(file))
        return traces[file]

    try:
        whole = {name: opened(file)[name] for name, file in index["weight_map"].items() if name not in index["shards"]}
        records = min(len(trace.steps) for trace in traces.values())
        shared = {name: _join(name, shard, opened) for name, shard in index["shards"].items()}
        records = min([records, *(len(tensor) for tensor in shared.values())])
    except TraceError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TraceError(f"{path} is corrupted, or is no index of a trace: {error}") from None
    lengths = len(whole["recorded_steps"]) if "recorded_steps" in whole else records
    tensors = {name: x[:records] if x.dim() and len(x) == lengths else x for name, x in whole.items()}
    metadata = next(iter(traces.values())).metadata if traces else {}
    own = {key: text for key, text in metadata.items() if not key.startswith("crc32")}
    return Trace(path, {**tensors, **{name: x.first(records) for name, x in shared.items()}}, own)


def _join(name: str, shard: dict[str, Any], opened: Any) -> ShardedTensor:
    """Return a tensor that several files share, after checking that they cover it."""
    parts, boxes = [], []
    _, *shape = shard["shape"]
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
    covered = sum(math.prod(high - low for low, high in box) for box in boxes)
    if covered != math.prod(shape):
        raise ValueError(f"the parts of {name} have {covered} elements, wanted {math.prod(shape)}")
    if _overlap(boxes):
        raise ValueError(f"the parts of {name} overlap")
    return ShardedTensor(parts, [min(len(tensor) for tensor, _ in parts), *shape])


def _overlap(boxes: Sequence[Sequence[tuple[int, int]]]) -> bool:
    """Return whether two boxes, each from and to along every axis, have an element in common."""
    cuts = [sorted({end for span in spans for end in span}) for spans in zip(*boxes, strict=True)]
    cells = np.zeros([len(ends) for ends in cuts], dtype=int)  # between one cut and the next
    for box in boxes:
        cells[tuple(slice(ends.index(low), ends.index(high)) for ends, (low, high) in zip(cuts, box, strict=True))] += 1
    return bool((cells > 1).any())
