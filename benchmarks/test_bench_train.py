"""The reference run against what people do today, and with recording on and off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import SUMMARY, median

from bhfast.corpus import Corpus
from bhfast.train import TrainConfig, train


def race(name: str, benchmark, rounds: int, contestants: dict[str, Callable[[], float]]) -> None:
    """Run two contestants in turn, ``rounds`` times after a warm-up; keep the steps per second of each, and the ratio.

    The time that pytest-benchmark reports is that of a round of both; speeds and ratios are in ``extra_info``.
    """
    speeds: dict[str, list[float]] = {contestant: [] for contestant in contestants}

    def once() -> None:
        for contestant, run in contestants.items():
            speeds[contestant].append(run())

    once()
    for values in speeds.values():
        values.clear()
    benchmark.pedantic(once, rounds=rounds, iterations=1)
    ours, baseline = speeds.values()
    ratio = median([a / b for a, b in zip(ours, baseline, strict=True)])
    benchmark.extra_info["steps_per_second"] = speeds
    benchmark.extra_info["median of ratios by round"] = ratio
    lines = [f"  {contestant:<20}{median(values):8.1f} steps/s" for contestant, values in speeds.items()]
    SUMMARY.extend([f"{name}, median of {rounds} rounds:", *lines, f"  {'ratio':<20}{ratio:8.3f}"])


def test_against_the_trainer(benchmark, corpus: Corpus, settings: dict) -> None:
    """Both record embeddings, gradients, both moments, logits and loss of every step."""
    pytest.importorskip("transformers", reason="needs the bench extra: transformers")
    from baseline import run_baseline

    losses = {}

    def ours() -> float:
        result = train(TrainConfig(steps=600, **settings))
        losses["ours"] = result.losses[-200:].mean().item()
        return result.steps_per_second

    def trainer() -> float:
        result = run_baseline(corpus.data, steps=600)
        losses["trainer"] = result.losses[-200:].float().mean().item()
        return result.steps_per_second

    race("600 steps against the Hugging Face Trainer", benchmark, 9, {"bhfast": ours, "Trainer and lists": trainer})
    assert losses["ours"] == pytest.approx(losses["trainer"], abs=0.15)  # the same experiment, other random numbers


def test_cost_of_recording(benchmark, settings: dict) -> None:
    def run(every: int) -> Callable[[], float]:
        return lambda: train(TrainConfig(steps=300, record_every=every, **settings)).steps_per_second

    race("300 steps with recording on and off", benchmark, 31, {"recording": run(1), "not recording": run(0)})
