"""The reference run against what people do today, and with recording on and off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import SPEEDS, median

from bhfast.corpus import Corpus
from bhfast.train import TrainConfig, train

STEPS = 600
ROUNDS = 9


def race(name: str, benchmark, contestants: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run all contestants in turn, ROUNDS times after a warm-up; keep the steps per second of each.

    The time that pytest-benchmark reports is that of one round of all; the speeds and ratios are in ``extra_info``.
    """
    speeds: dict[str, list[float]] = {contestant: [] for contestant in contestants}

    def once() -> None:
        for contestant, run in contestants.items():
            speeds[contestant].append(run())

    once()
    for values in speeds.values():
        values.clear()
    benchmark.pedantic(once, rounds=ROUNDS, iterations=1)
    first, *others = speeds
    SPEEDS[name] = speeds
    benchmark.extra_info["steps"] = STEPS
    benchmark.extra_info["steps_per_second"] = speeds
    for other in others:
        ratios = [a / b for a, b in zip(speeds[first], speeds[other], strict=True)]
        benchmark.extra_info[f"{first} / {other}, median of ratios by round"] = median(ratios)
        SPEEDS[
            f"{name}: {first} / {other} = {median(ratios):.2f} (by round {', '.join(f'{r:.2f}' for r in ratios)})"
        ] = {}
    return speeds


def test_against_the_trainer(benchmark, corpus: Corpus, settings: dict) -> None:
    """Both record embeddings, gradients, both moments, logits and loss of every step."""
    pytest.importorskip("transformers", reason="needs the bench extra: transformers")
    from baseline import run_baseline

    losses = {}

    def ours() -> float:
        result = train(TrainConfig(steps=STEPS, **settings))
        losses["ours"] = result.losses[-200:].mean().item()
        return result.steps_per_second

    def trainer() -> float:
        result = run_baseline(corpus.data, steps=STEPS)
        losses["trainer"] = result.losses[-200:].float().mean().item()
        return result.steps_per_second

    race("steps/s against the Hugging Face Trainer", benchmark, {"bhfast": ours, "Trainer and lists": trainer})
    assert losses["ours"] == pytest.approx(losses["trainer"], abs=0.15)  # the same experiment, other random numbers


def test_cost_of_recording(benchmark, settings: dict) -> None:
    def run(every: int) -> Callable[[], float]:
        return lambda: train(TrainConfig(steps=STEPS, record_every=every, **settings)).steps_per_second

    race("recording on and off", benchmark, {"recording": run(1), "not recording": run(0)})
