"""Opening a trace file: it is mapped into memory, and its header checked, without reading its data."""

from __future__ import annotations

import math
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bhfast.errors import MALFORMED, DamageError, TraceError
from bhfast.trace.format import FORMAT, PADDING, READABLE_VERSIONS, decode_entry, decode_header
from bhfast.trace.reader import Trace
from bhfast.trace.rebuilt import keyframed_params
from bhfast.trace.tensors import TraceTensor

# Without this flag, all pages of a private map count as memory in use at once. Python has it since 3.13; the value is
# that of Linux on x86 and ARM.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
# A private map: writing to a tensor never changes the file.
PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | MAP_NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
    if hasattr(mmap, "MAP_PRIVATE")
    else {"access": mmap.ACCESS_COPY}
)


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
            data = mmap.mmap(file.fileno(), size, **PRIVATE)
    except OSError as error:
        partial = path.with_name(path.name + ".partial")
        hint = f"; its run has not ended, open {partial}" if not path.exists() and partial.exists() else ""
        raise TraceError(f"cannot open the trace {path}: {error.strerror}{hint}") from None
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
    add_keyframes(trace)
    return trace


def add_keyframes(trace: Trace) -> None:
    """Let a file have the states of all steps, of parameters that it holds at key frames only.

    Raises:
        DamageError: its description does not fit its key frames.
    """
    try:
        trace.add_keyframes(dict(keyframed_params(trace)))
    except MALFORMED as error:
        raise DamageError(
            f"{trace.path} is corrupted: what it says of its key frames does not fit them ({error})"
        ) from None


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
