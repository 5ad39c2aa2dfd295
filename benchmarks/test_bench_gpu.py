"""On a GPU: each engine and the Hugging Face Trainer, with recording on and off.

Each benchmark is one contestant, so the others' figures survive if it fails. ``--tryout`` runs them on the CPU, a few
steps each: it measures nothing, but needs no GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import resident_floor
import torch
from conftest import SUMMARY, median, need_cuda, race

from bhfast.config import TrainConfig
from bhfast.engines.base import Engine, TrainingRun
from bhfast.engines.choose import make_engine
from bhfast.engines.resident import PORTABLE
from bhfast.tokens import Corpus
from bhfast.train import train

BLOCKS = {f"resident-{blocks}": blocks for blocks in (1, 2, 4, 8, 16)}  # engine, and blocks of threads for the run
STEPS = {"trainer": 200, "torch": 300, "native": 3000, "graph": 3000}  # a second or two each
STEPS.update(dict.fromkeys(BLOCKS, 3000))
ROUNDS = 5

trainer_speeds: list[float] = []  # with recording, once it has run

# Trains, recording or not; calls what it is given after each step. Returns steps per second and the trace's bytes.
Contestant = Callable[[bool, Callable[[], None] | None], tuple[float, int]]


class Ticks:
    """When each step ended: by CUDA events on a GPU, else by the clock."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ticks: list = []

    def __call__(self) -> None:
        if self.device == "cuda":
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(time.perf_counter())

    def microseconds(self) -> torch.Tensor:
        """Return the time from each step's end to the next one's."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.tensor([a.elapsed_time(b) * 1e3 for a, b in pairwise(self.ticks)])
        return torch.tensor([(b - a) * 1e6 for a, b in pairwise(self.ticks)])


def followed(work: Callable[[], None], tick: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        work()
        tick()

    return both


def make_ticking_engine(tick: Callable[[], None], name: str, run: TrainingRun, place: None) -> Engine:
    """Make an engine that calls ``tick`` after each step; those without torch then run them one at a time."""
    engine = make_engine(name, run)
    if name == "graph":
        engine._replay = followed(engine._replay, tick)
    elif name == "torch":
        engine.step = followed(engine.step, tick)
    else:
        step = followed(partial(engine.program.run, 1), tick)
        engine.program = SimpleNamespace(run=lambda steps: [step() for _ in range(steps)])
    return engine


def ours(engine: str, device: str, steps: int, settings: dict) -> Contestant:
    config = TrainConfig(steps=steps, device=device, engine=engine.split("-")[0], **settings)

    def run(recording: bool, tick: Callable[[], None] | None) -> tuple[float, int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bhfast.engines.resident.default_blocks", lambda run: BLOCKS[engine])
            if tick is not None:
                patch.setattr("bhfast.train.make_engine", partial(make_ticking_engine, tick))
            result = train(replace(config, record_every=int(recording)))
        if result.signal is not None:
            raise KeyboardInterrupt
        return result.steps_per_second, result.path.stat().st_size if recording else 0

    return run


def trainer_speed(figures: str | None) -> float | None:
    """Return the Trainer's steps per second with recording, here or in earlier figures; None if it has not run."""
    if figures and Path(figures).is_file():
        for entry in json.loads(Path(figures).read_text())["benchmarks"]:
            if entry["param"] == "trainer":
                return median(entry["extra_info"]["steps_per_second"]["recording"])
    return trainer_speeds[0] if trainer_speeds else None


def trainer(device: str, steps: int, corpus: Corpus, out: Path) -> Contestant:
    pytest.importorskip("transformers", reason="needs the bench extra: transformers")
    from baseline import run_baseline

    def run(recording: bool, tick: Callable[[], None] | None) -> tuple[float, int]:
        result = run_baseline(
            corpus.data, steps=steps, device=device, out=out, recording=recording, after_step=tick or (lambda: None)
        )
        return result.steps_per_second, out.stat().st_size if recording else 0

    return run


@pytest.mark.parametrize("name", STEPS)
def test_steps_beside_a_gpu(name: str, request, benchmark, corpus: Corpus, settings: dict) -> None:
    """What is recorded: embeddings, gradients, both moments, logits and loss of every step."""
    steps, rounds, gpu = STEPS[name], ROUNDS, "cuda"
    if request.config.getoption("--tryout"):
        steps, rounds, gpu = 10, 1, "cpu"
    else:
        need_cuda()
    device = "cpu" if name == "native" else gpu
    if name == "trainer":
        run = trainer(device, steps, corpus, Path(settings["out"]))
    else:
        run = ours(name, device, steps, settings)

    def speed(recording: bool) -> float:
        return run(recording, None)[0]

    modes = {"recording": True, "not recording": False}
    title = f"{name} on {device}"
    speeds = race(
        f"{title}, {steps:,} steps",
        benchmark,
        rounds,
        {mode: partial(speed, recording) for mode, recording in modes.items()},
    )
    if name == "trainer":
        trainer_speeds.append(speeds["recording"])
    elif baseline := trainer_speed(request.config.getoption("--trainer")):
        ratio = benchmark.extra_info["times the trainer, recording"] = speeds["recording"] / baseline
        SUMMARY.append(f"  {ratio:.1f} times the Trainer's")
    if name in BLOCKS and BLOCKS[name] <= PORTABLE:
        least, most = (1e6 * x for x in resident_floor.seconds(resident_floor.Sizes(), BLOCKS[name]))
        measured = 1e6 / speeds["recording"]
        benchmark.extra_info["expected_us"] = [least, most]
        SUMMARY.append(f"  {measured:.0f} us a step, measured; {least:.0f} to {most:.0f} us expected on an H200")
    for mode, recording in modes.items():
        ticks = Ticks(device)
        _, size = run(recording, ticks)
        p50, p99 = (ticks.microseconds().quantile(q).item() for q in (0.5, 0.99))
        to_host = size / steps * speeds[mode]
        benchmark.extra_info[mode] = {"p50_us": p50, "p99_us": p99, "bytes_per_second_to_host": to_host}
        SUMMARY.append(f"  {mode:<30}p50 {p50:.1f} us, p99 {p99:.1f} us, {to_host / 1e6:.1f} MB/s to the host")
