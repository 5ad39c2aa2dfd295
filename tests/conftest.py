"""Fixtures for all tests: devices, a small corpus, a short recorded run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bhfast import corpus
from bhfast.train import TrainConfig, TrainResult, train

REQUIRE_CUDA = os.environ.get("BHFAST_REQUIRE_CUDA") == "1"


def _device(name: str, there: bool) -> object:
    skip = pytest.mark.skipif(not there and not (REQUIRE_CUDA and name == "cuda"), reason=f"this machine has no {name}")
    return pytest.param(name, marks=skip)


@pytest.fixture(
    params=[
        "cpu",
        _device("cuda", torch.cuda.is_available()),
        _device("mps", torch.backends.mps.is_available()),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device; with BHFAST_REQUIRE_CUDA=1 the CUDA tests fail rather than skip where there is no GPU."""
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def text() -> str:
    """The corpus that the runs of the tests train on: the built-in one."""
    return str(corpus.builtin_path())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, text: str) -> TrainResult:
    """A recorded run of 130 steps at sigma 0. Do not write to its file."""
    path = tmp_path_factory.mktemp("run") / "trace.safetensors"
    return train(TrainConfig(steps=130, corpus=text, out=str(path), device="cpu", quiet=True))


@pytest.fixture
def copy_of_run(run: TrainResult, tmp_path: Path) -> Path:
    """A copy of the short run's file, to damage."""
    path = tmp_path / "copy.safetensors"
    path.write_bytes(run.path.read_bytes())
    return path
