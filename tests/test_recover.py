"""Runs that are killed: at random moments, and at every call by which a trace is finished."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import Program, fork, status_of
from streaming_run import assert_begins_like, record, reference

from bhfast import recover, train, verify
from bhfast.errors import StorageError, TraceError
from bhfast.recording.recorder import Recorder
from bhfast.recover import main
from bhfast.storage import finish as finishing
from bhfast.storage.output import OutputFile
from bhfast.trace import open_trace
from bhfast.trace.journal import journal_path, read_journal

STEPS = 1500
KILLS = 30
SLOTS = 48  # of a buffer of half a megabyte: as many steps as a kill may lose


@pytest.mark.parametrize("announced", [400, 1000, None])
@pytest.mark.parametrize("last", [3, 47, 333])
def test_killed_after_a_step(last: int, announced: int | None, tmp_path: Path) -> None:
    """Of the steps done at most one buffer is lost, and what is committed has the bits of an undisturbed run."""
    path = tmp_path / "t.safetensors"
    seen = mmap.mmap(-1, 8)  # shared with the child: the records that were committed

    def die(step: int, recorder: Recorder) -> None:
        seen[:] = recorder.stats().committed.to_bytes(8, "little")
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    assert status_of(fork(lambda: record(path, 400, announced=announced, after_step=die))) == -signal.SIGKILL
    committed = int.from_bytes(seen, "little")
    partial = tmp_path / "t.safetensors.partial"
    if read_journal(partial).records == 0:
        assert committed == 0
        assert last <= SLOTS
        with pytest.raises(TraceError, match="holds no committed record"):
            recover.recover(partial)
        return
    result = recover.recover(partial)
    assert result.path == path
    assert max(last - SLOTS, committed - 1) <= result.last_step <= last
    assert result.damaged == 0
    assert_begins_like(path, reference(tmp_path, 400))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Every committed step is recovered, with the bits of an undisturbed run; at most one buffer is lost."""
    whole = reference(tmp_path, STEPS)
    generator = random.Random(0)
    reached = mmap.mmap(-1, 8)  # shared with the child: the last step it has done
    at_work = 0
    for kill in range(KILLS):
        path = tmp_path / f"{kill}.safetensors"
        partial = path.with_name(path.name + ".partial")
        reached[:] = bytes(8)

        def run(path: Path = path, announced: int | None = (STEPS, 2 * STEPS, None)[kill % 3]) -> None:
            def note(step: int, recorder: object) -> None:
                reached[:] = step.to_bytes(8, "little")
                time.sleep(0.0002)

            record(path, STEPS, announced=announced, after_step=note)

        child = fork(run)
        time.sleep(generator.uniform(0.02, 0.7))
        os.kill(child, signal.SIGKILL)
        status_of(child)
        done = int.from_bytes(reached[:], "little")
        if not path.exists():
            try:
                result = recover.recover(partial)
            except TraceError:
                assert done <= SLOTS, "steps were done, but nothing can be recovered"
                partial.unlink(missing_ok=True)
                continue
            assert result.path == path
            assert done - SLOTS <= result.last_step <= done + 1
            assert result.damaged == 0
            at_work += 1
        assert_begins_like(path, whole)
        assert not partial.exists()
        journal_path(partial).unlink(missing_ok=True)  # killed between the last two calls
        path.unlink()
    assert at_work > KILLS / 2, "most kills must hit a run at work for this test to mean something"


@pytest.mark.parametrize("collapses", [True, False], ids=["collapse", "copy"])
def test_killed_at_every_call_that_finishes_a_trace(collapses, tmp_path: Path, monkeypatch) -> None:
    """Before and after each call that changes a file, and again while it is being recovered."""
    whole = reference(tmp_path, 60)
    if not collapses:
        monkeypatch.setattr("bhfast.storage.finish._collapse_range", lambda *_: False)
    made = tmp_path / "made"
    made.mkdir()
    path, partial = made / "t.safetensors", made / "t.safetensors.partial"

    def stop(*_: object) -> None:
        os._exit(7)

    def unfinished() -> None:
        monkeypatch.setattr("bhfast.storage.stream.finish", stop)
        record(path, 60, announced=400)

    assert status_of(fork(unfinished)) == 7
    for call in range(1000):
        here = tmp_path / str(call)
        shutil.copytree(made, here)

        def finish(here: Path = here, call: int = call) -> None:
            _die_at(call)
            recover.recover(here / partial.name)

        died = status_of(fork(finish)) == 9
        if (here / partial.name).exists():
            recover.recover(here / partial.name)
        assert_begins_like(here / path.name, whole)
        assert open_trace(here / path.name).steps[-1] == 60
        shutil.rmtree(here)
        if not died:
            break
    assert 10 < call < 999


def _die_at(number: int) -> None:
    """Let this process die at its call ``number`` of what changes files: the even ones before it, odd ones after."""
    calls = 0

    def mortal(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 2
            if calls - 2 == number:
                os._exit(9)
            result = real(*args, **kwargs)
            if calls - 1 == number:
                os._exit(9)
            return result

        return call

    for name in ("pwrite", "ftruncate", "fsync", "fdatasync", "replace", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    finishing._collapse_range = mortal(finishing._collapse_range)


# ---------------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run leaves that was killed after its last step."""

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bhfast.storage.stream.finish", refuse)
        with pytest.raises(KeyboardInterrupt):
            record(tmp_path / "t.safetensors", 60, announced=300)
    return tmp_path / "t.safetensors.partial"


def test_says_what_it_made(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(killed)]) == 0
    path = killed.with_suffix("")
    assert capsys.readouterr().out == f"{path}: 61 records, steps 0 to 60; all checksums match\n"
    assert_begins_like(path, reference(killed.parent, 60))
    assert sorted(x.name for x in killed.parent.iterdir()) == ["reference.safetensors", "t.safetensors"]


def test_a_file_that_is_there_stays(killed: Path) -> None:
    path = killed.with_suffix("")
    path.write_text("precious")
    assert recover.recover(killed).path.name == "t.cut-at-60.safetensors"
    assert path.read_text() == "precious"


@pytest.mark.parametrize("collapses", [True, False], ids=["collapse", "copy"])
def test_a_trace_gets_the_name_that_is_asked_for(collapses: bool, killed: Path, monkeypatch, capsys) -> None:
    if not collapses:
        monkeypatch.setattr("bhfast.storage.finish._collapse_range", lambda *_: False)
        monkeypatch.setattr("bhfast.storage.finish.WORTH_COPYING", 0)
    killed.with_suffix("").write_text("precious")
    out = killed.parent / "there" / "u.safetensors"
    out.parent.mkdir()
    assert main([str(killed), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 61 records, steps 0 to 60; all checksums match\n"
    assert_begins_like(out, reference(killed.parent, 60))
    assert killed.with_suffix("").read_text() == "precious"
    assert sorted(x.name for x in killed.parent.iterdir()) == ["reference.safetensors", "t.safetensors", "there"]


def test_a_whole_trace_gets_the_name_that_is_asked_for(killed: Path) -> None:
    path = recover.recover(killed).path
    path.rename(killed)
    assert recover.recover(killed, out=killed.parent / "u").path == killed.parent / "u"
    assert not killed.exists()
    assert not path.exists()


def test_refuses_a_name_that_a_trace_cannot_have(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = killed.parent
    (folder / "taken").touch()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name, message in [
        ("taken", "taken exists; choose another file with --out"),
        ("gone/t", "gone/t: No such file or directory; choose another place with --out"),
        ("u.partial", "u.partial is a name for what a run leaves, not for a trace; choose another file with --out"),
        (f"{killed.name}.copy", ".copy is a name for what a run leaves, not for a trace"),
    ]:
        assert main([str(killed), "--out", str(folder / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bhfast recover: error: ")
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(
        StorageError, match="without copying the records; choose a place on their file system with out="
    ):
        recover.recover(killed, out="/proc/t")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_records_are_left_out(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = read_journal(killed)
    own = state.tensors["second.grad"]
    with open(killed, "r+b") as file:
        file.seek(state.start["header"] + own.offset + 40 * own.nbytes)
        file.write(b"damage")
    assert main([str(killed)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("left out 21 records after step 39: a checksum does not match\n")
    assert_begins_like(killed.with_suffix(""), reference(killed.parent, 60))
    assert len(open_trace(killed.with_suffix("")).steps) == 40


def test_a_journal_that_was_cut_off_gives_the_steps_before(killed: Path) -> None:
    """As a power failure leaves it."""
    path = journal_path(killed)
    lines = path.read_bytes().split(b"\n")
    first = next(i for i, line in enumerate(lines) if line[9:].startswith(b'{"records"'))
    path.write_bytes(b"\n".join(lines[: first + 1]) + b"\n" + lines[first + 1][:50] + b"\0" * 4096)
    recovery = recover.recover(killed)
    assert 0 < recovery.last_step < 60
    assert_begins_like(recovery.path, reference(killed.parent, 60))


def test_refuses_what_it_cannot_recover(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = killed.parent
    journal_path(killed).rename(folder / "away")
    for name, message in [
        ("t.safetensors", "is not a .partial file: a run that was killed leaves NAME.partial and its journal"),
        ("gone.partial", "cannot open .*gone.partial: No such file or directory"),
        ("t.safetensors.partial", "has no journal: its run kept the records in memory"),
    ]:
        with pytest.raises(TraceError, match=message):
            recover.recover(folder / name)
    assert main([str(folder / "gone.partial")]) == 2
    assert capsys.readouterr().err.startswith("bhfast recover: error: cannot open")
    journal_path(killed).write_bytes(b"nonsense\n")
    with pytest.raises(TraceError, match="is not a journal of version 1"):
        recover.recover(killed)
    with OutputFile(folder / "u"), pytest.raises(StorageError, match="is being written by another run"):
        recover.recover(folder / "u.partial")


def test_the_next_run_is_told_how_to_keep_the_steps(killed: Path) -> None:
    with (
        pytest.raises(StorageError, match=rf"keep its steps with python -m bhfast\.recover {killed}"),
        OutputFile(killed.with_suffix("")),
    ):
        pass
    assert json.loads(journal_path(killed).read_bytes().split(b"\n")[0][9:])["start"]["every"] == 1


def test_a_killed_run_of_train_is_recovered_and_verified(tmp_path: Path, text: str, capsys) -> None:
    out = tmp_path / "t.safetensors"
    arguments = ["--steps", "20000", "--corpus", text, "--device", "cpu", "--storage", "stream", "--out", str(out)]
    process = Program(lambda: train.main(arguments))
    for line in process.stdout:
        if line.startswith("storage"):
            break
    while read_journal(out.with_name("t.safetensors.partial")).records < 50:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    recovery = recover.recover(tmp_path / "t.safetensors.partial")
    assert recovery.path == out
    assert recovery.last_step >= 49
    assert verify.main([str(out)]) == 0
    assert f"{recovery.last_step:,} steps replayed, all bits" in capsys.readouterr().out
