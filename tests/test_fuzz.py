"""Files that strangers wrote, or that were damaged: a reader says so, or reads them; and never anything else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import CHANGES, JUNK, fuzzed, mutated
from traces import joined, split

from bhfast.errors import TraceError
from bhfast.trace import Trace, open_trace
from bhfast.trace.checksums import checksum_metadata, checksums
from bhfast.trace.format import DTYPE_NAMES, DTYPES, FORMAT, PADDING, Entry, bytes_of, encode_header, place

OURS = re.compile(r"a name appears twice|the metadata's (config|optimizer|tied) is")  # what only we refuse, by message


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each example is written anew."""
    return tmp_path_factory.mktemp("fuzz") / "t.safetensors"


def valid_file() -> bytes:
    """All that a file of ours may have: dtypes, empty tensors, scalars, padding, checksums, several names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "w": torch.randn(3, 2, 4, generator=generator).bfloat16(),
        "w.exp_avg": torch.randn(3, 2, 4, generator=generator),
        "flags": torch.tensor([True, False, True]),
        "eighths": torch.randn(3, 2, generator=generator).to(torch.float8_e4m3fn),
        "none": torch.zeros(3, 0),
        "nothing": torch.zeros(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(1e-8, dtype=torch.float64),
        "recorded_steps": torch.arange(3),
    }
    places = place(tensors)
    end = max(entry.end for entry in places.values())
    places["scalar"] = Entry(torch.float64, (), end + -end % 8 + 16)
    metadata = {
        "format": FORMAT,
        "config": '{"steps": 2}',
        "optimizer": '{"name": "AdamW"}',
        "tied": '{"head": "w"}',
        **checksum_metadata({name: checksums(x) for name, x in tensors.items()}, 1),
    }
    header = encode_header(places, metadata)
    content = bytearray(header).ljust(len(header) + places["scalar"].end, b"\0")
    for name, entry in places.items():
        content[len(header) + entry.offset : len(header) + entry.end] = bytes_of(tensors[name])
    return bytes(content)


VALID = valid_file()
VALID_HEADER, DATA = split(VALID)


def check(path: Path, content: bytes) -> Trace | None:
    """Refuse the file with a TraceError, and nothing else; or open it, and then everything in it can be used.

    What safetensors accepts we accept too, with the same bytes; but for headers that name something twice or give a
    tensor more than 32 axes or more elements than numpy could count, dtypes that torch lacks, and metadata of our own
    that do not hold what we write there.
    """
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        theirs = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        theirs = None
    opened, refusal = opened_or_refused(path)
    if opened is None:
        assert theirs is None or OURS.search(refusal) or not all(map(is_usual, theirs.values())), refusal
        return None
    entries = {n: x for n, x in split(content)[0].items() if n != "__metadata__" and not n.startswith(PADDING)}
    assert opened.keys() == entries.keys()
    repr(opened).encode()
    for name, tensor in opened.items():
        assert DTYPE_NAMES[tensor.dtype] == entries[name]["dtype"]
        assert list(tensor.shape) == list(tensor.bits().shape) == entries[name]["shape"]
        assert type(tensor.clone()) is torch.Tensor
        assert theirs is None or bytes(bytes_of(tensor)) == theirs[name]["data"]
        if tensor.dim():
            assert tensor[:1].clone().shape == tensor[-1:].bits().shape
    try:
        for name, record in opened.damage():
            assert name in opened
            assert record is None or 0 <= record < len(opened[name])
    except TraceError:
        pass
    return opened


def opened_or_refused(path: Path) -> tuple[Trace | None, str]:
    try:
        return open_trace(path), ""
    except TraceError as error:
        return None, str(error)


def is_usual(entry: dict[str, Any]) -> bool:
    """Whether torch and numpy can hold a tensor that safetensors accepts."""
    elements = math.prod(n or 1 for n in entry["shape"])
    return entry["dtype"] in DTYPES and len(entry["shape"]) <= 32 and elements < 1 << 58


def test_a_file_as_we_write_it_passes(path: Path) -> None:
    opened = check(path, VALID)
    assert opened is not None
    assert list(opened.damage()) == []
    assert any(name.startswith(PADDING) for name in VALID_HEADER)
    assert torch.equal(opened["head"], opened["w"])


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


@fuzzed(300)
@given(content=st.binary(max_size=200), has_length=st.booleans())
def test_arbitrary_bytes(path: Path, content: bytes, has_length: bool) -> None:
    check(path, joined(content, b"") if has_length else content)


@fuzzed(500)
@given(changes=CHANGES)
@example(changes=[("delete", 100, b"1")])
@example(changes=[("cut", len(VALID) - 1, b"")])
def test_damaged_bytes(path: Path, changes: list[tuple[str, int, bytes]]) -> None:
    check(path, mutated(VALID, changes))


@fuzzed(200)
@given(at=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_data_is_found(path: Path, at: int, bit: int) -> None:
    """All but those of padding, which nobody reads."""
    content = bytearray(VALID)
    content[-len(DATA) + at] ^= 1 << bit
    opened = check(path, bytes(content))
    assert opened is not None
    within = {
        n for n, x in VALID_HEADER.items() if n != "__metadata__" and x["data_offsets"][0] <= at < x["data_offsets"][1]
    }
    assert {name for name, _ in opened.damage()} == {name for name in within if not name.startswith(PADDING)}


# ---------------------------------------------------------------------------------------------------------------------
# Headers

NAMES = sorted(VALID_HEADER.keys() - {"__metadata__"})
ENTRY_CHANGES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["dtype", "shape", "data_offsets", None, "more"]), JUNK),
    max_size=3,
)


@fuzzed(500)
@given(changes=ENTRY_CHANGES, swapped=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)))
def test_entries_of_anything(path: Path, changes: list[tuple[str, str | None, Any]], swapped: tuple[str, str]) -> None:
    header = json.loads(json.dumps(VALID_HEADER))
    one, other = (header[name] for name in swapped)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    for name, field, junk in changes:
        if field is None or not isinstance(header[name], dict):
            header[name] = junk
        else:
            header[name][field] = junk
    check(path, joined(header, DATA))


SIZES = st.lists(st.one_of(st.integers(0, 4), st.sampled_from([1 << 31, 1 << 40, 1 << 61])), max_size=5)


@fuzzed(300)
@given(
    shape=SIZES,
    dtype=st.sampled_from([*DTYPES]),
    shift=st.integers(0, 9),
    sums=st.integers(0, 3),
    each=st.sampled_from(["1", "2", "0", "-1", "1" * 30, "9" * 5000, "x", ""]),
)
@example(shape=[1 << 61, 0], dtype="U8", shift=0, sums=1, each="1")  # not 2**61 checksums
@example(shape=[1 << 61, 1 << 61, 0], dtype="U8", shift=0, sums=1, each="1")
@example(shape=[0, 1 << 61, 1 << 61], dtype="F64", shift=0, sums=1, each="1")
@example(shape=[1 << 61, 0], dtype="U8", shift=0, sums=1, each=str(1 << 61))
def test_any_shape_dtype_and_alignment(
    path: Path, shape: list[int], dtype: str, shift: int, sums: int, each: str
) -> None:
    size = torch.empty(0, dtype=DTYPES[dtype]).itemsize
    for n in shape:
        size *= n
    size = min(size, 4096)
    header = {
        "__metadata__": {
            "crc32": json.dumps({"x": "AAAAAA==" if sums == 1 else "A" * 16 * sums}),
            "crc32_records": each,
        },
        "before": {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]},
        "x": {"dtype": dtype, "shape": shape, "data_offsets": [shift, shift + size]},
    }
    opened = check(path, joined(header, bytes(shift + size)))
    assert opened is not None or not is_usual({"dtype": dtype, "shape": shape}) or size == 4096


@fuzzed(300)
@given(
    key=st.sampled_from(["config", "optimizer", "tied", "crc32", "crc32_records", "format", "other", None]),
    value=st.one_of(
        JUNK, JUNK.map(json.dumps), st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=3).map(json.dumps)
    ),
)
@example(key="tied", value='{"w": "gone"}')  # a tensor is found under its own name all the same
@example(key="crc32", value='{"w": "AAAA"}')
@example(key="crc32", value='{"w": "\ud800"}')
def test_metadata_of_anything(path: Path, key: str | None, value: Any) -> None:
    metadata = value if key is None else {**VALID_HEADER["__metadata__"], key: value}
    check(path, joined({**VALID_HEADER, "__metadata__": metadata}, DATA))


ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    ("header", "is_good"),
    [
        (b"[" * 100_000 + b"]" * 100_000, False),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, False),
        (b'{"a":{"dtype":"U8","shape":' + b"[" * 960 + b"]" * 960 + b',"data_offsets":[0,1]}}', False),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,1]}}', False),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', False),
        (b'{"a":{"dtype":"U8","shape":[' + b"1," * 31 + b'1],"data_offsets":[0,1]}}', True),
        (b'{"a":{"dtype":"U8","shape":[' + b"1," * 1000 + b'1],"data_offsets":[0,1]}}', False),
        (b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', False),
        (b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[false,true]}}', False),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,Infinity]}}', False),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', False),
        (b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", False),
        (b'{"\\ud800":' + ENTRY + b"}", False),
        (b'{"a":' + ENTRY + b',"__metadata__":{"b":"\\ud800"}}', False),
        (b'{"\xed\xa0\x80":' + ENTRY + b"}", False),
        (b'{"a":' + ENTRY + b',"__metadata__":{"b":null}}', False),
        (b'{"a":' + ENTRY + b',"__metadata__":null}', True),
        (b'{"a":' + ENTRY + b',"__metadata__":{"config":"of another program","tied":"[]"}}', True),
        (b'{"a":' + ENTRY + b',"__metadata__":{"config":"","format":"bhfast-trace"}}', False),
        (b'  {"a":' + ENTRY + b"}\t\n", True),
        (b'{"a":' + ENTRY + b"}\0", False),
        (b'\xef\xbb\xbf{"a":' + ENTRY + b"}", False),
        (('{"a":' + ENTRY.decode() + "}").encode("utf-16"), False),
        (b"", False),
    ],
    ids=lambda x: str(x)[2:34],
)
def test_peculiar_headers(path: Path, header: bytes, is_good: bool) -> None:
    assert (check(path, joined(header, b"\0")) is not None) == is_good


@pytest.mark.parametrize("length", [3, 1 << 20, 100_000_000, 100_000_001, 1 << 31, 1 << 63, (1 << 64) - 1])
def test_lengths_that_lie(path: Path, length: int) -> None:
    assert check(path, length.to_bytes(8, "little") + b"{}") is None


def test_a_long_header_of_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(8 + 100_000_000)
    with pytest.raises(TraceError, match="its header is not valid JSON"):
        open_trace(path)
