"""What other programs recorded: HDF5 and safetensors files, read a few records at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace.format import DTYPES, FORMAT
from bhfast.trace.lazy import LazyTensor, wanted_records
from bhfast.trace.opening import open_file

BLOCK = 4 << 20  # bytes of a dataset that are read at once, unless one chunk has more
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError)  # what h5py raises on damaged files


@dataclass
class Source:
    """A file of another program.

    Attributes:
        path: the file.
        tensors: by name. Those of two axes or more read only what is indexed.
        attributes: what else it says, for JSON.
        left_out: why something in it is no tensor of a trace, by name.
    """

    path: Path
    tensors: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open an HDF5 or safetensors file; its tensors can be read inside the block.

    Raises:
        TraceError: it cannot be read, is neither, or is a trace of bhfast; or it is HDF5, and h5py is missing.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(HDF5_SIGNATURE))
    except OSError as error:
        raise TraceError(f"cannot open {path}: {error.strerror}") from None
    if start != HDF5_SIGNATURE:
        trace = open_file(path)
        if trace.metadata.get("format") == FORMAT:
            raise TraceError(f"{path} is a trace of bhfast already")
        yield Source(path, dict(trace), dict(trace.metadata))
        return
    try:
        import h5py
    except ImportError:
        raise TraceError(f"{path} is HDF5, which needs h5py: pip install h5py") from None
    try:
        opened = h5py.File(path, "r")
    except UNREADABLE as error:
        raise TraceError(f"{path} cannot be read as HDF5: {error}") from None
    with opened:
        yield _hdf5_source(path, opened)


def _hdf5_source(path: Path, opened: Any) -> Source:
    source = Source(path)
    try:
        source.attributes |= {key: _plain(value) for key, value in opened.attrs.items()}
        opened.visititems(lambda name, item: _add(source, name, item))
    except UNREADABLE as error:
        raise TraceError(f"{path} cannot be read as HDF5: {error}") from None
    return source


def _add(source: Source, name: str, item: Any) -> None:
    source.attributes |= {f"{name}@{key}": _plain(value) for key, value in item.attrs.items()}
    if not hasattr(item, "dtype"):
        return  # a group
    dtype = _torch_dtype(item.dtype)
    if dtype is None or item.shape is None:
        source.left_out[name] = f"a trace has no {item.dtype}" if item.shape is not None else "it is empty"
    else:
        tensor = Hdf5Tensor(source.path, name, item, dtype)
        source.tensors[name] = tensor if tensor.dim() > 1 else tensor.whole()


def _torch_dtype(dtype: np.dtype) -> torch.dtype | None:
    """Return the dtype of torch with the same values; None if a trace cannot have it."""
    found = torch.bfloat16 if dtype.name == "bfloat16" else getattr(torch, dtype.name, None)
    return found if isinstance(found, torch.dtype) and found in DTYPES.values() else None


def _plain(value: Any) -> Any:
    """Return an attribute as what JSON can hold."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, str | int | float | bool | list) else str(value)


class Hdf5Tensor(LazyTensor):
    """A dataset. It is read in blocks of whole HDF5 chunks, so that each is decompressed once.

    All blocks are read into one buffer, which is kept until the last record was read. What is returned is allocated by
    numpy: torch aligns what it allocates, and on glibc that leaves gaps in the heap which grow with the file.

    Args:
        path, name: for errors.
        data: the dataset.
        dtype: of the same values.
    """

    kind = "HDF5"

    def __init__(self, path: Path, name: str, data: Any, dtype: torch.dtype) -> None:
        super().__init__(data.shape, dtype)
        self._where = f"{path}: {name}"
        self._data = data
        chunk = data.chunks[0] if data.chunks else 1
        row = max(1, math.prod(self.shape[1:]) * self.itemsize * chunk)
        self._length = chunk * max(1, BLOCK // row)  # records in a block
        self._buffer: np.ndarray | None = None
        self._start: int | None = None  # the first record in the buffer

    def whole(self) -> Tensor:
        """Read all of it."""
        return self._as_tensor(self._read_into(np.empty(self.shape, self._native), ()))

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        records = wanted_records(steps, len(self))
        first, stop = (records[0], records[-1] + 1) if len(records) else (0, 0)
        found = self._as_tensor(np.empty((stop - first, *self.shape[1:]), self._native))
        for start in range(first - first % self._length, stop, self._length):
            block = self._read_block(start)
            begin, end = max(first, start), min(stop, start + len(block))
            found[begin - first : end - first] = block[begin - start : end - start]
        if stop == len(self):
            self._buffer = self._start = None
        if len(found) > len(records):
            found = found[torch.tensor(records) - first]
        return found[:, low:high] if self.dim() > 1 else found

    def _read_block(self, start: int) -> Tensor:
        count = min(self._length, len(self) - start)
        if self._buffer is None:
            self._buffer = np.empty((min(self._length, len(self)), *self.shape[1:]), self._native)
        if self._start != start:
            self._start = None  # if reading fails
            self._read_into(self._buffer[:count], slice(start, start + count))
            self._start = start
        return self._as_tensor(self._buffer[:count])

    @property
    def _native(self) -> np.dtype:
        return self._data.dtype.newbyteorder("=")

    def _read_into(self, array: np.ndarray, index: Any) -> np.ndarray:
        try:
            if array.size:
                self._data.read_direct(array, index)
        except UNREADABLE as error:
            raise TraceError(f"{self._where} cannot be read: {error}") from None
        return array

    def _as_tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.view("u2") if self.dtype == torch.bfloat16 else array).view(self.dtype)
