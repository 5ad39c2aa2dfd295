"""The file: its bytes, its writer's promises, its reader's refusals."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from bhfast import trace
from bhfast.errors import StorageError, TraceError
from bhfast.storage import Claim, write_trace
from bhfast.trace import open_trace


def tensors() -> dict[str, torch.Tensor]:
    return {
        "losses": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
        "steps": torch.arange(3),
        "cube": torch.arange(3 * 32, dtype=torch.float32).view(3, 4, 8),
        "half": torch.ones(3, 5).half(),
        "scalar": torch.tensor(1e-8, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
    }


def write(path: Path, **options: bool) -> None:
    with Claim(path, **options) as claim:
        claim.reserve(1000)
        write_trace(claim, tensors(), {"config": '{"steps": 2}'}, path)


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


def test_golden_bytes() -> None:
    entries = trace.place({"b": torch.ones(2, 2).bfloat16(), "a": torch.ones(16)})
    header = trace.encode_header(entries, {"k": "v"})
    text = (
        b'{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]},'
        b'"b":{"dtype":"BF16","shape":[2,2],"data_offsets":[64,72]}}'
    )
    padding = b" " * (-(8 + len(text)) % 64)
    assert header == struct.pack("<Q", len(text) + len(padding)) + text + padding
    assert list(entries) == ["a", "b"]


def test_data_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    for name, tensor in open_trace(path).items():
        if tensor.numel():
            assert tensor.data_ptr() % (64 if name == "cube" else tensor.itemsize) == 0, name


def test_reading_is_lazy(tmp_path: Path) -> None:
    """Opening a file and reading one step of it leaves the rest of a gigabyte unread."""
    path = tmp_path / "big.safetensors"
    header = json.dumps({"x": {"dtype": "U8", "shape": [1024, 1 << 20], "data_offsets": [0, 1 << 30]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))
    code = f"""
import resource
from bhfast import open_trace
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert open_trace({str(path)!r})["x"][500].sum() == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300 * 1024  # kilobytes: torch's import, not the file


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
    with pytest.raises(KeyError, match="has no tensor 'losses'; it has"):
        opened["losses"]


def test_opens_misaligned_tensors(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\7" + struct.pack("<f", 2.5))
    assert open_trace(path)["b"].tolist() == [2.5]


def test_damage_is_located(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write(path)
    assert list(open_trace(path).damage()) == []
    damaged = open_trace(path)
    damaged["cube"][1, 0, 0] = 99.0
    damaged["losses"][2] = 99.0
    assert sorted(damaged.damage()) == [("cube", 1), ("losses", None)]


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
        ((2).to_bytes(8, "little") + b"[]", "its header is no JSON object"),
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
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', 1, "a name stands twice"),
    ],
)
def test_refuses_corrupted_headers(tmp_path: Path, header: object, size: int, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        open_trace(header_file(tmp_path / "bad", header, b"\0" * size))


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
# The writer's promises


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.safetensors"
    with Claim(path) as writer:
        writer.reserve(1 << 20)
        assert writer.partial.stat().st_size == 1 << 20
        assert not path.exists()
    assert list(path.parent.iterdir()) == []


def test_refuses_to_replace(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("precious")
    with pytest.raises(StorageError, match=r"t\.safetensors exists; pass --overwrite"):
        write(path)
    assert path.read_text() == "precious"
    write(path, overwrite=True)
    assert "cube" in open_trace(path)


def test_refuses_the_partial_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    partial = tmp_path / "t.safetensors.partial"
    partial.write_text("unfinished")
    with pytest.raises(StorageError, match=r"partial was left by a run that did not finish; delete it or pass --overw"):
        write(path)
    assert partial.read_text() == "unfinished"
    write(path, overwrite=True)
    assert not partial.exists()


def test_refuses_while_another_run_writes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with Claim(path), pytest.raises(StorageError, match="is being written by another run"):
        write(path, overwrite=True)


def test_refuses_a_disk_that_is_too_small(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with Claim(path) as writer, pytest.raises(StorageError, match=r"too small for the trace: 4611.* GB wanted"):
        writer.reserve(1 << 62)


def test_refuses_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the trace .*: .*; choose another place with --out"):
        write(tmp_path / "file" / "t.safetensors")
    with pytest.raises(StorageError, match="it is a folder; name a file with --out"):
        write(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("precious")
    real, calls = os.pwrite, []

    def failing(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StorageError, match=rf"writing the trace .* failed: {os.strerror(code)}"):
        write(path, overwrite=True)
    assert [x.name for x in tmp_path.iterdir()] == ["t.safetensors"]
    assert path.read_text() == "precious"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    path = tmp_path / "t.safetensors"
    write(path)
    assert torch.equal(load_file(path)["cube"], tensors()["cube"])


def test_checksums_are_crc32() -> None:
    assert trace.checksums(torch.tensor([ord(c) for c in "123456789"], dtype=torch.uint8)) == [0xCBF43926]
    assert trace.checksums(torch.zeros(2, 3)).dtype == np.dtype("<u4")
    assert trace.checksums(torch.zeros(2, 3)).shape == (2,)
