"""What all benchmarks share: the corpus, and a summary at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import bhfast
from bhfast.corpus import Corpus, load_corpus

SUMMARY: list[str] = []  # lines


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """The corpus of ``bhfast.train`` here; BHFAST_CORPUS names another."""
    return load_corpus(os.environ.get("BHFAST_CORPUS"), vocab_size=128, window=129)


@pytest.fixture
def settings(corpus: Corpus, tmp_path: Path) -> dict[str, object]:
    """What every run of ours is given."""
    return {
        "corpus": os.environ.get("BHFAST_CORPUS"),
        "out": str(tmp_path / "t.safetensors"),
        "overwrite": True,
        "quiet": True,
    }


def median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["bhfast"] = bhfast.__version__
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.pop("node", None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SUMMARY:
        terminalreporter.section("speeds and ratios")
        terminalreporter.write_line("\n".join(SUMMARY))
