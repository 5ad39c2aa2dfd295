"""Forked children of a recording process, such as workers of a DataLoader: what they do leaves the trace as it is."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import fork, status_of
from streaming_run import assert_begins_like, record, reference
from torch.utils.data import DataLoader, Dataset

from bhfast.errors import StorageError
from bhfast.recording.recorder import Recorder
from bhfast.recover import recover
from bhfast.storage.output import OutputFile
from bhfast.trace import open_trace
from bhfast.verify import verify

STEPS, FORKED_AT = 60, 25


def fork_at_step(step: int, *, raises: BaseException | None) -> Callable[[int, Recorder], None]:
    """Return what forks at a step. The child goes on with the training, or leaves it by an exception."""

    def after_step(number: int, recorder: Recorder) -> None:
        if number != step:
            return
        child = os.fork()
        if child == 0:
            if raises is not None:
                raise raises
        else:
            assert status_of(child) == 7

    return after_step


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("raises", [ZeroDivisionError(), SystemExit(1), None], ids=["exception", "exit", "goes on"])
def test_a_child_leaves_the_recording_as_it_is(storage: str, raises: BaseException | None, tmp_path: Path) -> None:
    path, test = tmp_path / "t.safetensors", os.getpid()
    try:
        record(path, STEPS, announced=STEPS, storage=storage, after_step=fork_at_step(FORKED_AT, raises=raises))
    finally:
        if os.getpid() != test:  # here the child has left the block
            os._exit(7 if path.with_name(f"{path.name}.partial").exists() and not path.exists() else 8)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    assert verify(path).replayed == STEPS
    assert_begins_like(path, reference(tmp_path, STEPS))
    assert len(open_trace(path).steps) == STEPS + 1


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_child_that_ends_as_a_program_does(storage: str, tmp_path: Path) -> None:
    """By sys.exit, with what is registered for the end, and its garbage."""
    path, errors = tmp_path / "t.safetensors", tmp_path / "errors"

    def after_step(step: int, recorder: Recorder) -> None:
        if step == FORKED_AT:
            child = fork(lambda: (atexit._run_exitfuncs(), recorder.close(), sys.exit(7)), errors)
            assert status_of(child) == 7

    atexit_before = atexit._ncallbacks()
    record(path, STEPS, announced=STEPS, storage=storage, after_step=after_step)
    assert atexit._ncallbacks() == atexit_before
    assert not errors.exists()
    assert verify(path).replayed == STEPS


class Numbers(Dataset):
    """Fails in a worker if told to."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if self.fails:
            raise ZeroDivisionError("in a worker")
        return index


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_workers_of_a_data_loader(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # How many seconds torch waits for a worker whose loader is garbage, and which may miss the call to leave.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    path = tmp_path / "t.safetensors"

    def after_step(step: int, recorder: Recorder) -> None:
        if step == FORKED_AT:
            loader = DataLoader(Numbers(False), num_workers=2, multiprocessing_context="fork")
            assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3]
            with pytest.raises(ZeroDivisionError, match="in a worker"):
                list(DataLoader(Numbers(True), num_workers=1, multiprocessing_context="fork"))

    record(path, STEPS, announced=STEPS, storage=storage, after_step=after_step)
    gc.collect()  # the loader that failed
    assert verify(path).replayed == STEPS
    assert_begins_like(path, reference(tmp_path, STEPS))


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_a_worker_that_outlives_a_killed_run_keeps_no_lock(storage: str, tmp_path: Path) -> None:
    path, partial = tmp_path / "t.safetensors", tmp_path / "t.safetensors.partial"
    worker_lives, stop = os.pipe()

    def work(step: int, recorder: Recorder) -> None:
        if step == FORKED_AT:
            if os.fork() == 0:
                os.close(stop)
                os.read(worker_lives, 1)  # until the test closes its end
                os._exit(0)
            while storage == "stream" and recorder.stats().committed <= 1:
                time.sleep(0.001)
            with pytest.raises(StorageError, match="is being written by another run"):
                recover(partial)
            os.kill(os.getpid(), signal.SIGKILL)

    run = fork(lambda: record(path, STEPS, announced=STEPS, storage=storage, commit_seconds=0, after_step=work))
    assert status_of(run) == -signal.SIGKILL
    try:
        if storage == "stream":
            assert 0 < recover(partial).last_step <= FORKED_AT
            assert_begins_like(path, reference(tmp_path, STEPS))
        with OutputFile(path, overwrite=True):
            assert partial.exists()
    finally:
        os.close(stop)
        os.close(worker_lives)


def test_a_child_neither_unlocks_nor_removes(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "t") as output:

        def leave() -> None:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(output.fd)
            output.__exit__(None, None, None)

        assert status_of(fork(leave)) == 0
        assert output.is_in_place
        with pytest.raises(StorageError, match="is being written by another run"):
            OutputFile(tmp_path / "t", overwrite=True).__enter__()
