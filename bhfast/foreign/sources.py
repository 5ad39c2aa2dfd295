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
from bhfast.storage.files import CHUNK
from bhfast.trace.format import DTYPES, FORMAT
from bhfast.trace.lazy import LazyTensor, wanted_records
from bhfast.trace.opening import open_file

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
    """A dataset. It is read in blocks of whole HDF5 chunks, so that each is decompressed once; the last one is kept.

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
        self._length = chunk * max(1, CHUNK // row)  # records in a block
        self._block: tuple[int, Tensor] | None = None

    def whole(self) -> Tensor:
        """Read all of it."""
        return self._tensor(())

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        records = wanted_records(steps, len(self))
        if not len(records):
            return torch.empty((0, high - low, *self.shape[2:]), dtype=self.dtype)
        parts = []
        first, stop = records[0], records[-1] + 1
        for start in range(first - first % self._length, stop, self._length):
            block = self._read_block(start)
            parts.append(block[max(0, first - start) : stop - start])
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(found) > len(records):
            found = found[torch.tensor(records) - first]
        return found[:, low:high] if self.dim() > 1 else found

    def _read_block(self, start: int) -> Tensor:
        if self._block is None or self._block[0] != start:
            self._block = None  # before the next one is read
            self._block = start, self._tensor(slice(start, min(start + self._length, len(self))))
        return self._block[1]

    def _tensor(self, index: Any) -> Tensor:
        try:
            array = np.asarray(self._data[index])
        except UNREADABLE as error:
            raise TraceError(f"{self._where} cannot be read: {error}") from None
        if self.dtype == torch.bfloat16:
            array = array.view(array.dtype.byteorder.replace("|", "=") + "u2")
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))
        tensor = torch.from_numpy(array.reshape(array.shape or (1,))).view(self.dtype)
        return tensor if array.shape else tensor[0]
