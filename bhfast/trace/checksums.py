"""The checksums of records in a trace's metadata."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from bhfast.trace.format import HEADER_CHECKSUM, bytes_of

MAX_CHECKSUMS = 1 << 17  # in one header: 0.7 MB of text


def checksums(tensor: Tensor, records: int = 1) -> np.ndarray:
    """Return the CRC-32 of each group of ``records`` entries along axis 0; of the whole if the tensor has one axis.

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
    """Turn the CRC-32s of single records into those of groups of ``records``.

    Args:
        sums: uint32 ``[R]``.
        size: bytes of a record.
        records: a power of two.

    Returns:
        Little-endian uint32, ``[ceil(R / records)]``.

    The CRC of A followed by B is the CRC of A, advanced by the length of B, plus (in GF(2)) the CRC of B; see Mark
    Adler's ``crc32_combine`` in zlib.
    """
    joined = sums.astype(np.uint32)
    tail = size  # bytes that the last CRC covers
    while records > 1:
        if len(joined) % 2:
            pairs, last = joined[:-1], joined[-1:]
            new_tail = tail
        else:
            pairs, last = joined, joined[:0]
            new_tail = size + tail
        first, second = pairs[0::2].copy(), pairs[1::2]
        if len(first):
            full = len(first) - (len(last) == 0)  # the pairs whose second half is complete
            first[:full] = _moved_on(first[:full], size)
            first[full:] = _moved_on(first[full:], tail)
        joined = np.concatenate([first ^ second, last])
        tail = new_tail
        size, records = 2 * size, records // 2
    return joined.astype("<u4")


def _moved_on(sums: np.ndarray, count: int) -> np.ndarray:
    """Return CRC-32s advanced by ``count`` bytes: a linear map over GF(2), raised to that power by squaring."""
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
    """Return the metadata that hold checksums, each of ``records`` records."""
    own = {"crc32": json.dumps({name: base64.b64encode(x.tobytes()).decode() for name, x in sums.items()})}
    return own if records == 1 else {**own, "crc32_records": str(records)}


def without_checksums(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata without the checksums of records and of the header."""
    return {key: text for key, text in metadata.items() if not key.startswith(("crc32", HEADER_CHECKSUM))}
