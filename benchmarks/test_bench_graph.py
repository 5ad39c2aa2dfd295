"""On a GPU: the graph engine against the notebook's way, with recording on and off, and step by step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import SUMMARY, race

from bhfast.corpus import Corpus
from bhfast.engines.graph import GraphEngine
from bhfast.train import TrainConfig, train

STEPS = 3000

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no cuda")


def graph(settings: dict, steps: int, record_every: int = 1) -> Callable[[], float]:
    config = TrainConfig(steps=steps, record_every=record_every, device="cuda", engine="graph", **settings)
    return lambda: train(config).steps_per_second


def test_graph_against_the_trainer(benchmark, corpus: Corpus, settings: dict) -> None:
    """Both on the GPU, both record embeddings, gradients, both moments, logits and loss of every step."""
    pytest.importorskip("transformers", reason="needs the bench extra: transformers")
    from baseline import run_baseline

    contestants = {
        "graph": graph(settings, STEPS),
        "eager torch": lambda: (
            train(TrainConfig(steps=300, device="cuda", engine="torch", **settings)).steps_per_second
        ),
        "Trainer and lists": lambda: run_baseline(corpus.data, steps=300).steps_per_second,
    }
    race("Steps on the GPU", benchmark, 5, contestants)


def test_cost_of_recording_in_the_graph(benchmark, settings: dict) -> None:
    contestants = {"recording": graph(settings, STEPS), "not recording": graph(settings, STEPS, record_every=0)}
    race(f"Graph, {STEPS:,} steps with recording on and off", benchmark, 15, contestants)


@pytest.mark.parametrize("record_every", [1, 0], ids=["recording", "not recording"])
def test_step_by_step(record_every: int, benchmark, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time from one replay's end to the next one's, by events: median and 99th percentile; bytes to the host."""
    events: list[torch.cuda.Event] = []

    def with_events(self: GraphEngine, steps: int, run=GraphEngine.run) -> None:
        replay = self._replay

        def marked() -> None:
            replay()
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        self._replay = marked
        run(self, steps)
        self._replay = replay

    monkeypatch.setattr(GraphEngine, "run", with_events)
    config = TrainConfig(steps=STEPS, record_every=record_every, device="cuda", engine="graph", **settings)

    def once() -> float:
        events.clear()
        result = train(config)
        size = Path(result.path).stat().st_size if result.path else 0
        return size * result.steps_per_second / STEPS

    once()
    bytes_per_second = benchmark.pedantic(once, rounds=3, iterations=1)
    torch.cuda.synchronize()
    times = torch.tensor([a.elapsed_time(b) * 1000 for a, b in pairwise(events)])
    p50, p99 = (times.quantile(q).item() for q in (0.5, 0.99))
    benchmark.extra_info.update(p50_us=p50, p99_us=p99, bytes_per_second_to_host=bytes_per_second)
    SUMMARY.append(
        f"Graph, {'recording' if record_every else 'not recording'}: step p50 {p50:.1f} us, p99 {p99:.1f} us, "
        f"{bytes_per_second / 1e6:.1f} MB/s to the host"
    )
