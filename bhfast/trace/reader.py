"""Reads a trace of one file: the file is mapped into memory, and slicing a tensor reads only that slice."""

from __future__ import annotations

import base64
import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import DamageError, TraceError
from bhfast.trace.checksums import checksums
from bhfast.trace.format import (
    DTYPE_NAMES,
    FORMAT,
    HEADER_CHECKSUM,
    MAX_SIZE,
    PADDING,
    READABLE_VERSIONS,
    decode_entry,
    decode_header,
    format_bytes,
    header_checksum,
    parse_json,
)
from bhfast.trace.tensors import TraceTensor

# Without this flag, all pages of a private map count as memory in use at once. Python has it since 3.13; the value is
# that of Linux on x86 and ARM.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Trace(Mapping[str, Any]):
    """A trace file, mapped into memory: a mapping from names to tensors. Slicing a tensor reads only that slice.

    A tensor stays valid when the Trace is gone. Writing to one changes a private copy in memory, never the file. A tied
    parameter is found under each of its names, and listed under the first one.

    Attributes:
        path: the file.
        metadata: the header's ``__metadata__``.
        config: the settings of a run of ``bhfast.train``; empty for other files.
        optimizer: the description of the optimizer and its parameters that :class:`bhfast.Recorder` wrote, for a
            replay; several optimizers are described as one. Empty for other files.
    """

    def __init__(
        self, path: Path, tensors: dict[str, Any], metadata: dict[str, str], header: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.config: dict[str, Any] = self.json("config")
        self.optimizer: dict[str, Any] = self.json("optimizer")
        self._tied: dict[str, Any] = self.json("tied")
        self._tensors = tensors
        self._header = header

    def json(self, key: str) -> dict[str, Any]:
        """Parse the JSON object under ``key`` of the metadata.

        Returns:
            The object; an empty one if there is none.

        Raises:
            DamageError: it is not a JSON object, in a file that bhfast wrote.
        """
        what = f"{self.path} is corrupted: the metadata's {key}"
        try:
            value = parse_json(what, self.metadata.get(key, "{}"))
            if not isinstance(value, dict):
                raise TraceError(f"{what} is not a JSON object")
        except TraceError as error:
            if self.metadata.get("format") == FORMAT:
                raise DamageError(str(error)) from None
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

    def header_is_intact(self) -> bool | None:
        """Compare names, dtypes, shapes, offsets and metadata with their checksum.

        Returns:
            Whether they agree. None if the file has no checksum of its header: in format version 1, in files of other
            programs, and for an index. False if it should have one: a file of bhfast, or one with checksums of records,
            that is not of version 1.
        """
        if self._header is None:
            return None
        if HEADER_CHECKSUM in self.metadata:
            return self.metadata[HEADER_CHECKSUM] == header_checksum(self._header)
        is_version_1 = self.metadata.get("format") == FORMAT and self.metadata.get("format_version") == "1"
        is_lost = "crc32" in self.metadata or self.metadata.get("format") == FORMAT
        return False if is_lost and not is_version_1 else None

    def damage(self) -> Iterator[tuple[str, int | None]]:
        """Compare all data with the checksums in the metadata; yield each damaged tensor and record.

        The record is an index along axis 0: the first of those that share the checksum. It is None for tensors of at
        most one axis. Yields nothing if the file has no checksums.

        Raises:
            DamageError: the checksums themselves are damaged, or a tensor has none.
        """
        if "crc32" not in self.metadata:
            return
        try:
            each = int(self.metadata.get("crc32_records", "1"))
            wanted = {k: np.frombuffer(base64.b64decode(v), dtype="<u4") for k, v in self.json("crc32").items()}
            fits = 0 < each < MAX_SIZE and wanted.keys() == self._tensors.keys()
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise DamageError(f"{self.path} is corrupted: its checksums cannot be read, or do not fit its tensors")
        for name, sums in wanted.items():
            tensor = self._tensors[name]
            wants = -(-len(tensor) // each) if tensor.dim() > 1 and len(tensor) else 1
            if len(sums) != wants:
                raise DamageError(f"{self.path} is corrupted: {len(sums)} checksums for {name}, wanted {wants}")
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
        TraceError: it does not exist, is not safetensors, or has a format version that this bhfast does not know.
        DamageError: it is truncated, or its header does not fit its data.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise TraceError(f"{path} is not a safetensors file: it has {size} bytes")
            flags = mmap.MAP_PRIVATE | MAP_NORESERVE
            data = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise TraceError(f"cannot open the trace {path}: {error.strerror}") from None
    header, start = decode_header(path, data, size)
    metadata = header.get("__metadata__")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise DamageError(f"{path} is corrupted: its metadata are not a JSON object of strings")
    tensors = {
        name: _view(data, start + first, dtype, shape)
        for name, (dtype, shape, first, _) in _entries(path, header, size - start)
        if not name.startswith(PADDING)
    }
    trace = Trace(path, tensors, metadata, header)
    version = metadata.get("format_version", "1")
    if metadata.get("format") == FORMAT and version not in READABLE_VERSIONS:
        if trace.header_is_intact() is False:
            raise DamageError(f"{path} is corrupted: its header is not the one that was written")
        raise TraceError(
            f"{path} has format version {version!r:.20}, this bhfast reads {' and '.join(READABLE_VERSIONS)}: "
            "use a newer bhfast"
        )
    return trace


def _entries(
    path: Path, header: dict[str, Any], size: int
) -> list[tuple[str, tuple[torch.dtype, list[int], int, int]]]:
    """Return the header's tensors in file order, after checking that they cover ``size`` bytes without gaps."""
    found = [(name, decode_entry(path, name, x)) for name, x in header.items() if name != "__metadata__"]
    found.sort(key=lambda item: item[1][2:])
    end = 0
    for name, (_, _, first, last) in found:
        if first != end:
            raise DamageError(f"{path} is corrupted: {name} starts at byte {first} of the data, wanted {end}")
        end = last
    if end != size:
        what = "truncated" if end > size else "corrupted"
        raise DamageError(f"{path} is {what}: its header describes {end} bytes of data, the file has {size}")
    return found


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
