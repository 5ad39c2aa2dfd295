"""What all benchmarks share: the corpus, and a summary at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bhfast
from bhfast.tokens import Corpus, load_corpus

SUMMARY: list[str] = []  # lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tryout", action="store_true", help="test_bench_gpu.py: a few steps on the CPU, to see it work")
    parser.addoption("--trainer", metavar="JSON", help="test_bench_gpu.py: earlier figures, which have the Trainer's")


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """The corpus of ``bhfast.train`` here; BHFAST_CORPUS names another."""
    return load_corpus(os.environ.get("BHFAST_CORPUS"), vocab_size=128, window=129)


@pytest.fixture
def settings(corpus: Corpus, tmp_path: Path) -> dict[str, object]:
    """The settings of every bhfast run."""
    return {
        "corpus": os.environ.get("BHFAST_CORPUS"),
        "out": str(tmp_path / "t.safetensors"),
        "overwrite": True,
        "quiet": True,
    }


def median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def need_cuda() -> None:
    """Skip the benchmark if there is no CUDA device; with BHFAST_REQUIRE_CUDA=1 fail instead."""
    if not torch.cuda.is_available():
        give_up = pytest.fail if os.environ.get("BHFAST_REQUIRE_CUDA") == "1" else pytest.skip
        give_up("this machine has no cuda")


def race(name: str, benchmark, rounds: int, contestants: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Run contestants in turn, ``rounds`` times after a warm-up; return the median steps per second of each.

    The first one is compared with each of the others, round by round: how many times as fast it is. The time that
    pytest-benchmark reports is that of a round of all of them; all speeds, and the ratios, are in ``extra_info``.
    """
    speeds: dict[str, list[float]] = {contestant: [] for contestant in contestants}

    def once() -> None:
        for contestant, run in contestants.items():
            speeds[contestant].append(run())

    once()
    for values in speeds.values():
        values.clear()
    benchmark.pedantic(once, rounds=rounds, iterations=1)
    first, *others = speeds
    ratios = {other: median([a / b for a, b in zip(speeds[first], speeds[other], strict=True)]) for other in others}
    benchmark.extra_info["steps_per_second"] = speeds
    benchmark.extra_info["median of ratios by round"] = ratios
    medians = {contestant: median(values) for contestant, values in speeds.items()}
    SUMMARY.append(f"{name}, median of {rounds} rounds:")
    for contestant, speed in medians.items():
        against = f"   x {ratios[contestant]:.3f}" if contestant in ratios else ""
        SUMMARY.append(f"  {contestant:<30}{speed:10.1f} steps/s{against}")
    return medians


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["bhfast"] = bhfast.__version__
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.pop("node", None)


@pytest.hookimpl(trylast=True)  # after the table: gpu.sh shows the end
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SUMMARY:
        terminalreporter.section("speeds and ratios")
        terminalreporter.write_line("\n".join(SUMMARY))
