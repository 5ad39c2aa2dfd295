"""What strangers and broken disks make of files: for tests with hypothesis."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from bhfast.trace.format import DTYPES

TIMES = int(os.environ.get("BHFAST_FUZZ_TIMES", "1"))


def fuzzed(examples: int) -> settings:
    """Decorate a test that is given so many examples, BHFAST_FUZZ_TIMES as many in a soak, a second for each."""
    return settings(max_examples=examples * TIMES, deadline=1000.0)


def mutated(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Replace, insert or delete some bytes, or cut off the end; each at a position modulo the length."""
    result = bytearray(content)
    for kind, position, new in changes:
        at = position % (len(result) + 1)
        if kind == "replace":
            result[at : at + len(new)] = new
        elif kind == "insert":
            result[at:at] = new
        elif kind == "delete":
            del result[at : at + len(new)]
        else:
            del result[at:]
    return bytes(result)


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "cut"]),
        st.integers(0, 1 << 16),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 100),
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([1 << 31, 1 << 32, (1 << 61) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
    st.floats(),
    st.sampled_from(["", "w", "\ud800", "\ufeff", "\0", "__metadata__", *DTYPES, "F4", "F6_E2M3", "F33", "f32"]),
    st.text(max_size=5),
)
JUNK = st.recursive(
    LEAVES,
    lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(st.text(max_size=4), x, max_size=3)),
    max_leaves=6,
)

HEADER_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["metadata", "rename metadata", "dtype", "shape", "swap", "remove", "rename", "add", "junk"]),
        st.integers(0, 1 << 16),
        st.integers(0, 1 << 16),
        JUNK,
    ),
    min_size=1,
    max_size=3,
)


def change_header(header: dict[str, Any], kind: str, one: int, other: int, junk: Any) -> None:
    """Change something in a header; most of it so that the file stays valid. Positions are modulo what there is."""
    metadata = header["__metadata__"]
    names = [name for name in header if name != "__metadata__"]
    if not names or not isinstance(metadata, dict):
        return
    entry, another = header[names[one % len(names)]], header[names[other % len(names)]]
    text = junk if isinstance(junk, str) else str(junk)
    text = text.encode(errors="replace").decode()
    if kind in ("metadata", "rename metadata") and metadata:
        key = sorted(metadata)[one % len(metadata)]
        metadata[text if kind == "rename metadata" else key] = metadata.pop(key) if kind != "metadata" else text
    elif kind == "dtype":
        same = {"BF16": "F16", "F16": "I16", "I16": "BF16", "F32": "I32", "I32": "F32", "F64": "I64", "I64": "F64"}
        entry["dtype"] = same.get(entry["dtype"], entry["dtype"])
    elif kind == "shape":
        entry["shape"] = list(reversed(entry["shape"])) if other % 2 else [*entry["shape"], 1]
    elif kind == "swap" and "data_offsets" in entry and "data_offsets" in another:
        entry["data_offsets"], another["data_offsets"] = another["data_offsets"], entry["data_offsets"]
    elif kind == "remove":
        del header[names[one % len(names)]]
    elif kind == "rename":
        header[text] = header.pop(names[one % len(names)])
    elif kind == "add":
        header.setdefault(
            text, {**copy.deepcopy(entry), "shape": [0, 2], "data_offsets": entry["data_offsets"][1:] * 2}
        )
    elif kind == "junk":
        entry[text] = junk
