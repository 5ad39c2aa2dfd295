"""Storage: what an output file promises, and a trace kept in memory until it is written as a whole."""

from __future__ import annotations

import builtins
import errno
import io
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from traces import tensors, write

from bhfast.errors import StorageError
from bhfast.machine import available_memory
from bhfast.storage.base import Stats
from bhfast.storage.files import copy_path
from bhfast.storage.memory import MemoryStorage
from bhfast.storage.output import OutputFile, lock
from bhfast.storage.whole import write_trace
from bhfast.trace import open_trace
from bhfast.trace.journal import journal_path
from bhfast.trace.recorded import RecordedTensor

# ---------------------------------------------------------------------------------------------------------------------
# The writer's promises


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "t.safetensors"
    with OutputFile(path) as writer:
        writer.reserve(1 << 20)
        assert writer.partial.stat().st_size == 1 << 20
        assert not path.exists()
    assert list(path.parent.iterdir()) == []


def test_no_other_run_gets_in_while_the_files_of_one_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    unlink, removed = Path.unlink, []

    def unlink_and_try(self: Path, missing_ok: bool = False) -> None:
        with pytest.raises(StorageError, match="is being written by another run"):
            lock(path.with_name("t.safetensors.partial"), os.O_CREAT)
        unlink(self, missing_ok)
        removed.append(self.name)

    with OutputFile(path) as output:
        for own in (journal_path(output.partial), copy_path(output.partial)):
            own.touch()
        monkeypatch.setattr(Path, "unlink", unlink_and_try)
    assert [name.removeprefix("t.safetensors.partial") for name in removed] == [".journal", ".copy", ""]
    assert list(tmp_path.iterdir()) == []


def test_refuses_to_replace(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("precious")
    with pytest.raises(StorageError, match=r"t\.safetensors exists; pass overwrite=True"):
        write(path)
    assert path.read_text() == "precious"
    write(path, overwrite=True)
    assert "cube" in open_trace(path)


def test_refuses_the_partial_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    partial = tmp_path / "t.safetensors.partial"
    partial.write_text("unfinished")
    with pytest.raises(StorageError, match=r"partial was left by a run that did not finish; delete it, pass overw"):
        write(path)
    assert partial.read_text() == "unfinished"
    write(path, overwrite=True)
    assert not partial.exists()


def test_refuses_while_another_run_writes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with OutputFile(path), pytest.raises(StorageError, match="is being written by another run"):
        write(path, overwrite=True)


def test_refuses_a_disk_that_is_too_small(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with OutputFile(path) as writer, pytest.raises(StorageError, match=r"too small for the trace: 4611.* GB wanted"):
        writer.reserve(1 << 62)


def test_refuses_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the trace .*: .*; choose another place with path="):
        write(tmp_path / "file" / "t.safetensors")
    with pytest.raises(StorageError, match="it is a folder; name a file with path="):
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


def test_a_lock_is_of_one_run_and_ends_with_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "t")
    one = lock(tmp_path / "t", os.O_CREAT)
    with pytest.raises(StorageError, match="t is being written by another run; wait for it"):
        lock(tmp_path / "t")
    os.close(one)
    os.close(lock(tmp_path / "t"))


def test_what_is_worth_keeping_stays(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "t") as output:
        output.reserve(100)
        output.is_worth_keeping = True
    assert output.partial.stat().st_size == 100
    with OutputFile(tmp_path / "t", overwrite=True) as output:
        assert output.partial.stat().st_size == 0


def test_room_counts_what_the_trace_has_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 50_000}))
    with OutputFile(tmp_path / "t") as output:
        before = output.free()
        output.reserve(40_960)
        assert output.free() == before + 40_960
        output.reserve(90_000)
        with pytest.raises(StorageError, match="is too small for the trace"):
            output.reserve(1 << 20)


def test_a_trace_has_its_checksums_and_no_more_than_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with OutputFile(path) as output:
        output.reserve(1 << 20)
        write_trace(output, tensors(), {"of": "this"}, path)
    assert path.stat().st_size < 4096
    assert open_trace(path).metadata.keys() == {"of", "crc32", "header_crc32"}
    assert list(open_trace(path).damage()) == []


# ---------------------------------------------------------------------------------------------------------------------
# In memory


def test_memory_keeps_every_record_and_writes_those_that_were_made(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with OutputFile(path) as output:
        memory = MemoryStorage(output, records=5, every=10)
        w = memory.add(RecordedTensor("w", (2, 3), torch.float32), group=1, first=0)
        late = memory.add(RecordedTensor("late", (), torch.float64, float("nan")), group=1, first=0)
        memory.set_constant("rows", torch.tensor([4, 2]))
        assert w.shape == (5, 2, 3)
        assert late.isnan().all()
        assert (memory.room, memory.capacity, memory.committed, memory.waits) == (5, 5, 0, 0)
        for record in range(3):
            memory.wait(record)
            w[record] = record
            memory.submit(record + 1, [])
            assert not memory.is_due(record + 1)
        late[2] = 0.5
        assert memory.settle(3) == 3
        assert memory.committed == 0
        memory.save({"of": "this"}, path)
        assert memory.committed == 3
        memory.close()
    trace = open_trace(path)
    assert trace.steps.tolist() == [0, 10, 20]
    assert trace["w"].tolist() == [[[record] * 3] * 2 for record in range(3)]
    assert trace["late"].nan_to_num(nan=-1).tolist() == [-1, -1, 0.5]
    assert trace["rows"].tolist() == [4, 2]


def test_memory_reserves_the_disk_for_all_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 300_000}))
    with OutputFile(tmp_path / "t") as output:
        memory = MemoryStorage(output, records=100, every=1)
        for name in ("a", "b"):
            memory.add(RecordedTensor(name, (1000,), torch.uint8), group=1, first=0)
        assert output.partial.stat().st_size == 200_000
        with pytest.raises(StorageError, match="is too small for the trace"):
            memory.add(RecordedTensor("c", (9000,), torch.uint8), group=1, first=0)


def test_bytes_per_second() -> None:
    figures = {"steps": 2, "records": 3, "committed": 3, "bytes": 300, "waits": 0}
    assert Stats(**figures, seconds=2.0).bytes_per_second == 150
    assert Stats(**figures, seconds=0.0).bytes_per_second == 0


MEMINFO = "MemTotal: 8000 kB\nMemAvailable: 5000 kB\n"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"/proc/meminfo": MEMINFO}, 5_120_000),
        ({"/proc/meminfo": MEMINFO, "memory.max": "9000000", "memory.stat": "anon 8000000\nfile 3"}, 1_000_000),
        ({"/proc/meminfo": MEMINFO, "memory.max": "90000000", "memory.stat": "anon 1000"}, 5_120_000),
        ({"/proc/meminfo": MEMINFO, "memory.max": "max", "memory.stat": "anon 1000"}, 5_120_000),
        ({}, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    ],
    ids=["machine", "group", "large group", "group without a limit", "no /proc"],
)
def test_available_memory(files: dict[str, str], wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's, or its control group's if that is less."""

    def read(name: str) -> str:
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    monkeypatch.setattr(builtins, "open", lambda name, *_: io.StringIO(read(str(name))))
    monkeypatch.setattr(Path, "read_text", lambda path: read(path.name))
    found = available_memory()
    monkeypatch.undo()
    assert found == wanted
