"""Compact traces: what is rebuilt between key frames is what a full recording of the same run holds, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from keyframe_runs import KEYFRAME, RUNS, SHAPES, STEPS, assert_same, assert_same_bits

from bhfast.trace import open_trace
from bhfast.trace.format import KEYFRAMES
from bhfast.trace.updates import STATE
from bhfast.verify import verify


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("name", RUNS)
def test_rebuilds_what_a_full_recording_holds(name: str, storage: str, tmp_path: Path) -> None:
    run = RUNS[name]
    compact = run.record(tmp_path / "compact", keyframes=KEYFRAME, storage=storage)
    assert_same(run.record(tmp_path / "full"), compact)
    found = verify(compact)
    if run.done == 0:
        assert (found.status, found.reason) == (2, "learning_rates are not in the file")
    else:
        assert (found.status, found.replayed) == (0, len(open_trace(compact).steps) - 1), found


@pytest.mark.parametrize("keyframes", [2, 3, STEPS, STEPS + 1, 1000])
@pytest.mark.parametrize("steps", [STEPS, None, 1000])
def test_any_distance_between_key_frames(keyframes: int, steps: int | None, tmp_path: Path) -> None:
    storage = "stream" if steps is None else "auto"
    compact = RUNS["FusedAdam"].record(tmp_path / "compact", keyframes=keyframes, steps=steps, storage=storage)
    assert_same(RUNS["FusedAdam"].record(tmp_path / "full"), compact)
    trace = open_trace(compact)
    frames = sorted({*range(0, STEPS + 1, keyframes), STEPS})
    assert trace["keyframe_steps"].tolist() == frames
    assert trace.metadata["keyframes"] == str(keyframes)
    for name in SHAPES:
        for key in (trace.optimizer["params"][name]["keys"][field] for field in STATE):
            assert_same_bits(trace[f"{key}{KEYFRAMES}"], trace[key][torch.tensor(frames)])
    assert verify(compact).status == 0
