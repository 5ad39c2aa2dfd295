"""Traces that are read while their runs go on: as far as they are committed, without disturbing the run."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from children import fork, status_of
from memory import peak_memory
from streaming_run import record, reference
from torch import nn
from traces import raw
from traces import record as record_small

from bhfast.config import TrainConfig
from bhfast.errors import StorageError, TraceError
from bhfast.recording.recorder import Recorder
from bhfast.recording.slots import RecordSlots
from bhfast.recover import recover
from bhfast.report.program import main as report
from bhfast.report.survey import survey_trace
from bhfast.storage import finish
from bhfast.storage.choose import open_storage
from bhfast.storage.journal import Journal
from bhfast.storage.stream import StreamStorage
from bhfast.trace import Trace, open_trace
from bhfast.trace.journal import journal_path
from bhfast.trace.live import CommittedFile
from bhfast.train import train
from bhfast.verify import verify

STEPS = 300


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhfast.trace.live.PATIENCE", 0.2)


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def assert_is_start_of(trace: Trace, whole: Trace, *, logged: int | None = None) -> None:
    """All tensors of a trace are the beginnings of those of another one, bit for bit.

    Args:
        logged: the number of records that have all their logged values; None: of all.
    """
    for name in trace:
        found, records = trace[name][:], len(trace.steps)
        if name in ("loss", "late") and logged is not None:
            found, records = found[:logged], min(logged, records)
        wanted = whole[name][:records] if len(whole[name]) == len(whole.steps) else whole[name]
        if name.endswith(".keyframes") or name == "keyframe_steps":
            wanted = whole[name][: len(found)]
        assert found.shape == wanted.shape, name
        assert raw(found) == raw(wanted), name


class Small(RecordSlots):
    _open_storage = staticmethod(partial(open_storage, buffer_bytes=1 << 16, commit_seconds=0.0))


class SmallRecorder(Recorder):
    """Commits as often as it can."""

    _slots_class = Small


def record_compact(
    path: Path, steps: int, *, after_step: Callable[[int, Recorder, torch.optim.Optimizer], None], **options: object
) -> None:
    """Train a matrix and a vector with AdamW, and record key frames."""
    torch.manual_seed(0)
    params = {"w": nn.Parameter(torch.randn(40, 16).bfloat16()), "b": nn.Parameter(torch.randn(3).bfloat16())}
    optimizer = torch.optim.AdamW(params.values(), lr=0.01)
    with SmallRecorder(optimizer, params, path=path, keyframes=16, **options) as recorder:
        for step in range(1, steps + 1):
            for param in params.values():
                param.grad = (param.detach() * step).cos()
            optimizer.step()
            recorder.log(loss=torch.tensor(float(step)))
            after_step(step, recorder, optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# While the run goes on


@pytest.mark.parametrize("announced", [STEPS, None, 1000])
@pytest.mark.parametrize("collapses", [True, False], ids=["collapse", "copy"])
def test_a_trace_at_every_stage_of_its_run(announced, collapses, tmp_path: Path, monkeypatch) -> None:
    """Tensors that appear late, small ones, constants; what was opened before stays right when the run has ended."""
    if not collapses:
        monkeypatch.setattr("bhfast.storage.finish._collapse_range", lambda *_: False)
    path, seen = tmp_path / "t.safetensors", []

    def look(step: int, recorder: Recorder) -> None:
        if step % 50 == 1:
            while recorder.stats().committed < step - 40:
                time.sleep(0.01)
            seen.append(open_trace(partial_of(path)))
            assert seen[-1].is_live
            assert len(seen[-1].steps) >= step - 40
            assert step + 1 >= seen[0].refresh() >= len(seen[-1].steps)

    record(path, STEPS, announced=announced, commit_seconds=0.0, after_step=look)
    whole = open_trace(reference(tmp_path, STEPS))
    assert len(seen) == 6
    for trace in seen:
        assert_is_start_of(trace, whole)
        assert "late" in trace or len(trace.steps) < 16
    for trace in seen:
        held = trace["first"]
        assert trace.refresh() == STEPS + 1
        assert not trace.is_live
        assert trace.path == path
        assert_is_start_of(trace, whole)
        assert trace.keys() == whole.keys()
        assert torch.equal(held[-1:], whole["first"][len(held) - 1 : len(held)])
        assert trace.refresh() == STEPS + 1
    assert list(seen[-1].damage()) == []


def test_indices_of_all_kinds(tmp_path: Path) -> None:
    checked = []

    def look(step: int, recorder: Recorder) -> None:
        if step < 200 or checked or recorder.stats().committed < 100:
            return
        trace = open_trace(partial_of(tmp_path / "t"))
        tensor = trace["first"]
        own = tensor[:].clone()
        for index in [
            *(0, -1, slice(3, 9), slice(None, None, 7), slice(50, 20), [5, 2, 2], torch.tensor([-1, 0])),
            *((4, 7), (slice(2, 5), slice(10, 20)), (slice(None), 3), (slice(1, 90, 2), slice(40, None), slice(3, 5))),
            *((-2, slice(1, 2), -1), (torch.tensor([9, 1]), slice(2, 4)), (slice(0, 3), [1, 5]), (Ellipsis, 2)),
            *(torch.arange(len(own)) % 3 == 0, (slice(3, 4), slice(7, 7))),
        ]:
            assert torch.equal(tensor[index], own[index]), index
        for bad in (len(own), (0, 48)):
            with pytest.raises(IndexError, match="out of bounds"):
                tensor[bad]
        with pytest.raises(ValueError, match="step must be greater than zero"):
            tensor[::-1]
        with pytest.raises(TypeError, match="a live tensor has no __add__: index it first"):
            tensor + 1
        checked.append(len(own))

    record(tmp_path / "t", STEPS, commit_seconds=0.0, after_step=look)
    assert checked


def test_another_process_polls_in_little_memory(tmp_path: Path) -> None:
    """Every value that it reads is that of the finished trace, until the end and beyond it."""
    path, values = tmp_path / "t.safetensors", tmp_path / "values"

    def poll() -> None:
        while not partial_of(path).exists():
            time.sleep(0.001)
        trace = None
        while trace is None:
            with suppress(TraceError):  # until the run has begun
                trace = open_trace(partial_of(path))
        found, memory = {}, peak_memory()
        while trace.is_live:
            records = trace.refresh()
            for at in {records // 3, records - 1} if records > 2 else ():
                for name in ("first", "second.exp_avg_sq", "loss"):
                    found[at, name] = trace[name][at].clone()
            time.sleep(0.005)
        torch.save(found, values)
        assert peak_memory() - memory < 20e6

    child = fork(poll, tmp_path / "errors")
    record(path, 2000, commit_seconds=0.0)
    assert status_of(child) == 0, (tmp_path / "errors").read_text()
    whole, found = open_trace(path), torch.load(values)
    assert len({at for at, _ in found}) > 20
    for (at, name), value in found.items():
        assert raw(whole[name][at]) == raw(value), (at, name)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "t"

    def look(step: int, recorder: Recorder) -> None:
        if step % 20 == 0:
            trace = open_trace(partial_of(folder / "t"))
            for tensor in trace.values():
                copy = tensor[:]
                copy.zero_()

    record(folder / "t", STEPS, commit_seconds=0.0, after_step=look)
    assert [path.name for path in folder.iterdir()] == ["t"]
    assert_is_start_of(open_trace(folder / "t"), open_trace(reference(tmp_path, STEPS)))
    assert list(open_trace(folder / "t").damage()) == []


def test_a_compact_trace(tmp_path: Path) -> None:
    path, seen = tmp_path / "t", []

    def look(step: int, recorder: Recorder, optimizer: torch.optim.Optimizer) -> None:
        if step in (3, 60, 100):
            while recorder.stats().committed < max(1, step - 8):
                time.sleep(0.01)
            seen.append(open_trace(partial_of(path)))
            seen[-1]["w"][-1]  # a block that is kept

    record_compact(path, 100, storage="stream", after_step=look)
    whole = open_trace(path)
    assert {"w", "w.exp_avg", "b", "w.keyframes"} <= set(seen[-1])
    for trace in seen:
        assert_is_start_of(trace, whole)
        some = [0, len(trace.steps) // 2, -1]
        assert torch.equal(trace["w.exp_avg_sq"][some, 3:5], whole["w.exp_avg_sq"][: len(trace.steps)][some, 3:5])
        assert trace.refresh() == 101
        assert torch.equal(trace["w"][:], whole["w"][:])
        assert trace["keyframe_steps"].tolist() == [*range(0, 100, 16), 100]


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.filterwarnings("ignore:.*cannot be rebuilt:bhfast.errors.RecordingWarning")
def test_what_cannot_be_rebuilt_is_known_at_once(is_killed: bool, tmp_path: Path) -> None:
    """Settings change in the middle: an unfinished trace says so, as the finished one does."""
    path, ready = tmp_path / "t", tmp_path / "ready"

    def look(step: int, recorder: Recorder, optimizer: torch.optim.Optimizer) -> None:
        if step == 36:
            optimizer.param_groups[0]["betas"] = (0.5, 0.5)
        if step == 60:
            while recorder.stats().committed < 45:
                time.sleep(0.01)
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            check(open_trace(partial_of(path)))
            ready.touch()

    def check(trace: Trace) -> None:
        assert len(trace["w"][:32]) == 32
        for at in (37, 40):
            with pytest.raises(TraceError, match=r"cannot be rebuilt: the optimizer's settings were changed"):
                trace["w"][at]

    if is_killed:
        assert status_of(fork(partial(record_compact, path, 80, storage="stream", after_step=look))) == -signal.SIGKILL
        check(open_trace(partial_of(path)))
        recover(partial_of(path))
    else:
        record_compact(path, 80, storage="stream", after_step=look)
        assert ready.exists()
    check(open_trace(path))


# ---------------------------------------------------------------------------------------------------------------------
# When the run ends


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed run of unknown length left in its folder. Do not change it."""
    path = tmp_path_factory.mktemp("killed") / "t.safetensors"

    def kill(step: int, recorder: Recorder) -> None:
        if step >= 200 and recorder.stats().committed > 100:
            os.kill(os.getpid(), signal.SIGKILL)

    assert status_of(fork(partial(record, path, 10_000, commit_seconds=0.0, after_step=kill))) == -signal.SIGKILL
    return path.parent


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Path:
    """A copy of what a killed run left: its ``.partial``."""
    folder = tmp_path / "left"
    folder.mkdir()
    for path in killed.iterdir():
        with open(path, "rb") as source, open(folder / path.name, "wb") as target:
            shutil.copyfileobj(source, target) if "journal" in path.name else _copy_sparse(source, target)
    return folder / "t.safetensors.partial"


def _copy_sparse(source, target) -> None:
    size = os.fstat(source.fileno()).st_size
    os.truncate(target.fileno(), size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source.fileno(), at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
        while at < end:
            data = os.pread(source.fileno(), min(1 << 20, end - at), at)
            os.pwrite(target.fileno(), data, at)
            at += len(data)


def test_a_killed_run(left: Path, tmp_path: Path) -> None:
    trace = open_trace(left)
    records = len(trace.steps)
    assert trace.refresh() == records > 100
    assert_is_start_of(trace, open_trace(reference(tmp_path, records)), logged=records - 1)
    held = trace["second"]
    assert recover(left).records == records
    assert torch.equal(held[:], open_trace(left.with_suffix(""))["second"])
    assert trace.refresh() == records
    assert not trace.is_live


def test_at_every_step_of_finishing(left: Path, monkeypatch) -> None:
    """Tensors read right before and after each change of the file and of its journal."""
    whole = {name: tensor[:].clone() for name, tensor in open_trace(left).items()}
    trace, looks = open_trace(left), []

    def check(what: str) -> None:
        looks.append(what)
        for name, tensor in whole.items():
            assert raw(trace[name][:]) == raw(tensor), (what, name)

    def watched(what: str, function: Callable) -> Callable:
        def call(*args: object) -> object:
            if what != "replace":  # the journal is gone, and the file has not got its name
                check(f"before {what}")
            result = function(*args)
            check(f"after {what}")
            return result

        return call

    monkeypatch.setattr(Journal, "append", watched("append", Journal.append))
    monkeypatch.setattr(Journal, "release", watched("release", Journal.release))
    monkeypatch.setattr(finish, "_collapse_range", watched("collapse", finish._collapse_range))
    monkeypatch.setattr(finish, "_write_rest", watched("rest", finish._write_rest))
    monkeypatch.setattr(os, "replace", watched("replace", os.replace))
    recover(left)
    check("at the end")
    assert {"before append", "after collapse", "after rest", "after replace"} <= set(looks)
    assert trace.refresh() == len(whole["recorded_steps"])


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize("collapses", [True, False], ids=["collapse", "copy"])
def test_a_run_that_ends_during_a_read(is_interrupted: bool, collapses: bool, left: Path, monkeypatch) -> None:
    """The place of a record is known, then all records move, and only then is that place read."""
    trace, ended = open_trace(left), []
    wanted = trace["second.grad"][40:60].clone()
    real = CommittedFile._fill

    def fill(self: CommittedFile, target: memoryview, offset: int) -> bool:
        if not ended:
            ended.append(offset)
            with suppress(StorageError), monkeypatch.context() as patch:
                if not collapses:
                    patch.setattr(finish, "_collapse_range", lambda *_: False)
                if is_interrupted:
                    patch.setattr(os, "ftruncate", broken)
                recover(left)
            assert left.exists() == is_interrupted
        return real(self, target, offset)

    def broken(fd: int, size: int) -> None:
        if size > 0 and os.readlink(f"/proc/self/fd/{fd}") == str(left):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        truncate(fd, size)

    truncate = os.ftruncate
    monkeypatch.setattr(CommittedFile, "_fill", fill)
    if is_interrupted and not collapses:
        monkeypatch.setattr(finish, "_has_room", lambda *_: False)
    assert torch.equal(trace["second.grad"][40:60], wanted)
    assert torch.equal(trace["second.grad"][40:60], wanted)
    assert ended


def test_a_new_run_over_a_killed_one(left: Path) -> None:
    """The run takes the same file again: what was shown of the killed one cannot be read any more."""
    trace = open_trace(left)
    rows = trace["first"][5].clone()
    small = trace["loss"][:].clone()

    def look(step: int, recorder: Recorder) -> None:
        if step == 100:
            assert raw(trace["loss"]) == raw(small)
            with pytest.raises(TraceError, match=r"the run that wrote .*partial has ended, but its trace is not"):
                trace["first"][5]
            with pytest.raises(TraceError, match="has ended, but its trace is not in"):
                trace.refresh()
            assert torch.equal(open_trace(left)["first"][5], rows)  # the same run again

    record(left.with_suffix(""), 150, commit_seconds=0.0, after_step=look)


def test_a_trace_that_got_another_name(left: Path, tmp_path: Path) -> None:
    trace = open_trace(left)
    record_small(tmp_path / "other")
    os.replace(tmp_path / "other", left.with_suffix(""))
    path = recover(left).path
    assert ".cut-at-" in path.name
    assert trace.refresh() == len(open_trace(path).steps)
    assert trace.path == path


def test_a_run_that_is_cut_to_its_good_records(left: Path) -> None:
    """The recovered trace is shorter than what was shown before: that is said, and never read past its end."""
    trace = open_trace(left)
    held, state = trace["first"], trace._file.state
    at = state.start["header"] + state.tensors["second.grad"].offset + 60 * state.tensors["second.grad"].nbytes
    with open(left, "r+b") as file:
        file.seek(at)
        file.write(b"damage")
    assert recover(left).records == 60
    with pytest.raises(TraceError, match=r"was cut to fewer records when it was recovered.*refresh\(\) the trace"):
        held[0]
    assert trace.refresh() == 60
    assert len(trace["first"][:]) == 60


def test_a_file_that_is_cut_off(left: Path) -> None:
    trace = open_trace(left)
    os.truncate(left, 100)
    with pytest.raises(TraceError, match="has ended, but its trace is not in"):
        trace["first"][5]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


def test_a_run_that_keeps_its_records_in_memory(tmp_path: Path) -> None:
    def look(step: int, recorder: Recorder) -> None:
        with pytest.raises(TraceError, match=r"partial has no journal, .*keeps its records in memory until it ends"):
            open_trace(partial_of(tmp_path / "t"))

    record(tmp_path / "t", 3, announced=10, storage="memory", after_step=look)


def test_a_complete_file_that_was_not_renamed(tmp_path: Path) -> None:
    record_small(tmp_path / "t.partial")
    assert open_trace(tmp_path / "t.partial").steps.tolist() == [*range(7)]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot open the trace .*t\.partial: No such file"):
        open_trace(tmp_path / "t.partial")
    record_small(tmp_path / "t")
    with pytest.raises(TraceError, match=r"t\.partial: its run has ended; open .*/t$"):
        open_trace(tmp_path / "t.partial")
    journal_path(tmp_path / "t.partial").touch()
    with pytest.raises(TraceError, match="its run has ended; open"):
        open_trace(tmp_path / "t.partial")
    (tmp_path / "t.partial").touch()
    with pytest.raises(TraceError, match="holds nothing yet: its run has only just begun"):
        open_trace(tmp_path / "t.partial")


def test_a_damaged_journal(left: Path) -> None:
    trace = open_trace(left)
    text = b'{"nonsense":1}'
    with open(journal_path(left), "r+b") as file:
        file.seek(trace._file.state.end)
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    for read in (trace.refresh, lambda: trace["first"][0], lambda: open_trace(left)):
        with pytest.raises(TraceError, match=r"journal is corrupted: at or after byte \d+"):
            read()


def test_a_torn_last_line(left: Path) -> None:
    trace = open_trace(left)
    end = trace._file.state.end
    with open(journal_path(left), "r+b") as file:
        file.seek(end)
        file.write(b'00000000 {"records":5')
    assert trace.refresh() == len(open_trace(left).steps) > 100


def test_the_name_that_a_run_will_give_its_trace(left: Path) -> None:
    with pytest.raises(TraceError, match=r"No such file or directory; its run has not ended, open .*partial$"):
        open_trace(left.with_suffix(""))


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def test_verify_wants_the_end_of_the_run(left: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be verified: its run has not ended; if it was killed, .*recover"):
        verify(left)


def test_report_of_a_run_that_goes_on(text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    seen = []
    real = StreamStorage.submit

    def submit(self: StreamStorage, records: int, tickets: object) -> None:
        real(self, records, tickets)
        partial_ = self.output.partial
        if records > 60 and not seen and journal_path(partial_).exists() and len(open_trace(partial_).steps) > 20:
            assert report([str(partial_)]) == 0
            seen.append(survey_trace(open_trace(partial_)))

    monkeypatch.setattr(StreamStorage, "submit", submit)
    monkeypatch.setattr(StreamStorage, "is_due", lambda *_: True)
    train(TrainConfig(steps=80, corpus=text, out=str(tmp_path / "t"), storage="stream", engine="torch", quiet=True))
    assert re.search(r"step 0: centroid norm [0-9.]+.*\nloss: ", capsys.readouterr().out, re.S)
    (found,) = seen
    whole = survey_trace(open_trace(tmp_path / "t"))
    assert 20 < len(found.steps) < 81
    assert torch.equal(found.norms["grads"], whole.norms["grads"][: len(found.steps)])
