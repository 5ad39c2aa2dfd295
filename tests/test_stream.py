"""Streaming: the same file as from memory, in flat memory, on disks that are slow, full, or broken."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from children import fork, status_of
from copy_streams import SlowCopyStream
from memory import peak_memory
from streaming_run import assert_begins_like, record, reference
from traces import assert_same_data

from bhfast.config import TrainConfig
from bhfast.errors import ConfigError, StorageError
from bhfast.recording.recorder import Recorder
from bhfast.recording.slots import RecordSlots
from bhfast.recover import recover
from bhfast.storage.choose import open_storage
from bhfast.storage.files import sync
from bhfast.trace import open_trace
from bhfast.train import train
from bhfast.verify import verify

Fail = Callable[[int, memoryview, int], int]


# ---------------------------------------------------------------------------------------------------------------------
# The same file


@pytest.mark.parametrize("announced", [300, 1000, None])
@pytest.mark.parametrize("collapses", [True, False], ids=["collapse", "copy"])
def test_the_same_data_as_from_memory(announced, collapses, tmp_path: Path, monkeypatch) -> None:
    """Of a run as long as announced, a shorter one, and one of unknown length."""
    if not collapses:
        monkeypatch.setattr("bhfast.storage.finish._collapse_range", lambda *_: False)
    recorder = record(tmp_path / "t.safetensors", 300, announced=announced)
    assert_same_data(recorder.path, reference(tmp_path, 300))
    assert verify(recorder.path).replayed == 300
    assert verify(recorder.path).difference is None
    assert recorder.stats().committed == 301
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference.safetensors", "t.safetensors"]


def test_gaps_become_padding_where_nothing_else_is_possible(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bhfast.storage.finish._collapse_range", lambda *_: False)
    monkeypatch.setattr("bhfast.storage.finish._has_room", lambda *_: False)
    recorder = record(tmp_path / "t.safetensors", 300, announced=3000)
    assert_same_data(recorder.path, reference(tmp_path, 300))
    assert recorder.path.stat().st_size > 3000 * 48 * 24 * 2


def test_a_run_of_train_streams_the_same_file(text: str, tmp_path: Path) -> None:
    paths = []
    for storage in ("memory", "stream"):
        config = TrainConfig(steps=60, corpus=text, out=str(tmp_path / storage), storage=storage, quiet=True)
        paths.append(train(config).path)
    assert_same_data(*paths)
    assert verify(paths[1]).replayed == 60
    memory, streamed = map(open_trace, paths)
    assert json.loads(streamed.metadata["crc32"]) == json.loads(memory.metadata["crc32"])
    assert not any(name.startswith("_padding") for name in paths[1].read_bytes()[8:10000].decode().split('"'))


def test_auto_streams_what_outgrows_memory_and_says_why(tmp_path: Path, monkeypatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(128, 64).bfloat16())
    optimizer = torch.optim.AdamW([weight])
    for memory, steps, said in [
        (150e6, 1200, "stream (78.7 MB is more than half of the 150.0 MB of free memory): 78.7 MB for 1,201 records"),
        (158e6, 1200, "memory (it fits into the 158.0 MB of free memory): 78.7 MB for 1,201 records"),
        (1e9, None, "stream (the number of steps is not known): 0.1 MB a step"),
    ]:
        monkeypatch.setattr("bhfast.storage.choose.available_memory", lambda memory=memory: memory)
        with Recorder(optimizer, {"w": weight}, steps=steps, path=tmp_path / "t", overwrite=True) as recorder:
            assert recorder.description.startswith(said)


@pytest.mark.parametrize("every", [1, 3])
def test_streams_through_a_ring(every: int, tmp_path: Path, monkeypatch) -> None:
    """As on a GPU: a slow copy stream, a slow disk, tensors of very different sizes, buffers of few records."""
    streams = []

    class RingSlots(RecordSlots):
        _open_storage = staticmethod(partial(open_storage, buffer_bytes=1 << 13))
        _half_size = staticmethod(lambda record, records: 8 if record < 5000 else 2)

        @staticmethod
        def _make_copy_stream(device: torch.device) -> SlowCopyStream:
            streams.append(SlowCopyStream(delay=0.001))
            return streams[-1]

    class RingRecorder(Recorder):
        _slots_class = RingSlots

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: (time.sleep(0.0005), real(*a))[1])
    for name, kind in (("memory", Recorder), ("stream", RingRecorder)):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(12, 10).bfloat16())
        optimizer = torch.optim.AdamW([weight])
        with kind(optimizer, {"w": weight}, steps=100, every=every, path=tmp_path / name, storage=name) as recorder:
            for step in range(1, 101):
                weight.grad = torch.randn(12, 10).bfloat16()
                optimizer.step()
                recorder.log(loss=torch.tensor(step))
                if step > 30 and step % 4:
                    recorder.log(wide=torch.full((60, 50), step, dtype=torch.int16))
    assert_same_data(tmp_path / "memory", tmp_path / "stream")
    assert all(stream.closed for stream in streams)
    assert len(streams) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Flat memory, slow disks


def test_a_slow_disk_makes_the_run_wait_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    real = sync
    monkeypatch.setattr("bhfast.storage.stream.sync", lambda fd: (time.sleep(0.01), real(fd)))
    recorder = record(tmp_path / "t.safetensors", 300, announced=300, buffer_bytes=1 << 16)
    stats = recorder.stats()
    assert stats.waits > 20
    assert (stats.steps, stats.records, stats.committed) == (300, 301, 301)
    assert stats.bytes == 301 * (4 * (48 * 24 + 8 * 24) * 2 + 50 * 4 + 4 + 8)
    assert 0 < stats.bytes_per_second < stats.bytes / 0.2
    assert_same_data(recorder.path, reference(tmp_path, 300))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_memory_stays_flat(tmp_path: Path) -> None:
    """160 MB of records through a buffer of 8, in a process of its own, as the memory is that at its peak."""

    class SmallSlots(RecordSlots):
        _open_storage = staticmethod(partial(open_storage, buffer_bytes=8 << 20))

    class SmallRecorder(Recorder):
        _slots_class = SmallSlots

    def run() -> None:
        weight = torch.nn.Parameter(torch.zeros(1000, 500).bfloat16())
        optimizer = torch.optim.SGD([weight], lr=0.1)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        before = peak_memory()
        with SmallRecorder(optimizer, {"w": weight}, path=tmp_path / "t", storage="stream") as recorder:
            for _ in range(80):
                optimizer.step()
        assert recorder.stats().bytes > 160e6
        assert peak_memory() - before < 40e6

    assert status_of(fork(run)) == 0


def test_slow_steps_are_committed_without_waiting_for_a_full_block(tmp_path: Path) -> None:
    seen = []

    def look(step: int, recorder: Recorder) -> None:
        time.sleep(0.05)
        seen.append(recorder.stats().committed)

    record(tmp_path / "t", 10, announced=1000, commit_seconds=0.0, after_step=look)
    assert seen[-1] >= 8


# ---------------------------------------------------------------------------------------------------------------------
# Broken disks


def failing_pwrite(code: int, after: int) -> Fail:
    """Return a ``pwrite`` that fails from its call number ``after`` on, for calls of the writer's thread."""
    real, calls = os.pwrite, itertools.count()

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if threading.current_thread().name == "bhfast-writer" and next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    return pwrite


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("announced", [20_000, None])
def test_a_disk_that_fails_ends_the_run_with_what_was_saved(code, announced, tmp_path, monkeypatch) -> None:
    reached = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite(code, after=60))
        text = rf"failed: {os.strerror(code)}; [\d,]+ records are safe in .*t\.safetensors\.partial, to become a"
        with pytest.raises(StorageError, match=text):
            record(tmp_path / "t.safetensors", 20_000, announced=announced, after_step=lambda n, _: reached.append(n))
    trace = open_trace(tmp_path / "t.safetensors")
    assert 0 < trace.steps[-1] <= reached[-1] < 20_000
    assert_begins_like(tmp_path / "t.safetensors", reference(tmp_path, reached[-1]))
    assert not list(tmp_path.glob("*.partial*"))


def test_a_failure_after_the_last_step_is_raised_too(tmp_path: Path, monkeypatch) -> None:
    def fail(step: int, recorder: Recorder) -> None:
        if step == 150:
            monkeypatch.setattr(os, "pwrite", failing_pwrite(errno.EIO, after=0))

    with pytest.raises(StorageError, match=r"Input/output error; steps 0 to \d+ of 150 were saved: .*t\.safetensors"):
        record(tmp_path / "t.safetensors", 150, announced=150, commit_seconds=1e9, after_step=fail)
    assert open_trace(tmp_path / "t.safetensors").steps[-1] < 150


def test_a_disk_that_fails_at_once_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "pwrite", failing_pwrite(errno.EIO, after=0))
    with pytest.raises(StorageError, match="Input/output error; nothing was saved"):
        record(tmp_path / "t.safetensors", 3, announced=3, commit_seconds=1e9)
    assert list(tmp_path.iterdir()) == []


def test_a_finish_that_fails_can_be_made_up_for(tmp_path: Path, monkeypatch) -> None:
    partial = tmp_path / "t.safetensors.partial"

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(StorageError, match=rf"81 records are safe in .* run python -m bhfast\.recover {partial}"):
            record(tmp_path / "t.safetensors", 80, announced=80)
    assert recover(partial).records == 81
    assert_same_data(tmp_path / "t.safetensors", reference(tmp_path, 80))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:999], offset))
    recorder = record(tmp_path / "t.safetensors", 60, announced=None)
    assert_same_data(recorder.path, reference(tmp_path, 60))


def test_a_writer_that_dies_is_noticed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bhfast.storage.stream.checksums", lambda data: 1 / 0)
    with pytest.raises(StorageError, match="failed: ZeroDivisionError"):
        record(tmp_path / "t.safetensors", 10_000, announced=None, buffer_bytes=1 << 16)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("announced", [5000, None])
def test_a_limit_on_the_size_of_files(announced: int | None, tmp_path: Path) -> None:
    """Refused before the first step if the length is known, and an end with all that fits if it is not."""
    folder, errors = tmp_path / "t", tmp_path / "errors"

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
        record(folder / "t.safetensors", 5000, announced=announced)

    assert status_of(fork(run, errors)) == 1
    if announced:
        assert "StorageError: cannot reserve" in errors.read_text()
        assert "File too large" in errors.read_text()
        assert list(folder.iterdir()) == []
    else:
        assert "is full:" in errors.read_text()
        last = int(open_trace(folder / "t.safetensors").steps[-1])
        assert 100 < last < 5000
        assert_begins_like(folder / "t.safetensors", reference(tmp_path, last))


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of 6 MB, that cannot collapse ranges."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root on Linux")
    try:
        with pytest.raises(StorageError, match="is too small for the trace"):
            record(mount / "t.safetensors", 5000, announced=5000)
        assert list(mount.iterdir()) == []
        with pytest.raises(StorageError, match=r"No space left on device|is full"):
            record(mount / "t.safetensors", 5000)
        last = int(open_trace(mount / "t.safetensors").steps[-1])
        assert 100 < last < 5000
        assert_begins_like(mount / "t.safetensors", reference(tmp_path, last))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_too_many_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no room for x[0-9]+ in the header"):
        record(
            tmp_path / "t.safetensors",
            1000,
            after_step=lambda step, recorder: recorder.log(**{f"x{step}": torch.zeros(())}),
        )
    assert open_trace(tmp_path / "t.safetensors").steps[-1] > 100


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 1, "KeyboardInterrupt"), (signal.SIGTERM, 143, "")],
    ids=["INT", "TERM"],
)
def test_signals_end_a_run_of_the_users_own_in_a_valid_file(number, code, said, tmp_path: Path) -> None:
    path, errors = tmp_path / "t.safetensors", tmp_path / "errors"
    errors.touch()
    ready, recording = os.pipe()

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
        record(path, 10_000_000, after_step=lambda step, _: os.write(recording, b".") if step == 100 else None)

    child = fork(run, errors)
    os.read(ready, 1)
    time.sleep(0.1)
    os.kill(child, number)
    assert status_of(child) == code
    assert said in errors.read_text()
    last = int(open_trace(path).steps[-1])
    assert last >= 100
    assert_begins_like(path, reference(tmp_path, last), logged=last)  # it may end between a step and what it logs
    assert not list(tmp_path.glob("*.partial*"))
    for end in (ready, recording):
        os.close(end)
