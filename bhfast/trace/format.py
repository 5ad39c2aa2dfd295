"""The trace file: a safetensors file whose tensors have the recorded step as axis 0.

:func:`bhfast.open_trace` maps a file into memory; slicing a tensor reads only the bytes of the slice.

The layout is safetensors' own: 8 bytes of header length, little-endian; a JSON header, padded with spaces so that the
data starts at a multiple of 64; the tensors, each aligned to its elements. The format allows no gaps, so any bytes
between two tensors are covered by a tensor of bytes called ``_padding.N``. The metadata hold a CRC-32 of every record
of every tensor, so that damage can be found and located even if a replay cannot see it. In a file of very many records,
several records share a CRC-32. Since format version 2 the metadata also hold a CRC-32 of the header itself.
"""

from __future__ import annotations

import json
import math
import mmap
import reprlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bhfast.errors import DamageError, TraceError

FORMAT = "bhfast-trace"
FORMAT_VERSION = "2"  # 1 had no checksum of the header
READABLE_VERSIONS = ("1", FORMAT_VERSION)
HEADER_CHECKSUM = "header_crc32"
ALIGNMENT = 64
MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_SIZE = 1 << 62  # elements along one axis, or bytes
MAX_AXES = 32  # of a tensor; numpy had no more before 2.0
PADDING = "_padding."
KEYFRAMES = ".keyframes"  # ends the name of a tensor recorded at key frames only
KEYFRAME_STEPS = "keyframe_steps"
CHANGED = ".changed"  # ends the name of the flags of records that the loop itself changed after the step
# What `bhfast train` calls the tensors of the token vectors, by field.
REFERENCE_NAMES = {"param": "embeddings", "grad": "grads", "exp_avg": "momentum", "exp_avg_sq": "variance"}
AFTER_STEP = ".after_step"  # ends the name of what the step had left in these records

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
    """Lay out tensors side by side, starting at ``offset``; return them in file order.

    Tensors whose size is a multiple of 64 come first; within each part, larger elements come first. So all are aligned.
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
        metadata: the header's ``__metadata__``, to which this adds the header's checksum.
        size: how many bytes to return; None for as few as possible.

    Raises:
        TraceError: the header does not fit into ``size``, or is larger than safetensors allows.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].end)):
        if entry.offset > end:
            header[f"{PADDING}{len(header)}"] = _describe(Entry(torch.uint8, (entry.offset - end,), end))
        header[name] = _describe(entry)
        end = entry.end
    header["__metadata__"][HEADER_CHECKSUM] = header_checksum(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = size - 8 if size is not None else len(text) + -(8 + len(text)) % ALIGNMENT
    if len(text) > padded or padded > MAX_HEADER:
        raise TraceError(f"the header has {len(text)} bytes, but there is room for {min(padded, MAX_HEADER)}")
    return padded.to_bytes(8, "little") + text.ljust(padded)


def header_checksum(header: Mapping[str, Any]) -> str:
    """Return the CRC-32 of a header: all its names, dtypes, shapes, offsets and metadata, except this checksum itself.

    It is the CRC-32 of the header as JSON with sorted keys, in ASCII and without spaces, so it does not depend on how
    the header is written. The result has eight hexadecimal digits.
    """
    metadata = {key: text for key, text in header["__metadata__"].items() if key != HEADER_CHECKSUM}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"


def _describe(entry: Entry) -> dict[str, Any]:
    return {
        "dtype": DTYPE_NAMES[entry.dtype],
        "shape": list(entry.shape),
        "data_offsets": [entry.offset, entry.end],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one element is contiguous, whatever its stride
    return flat.view(torch.uint8).numpy().data


def format_bytes(count: float) -> str:
    """Return a number of bytes as text, in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def decode_header(path: Path, data: mmap.mmap, size: int) -> tuple[dict[str, Any], int]:
    """Return the header of a mapped file of ``size`` bytes, and where its data starts.

    Raises:
        TraceError: it is not a safetensors file.
        DamageError: it is truncated, or its header cannot be parsed.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise TraceError(f"{path} is not a safetensors file: its header would have {length} bytes")
    if 8 + length > size:
        raise DamageError(f"{path} is truncated: its header ends at byte {8 + length}, the file at {size}")
    text = data[8 : 8 + length]
    try:
        header = parse_json("its header", text)
    except TraceError as error:
        if text[:1] == b"{":
            raise DamageError(f"{path} is corrupted: {error}") from None
        raise TraceError(f"{path} is not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise TraceError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def parse_json(what: str, text: bytes | str) -> Any:
    """Parse JSON from an untrusted source.

    Args:
        what: how the error message begins.
        text: UTF-8.

    Raises:
        TraceError: it is not valid JSON, or an object has the same name twice.
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
        raise ValueError("a name appears twice")
    return result


def decode_entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Return dtype, shape, and first and last byte of a tensor, after checking its entry in the header.

    Raises:
        DamageError: the entry does not describe a tensor.
    """
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        fits = isinstance(shape, list) and all(type(n) is int and 0 <= n < MAX_SIZE for n in [*shape, first, last])
        fits = fits and len(shape) <= MAX_AXES
        fits = fits and math.prod(n or 1 for n in shape) * dtype.itemsize < MAX_SIZE  # numpy wants this of empty ones
        fits = fits and last - first == math.prod(shape) * dtype.itemsize
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise DamageError(f"{path} is corrupted: the header's entry for {name} is {reprlib.repr(entry)}")
    return dtype, shape, first, last
