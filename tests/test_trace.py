"""The file: its bytes, its writer's promises, its reader's refusals."""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_memory, reset_peak_memory
from safetensors.torch import load_file, save_file
from traces import raw, tensors, write

from bhfast.errors import DamageError, TraceError
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.trace.checksums import MAX_CHECKSUMS, checksums, join_checksums, records_per_checksum
from bhfast.trace.format import DTYPES, PADDING, encode_header, place


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    loaded = load_file(path)
    assert loaded.keys() == tensors().keys()
    for name, wanted in tensors().items():
        assert loaded[name].dtype == wanted.dtype
        assert torch.equal(loaded[name], wanted)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["config"]) == {"steps": 2}


RECORDINGS: dict[str, dict[str, Any]] = {
    "memory": {"steps": 9, "storage": "memory"},
    "memory, cut short": {"steps": 50, "storage": "memory"},
    "stream": {"steps": 9, "storage": "stream"},
    "stream, cut short": {"steps": 5000, "storage": "stream"},
    "stream of unknown length": {"steps": None},
    "every third, in memory": {"steps": 9, "every": 3, "storage": "memory"},
    "every third, streamed": {"steps": 10, "every": 3, "storage": "stream"},
}


def record(path: Path, **options: Any) -> None:
    """Nine steps of two parameters, of one of them some rows; values logged late, and a constant."""
    torch.manual_seed(0)
    params = {"w": torch.nn.Parameter(torch.randn(33, 7).bfloat16()), "v": torch.nn.Parameter(torch.randn(5, 3))}
    optimizer = FusedAdam(params.values(), max_grad_norm=1.0)
    with Recorder(optimizer, params, path=path, rows={"w": [32, 0, 5]}, metadata={"of": "π"}, **options) as recorder:
        for step in range(1, 10):
            for param in params.values():
                param.grad = torch.randn_like(param)
            optimizer.step()
            recorder.log(loss=torch.tensor(step / 7))
            if step > 4:
                recorder.log(late=torch.full((5, 9), step, dtype=torch.int32), flag=torch.tensor(True))
        recorder.constants["frequencies"] = torch.arange(3).bfloat16()


@pytest.mark.parametrize("options", RECORDINGS.values(), ids=RECORDINGS)
def test_any_safetensors_reader_opens_every_recording(options: dict[str, Any], tmp_path: Path) -> None:
    """Mapped into memory or not, by torch and by numpy, whole and in slices, with the same bytes."""
    pytest.importorskip("ml_dtypes")
    path = tmp_path / "t.safetensors"
    record(path, **options)
    ours = open_trace(path)
    assert ours.steps.tolist() == list(range(0, 10, options.get("every", 1)))
    assert len(ours["w"]) == len(ours["late"]) == len(ours.steps)
    assert ours["w.rows"].tolist() == [32, 0, 5]
    assert list(ours.damage()) == []
    assert ours.header_is_intact()
    assert ours.metadata["format_version"] == "2"
    for load in (
        safetensors.torch.load_file,
        lambda path: safetensors.torch.load(path.read_bytes()),
        safetensors.numpy.load_file,
    ):
        theirs = {name: x for name, x in load(path).items() if not name.startswith(PADDING)}
        assert theirs.keys() == ours.keys()
        for name, x in theirs.items():
            assert tuple(x.shape) == ours[name].shape
            assert isinstance(x, np.ndarray) or x.dtype == ours[name].dtype
            assert raw(x) == raw(ours[name]), name
    for framework in ("pt", "np"):
        with safetensors.safe_open(path, framework) as file:
            assert file.metadata() == ours.metadata
            assert file.metadata()["of"] == "π"
            for name, wanted in ours.items():
                assert raw(file.get_tensor(name)) == raw(wanted)
                assert raw(file.get_slice(name)[1:3]) == raw(wanted[1:3])


def test_golden_bytes() -> None:
    entries = place({"b": torch.ones(2, 2).bfloat16(), "a": torch.ones(16)})
    header = encode_header(entries, {"k": "v"})
    canonical = (
        b'{"__metadata__":{"k":"v"},"a":{"data_offsets":[0,64],"dtype":"F32","shape":[16]},'
        b'"b":{"data_offsets":[64,72],"dtype":"BF16","shape":[2,2]}}'
    )
    text = (
        b'{"__metadata__":{"k":"v","header_crc32":"%08x"},"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
        b'"b":{"dtype":"BF16","shape":[2,2],"data_offsets":[64,72]}}'
    ) % zlib.crc32(canonical)
    padding = b" " * (-(8 + len(text)) % 64)
    assert header == struct.pack("<Q", len(text) + len(padding)) + text + padding
    assert list(entries) == ["a", "b"]


def test_data_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    for name, tensor in open_trace(path).items():
        if tensor.numel():
            assert tensor.data_ptr() % (64 if name == "cube" else tensor.itemsize) == 0, name


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc/self/clear_refs")
def test_reading_is_lazy(tmp_path: Path) -> None:
    """Opening a gigabyte and reading one step of it takes the memory of that step."""
    path = tmp_path / "big.safetensors"
    header = json.dumps({"x": {"dtype": "U8", "shape": [1024, 1 << 20], "data_offsets": [0, 1 << 30]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))

    def growth(number: int) -> int:
        reset_peak_memory()
        before = peak_memory()
        assert open_trace(path)["x"][number].max() == 0
        return peak_memory() - before

    growth(3)  # brings in the code that reads
    assert 1 << 19 < growth(500) < 1 << 21  # a step has 1 << 20; the system counts roughly


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not reserve memory for a map")
def test_a_file_larger_than_memory_opens(tmp_path: Path) -> None:
    """200 GB, of which one record is written: far more than memory, swap and what else the system would promise."""
    path, records, record = tmp_path / "large.safetensors", 200, 1_000_000_000
    header = {"x": {"dtype": "U8", "shape": [records, record], "data_offsets": [0, records * record]}}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + records * record)
        except OSError as error:
            pytest.skip(f"the file system takes no file of 200 GB: {error.strerror}")
        file.seek(8 + len(text) + 150 * record + 7)
        file.write(b"abc")
    x = open_trace(path)["x"]
    assert x.shape == (records, record)
    assert bytes(x[150, 5:12].tolist()) == b"\0\0abc\0\0"
    x[199, -1] = 9  # in memory only
    assert x[199, -2:].tolist() == [0, 9]


def test_tensors_outlive_the_trace_and_do_not_write_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    before = path.read_bytes()
    cube = open_trace(path)["cube"]
    cube.zero_()
    assert (cube == 0).all()
    assert path.read_bytes() == before


def test_opens_what_the_notebook_writes(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"embeddings": torch.ones(2, 3).bfloat16(), "recorded_steps": torch.arange(2)}, path)
    opened = open_trace(path)
    assert torch.equal(opened["embeddings"], torch.ones(2, 3).bfloat16())
    assert torch.equal(opened.steps, torch.arange(2))
    assert opened.metadata == opened.config == {}
    assert "embeddings       BF16  [2, 3]" in repr(opened)
    with pytest.raises(
        KeyError, match=r"foreign\.safetensors has no tensor 'losses'; it has recorded_steps, embeddings"
    ):
        opened["losses"]
    assert "losses" not in opened
    assert ["unhashable"] not in opened


def test_opens_misaligned_tensors(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\7" + struct.pack("<f", 2.5))
    before = path.read_bytes()
    odd = open_trace(path)["b"]
    assert odd.tolist() == [2.5]
    assert odd.numpy().tolist() == [2.5]
    odd += 1
    assert odd.tolist() == [3.5]
    assert path.read_bytes() == before


def test_damage_is_located(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    assert list(open_trace(path).damage()) == []
    damaged = open_trace(path)
    damaged["cube"][1, 0, 0] = 99.0
    damaged["losses"][2] = 99.0
    assert sorted(damaged.damage()) == [("cube", 1), ("losses", None)]


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_damage_is_located_where_records_share_a_checksum(storage, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bhfast.trace.checksums.MAX_CHECKSUMS", 40)
    path = tmp_path / "t.safetensors"
    record(path, steps=9, storage=storage)
    each = int(open_trace(path).metadata["crc32_records"])
    assert each in (4, 8)
    assert list(open_trace(path).damage()) == []
    for record_, first in ((0, 0), (each - 1, 0), (each, each), (9, 9 // each * each)):
        damaged = open_trace(path)
        damaged["v.grad"][record_, 4, 2] += 1
        damaged["late"][record_, 0, 0] += 1
        assert set(damaged.damage()) == {("v.grad", first), ("late", first)}


# ---------------------------------------------------------------------------------------------------------------------
# Bad files


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file: it has 0 bytes"),
        (b"1234", "is not a safetensors file: it has 4 bytes"),
        (b"this is a text, not a trace", "is not a safetensors file: its header would have"),
        ((500).to_bytes(8, "little") + b"{}", "is truncated: its header ends at byte 508, the file at 10"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
        ((3).to_bytes(8, "little") + b"{x}", "its header is not valid JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "its header is not valid JSON"),
    ],
)
def test_refuses_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message):
        open_trace(path)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": ENTRY}, 4, "is truncated: its header describes"),
        ({"a": ENTRY}, 12, "is corrupted: its header describes"),
        ({"a": {**ENTRY, "dtype": "F33"}}, 8, "the header's entry for a is"),
        ({"a": {**ENTRY, "shape": [-2]}}, 8, "the header's entry for a is"),
        ({"a": {**ENTRY, "shape": [3]}}, 8, "the header's entry for a is"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, 8, "the header's entry for a is"),
        ({"a": "x"}, 8, "the header's entry for a is"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, 12, "a starts at byte 4 of the data, wanted 0"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, 12, "b starts at byte 4 of the data, wanted 8"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', 1, "a name appears twice"),
    ],
)
def test_refuses_corrupted_headers(tmp_path: Path, header: object, size: int, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        open_trace(header_file(tmp_path / "bad", header, b"\0" * size))


def test_reads_the_versions_it_knows(tmp_path: Path) -> None:
    path, ours = tmp_path / "t.safetensors", {"format": "bhfast-trace"}
    for version in ("1", "2"):
        header_file(path, {"__metadata__": {**ours, "format_version": version}, "a": ENTRY}, b"\0" * 8)
        assert open_trace(path)["a"].tolist() == [0, 0]
        assert open_trace(path).header_is_intact() is (None if version == "1" else False)
    later = {"a": torch.zeros(2)}
    header = encode_header(place(later), {**ours, "format_version": "3"})
    path.write_bytes(header + b"\0" * 8)
    with pytest.raises(
        TraceError, match=r"t\.safetensors has format version '3', this bhfast reads 1 and 2: use a new"
    ):
        open_trace(path)
    path.write_bytes(header.replace(b'"a"', b'"b"') + b"\0" * 8)
    with pytest.raises(DamageError, match="is corrupted: its header is not the one that was written"):
        open_trace(path)


def test_checksums_must_be_of_all_tensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    header_file(path, {"__metadata__": {"crc32": "{}"}, "a": ENTRY}, b"\0" * 8)
    with pytest.raises(DamageError, match="its checksums cannot be read, or do not fit its tensors"):
        list(open_trace(path).damage())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot open the trace .*gone: No such file"):
        open_trace(tmp_path / "gone")


@pytest.mark.parametrize("cut", [1, 9, 100, 700])
def test_every_truncation_is_noticed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(TraceError, match="truncated"):
        open_trace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Checksums


def test_checksums_are_crc32() -> None:
    assert checksums(torch.tensor([ord(c) for c in "123456789"], dtype=torch.uint8)) == [0xCBF43926]
    column = torch.arange(6).view(1, 6)[:, 3]  # contiguous, with a stride
    assert checksums(column) == [zlib.crc32(struct.pack("<q", 3))]
    assert checksums(torch.zeros(2, 3)).dtype == np.dtype("<u4")
    assert checksums(torch.zeros(2, 3)).shape == (2,)


@settings(deadline=1000)
@given(count=st.integers(0, 40), size=st.integers(1, 200), power=st.integers(0, 6), seed=st.integers(0, 1 << 32))
def test_checksums_of_several_records_come_from_those_of_one(count: int, size: int, power: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (count, size), dtype=np.uint8)
    single = np.array([zlib.crc32(row) for row in data], dtype="<u4")
    joined = join_checksums(single, size, 1 << power)
    assert joined.dtype == np.dtype("<u4")
    assert joined.tolist() == [zlib.crc32(data[i : i + (1 << power)]) for i in range(0, count, 1 << power)]


@settings(deadline=1000)
@given(shape=st.lists(st.integers(0, 5), max_size=3), records=st.integers(1, 7), dtype=st.sampled_from([*DTYPES]))
def test_checksums_are_of_the_bytes(shape: list[int], records: int, dtype: str) -> None:
    empty = torch.empty(shape, dtype=DTYPES[dtype])
    data = np.random.default_rng(0).integers(0, 2, empty.nbytes, dtype=np.uint8)
    tensor = torch.tensor(data.tolist(), dtype=torch.uint8).view(empty.dtype).view(shape)
    wanted = [zlib.crc32(data)]
    if len(shape) > 1 and shape[0]:
        size = empty.nbytes // shape[0]
        wanted = [zlib.crc32(data[i * size : (i + records) * size]) for i in range(0, shape[0], records)]
    assert checksums(tensor, records).tolist() == wanted


@settings(max_examples=300, deadline=1000)
@given(records=st.integers(0, 1 << 40), tensors=st.integers(0, 1 << 20))
def test_as_few_records_share_a_checksum_as_the_header_allows(records: int, tensors: int) -> None:
    each = records_per_checksum(records, tensors)
    allowed = max(1, MAX_CHECKSUMS // max(1, tensors))
    assert each.bit_count() == 1
    assert -(-records // each) <= allowed
    assert each == 1 or -(-records // (each // 2)) > allowed
