"""A trace written as a whole: from tensors in memory, or from those of other traces, a part at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bhfast.errors import StorageError
from bhfast.storage.files import CHUNK, sync_folder, write_at
from bhfast.storage.output import OutputFile
from bhfast.trace.checksums import checksum_metadata, checksums, records_per_checksum
from bhfast.trace.format import bytes_of, encode_header, place


def write_trace(
    output: OutputFile,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str],
    path: Path,
    *,
    check: Callable[[Path], None] = lambda partial: None,
) -> None:
    """Write a whole trace, sync it, and give it its final name.

    Tensors in memory are not copied: the bytes go straight to the file. Do not write to the tensors meanwhile.

    Args:
        output: the file to write.
        tensors: contiguous CPU tensors, or tensors of other traces, by name.
        metadata: for the header's ``__metadata__``.
        path: the final name, in the same folder.
        check: called with the name of the written file before it gets its final name; what it raises prevents that.

    Raises:
        StorageError: the disk filled up or failed; the tensors are unchanged.
    """
    each = records_per_checksum(max(map(len, (x for x in tensors.values() if x.dim())), default=1), len(tensors))
    entries = place(tensors)
    sums = {name: np.zeros(_checksum_count(tensors[name], each), dtype="<u4") for name in entries}
    header = len(encode_header(entries, {**metadata, **checksum_metadata(sums, each)}))
    try:
        for name, entry in entries.items():
            sums[name] = _write_tensor(output.fd, tensors[name], header + entry.offset, each)
        write_at(output.fd, memoryview(encode_header(entries, {**metadata, **checksum_metadata(sums, each)})), 0)
        os.ftruncate(output.fd, header + max((entry.end for entry in entries.values()), default=0))
        os.fsync(output.fd)
    except OSError as error:
        raise StorageError(f"writing the trace {path} failed: {error.strerror}; nothing was saved") from error
    check(output.partial)
    output.is_worth_keeping = True
    try:
        os.replace(output.partial, path)
    except OSError as error:
        raise StorageError(
            f"renaming the trace to {path} failed: {error.strerror}; it is complete in {output.partial}: run "
            f"python -m bhfast.recover {output.partial}"
        ) from error
    output.is_worth_keeping = False
    sync_folder(path.parent)


def _checksum_count(tensor: Any, each: int) -> int:
    return -(-len(tensor) // each) if tensor.dim() > 1 and len(tensor) else 1


def _write_tensor(fd: int, tensor: Any, at: int, each: int) -> np.ndarray:
    """Write a tensor at byte ``at``; return its checksums, each of ``each`` records."""
    if _checksum_count(tensor, each) == 1:
        data = tensor[:] if tensor.dim() else tensor
        write_at(fd, bytes_of(data), at)
        return checksums(data, each)
    size = tensor.numel() * tensor.dtype.itemsize // len(tensor)
    count = max(1, CHUNK // max(1, size * each)) * each  # records at once
    sums = []
    for first in range(0, len(tensor), count):
        part = tensor[first : first + count]
        write_at(fd, bytes_of(part), at + first * size)
        sums.append(checksums(part, each))
    return np.concatenate(sums)
