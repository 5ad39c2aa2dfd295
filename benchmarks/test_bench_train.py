"""The reference run against what people do today, and with recording on and off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import race

from bhfast.corpus import Corpus
from bhfast.train import TrainConfig, train


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
