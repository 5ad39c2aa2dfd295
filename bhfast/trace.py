"""The trace file: a safetensors file whose tensors have the recorded step as axis 0.

:func:`open_trace` maps a file into memory; a slice reads just its own bytes.

The layout is safetensors' own: 8 bytes of header length, little-endian; a JSON header, padded with spaces so that the
data starts at a multiple of 64; the tensors, each aligned to its elements. Where there are bytes between two of them, a
tensor of bytes called ``_padding.N`` covers these, as the format has no gaps. The metadata holds a CRC-32 of every
record of every tensor, so that damage can be found, and located, also where a replay cannot see it; in a file of many
records, one for each few of them.
"""

from __future__ import annotations

import base64
import json
import math
import mmap
import os
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import TraceError

FORMAT = "bhfast-trace"
FORMAT_VERSION = "1"
ALIGNMENT = 64
MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_CHECKSUMS = 1 << 17  # in one header: 0.7 MB of text
MAX_SIZE = 1 << 62  # elements along one axis, or bytes
MAX_AXES = 32  # of a tensor; numpy had no more before 2.0
PADDING = "_padding."

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
    "C64": torch.complex64,
}
if hasattr(torch, "float8_e8m0fnu"):  # since 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The header


class Entry(NamedTuple):
    """Where a tensor is: its data starts ``offset`` bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def place(tensors: Mapping[str, Tensor], offset: int = 0) -> dict[str, Entry]:
    """Lay out tensors side by side from ``offset`` on, in file order.

    Those whose size is a multiple of 64 come first, then by falling element size, so that each is aligned.
    """

    def rank(name: str) -> tuple[bool, int]:
        return tensors[name].nbytes % ALIGNMENT != 0, -tensors[name].itemsize

    entries = {}
    for name in sorted(tensors, key=rank):
        tensor = tensors[name]
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), offset)
        offset += tensor.nbytes
    return entries


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str], size: int | None = None) -> bytes:
    """Return the length prefix and padded header of a file.

    Args:
        entries: by name; bytes between two of them become padding.
        metadata: the header's ``__metadata__``.
        size: how many bytes to return; None for as few as there are.

    Raises:
        TraceError: they do not fit into ``size``, or are more than safetensors allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].end)):
        if entry.offset > end:
            header[f"{PADDING}{len(header)}"] = _describe(Entry(torch.uint8, (entry.offset - end,), end))
        header[name] = _describe(entry)
        end = entry.end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = size - 8 if size is not None else len(text) + -(8 + len(text)) % ALIGNMENT
    if len(text) > padded or padded > MAX_HEADER:
        raise TraceError(f"the header has {len(text)} bytes, more than the {min(padded, MAX_HEADER)} there are for it")
    return padded.to_bytes(8, "little") + text.ljust(padded)


def _describe(entry: Entry) -> dict[str, Any]:
    return {
        "dtype": DTYPE_NAMES[entry.dtype],
        "shape": list(entry.shape),
        "data_offsets": [entry.offset, entry.end],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checksums


def checksums(tensor: Tensor, records: int = 1) -> np.ndarray:
    """Return the CRC-32 of each ``records`` entries along axis 0 of a tensor; of the whole if it has one axis.

    Returns:
        Little-endian uint32, ``[ceil(R / records)]`` or ``[1]``.
    """
    data = bytes_of(tensor)
    if tensor.dim() < 2 or not len(tensor):
        return np.array([zlib.crc32(data)], dtype="<u4")
    size = len(data) // len(tensor)
    sums = [zlib.crc32(data[i * size : (i + records) * size]) for i in range(0, len(tensor), records)]
    return np.array(sums, dtype="<u4")


def records_per_checksum(records: int, tensors: int) -> int:
    """Return how many records share a checksum, a power of two, so that the header stays small."""
    each = max(1, MAX_CHECKSUMS // max(1, tensors))
    return 1 << max(0, math.ceil(records / each) - 1).bit_length()


def join_checksums(sums: np.ndarray, size: int, records: int) -> np.ndarray:
    """Turn the CRC-32 of single records into those of each ``records`` of them.

    Args:
        sums: uint32 ``[R]``.
        size: bytes of a record.
        records: a power of two.

    The CRC of A followed by B is that of A moved on by the length of B, plus (in GF(2)) that of B; see Mark Adler's
    ``crc32_combine`` in zlib.
    """
    joined = sums.astype(np.uint32)
    tail = size  # bytes that the last one covers
    while records > 1:
        if len(joined) % 2:
            pairs, last = joined[:-1], joined[-1:]
            new_tail = tail
        else:
            pairs, last = joined, joined[:0]
            new_tail = size + tail
        first, second = pairs[0::2].copy(), pairs[1::2]
        if len(first):
            full = len(first) - (len(last) == 0)  # all whose second half is whole
            first[:full] = _moved_on(first[:full], size)
            first[full:] = _moved_on(first[full:], tail)
        joined = np.concatenate([first ^ second, last])
        tail = new_tail
        size, records = 2 * size, records // 2
    return joined.astype("<u4")


def _moved_on(sums: np.ndarray, count: int) -> np.ndarray:
    """Return CRC-32s moved on by ``count`` bytes: a linear map over GF(2), raised to that power by squaring."""
    columns = np.array([0xEDB88320, *(1 << np.arange(31))], dtype=np.uint32)  # one bit
    for _ in range(3):
        columns = _apply(columns, columns)
    while count:
        if count & 1:
            sums = _apply(columns, sums)
        columns = _apply(columns, columns)
        count >>= 1
    return sums


def _apply(columns: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    bits = (vectors[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(np.where(bits == 1, columns, np.uint32(0)), axis=1)


def checksum_metadata(sums: Mapping[str, np.ndarray], records: int) -> dict[str, str]:
    """Return the metadata for checksums of each ``records`` records."""
    own = {"crc32": json.dumps({name: base64.b64encode(x.tobytes()).decode() for name, x in sums.items()})}
    return own if records == 1 else {**own, "crc32_records": str(records)}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one element is contiguous, whatever its stride
    return flat.view(torch.uint8).numpy().data


def format_bytes(count: float) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


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


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a trace, or any safetensors file, or the ``.index.json`` of several, without reading its data.

    Raises:
        TraceError: it is not there, not safetensors, truncated, or its header does not fit its data.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        from bhfast.index import open_index

        return open_index(path)
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


def _decode_header(path: Path, data: mmap.mmap, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise TraceError(f"{path} is not a safetensors file: its header would have {length} bytes")
    if 8 + length > size:
        raise TraceError(f"{path} is truncated: its header ends at byte {8 + length}, the file at {size}")
    header = parse_json(f"{path} is not a safetensors file: its header", data[8 : 8 + length])
    if not isinstance(header, dict):
        raise TraceError(f"{path} is not a safetensors file: its header is no JSON object")
    return header, 8 + length


def parse_json(what: str, text: bytes | str) -> Any:
    """Parse JSON that strangers may have written.

    Args:
        what: the beginning of the message, should it be wrong.
        text: UTF-8.

    Raises:
        TraceError: it is not valid, or has a name twice.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        text.encode()  # no lone surrogates
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{what} is not valid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()  # nor escaped ones
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Return dtype, shape, and first and last byte of a tensor, after checking its entry in the header."""
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = isinstance(shape, list) and all(type(n) is int and 0 <= n < MAX_SIZE for n in [*shape, first, last])
        fits = fits and len(shape) <= MAX_AXES
        fits = fits and math.prod(n or 1 for n in shape) * dtype.itemsize < MAX_SIZE  # numpy wants this of empty ones
        fits = fits and last - first == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise TraceError(f"{path} is corrupted: the header's entry for {name} is {reprlib.repr(entry)}")
    return dtype, shape, first, last


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
