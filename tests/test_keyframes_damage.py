"""Compact traces that were damaged, or whose run was killed or ran out of disk."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from children import fork, status_of
from hypothesis import given
from hypothesis import strategies as st
from keyframe_runs import KEYFRAME, RUNS, STEPS, Params, Run, assert_same, assert_same_bits
from strategies import HEADER_CHANGES, JUNK, change_header, fuzzed
from streaming_run import assert_begins_like, record
from traces import flip, joined, split

from bhfast.errors import RecordingWarning, TraceError
from bhfast.recover import recover
from bhfast.storage import stream
from bhfast.storage.files import journal_path
from bhfast.storage.journal import Journal
from bhfast.trace import open_trace, rebuilt
from bhfast.trace.format import KEYFRAME_STEPS
from bhfast.verify import main, verify

# ---------------------------------------------------------------------------------------------------------------------
# One flipped bit


@pytest.fixture
def clipped(tmp_path: Path) -> Path:
    return RUNS["unclipped"].record(tmp_path / "t", keyframes=KEYFRAME)


@pytest.mark.parametrize(
    ("tensor", "index", "said"),
    [
        (
            "cube.grad",
            (13, 1, 0, 9),
            r"step 13, cube.grad: .*; found by replaying cube.*keyframes\[1, 0, 9\] of step 16",
        ),
        (
            "cube.grad",
            (16, 2, 1, 64),
            r"step 16, cube.grad: .*; found by replaying cube.*keyframes\[2, 1, 64\] of step 16",
        ),
        ("vector.grad", (20, 3), r"step 20, vector.grad: .*; found by replaying vector.*keyframes\[3\] of step 21"),
        ("scalar.grad", (4,), r"steps 1 to 8, scalar.grad: .*; found by replaying scalar.*keyframes\[\] of step 8"),
        (
            "cube.keyframes",
            (1, 1, 0, 9),
            r"step 8, cube.keyframes: .*; found by replaying cube.*keyframes\[1, 0, 9\] of step",
        ),
        ("matrix.exp_avg.keyframes", (3, 4, 6), r"step 21, matrix.exp_avg.keyframes: .*\[4, 6\] of step 21"),
        ("matrix.exp_avg.keyframes", (0, 0, 1), r"step 0, matrix.exp_avg.keyframes\[0, 1\]: recorded .* replayed 0"),
        ("clip_coefs", (11,), r"steps 9 to 16, clip_coefs: its CRC-32 does not match; found by replaying "),
        ("learning_rates", (2,), r"steps 1 to 8, learning_rates: its CRC-32 does not match; found by replaying "),
    ],
    ids=str,
)
def test_names_the_damaged_record(tensor: str, index: Any, said: str, clipped: Path, capsys: Any) -> None:
    flip(clipped, tensor, *index, bit={"clip_coefs": 22, "learning_rates": 51}.get(tensor, 13))
    assert main([str(clipped)]) == 1
    assert re.search(said, capsys.readouterr().out)


def test_a_read_that_fails_leaves_nothing_behind(clipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intact = open_trace(clipped)["matrix"][: KEYFRAME + 1].clone()
    flip(clipped, "matrix.grad", 12, 3, 3, bit=13)
    matrix = open_trace(clipped)["matrix"]
    monkeypatch.setattr(rebuilt, "CACHE_BYTES", 3 * KEYFRAME * intact[0].nbytes)  # one block
    assert_same_bits(matrix[3], intact[3])
    for _ in range(2):
        with pytest.raises(TraceError, match="steps 9 to 16 do not lead from one key frame of matrix to the next"):
            _ = matrix[10]
        assert_same_bits(matrix[3], intact[3])


def change_settings(step: int, params: Params, optimizers: Any) -> None:
    if step == 2:
        optimizers[0].param_groups[0]["weight_decay"] = 0.5


@pytest.mark.filterwarnings("ignore:from step 3 on")
@pytest.mark.parametrize(("tensor", "step"), [("cube.grad", 2), ("cube.keyframes", 16), ("cube.exp_avg.keyframes", 16)])
def test_without_a_replay_checksums_name_the_step(tensor: str, step: int, tmp_path: Path) -> None:
    path = Run(after_step=change_settings).record(tmp_path / "t", keyframes=KEYFRAME)
    assert verify(path).status == 2
    flip(path, tensor, 2, 0, 0, 0, bit=1)
    assert str(verify(path)) == f"DIFFERENT: step {step}, {tensor}: the CRC-32 of its bytes does not match"


@pytest.mark.parametrize("index", [13, slice(9, 16), slice(None), (slice(None), 1), [0, 3, 12]], ids=str)
def test_reading_from_a_damaged_gradient_is_an_error(index: Any, clipped: Path) -> None:
    wanted = open_trace(clipped)["cube"][:]
    flip(clipped, "cube.grad", 13, 1, 0, 9, bit=13)
    trace = open_trace(clipped)
    with pytest.raises(TraceError, match="steps 9 to 16 do not lead from one key frame of cube to the next"):
        trace["cube"][index]
    known = [*range(KEYFRAME + 1), *range(16, STEPS + 1)]
    assert_same_bits(trace["cube"][known], wanted[known])
    assert_same_bits(trace["cube"][:, 0], wanted[:, 0])


def test_a_damaged_key_frame_is_an_error_on_both_sides(clipped: Path) -> None:
    wanted = open_trace(clipped)["cube"][:]
    flip(clipped, "cube.keyframes", 1, 1, 0, 9, bit=3)
    trace = open_trace(clipped)
    for index in (*range(1, KEYFRAME), *range(KEYFRAME + 1, 2 * KEYFRAME)):
        with pytest.raises(TraceError, match="do not lead from one key frame of cube to the next"):
            trace["cube"][index]
    assert_same_bits(trace["cube"][2 * KEYFRAME :], wanted[2 * KEYFRAME :])


# ---------------------------------------------------------------------------------------------------------------------
# A header that says something else


def set_leaf(value: Any, places: list[int], junk: Any) -> Any:
    """Return a JSON value with one part of it replaced."""
    if not places or not isinstance(value, dict | list) or not value:
        return junk
    key = sorted(value)[places[0] % len(value)] if isinstance(value, dict) else places[0] % len(value)
    value[key] = set_leaf(value[key], places[1:], junk)
    return value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RUNS["two optimizers"].record(tmp_path_factory.mktemp("whole") / "t", keyframes=KEYFRAME)


@fuzzed(40)
@given(HEADER_CHANGES, st.lists(st.integers(0, 9), min_size=1, max_size=5), JUNK, st.booleans())
def test_a_damaged_header_is_a_trace_error(
    whole: Path, changes: Any, places: list[int], junk: Any, is_optimizer: bool
) -> None:
    header, data = split(whole.read_bytes())
    if is_optimizer:
        described = set_leaf(json.loads(header["__metadata__"]["optimizer"]), places, junk)
        header["__metadata__"]["optimizer"] = json.dumps(described)
    else:
        for change in changes:
            change_header(header, *change)
    path = whole.with_name("damaged")
    path.unlink(missing_ok=True)
    path.write_bytes(joined(header, data))
    with suppress(TraceError):
        trace = open_trace(path)
        for tensor in trace.rebuilt.values():
            for index in (slice(None), 5, [1, -1]):
                with suppress(TraceError, IndexError):
                    tensor[index]
    with suppress(TraceError):
        verify(path)


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def compact(path: Path, **options: Any) -> Any:
    return record(path, 400, keyframes=KEYFRAME, buffer_bytes=1 << 16, commit_seconds=1e-3, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("whole") / "whole", 400, announced=400, storage="memory").path


def assert_recovered(partial_path: Path, whole: Path) -> None:
    """All committed records are there, or rebuilt, as in the full trace."""
    found = recover(partial_path)
    assert_begins_like(found.path, whole, logged=found.records - 1)
    assert len(open_trace(found.path).steps) == found.records
    assert verify(found.path).difference is None


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_is_recovered_and_rebuilt(times: int, undisturbed: Path, tmp_path: Path) -> None:
    chance = random.Random(times)
    for number in range(times):
        path = tmp_path / f"{number}"
        announced, seconds = chance.choice([None, 400, 1000]), chance.uniform(0.05, 0.4)
        child = fork(partial(compact, path, announced=announced, after_step=lambda *_: time.sleep(0.002)))
        while not journal_path(path.with_name(f"{path.name}.partial")).exists():
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
        assert_recovered(path.with_name(f"{path.name}.partial"), undisturbed)


def kill_after(number: int, step: int, recorder: Any) -> None:
    if step == number:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", [KEYFRAME * 10 - 1, KEYFRAME * 10, KEYFRAME * 10 + 1])
def test_a_run_killed_near_a_key_frame(step: int, undisturbed: Path, tmp_path: Path) -> None:
    assert status_of(fork(partial(compact, tmp_path / "t", after_step=partial(kill_after, step)))) == -signal.SIGKILL
    assert_recovered(tmp_path / "t.partial", undisturbed)


# ---------------------------------------------------------------------------------------------------------------------
# The last key frame


@pytest.mark.parametrize("where", ["file", "journal", "sync"])
def test_a_disk_that_fills_up_at_the_last_key_frame(where: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Only that key frame is lost: what it has is rebuilt."""
    run = RUNS["FusedAdam"]
    add_last = stream.StreamStorage.add_last

    def failing(self: stream.StreamStorage) -> bool:
        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            target = {"file": (stream, "write_at"), "journal": (Journal, "append"), "sync": (stream, "sync")}[where]
            patch.setattr(*target, fail)
            return add_last(self)

    monkeypatch.setattr(stream.StreamStorage, "add_last", failing)
    said = (
        "the last key frame of .*/compact could not be written: No space left on device; the others and all gradients"
    )
    with pytest.warns(RecordingWarning, match=said):
        path = run.record(tmp_path / "compact", keyframes=KEYFRAME, storage="stream")
    assert open_trace(path)[KEYFRAME_STEPS].tolist() == [0, 8, 16]
    assert_same(run.record(tmp_path / "full"), path)
    assert verify(path).status == 0


def test_a_last_line_of_the_journal_that_is_not_synced(tmp_path: Path, monkeypatch: Any) -> None:
    run = RUNS["FusedAdam"]
    append = Journal.append

    def failing(self: Journal, event: Any) -> None:
        append(self, event)
        if "last" in event:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Journal, "append", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecordingWarning)
        path = run.record(tmp_path / "compact", keyframes=KEYFRAME, storage="stream")
    assert_same(run.record(tmp_path / "full"), path)
    assert verify(path).status == 0
    assert open_trace(path)[KEYFRAME_STEPS].tolist() == [0, 8, 16, 21]
