"""Predicted and recorded updates, against a formula in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from traces import flip, record

from bhfast.accounting import predicted_shares
from bhfast.errors import RecordingWarning, TraceError
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.train import TrainResult


def test_every_recorded_update_is_the_one_of_its_arithmetic(run: TrainResult) -> None:
    shares = predicted_shares(open_trace(run.path), "wte")
    assert shares.shape == (130, 128)
    assert (shares == 1).all()


def test_the_textbook_formula_misses_some(run: TrainResult) -> None:
    trace = open_trace(run.path)
    shares = predicted_shares(trace, "wte", "float32")
    w, m, v = (trace[name].float().numpy() for name in ("embeddings", "momentum", "variance"))
    one = np.float32(1)
    for k in (1, 2, 130):
        lr = trace["learning_rates"][k].item()
        step_size, root = np.float32(-(lr / (1 - 0.9**k))), np.float32((1 - 0.999**k) ** 0.5)
        predicted = one * w[k - 1] + step_size * (m[k] / (np.sqrt(v[k]) / root + np.float32(1e-8)))
        equal = torch.from_numpy(predicted).bfloat16() == trace["embeddings"][k]
        assert torch.equal(shares[k - 1], equal.double().mean(1))
    assert 0.9 < shares.mean() < 1


def test_what_was_changed_shows(recorded: Path) -> None:
    flip(recorded, "w", 3, 2, 5, bit=3)
    shares = predicted_shares(open_trace(recorded), "w")
    assert (shares < 1).nonzero().tolist() == [[2, 2], [3, 2]]  # the step to the changed value, and the one from there
    assert shares[2, 2] == 7 / 8


def test_a_vector_is_one_row(tmp_path: Path) -> None:
    record(tmp_path / "t", lambda params: FusedAdam(params, rounding="opmath", weight_decay=0.1))
    trace = open_trace(tmp_path / "t")
    for formula in ("recorded", "float32"):
        assert predicted_shares(trace, "b", formula).shape == (6, 1)
    assert (predicted_shares(trace, "b") == 1).all()


def test_without_a_gradient_nothing_should_move(tmp_path: Path) -> None:
    w = nn.Parameter(torch.ones(4, 2).bfloat16())
    optimizer = FusedAdam([w], lr=0.1)
    recorder = Recorder(optimizer, {"w": w}, steps=3, path=tmp_path / "t")
    with pytest.warns(RecordingWarning, match="w has no gradient at step 2"), recorder:
        for step in range(3):
            w.grad = None if step == 1 else torch.ones(4, 2).bfloat16()
            optimizer.step()
            recorder.log()
    for formula in ("recorded", "float32"):
        assert (predicted_shares(open_trace(tmp_path / "t"), "w", formula) == 1).all()


def test_what_cannot_be_predicted(tmp_path: Path, recorded: Path) -> None:
    def reason(path: Path, *arguments: str) -> str:
        with pytest.raises(TraceError) as error:
            predicted_shares(open_trace(path), *arguments)
        return str(error.value)

    assert reason(recorded, "x").endswith("cannot be predicted: the trace describes no such parameter; it has w, b")
    record(tmp_path / "sgd", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    assert "exp_avg, exp_avg_sq of it were not recorded" in reason(tmp_path / "sgd", "w")
    record(tmp_path / "lion", lambda params: torch.optim.NAdam(params))
    assert "a replay knows AdamW, not NAdam" in reason(tmp_path / "lion", "w")
    record(tmp_path / "some", every=2)
    for formula in ("recorded", "float32"):
        assert "needs every step" in reason(tmp_path / "some", "w", formula)
    with pytest.raises(ValueError, match="formula must be one of recorded, float32, got 'exact'"):
        predicted_shares(open_trace(recorded), "w", "exact")


def test_what_the_loop_changes_does_not_count(tmp_path: Path) -> None:
    w = nn.Parameter(torch.full((4, 64), 0.1).bfloat16())
    optimizer = FusedAdam([w], lr=1e-3)
    with Recorder(optimizer, {"w": w}, steps=4, path=tmp_path / "t"):
        for step in range(4):
            w.grad = torch.randn(4, 64).bfloat16()
            optimizer.step()
            if step == 1:
                with torch.no_grad():
                    w[2] += 1
                    optimizer.state[w]["exp_avg"].zero_()
    assert (predicted_shares(open_trace(tmp_path / "t"), "w") == 1).all()
    assert (predicted_shares(open_trace(tmp_path / "t"), "w", "float32") > 0.5).all()
