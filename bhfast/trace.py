"""The trace file: a safetensors file whose tensors have the recorded step as axis 0.

Writing: :class:`TraceWriter` reserves ``NAME.partial`` before the first step and turns it into ``NAME`` in one rename.
Reading: :func:`open_trace` maps the file into memory; a slice reads just its own bytes.

The layout is safetensors' own: 8 bytes of header length, little-endian; a JSON header, padded with spaces so that the
data starts at a multiple of 64; the tensors without gaps, those whose size is a multiple of 64 first, then by falling
element size, so that every tensor is aligned to its elements. The metadata holds a CRC-32 of every record of every
tensor, so that damage can be found, and located, also where a replay cannot see it.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import math
import mmap
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import StorageError, TraceError

FORMAT = "bhfast-trace"
FORMAT_VERSION = "1"
ALIGNMENT = 64
MAX_HEADER = 100_000_000  # the limit of the safetensors library
CHUNK = 16 << 20

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return the length prefix and padded header of a file of ``tensors``, and their names in file order."""

    def place(name: str) -> tuple[bool, int]:
        return tensors[name].nbytes % ALIGNMENT != 0, -tensors[name].itemsize

    order = sorted(tensors, key=place)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, order


def checksums(tensor: Tensor) -> np.ndarray:
    """Return the CRC-32 of each record (entry along axis 0) of a contiguous tensor, or of the whole if it has one axis.

    Returns:
        Little-endian uint32, ``[R]`` or ``[1]``.
    """
    parts = tensor if tensor.dim() > 1 else tensor[None]
    return np.array([zlib.crc32(_bytes_of(part)) for part in parts], dtype="<u4")


class TraceWriter:
    """Claims a trace file before a run and writes it whole at the end.

    Entering creates ``NAME.partial`` and locks it against other runs. :meth:`commit` writes it, syncs it and renames it
    to ``NAME``. Leaving without a commit removes it; ``NAME`` itself is never touched but by the rename.

    Args:
        path: the final name.
        overwrite: whether ``NAME``, and a ``NAME.partial`` that an earlier run left, may be replaced.

    Raises:
        StorageError: on entering, if ``NAME`` or ``NAME.partial`` exists, or the folder is not writable.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite = overwrite

    def __enter__(self) -> TraceWriter:
        if self.path.is_dir():
            raise StorageError(f"cannot write the trace {self.path}: it is a folder; name a file with --out")
        if self.path.exists() and not self.overwrite:
            raise StorageError(
                f"the trace {self.path} exists; pass --overwrite to replace it, or choose another file with --out"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._open()
        except OSError as error:
            raise StorageError(
                f"cannot write the trace {self.path}: {error.strerror}; choose another place with --out"
            ) from None
        return self

    def _open(self) -> int:
        exists = self.partial.exists()
        fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StorageError(
                f"{self.partial} is being written by another run; wait for it, or choose another file with --out"
            ) from None
        if exists and not self.overwrite:
            os.close(fd)
            raise StorageError(
                f"{self.partial} was left by a run that did not finish; delete it or pass --overwrite to replace it, "
                "or choose another file with --out"
            )
        return fd

    def reserve(self, size: int) -> None:
        """Reserve ``size`` bytes of disk in all, so that the commit cannot fail for want of space.

        Raises:
            StorageError: the disk is too small.
        """
        free = shutil.disk_usage(self.path.parent).free + os.fstat(self._fd).st_blocks * 512
        if free < size:
            raise StorageError(
                f"the disk of {self.path.parent} is too small for the trace: {format_bytes(size)} wanted, "
                f"{format_bytes(free)} free; free some, choose another place with --out, or record less with "
                "--record-every or --steps"
            )
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, size)
            except OSError as error:
                raise StorageError(
                    f"cannot reserve {format_bytes(size)} for the trace {self.path}: {error.strerror}; "
                    "choose another place with --out"
                ) from None

    def commit(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
        """Write the file, sync it and give it its final name.

        Nothing is copied: the bytes go from the tensors to the file. Nobody may write to the tensors meanwhile.

        Args:
            tensors: contiguous CPU tensors by name.
            metadata: for the header's ``__metadata__``.
            path: the final name, in the same folder.

        Raises:
            StorageError: the disk filled up or failed; the ``.partial`` is removed, the tensors are as they were.
        """
        sums = {name: base64.b64encode(checksums(tensor).tobytes()).decode() for name, tensor in tensors.items()}
        header, order = encode_header(tensors, {**metadata, "crc32": json.dumps(sums)})
        try:
            os.lseek(self._fd, 0, os.SEEK_SET)
            _write_all(self._fd, memoryview(header))
            for name in order:
                _write_all(self._fd, _bytes_of(tensors[name]))
            size = os.lseek(self._fd, 0, os.SEEK_CUR)
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
            os.replace(self.partial, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise StorageError(f"writing the trace {path} failed: {error.strerror}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(FileNotFoundError):  # gone if it was committed
            self.partial.unlink()
        os.close(self._fd)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data[:CHUNK]) :]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def format_bytes(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Trace(Mapping[str, Tensor]):
    """A trace file, mapped into memory: a mapping of names to tensors, of which a slice reads just its own bytes.

    The tensors live as long as somebody holds them, whether or not the Trace does. Writing to one changes a private
    copy in memory, never the file.

    Attributes:
        path: the file.
        metadata: the header's ``__metadata__``.
        config: the run's settings; empty if the file is not bhfast's.
    """

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self.config: dict[str, Any] = json.loads(metadata.get("config", "{}"))
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {', '.join(self._tensors)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def steps(self) -> Tensor:
        """The recorded steps: int64 ``[R]``."""
        return self["recorded_steps"]

    def damage(self) -> Iterator[tuple[str, int | None]]:
        """Compare all data with the checksums in the metadata; yield each damaged tensor and record.

        The record is an index along axis 0; None for a tensor of one axis or none. Yields nothing if the file has no
        checksums.
        """
        for name, encoded in json.loads(self.metadata.get("crc32", "{}")).items():
            wanted = np.frombuffer(base64.b64decode(encoded), dtype="<u4")
            tensor = self[name]
            for record in np.flatnonzero(checksums(tensor) != wanted):
                yield name, int(record) if tensor.dim() > 1 else None

    def __repr__(self) -> str:
        rows = [f"  {name:<16} {DTYPE_NAMES[x.dtype]:<5} {list(x.shape)}" for name, x in self._tensors.items()]
        return "\n".join([f"Trace({str(self.path)!r})", *rows])


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a trace, or any safetensors file, without reading its data.

    Raises:
        TraceError: it is not there, not safetensors, truncated, or its header does not fit its data.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise TraceError(f"{path} is not a safetensors file: it has {size} bytes")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise TraceError(f"cannot open the trace {path}: {error.strerror}") from None
    header, start = _decode_header(path, data, size)
    metadata = header.pop("__metadata__", {})
    spans = sorted((_span(path, name, entry), name) for name, entry in header.items())
    end = 0
    for (first, last), name in spans:
        if first != end:
            raise TraceError(f"{path} is corrupted: {name} starts at byte {first} of the data, wanted {end}")
        end = last
    if start + end != size:
        what = "truncated" if start + end > size else "corrupted"
        raise TraceError(f"{path} is {what}: its header describes {start + end} bytes, the file has {size}")
    tensors = {name: _view(data, start + first, header[name]) for (first, _), name in spans}
    return Trace(path, tensors, metadata)


def _decode_header(path: Path, data: mmap.mmap, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise TraceError(f"{path} is not a safetensors file: its header would have {length} bytes")
    if 8 + length > size:
        raise TraceError(f"{path} is truncated: its header ends at byte {8 + length}, the file at {size}")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise TraceError(f"{path} is not a safetensors file: its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise TraceError(f"{path} is not a safetensors file: its header is no JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Return the first and last byte of a tensor, after checking its entry in the header."""
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = all(isinstance(n, int) and n >= 0 for n in [*shape, first])
        fits = fits and last - first == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise TraceError(f"{path} is corrupted: the header's entry for {name} is {json.dumps(entry)}")
    return first, last


def _view(data: mmap.mmap, offset: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:  # foreign files need not align their tensors
        return torch.frombuffer(bytearray(data[offset : offset + count * dtype.itemsize]), dtype=dtype).view(shape)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)
