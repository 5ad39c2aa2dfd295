"""Runs that go on after an interruption: to the bytes of a run that was never interrupted, or with a reason why not."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import fork, status_of
from test_graph import emulated  # noqa: F401 - a fixture

from bhfast import train as module
from bhfast.checkpoint import Checkpoint, checkpoint_path, read_checkpoint
from bhfast.config import TrainConfig
from bhfast.errors import BhfastError, ConfigError, StorageError
from bhfast.model import build_model
from bhfast.recover import recover
from bhfast.trace import open_trace
from bhfast.trace.journal import journal_path
from bhfast.train import main, resume, train
from bhfast.verify import verify

STEPS = 40
SMALL = {"steps": STEPS, "hidden_dim": 32, "layers": 1, "context": 16, "sigma": 1e-2, "device": "cpu", "quiet": True}
EVERY = 7  # steps from one checkpoint to the next
Progress = Callable[[int, float], None]


@pytest.fixture(autouse=True)
def bursts_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRESS_EVERY", 1)


@pytest.fixture
def settings(tmp_path: Path, text: str) -> TrainConfig:
    out = str(tmp_path / "t.safetensors")
    return TrainConfig(**SMALL, corpus=text, out=out, checkpoint_every=EVERY, storage="stream", engine="auto")


@pytest.fixture
def interrupted(settings: TrainConfig) -> TrainConfig:
    settings = replace(settings, engine="torch")
    train(settings, progress=interrupting(12))
    return settings


def uninterrupted(settings: TrainConfig) -> bytes:
    """Return the bytes of the trace that the run leaves if nothing happens."""
    path = settings.path.with_name("uninterrupted")
    train(replace(settings, out=str(path), checkpoint_every=0, storage=settings.wanted_storage))
    data = path.read_bytes()
    path.unlink()
    return data


def interrupting(last: int, number: int = signal.SIGINT) -> Progress:
    """Send this process a signal after step ``last``."""

    def progress(step: int, loss: float) -> None:
        if step == last:
            os.kill(os.getpid(), number)

    return progress


def killed(work: Callable[[Progress], object], last: int) -> None:
    """Do ``work`` in a child that is killed after step ``last``."""
    assert status_of(fork(lambda: work(interrupting(last, signal.SIGKILL)))) == -signal.SIGKILL


def files(settings: TrainConfig) -> set[str]:
    return {path.name for path in settings.path.parent.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# To the same bytes


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("rounding", ["per-op", "opmath"])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_after_five_interruptions(engine, rounding, storage, settings: TrainConfig) -> None:
    settings = replace(settings, engine=engine, adam_rounding=rounding, storage=storage, weight_decay=0.1)
    wanted = uninterrupted(settings)
    first, *others = sorted(random.sample(range(1, STEPS), 5))
    print("interrupted after steps", first, *others)
    assert train(settings, progress=interrupting(first)).signal == signal.SIGINT
    for last in others:
        result = resume(settings.path, progress=interrupting(last))
        assert (result.steps, result.path) == (last, settings.path)
        assert open_trace(settings.path).steps[-1] == read_checkpoint(checkpoint_path(settings.path)).step == last
        assert files(settings) == {"t.safetensors", "t.safetensors.checkpoint"}
    assert resume(settings.path).steps == STEPS
    assert settings.path.read_bytes() == wanted
    assert files(settings) == {"t.safetensors"}


@pytest.mark.parametrize("engine", ["torch", "native"])
@pytest.mark.parametrize(
    "changes",
    [{"keyframes": 4}, {"keyframes": 64}, {"record_every": 3}, {"record_every": 3, "storage": "memory"},
     {"keyframes": 5, "storage": "memory"}, {"grad_accum": 2, "batch_size": 3, "max_grad_norm": 0.1}],
    ids=str,
)  # fmt: skip
def test_after_a_kill_with_other_settings(changes, engine: str, settings: TrainConfig) -> None:
    settings = replace(settings, engine=engine, **changes)
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(random.randrange(1, 15)))
    killed(lambda progress: resume(settings.path, progress=progress), random.randrange(15, STEPS))
    resume(settings.path)
    assert settings.path.read_bytes() == wanted
    assert verify(settings.path).difference is None


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize(
    "changes",
    [
        {"thermal_noise": 1e-3, "thermal_rows": "dead"},
        {"thermal_noise": 1e-3, "record_every": 3, "hidden": "mean,var"},
        {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "params": "wte,h.0.mlp", "rows": "1,5-90"},
        {"dtype": "float32", "frozen_rows": "dead", "start": "gaussian", "init_seed": 3, "data_seed": 4},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_of_another_experiment(changes, storage: str, settings: TrainConfig) -> None:
    settings = replace(settings, storage=storage, **changes)
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(11))
    killed(lambda progress: resume(settings.path, progress=progress), 25)
    resume(settings.path)
    assert settings.path.read_bytes() == wanted


def test_of_some_rows_on_the_native_engine(settings: TrainConfig) -> None:
    settings = replace(settings, engine="native", rows="dead", hidden="mean", frozen_rows="1-9", params="wte,ln_f")
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(11))
    resume(settings.path)
    assert settings.path.read_bytes() == wanted


@pytest.mark.parametrize("is_recovered", [False, True])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_after_kills(engine: str, is_recovered: bool, settings: TrainConfig) -> None:
    settings = replace(settings, engine=engine)
    wanted = uninterrupted(settings)
    steps = sorted(random.sample(range(EVERY + 1, STEPS), 5))
    print("killed after steps", *steps)
    for i, last in enumerate(steps):
        killed(
            lambda progress, i=i: resume(settings.path, progress=progress) if i else train(settings, progress=progress),
            last,
        )
        if is_recovered:
            with suppress(StorageError):  # of the second one with as many records
                recover(settings.path.with_name("t.safetensors.partial"))
    resume(settings.path)
    assert settings.path.read_bytes() == wanted


def test_the_result_is_that_of_the_whole_run(settings: TrainConfig) -> None:
    whole = train(replace(settings, out=f"{settings.out}.whole"))
    train(settings, progress=interrupting(19))
    resumed = resume(settings.path)
    assert torch.equal(resumed.losses, whole.losses)
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))


@pytest.mark.parametrize("changes", [{}, {"record_every": 3, "storage": "memory"}, {"keyframes": 4}], ids=str)
def test_through_a_ring(changes, emulated, settings: TrainConfig) -> None:  # noqa: F811
    settings = replace(settings, engine="graph", **changes)
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(12))
    for last in (13, 22):
        resume(settings.path, progress=interrupting(last))
    resume(settings.path)
    assert settings.path.read_bytes() == wanted


@pytest.mark.parametrize("interrupted", [None, 9])
def test_a_shorter_run_becomes_longer(interrupted: int | None, settings: TrainConfig) -> None:
    settings = replace(settings, lr_schedule="constant")
    wanted = uninterrupted(settings)
    train(replace(settings, steps=18), progress=interrupted and interrupting(interrupted))
    assert files(settings) == {"t.safetensors", "t.safetensors.checkpoint"}
    resume(settings.path, steps=30)
    resume(settings.path, steps=STEPS)
    assert settings.path.read_bytes() == wanted
    assert files(settings) == {"t.safetensors", "t.safetensors.checkpoint"}


def test_the_corpus_may_have_moved(settings: TrainConfig, tmp_path: Path) -> None:
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(9))
    moved = shutil.copy(settings.corpus, tmp_path / "moved.txt")
    resume(settings.path, corpus=str(moved))
    assert settings.path.read_bytes() == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Bad luck


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("last", [17, STEPS])
def test_a_kill_at_any_file_operation_loses_nothing(storage: str, last: int, settings: TrainConfig) -> None:
    """A resumed run is killed before each of its renames, removals and syncs, and goes on after that."""
    settings = replace(settings, storage=storage)
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(12))
    folder = settings.path.parent
    shutil.copytree(folder, kept := folder.with_name(f"{folder.name}-kept"))
    for number in range(1, 1000):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        status = status_of(
            fork(lambda n=number: dying_at(n, lambda: resume(settings.path, progress=interrupting(last))))
        )
        assert status in (0, -signal.SIGKILL)
        with suppress(ConfigError):  # is complete
            resume(settings.path)
        assert settings.path.read_bytes() == wanted, number
        assert files(settings) == {"t.safetensors"}
        if status == 0:
            break
    assert number > 8


def dying_at(number: int, work: Callable[[], object]) -> None:
    """Do ``work`` until the call with this number of a function that changes names or syncs, from 1."""
    calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "fsync", "fdatasync", "ftruncate"):
        setattr(os, name, dying(getattr(os, name)))
    work()


def test_a_kill_with_the_records_in_memory_leaves_the_earlier_trace(settings: TrainConfig) -> None:
    settings = replace(settings, storage="memory")
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(11))
    killed(lambda progress: resume(settings.path, progress=progress), 30)
    assert open_trace(settings.path).steps[-1] == 11
    resume(settings.path)
    assert settings.path.read_bytes() == wanted


def test_an_interruption_before_the_earlier_end_keeps_the_earlier_trace(settings: TrainConfig) -> None:
    wanted = uninterrupted(settings)
    train(settings, progress=interrupting(14))
    earlier = shutil.copy(checkpoint_path(settings.path), settings.path.with_name("earlier"))
    settings.path.unlink()
    train(settings, progress=interrupting(20))
    os.replace(earlier, checkpoint_path(settings.path))
    result = resume(settings.path, progress=interrupting(15))  # goes on after 14
    assert (result.steps, result.path) == (15, settings.path)
    assert open_trace(settings.path).steps[-1] == 20
    assert files(settings) == {"t.safetensors", "t.safetensors.checkpoint"}
    resume(settings.path)
    assert settings.path.read_bytes() == wanted


def test_an_interruption_before_the_first_step_changes_nothing(interrupted: TrainConfig, monkeypatch) -> None:
    before = interrupted.path.read_bytes()
    restore = Checkpoint.restore
    monkeypatch.setattr(Checkpoint, "restore", lambda *args: (os.kill(os.getpid(), signal.SIGINT), restore(*args)))
    result = resume(interrupted.path)
    assert (result.steps, result.path, result.signal) == (12, interrupted.path, signal.SIGINT)
    assert interrupted.path.read_bytes() == before
    assert files(interrupted) == {"t.safetensors", "t.safetensors.checkpoint"}
    monkeypatch.undo()
    assert resume(interrupted.path).steps == STEPS


def test_a_full_disk_leaves_the_earlier_checkpoint(settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = uninterrupted(settings)
    real = os.replace

    def full(source, target):
        if str(target).endswith(".checkpoint") and read_step(target) == 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    def read_step(path):
        return read_checkpoint(Path(path)).step if os.path.exists(path) else 0

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"cannot write the checkpoint .*: No space left .*; make room, then go on"):
        train(settings)
    monkeypatch.undo()
    assert files(settings) == {"t.safetensors", "t.safetensors.checkpoint"}
    assert read_checkpoint(checkpoint_path(settings.path)).step == 14
    resume(settings.path)
    assert settings.path.read_bytes() == wanted


def test_a_checkpoint_is_never_ahead_of_the_trace(settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose writer commits only when it must is killed right after a checkpoint."""
    monkeypatch.setattr("bhfast.storage.stream.COMMIT_SECONDS", 1e9)
    killed(lambda progress: train(settings, progress=progress), 22)
    partial = settings.path.with_name("t.safetensors.partial")
    assert open_trace(partial).steps[-1] >= read_checkpoint(checkpoint_path(settings.path)).step == 21


def test_a_checkpoint_of_an_earlier_run_goes_with_its_trace(settings: TrainConfig) -> None:
    train(settings, progress=interrupting(9))
    train(replace(settings, seed=1, overwrite=True, checkpoint_every=0))
    assert files(settings) == {"t.safetensors"}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 43}, r"resuming \S+ under other settings \(seed 42, now 43\): leave these out, or start another run"),
        ({"lr": 1e-4, "sigma": 0.0}, r"\(sigma 0\.01, now 0\.0; lr 0\.001, now 0\.0001\): leave these out"),
        ({"keyframes": 4}, r"under other settings \(keyframes 0, now 4\)"),
        ({"engine": "native"}, r"under other settings \(engine 'torch', now 'native'\)"),
        ({"overwrite": True}, r"under other settings \(overwrite False, now True\)"),
        ({"steps": 39}, r"steps can only become larger when a run is resumed: it was 40, now 39"),
        (
            {"steps": 41},
            r"steps was 40, now 41: with lr_schedule linear all learning rates would be others; only a run",
        ),
        ({"storage": "tape"}, r"storage must be one of auto, memory, stream, got 'tape'"),
    ],
    ids=str,
)
def test_refuses_other_settings(change, message, interrupted: TrainConfig) -> None:
    before = interrupted.path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        resume(interrupted.path, **change)
    assert interrupted.path.read_bytes() == before
    assert files(interrupted) == {"t.safetensors", "t.safetensors.checkpoint"}


def test_refuses_another_text_and_another_machine(interrupted, tmp_path: Path, two_threads) -> None:
    with pytest.raises(ConfigError, match=r"under other settings \(threads '1', now '2'\): its bits would be others"):
        resume(interrupted.path)
    other = tmp_path / "other.txt"
    other.write_bytes(Path(interrupted.corpus).read_bytes() + b".")
    with pytest.raises(ConfigError, match=r"\(corpus_sha256 '.*', now '.*'; threads"):
        resume(interrupted.path, corpus=str(other))


def test_settings_that_are_given_again_are_fine(interrupted: TrainConfig) -> None:
    assert resume(interrupted.path, seed=42, engine="torch", out=interrupted.out, steps=STEPS).steps == STEPS


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def record_bytes(path: Path, record: int) -> bytes:
    return open_trace(path)["grads"][record].view(torch.uint8).numpy().tobytes()


def without_checkpoint(settings: TrainConfig) -> None:
    checkpoint_path(settings.path).unlink()


def without_trace(settings: TrainConfig) -> None:
    settings.path.unlink()


def without_both(settings: TrainConfig) -> None:
    without_checkpoint(settings)
    without_trace(settings)


def damaged_checkpoint(settings: TrainConfig) -> None:
    flip(checkpoint_path(settings.path), -1000)


def cut_off_checkpoint(settings: TrainConfig) -> None:
    path = checkpoint_path(settings.path)
    path.write_bytes(path.read_bytes()[:-100])


def something_else_as_checkpoint(settings: TrainConfig) -> None:
    shutil.copy(settings.path, checkpoint_path(settings.path))


def checkpoint_of_another_run(settings: TrainConfig) -> None:
    other = replace(settings, seed=1, out=f"{settings.out}.other")
    train(other, progress=interrupting(12))
    os.replace(checkpoint_path(other.path), checkpoint_path(settings.path))


def damaged_trace(settings: TrainConfig) -> None:
    flip(settings.path, settings.path.read_bytes().index(record_bytes(settings.path, 5)) + 100)


def cut_off_trace(settings: TrainConfig) -> None:
    settings.path.write_bytes(settings.path.read_bytes()[:-1000])


def trace_that_ends_earlier(settings: TrainConfig) -> None:
    late = checkpoint_path(settings.path).read_bytes()
    without_both(settings)
    train(settings, progress=interrupting(5))
    checkpoint_path(settings.path).write_bytes(late)


def foreign_partial(settings: TrainConfig) -> None:
    other = replace(settings, seed=1, out=f"{settings.out}.other")
    killed(lambda progress: train(other, progress=progress), 20)
    partial = other.path.with_name(other.path.name + ".partial")
    own = settings.path.with_name(settings.path.name + ".partial")
    os.replace(journal_path(partial), journal_path(own))
    os.replace(partial, own)


def killed_in_memory(settings: TrainConfig) -> None:
    without_both(settings)
    killed(lambda progress: train(replace(settings, storage="memory"), progress=progress), 12)


def complete(settings: TrainConfig) -> None:
    resume(settings.path)


def complete_and_longer(settings: TrainConfig) -> None:
    without_both(settings)
    train(replace(settings, lr_schedule="constant"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without_checkpoint,
            "cannot be resumed: .*checkpoint does not exist; a run writes checkpoints with --checkpoint",
        ),
        (without_trace, "cannot resume .*: there is a checkpoint, but no such trace"),
        (without_both, "cannot resume .*: there is no such trace"),
        (damaged_checkpoint, "the checkpoint .* is damaged: a checksum does not match; nothing can go on from it"),
        (cut_off_checkpoint, r"t\.safetensors\.checkpoint is truncated"),
        (something_else_as_checkpoint, r"t\.safetensors\.checkpoint is not a checkpoint of bhfast"),
        (checkpoint_of_another_run, r"and the checkpoint beside it are of different runs \(seed 42, now 1\)"),
        (
            damaged_trace,
            "is damaged after step 4, before its checkpoint of step 12: nothing can go on from it; python -m",
        ),
        (cut_off_trace, r"t\.safetensors is truncated"),
        (trace_that_ends_earlier, "ends at step 5, before its checkpoint of step 12: the records in between are lost"),
        (foreign_partial, r"\.partial and the checkpoint beside it are of different runs \(seed 1, now 42\): move one"),
        (
            killed_in_memory,
            "cannot be resumed: its run kept the records in memory, and they were lost when it was killed",
        ),
        (complete, r"t\.safetensors is complete: it has all of its 40 steps$"),
        (complete_and_longer, "is complete: it has all of its 40 steps; to go on, pass a larger --steps"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_says_why_it_cannot_go_on(spoil, message: str, interrupted: TrainConfig) -> None:
    spoil(interrupted)
    before = {path: path.read_bytes() for path in interrupted.path.parent.iterdir()}
    with pytest.raises(BhfastError, match=message) as caught:
        resume(interrupted.path)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in interrupted.path.parent.iterdir()} == before


def test_a_trace_that_is_damaged_later_is_made_whole(interrupted: TrainConfig) -> None:
    checkpoint = checkpoint_path(interrupted.path)
    kept = checkpoint.read_bytes()
    resume(interrupted.path)
    wanted = interrupted.path.read_bytes()
    flip(interrupted.path, wanted.index(record_bytes(interrupted.path, 30)) + 100)
    checkpoint.write_bytes(kept)
    resume(interrupted.path)
    assert interrupted.path.read_bytes() == wanted


def test_refuses_a_state_that_is_not_that_of_the_trace(interrupted: TrainConfig, monkeypatch) -> None:
    before, path = interrupted.path.read_bytes(), checkpoint_path(interrupted.path)
    found = read_checkpoint(path)
    found.tensors["state.wte.weight.exp_avg"][3, 5] += 1
    found.write(path)
    with pytest.raises(
        ConfigError, match=r"the checkpoint of step 12 does not fit .*, whose momentum of that step differs"
    ):
        resume(interrupted.path)
    monkeypatch.setattr(module, "build_model", lambda *args, seed, **kw: build_model(*args, seed=seed + 1, **kw))
    with pytest.raises(ConfigError, match="does not start as this run does: embeddings of step 0 differs"):
        resume(interrupted.path)
    assert interrupted.path.read_bytes() == before


def test_refuses_a_run_that_is_still_going_on(settings: TrainConfig) -> None:
    def look(step: int, loss: float) -> None:
        if step == 20:
            with pytest.raises(StorageError, match="is being written by another run"):
                resume(settings.path)

    assert train(settings, progress=look).steps == STEPS


def test_checkpoints_need_a_recording() -> None:
    with pytest.raises(ConfigError, match="checkpoint_every needs a recording to go on with, got record_every=0"):
        TrainConfig(checkpoint_every=5, record_every=0)
    with pytest.raises(ConfigError, match="checkpoint_every must be at least 0, got -1"):
        TrainConfig(checkpoint_every=-1)


def test_checkpoints_choose_a_storage_that_outlives_a_kill() -> None:
    assert TrainConfig().wanted_storage == "auto"
    assert TrainConfig(checkpoint_every=5).wanted_storage == "stream"
    assert TrainConfig(checkpoint_every=5, storage="memory").wanted_storage == "memory"


def test_the_program_resumes(interrupted: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", interrupted.out, "--lr", "0.5"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("bhfast train: error: resuming")
    assert printed.err.count("\n") == 1
    assert main(["--resume", interrupted.out]) == 0
    printed = capsys.readouterr()
    assert "resumes  after step 12 of 40" in printed.out
    assert "28 steps in" in printed.out
    assert "saved steps 0 to 40" in printed.out
    assert main(["--resume", interrupted.out]) == 2
