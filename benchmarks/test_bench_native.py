"""On a CPU: the native engine against the torch engine and the Trainer, and where its time goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SUMMARY, median, race

from bhfast.config import TrainConfig
from bhfast.engines.native import NativeEngine
from bhfast.model import GPTConfig
from bhfast.ops import extension
from bhfast.ops.extension import _extension
from bhfast.tokens import Corpus
from bhfast.train import train

STEPS = 3000
LARGER = {"vocab_size": 10_000, "batch_size": 8}

pytestmark = pytest.mark.skipif(not extension.native_instruction_sets(), reason="the extension is not built")


def on_cpu(settings: dict, threads: int | None = None, **more: object) -> Callable[[], float]:
    config = TrainConfig(**{"steps": STEPS, "device": "cpu", "engine": "native", **settings, **more})

    def run() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            return train(config).steps_per_second
        finally:
            torch.set_num_threads(before)

    return run


def test_native_against_the_others(benchmark, corpus: Corpus, settings: dict) -> None:
    """All record embeddings, gradients, both moments, logits and loss of every step; one records nothing."""
    pytest.importorskip("transformers", reason="needs the bench extra: transformers")
    from baseline import run_baseline

    losses = {}

    def native() -> float:
        result = train(TrainConfig(steps=STEPS, device="cpu", engine="native", **settings))
        losses["native"] = result.losses[400:600].mean().item()
        return result.steps_per_second

    def trainer() -> float:
        result = run_baseline(corpus.data, steps=600, device="cpu")
        losses["trainer"] = result.losses[400:600].float().mean().item()
        return result.steps_per_second

    contestants = {
        "native": native,
        "native, not recording": on_cpu(settings, record_every=0),
        "native, one thread": on_cpu(settings, threads=1),
        "native, one thread, not recording": on_cpu(settings, threads=1, record_every=0),
        "torch": on_cpu(settings, engine="torch", steps=600),
        "torch, not recording": on_cpu(settings, engine="torch", steps=600, record_every=0),
        "Trainer and lists": trainer,
    }
    race("Steps on the CPU", benchmark, 9, contestants)
    assert losses["native"] == pytest.approx(losses["trainer"], abs=0.15)  # the same experiment, other random numbers


def test_cost_of_recording(benchmark, settings: dict) -> None:
    contestants = {"recording": on_cpu(settings), "not recording": on_cpu(settings, record_every=0)}
    race(f"Native, {STEPS:,} steps with recording on and off", benchmark, 31, contestants)


def test_larger_shape(benchmark, settings: dict) -> None:
    contestants = {
        "native": on_cpu(settings, steps=40, **LARGER),
        "torch": on_cpu(settings, steps=20, engine="torch", **LARGER),
    }
    race("Vocabulary 10,000, batch 8 x 128", benchmark, 9, contestants)


def test_command_to_file(benchmark, settings: dict) -> None:
    """10,000 steps, from starting the command until the file is complete: steps per second of the whole."""
    pytest.importorskip("transformers", reason="needs the bench extra: transformers")
    steps = 10_000
    corpus = ["--corpus", os.environ["BHFAST_CORPUS"]] if "BHFAST_CORPUS" in os.environ else []
    out = [*corpus, "--steps", str(steps), "--out", str(settings["out"])]

    def command(*arguments: str) -> Callable[[], float]:
        def run() -> float:
            Path(settings["out"]).unlink(missing_ok=True)
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments, *out], check=True, stdout=subprocess.DEVNULL)
            assert Path(settings["out"]).stat().st_size > 650e6
            return steps / (time.perf_counter() - begin)

        return run

    ours = ("-m", "bhfast.train", "--device", "cpu", "--engine", "native", "--quiet")
    contestants = {
        "bhfast train": command(*ours),
        "bhfast train --storage stream": command(*ours, "--storage", "stream"),
        "Trainer and lists": command(str(Path(__file__).with_name("baseline.py")), "--device", "cpu"),
    }
    race(f"Command to file, {steps:,} steps", benchmark, 3, contestants)


def test_sweep(benchmark, settings: dict, tmp_path: Path) -> None:
    """Ten runs of 2,000 steps, from starting the command until the last file is complete: steps per second in all."""
    grid = ["--sigma", "0", "1e-5", "1e-4", "1e-3", "1e-2", "--seed", "42", "43", "--steps", "2000", "--overwrite"]
    corpus = ["--corpus", os.environ["BHFAST_CORPUS"]] if "BHFAST_CORPUS" in os.environ else []

    def sweep(jobs: int, *more: str) -> Callable[[], float]:
        command = [sys.executable, "-m", "bhfast.sweep", *grid, *corpus, "--quiet", "--device", "cpu"]

        def run() -> float:
            begin = time.perf_counter()
            subprocess.run([*command, *more, "--jobs", str(jobs), "--out-dir", str(tmp_path / "sweep")], check=True)
            return 20_000 / (time.perf_counter() - begin)

        return run

    cores = os.cpu_count() or 1
    contestants = {
        "one run per core": sweep(cores),
        "one more": sweep(cores + 1),
        "one run per core, in memory": sweep(cores, "--storage", "memory"),
        "one after another": sweep(1),
        "one train, its steps alone": on_cpu(settings, steps=2000),
    }
    race("A sweep of 10 runs of 2,000 steps", benchmark, 5, contestants)


@pytest.mark.parametrize("threads", [2, 1])
def test_profile(threads: int, benchmark, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the time of a step goes, and how close its matrix products come to the peak of the machine."""
    engines: list[NativeEngine] = []

    def profiled(self: NativeEngine, job, __init__=NativeEngine.__init__) -> None:
        __init__(self, job, threads=threads)
        self.program.set_profiling(True)
        engines.append(self)

    monkeypatch.setattr(NativeEngine, "__init__", profiled)
    run = on_cpu(settings, threads=threads)
    run()
    engines.clear()
    benchmark.pedantic(run, rounds=5, iterations=1)
    profiles = [engine.program.profile() for engine in engines]
    microseconds = {name: median([p[name] for p in profiles]) / STEPS / threads * 1e6 for name in profiles[0]}

    net = GPTConfig()
    weights = net.layers * 12 * net.hidden_dim**2 + net.vocab_size * net.hidden_dim
    instruction_set = extension.native_instruction_sets()[0]
    gflops = {
        "products": 2 * 2 * weights * net.context / microseconds["products"] / 1e3,  # forward, and back to activations
        "weight gradients": 2 * weights * net.context / microseconds["weight gradients"] / 1e3,
        "peak": _extension.native_peak(instruction_set, threads) / 1e9,
    }
    benchmark.extra_info.update(instruction_set=instruction_set, microseconds_per_step=microseconds, gflops=gflops)
    total = sum(microseconds.values())
    SUMMARY.append(f"Native, {instruction_set}, {threads} threads: {total:.0f} us a step with clocks in it")
    for name, value in sorted(microseconds.items(), key=lambda item: -item[1]):
        speed = f"   {gflops[name]:.0f} of {gflops['peak']:.0f} GFLOP/s" if name in gflops else ""
        SUMMARY.append(f"  {name:<30}{value:10.1f} us {value / total:6.1%}{speed}")
