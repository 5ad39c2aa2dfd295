"""The figures, against slow and obvious computations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bhfast import report
from bhfast.trace import open_trace
from bhfast.train import TrainResult


def test_identical_vectors_are_at_distance_zero(generator) -> None:
    one = torch.randn(64, generator=generator).bfloat16()
    assert report.max_pairwise_distance(one.expand(300, 64)) == 0.0


def test_largest_distance(generator) -> None:
    vectors = torch.randn(300, 8, generator=generator).bfloat16()
    wanted = max((a.double() - b.double()).norm().item() for a in vectors[::7] for b in vectors)
    assert report.max_pairwise_distance(vectors) >= wanted * (1 - 1e-6)
    far = torch.zeros(300, 2)
    far[299] = torch.tensor([3.0, 4.0])
    assert report.max_pairwise_distance(far) == 5.0


def test_losses_are_averaged_by_thousands() -> None:
    steps = torch.arange(500, 2501, 500)
    assert report.window_means(steps, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])) == [2.0, 6.0, 9.0]


def test_figures_of_a_run(run: TrainResult) -> None:
    trace = open_trace(run.path)
    lines = report.figures(trace).splitlines()
    centroid = trace["embeddings"][-1].float().mean(0).norm().item()
    assert lines[0].endswith("largest pairwise distance 0.000000")
    assert lines[1].startswith(f"step 130: centroid norm {centroid:.6f}")
    assert lines[2].startswith("step 1: row norm of the gradient, mean ")
    assert lines[3].startswith(f"step 100: mean |momentum| {trace['momentum'][100].float().abs().mean().item():.6e}")
    assert (
        lines[4]
        == f"loss: {run.losses[0].bfloat16().item():.4f} at step 1, {trace['losses'][-1].item():.4f} at step 130"
    )
    assert lines[5] == f"mean loss of each 1,000 steps: {trace['losses'][1:].double().mean().item():.3f}"


def test_program(run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(run.path)]) == 0
    assert "largest pairwise distance" in capsys.readouterr().out
    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    assert report.main([str(tmp_path / "foreign")]) == 2
    assert "is no trace of the reference run: it has no recorded_steps" in capsys.readouterr().err
