"""Runs that are disturbed from outside: by other runs, and by who deletes their files or their folder meanwhile."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming_run import assert_begins_like, record, reference

from bhfast.errors import StorageError, TraceError
from bhfast.recording.recorder import Recorder
from bhfast.recover import recover
from bhfast.storage.output import OutputFile, lock, unlock
from bhfast.trace import open_trace
from bhfast.trace.journal import journal_path
from bhfast.verify import verify

STEPS, DISTURBED_AT = 60, 25
STORAGES = pytest.mark.parametrize("storage", ["memory", "stream"])


def at_step(step: int, disturb: Callable[[], object]) -> Callable[[int, Recorder], None]:
    return lambda number, recorder: disturb() if number == step else None


# ---------------------------------------------------------------------------------------------------------------------
# Other runs


@STORAGES
def test_a_second_run_is_refused_and_the_first_goes_on(storage: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"

    def disturb() -> None:
        for overwrite in (False, True):
            with pytest.raises(StorageError, match=r"t\.safetensors\.partial is being written by another run"):
                record(path, 3, announced=3, storage=storage, overwrite=overwrite)

    record(path, STEPS, announced=STEPS, storage=storage, after_step=at_step(DISTURBED_AT, disturb))
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    assert verify(path).replayed == STEPS
    assert_begins_like(path, reference(tmp_path, STEPS))


def test_a_run_that_ends_leaves_the_files_of_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one may begin as soon as the trace has its name."""
    path, real, following = tmp_path / "t.safetensors", os.replace, []

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        following.append(OutputFile(path, overwrite=True).__enter__())
        journal_path(following[0].partial).write_text("its journal")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        record(path, STEPS, announced=STEPS)
    assert verify(path).replayed == STEPS
    (output,) = following
    assert output.is_in_place
    assert journal_path(output.partial).read_text() == "its journal"
    output.__exit__(None, None, None)


def test_a_trace_that_was_finished_meanwhile_is_not_taken_for_a_partial(tmp_path: Path, monkeypatch) -> None:
    """Between opening the file and locking it: it must not be emptied."""
    partial, real = tmp_path / "t.partial", fcntl.flock
    partial.write_text("a trace")

    def flock(fd: int, how: int) -> None:
        if partial.exists() and partial.read_text() == "a trace":
            partial.rename(tmp_path / "t")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    fd = lock(partial, os.O_CREAT)
    assert os.path.samestat(os.fstat(fd), partial.stat())
    unlock(fd)
    assert (tmp_path / "t").read_text() == "a trace"


@STORAGES
def test_the_next_run_is_not_stopped_by_a_partial_without_records(storage: str, tmp_path: Path) -> None:
    """As a run leaves that was killed before its first commit."""
    path = tmp_path / "t.safetensors"
    partial = tmp_path / "t.safetensors.partial"
    partial.write_text("" if storage == "memory" else "a header")
    if storage == "stream":
        journal_path(partial).write_bytes(b"12345678 {torn" + b"\0" * 1000)
    record(path, 3, announced=3, storage=storage, overwrite=False)
    assert verify(path).replayed == 3


# ---------------------------------------------------------------------------------------------------------------------
# Files that vanish


@pytest.mark.parametrize("lost", ["partial", "folder"])
def test_a_run_in_memory_makes_its_file_again(lost: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "t.safetensors"

    def disturb() -> None:
        shutil.rmtree(path.parent) if lost == "folder" else path.with_name(path.name + ".partial").unlink()

    record(path, STEPS, announced=STEPS, storage="memory", after_step=at_step(DISTURBED_AT, disturb))
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    assert verify(path).replayed == STEPS


def test_a_run_in_memory_that_cannot_make_its_file_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "t.safetensors"

    def disturb() -> None:
        shutil.rmtree(path.parent)
        path.parent.write_text("a file")

    with pytest.raises(StorageError, match=r"cannot write the trace .*: (File exists|Not a directory)"):
        record(path, STEPS, announced=STEPS, storage="memory", after_step=at_step(DISTURBED_AT, disturb))
    assert path.parent.read_text() == "a file"


@pytest.mark.parametrize("lost", ["partial", "journal", "folder", "both", "replaced"])
@pytest.mark.parametrize("step", [DISTURBED_AT, STEPS], ids=["meanwhile", "at the end"])
def test_a_stream_that_lost_its_files_says_so(lost: str, step: int, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "t.safetensors"
    partial = path.with_name(path.name + ".partial")

    def disturb() -> None:
        if lost == "folder":
            shutil.rmtree(path.parent)
        if lost in ("partial", "both", "replaced"):
            partial.unlink()
        if lost in ("journal", "both"):
            journal_path(partial).unlink()
        if lost == "replaced":
            partial.write_text("of somebody else")

    text = r"t\.safetensors\.partial or its journal was deleted or replaced during the run; nothing (can be|was) saved"
    with pytest.raises(StorageError, match=text) as raised:
        record(path, STEPS, announced=STEPS, buffer_bytes=1 << 16, after_step=at_step(step, disturb))
    assert " safe in " not in str(raised.value)
    assert not path.exists()
    assert partial.exists() == (lost == "replaced")
    if lost == "replaced":
        assert partial.read_text() == "of somebody else"
        partial.unlink()
    record(path, 3, announced=3, overwrite=False)
    assert [x.name for x in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------------------------
# Traces that are whole, but have not got their name yet


@STORAGES
def test_a_trace_that_could_not_be_renamed_is_recovered(storage: str, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "t.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os.stat("/nowhere"))
        with pytest.raises(StorageError, match=r"python -m bhfast\.recover .*t\.safetensors\.partial"):
            record(path, STEPS, announced=STEPS, storage=storage)
    recovery = recover(tmp_path / "t.safetensors.partial")
    assert (recovery.path, recovery.records, recovery.last_step) == (path, STEPS + 1, STEPS)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    assert_begins_like(path, reference(tmp_path, STEPS))


def test_a_partial_without_a_journal_that_is_damaged_is_not_recovered(tmp_path: Path) -> None:
    path = reference(tmp_path, STEPS)
    partial = tmp_path / "u.partial"
    shutil.copy(path, partial)
    with open(partial, "r+b") as file:
        file.seek(-300, os.SEEK_END)
        file.write(b"damage")
    with pytest.raises(
        TraceError, match=r"its run kept the records in memory .*, and was killed before it had written them all"
    ):
        recover(partial)
    shutil.copy(path, partial)
    assert len(open_trace(recover(partial).path).steps) == STEPS + 1
