"""Sweeps on the resident engine: runs side by side in one launch leave what single runs do."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import fork, status_of
from test_sweep import entries, traces, work_here

from bhfast.checkpoint import Checkpoint
from bhfast.config import TrainConfig
from bhfast.engines.launches import SharedLaunches
from bhfast.errors import StorageError
from bhfast.ops import extension
from bhfast.recording.carried import carry_over
from bhfast.sweep import main
from bhfast.sweep.grid import Run, expand_grid, parse_grid
from bhfast.sweep.jobs import make_jobs
from bhfast.sweep.limits import Machine, Needs, disk_speed, divide, limits, needs_of
from bhfast.sweep.pool import divide_machine
from bhfast.sweep.results import SweepResults
from bhfast.trace import open_trace
from bhfast.train import train
from bhfast.verify import verify

BLOCKS = 2
SMALL = {"steps": 6, "batch_size": 2, "context": 7, "hidden_dim": 32, "layers": 1, "heads": 1}
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
GRID = ["--sigma", "1e-3", "1e38", "--seed", "1", "2"]  # the second sigma overflows: loss and gradients are NaN
H200 = Machine(132, 8, 130e9, 1e12, 55e9, 2e9)


@pytest.fixture(autouse=True)
def stand_in(cuda_on_cpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines run on the stand-in for a GPU, and workers in this process."""
    monkeypatch.setattr(extension, "_resident_module", lambda: cuda_on_cpu.module)
    monkeypatch.setattr(extension, "resident_unavailable", lambda device: None)
    monkeypatch.setattr("bhfast.sweep.limits.this_machine", lambda folder, gpus: replace(H200, disk=50e9))
    monkeypatch.setattr("bhfast.engines.resident.default_blocks", lambda run: BLOCKS)  # of single runs
    work_here(monkeypatch)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """How many runs each program has had, their blocks, and the steps that they started at."""
    found, real = [], extension.resident_engine

    def engine(runs: list[dict[str, Any]], **settings: Any) -> Any:
        found.append((len(runs), settings["blocks"], [run["start"] for run in runs]))
        return real(runs, **settings)

    monkeypatch.setattr(extension, "resident_engine", engine)
    return found


@pytest.fixture
def flags(text: str, tmp_path: Path) -> list[str]:
    return [*FLAGS, "--corpus", text, "--device", "cpu", "--engine", "resident", "--out-dir", str(tmp_path / "out")]


def alone(text: str, folder: Path, **more: Any) -> dict[str, bytes]:
    """The traces of single runs of the grid."""
    for sigma, name in ((1e-3, "sigma0.001"), (1e38, "sigma1e+38")):
        for seed in (1, 2):
            out = str(folder / f"{name}_seed{seed}.safetensors")
            settings = {**SMALL, "corpus": text, "device": "cpu", "engine": "resident", "storage": "stream", **more}
            train(TrainConfig(sigma=sigma, seed=seed, out=out, quiet=True, **settings))
    return traces(folder)


def runs_of(**grid: Any) -> list[Run]:
    return expand_grid(parse_grid({**SMALL, "device": "cpu", "engine": "resident", **grid}, "grid"), "out")


@pytest.mark.parametrize("more", [{}, {"keyframes": 3}], ids=["full", "compact"])
def test_traces_are_those_of_single_runs(more: dict[str, int], flags, text: str, tmp_path: Path, launched, capsys):
    wanted = alone(text, tmp_path / "alone", **more)
    assert launched == [(1, BLOCKS, [0])] * 4
    extra = [part for name, value in more.items() for part in (f"--{name}", str(value))]
    assert main([*flags, *GRID, *extra]) == 0
    assert launched[4:] == [(4, BLOCKS, [0] * 4)]
    out = tmp_path / "out"
    assert traces(out) == wanted
    assert [run["state"] for run in entries(out).values()] == ["done"] * 4
    assert [run["mean_loss"] is None for run in entries(out).values()] == [False, False, True, True]
    for seed in (1, 2):
        assert verify(out / f"sigma0.001_seed{seed}.safetensors").difference is None
    assert "side by side on a GPU: 4 of 4 runs, 2 of 132 multiprocessors each; limits: 66 by" in capsys.readouterr().out
