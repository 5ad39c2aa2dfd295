"""Reading a trace of one file: it is mapped into memory, and a slice reads just its own bytes."""

from __future__ import annotations

import base64
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace.checksums import checksums
from bhfast.trace.format import DTYPE_NAMES, FORMAT, MAX_SIZE, PADDING, _decode_header, _entry, format_bytes, parse_json


class TraceTensor(Tensor):
    """A tensor of a trace, or part of one: a view of the file. What is computed from it is a plain tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func is Tensor.__getitem__ else result

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(Tensor), spec)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Return a numpy view of the same bytes.

        Of bfloat16 and float8 it has the dtype of that name in ``ml_dtypes``, where that is installed, else uint16 or
        uint8.
        """
        plain = self.as_subclass(Tensor)
        name = str(self.dtype).removeprefix("torch.")
        if name != "bfloat16" and not name.startswith("float8"):
            return plain.numpy(force=force)
        raw = plain.view(torch.uint16 if self.itemsize == 2 else torch.uint8).numpy(force=force)
        try:
            import ml_dtypes
        except ImportError:
            return raw
        return raw.view(getattr(ml_dtypes, name))


class Trace(Mapping[str, Any]):
    """A trace file, mapped into memory: a mapping of names to tensors, of which a slice reads just its own bytes.

    The tensors live as long as somebody holds them, whether or not the Trace does. Writing to one changes a private
    copy in memory, never the file. A tied parameter is found under each of its names, and listed under the first.

    Attributes:
        path: the file.
        metadata: the header's ``__metadata__``.
        config: the settings of a run of ``bhfast.train``; empty if the file is of something else.
        optimizer: what :class:`bhfast.Recorder` says of the optimizer and its parameters; empty likewise.
    """

    def __init__(self, path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self.config: dict[str, Any] = self._json("config")
        self.optimizer: dict[str, Any] = self._json("optimizer")
        self._tied: dict[str, Any] = self._json("tied")
        self._tensors = tensors

    def _json(self, key: str) -> dict[str, Any]:
        """Return what the metadata hold under ``key``; nothing if it is not there."""
        what = f"{self.path} is corrupted: the metadata's {key}"
        try:
            value = parse_json(what, self.metadata.get(key, "{}"))
            if not isinstance(value, dict):
                raise TraceError(f"{what} is no JSON object")
        except TraceError:
            if self.metadata.get("format") == FORMAT:
                raise
            return {}  # another program's files may have anything there
        return value

    def __getitem__(self, name: str) -> Any:
        try:
            return self._tensors[name if name in self._tensors else self._tied[name]]
        except (KeyError, TypeError):
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {', '.join(self._tensors)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def steps(self) -> Tensor:
        """The recorded steps: int64 ``[R]``."""
        return self["recorded_steps"][:]

    def damage(self) -> Iterator[tuple[str, int | None]]:
        """Compare all data with the checksums in the metadata; yield each damaged tensor and record.

        The record is an index along axis 0, the first of several if they share a checksum; None for a tensor of one
        axis or none. Yields nothing if the file has no checksums.

        Raises:
            TraceError: the checksums themselves are damaged.
        """
        try:
            each = int(self.metadata.get("crc32_records", "1"))
            wanted = {k: np.frombuffer(base64.b64decode(v), dtype="<u4") for k, v in self._json("crc32").items()}
            pairs = [(name, self._tensors[name], sums) for name, sums in wanted.items()]
            fits = 0 < each < MAX_SIZE
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise TraceError(f"{self.path} is corrupted: its checksums cannot be read")
        for name, tensor, sums in pairs:
            wants = -(-len(tensor) // each) if tensor.dim() > 1 and len(tensor) else 1
            if len(sums) != wants:
                raise TraceError(f"{self.path} is corrupted: {len(sums)} checksums for {name}, wanted {wants}")
            for record in np.flatnonzero(checksums(tensor, each) != sums):
                yield name, int(record) * each if tensor.dim() > 1 else None

    def __repr__(self) -> str:
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in self._tensors.values())
        about = [str(self.path), format_bytes(size)]
        steps = self._tensors.get("recorded_steps")
        if steps is not None and steps.dim() == 1 and len(steps) and steps.dtype == torch.int64:
            about.insert(1, f"{len(steps):,} records, steps {int(steps[0]):,} to {int(steps[-1]):,}")
        rows = [f"  {name:<16} {DTYPE_NAMES[x.dtype]:<5} {list(x.shape)}" for name, x in self._tensors.items()]
        return "\n".join([f"Trace({', '.join(about)})", *rows])


def open_file(path: Path) -> Trace:
    """Open one safetensors file, without reading its data.

    Raises:
        TraceError: it is not there, not safetensors, truncated, or its header does not fit its data.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise TraceError(f"{path} is not a safetensors file: it has {size} bytes")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise TraceError(f"cannot open the trace {path}: {error.strerror}") from None
    header, start = _decode_header(path, data, size)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise TraceError(f"{path} is corrupted: its metadata are no JSON object of strings")
    entries = sorted(((name, _entry(path, name, x)) for name, x in header.items()), key=lambda item: item[1][2:])
    end = 0
    for name, (_, _, first, last) in entries:
        if first != end:
            raise TraceError(f"{path} is corrupted: {name} starts at byte {first} of the data, wanted {end}")
        end = last
    if start + end != size:
        what = "truncated" if start + end > size else "corrupted"
        raise TraceError(f"{path} is {what}: its header describes {start + end} bytes, the file has {size}")
    tensors = {
        name: _view(data, start + first, dtype, shape)
        for name, (dtype, shape, first, _) in entries
        if not name.startswith(PADDING)
    }
    return Trace(path, tensors, metadata)


def _view(data: mmap.mmap, offset: int, dtype: torch.dtype, shape: list[int]) -> TraceTensor:
    count = math.prod(shape)
    if count == 0:
        tensor = torch.empty(0, dtype=dtype).as_strided(shape, [0] * len(shape))
    elif offset % dtype.itemsize:  # foreign files need not align their tensors
        raw = bytearray(data[offset : offset + count * dtype.itemsize])
        tensor = torch.frombuffer(raw, dtype=dtype).view(shape)
    else:
        tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)
    return tensor.as_subclass(TraceTensor)
