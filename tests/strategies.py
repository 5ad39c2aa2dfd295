"""What strangers and broken disks make of files: for tests with hypothesis."""

from __future__ import annotations

import os

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
