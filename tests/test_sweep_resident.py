"""Sweeps on the resident engine: runs side by side in one launch leave what single runs do."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from children import fork, status_of
from test_sweep import entries, traces, work_here

from bhfast.checkpoint import Checkpoint
from bhfast.config import TrainConfig
from bhfast.engines.launches import SharedLaunches
from bhfast.errors import StorageError
from bhfast.ops import extension
from bhfast.sweep import main
from bhfast.sweep.grid import Run, expand_grid, parse_grid
from bhfast.sweep.jobs import make_jobs
from bhfast.sweep.limits import Machine, Needs, disk_speed, divide, limits, needs_of
from bhfast.sweep.pool import divide_machine
from bhfast.trace import open_trace
from bhfast.train import train
from bhfast.verify import verify

BLOCKS = 2
SMALL = {"steps": 4, "batch_size": 2, "context": 7, "hidden_dim": 16, "layers": 1, "heads": 1}
FLAGS = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
NAMES = [f"sigma{sigma}_seed{seed}.safetensors" for sigma in ("0.001", "1e+38") for seed in (1, 2)]
GRID = ["--sigma", "1e-3", "1e38", "--seed", "1", "2"]  # the second sigma overflows: loss and gradients are NaN
H200 = Machine(132, 8, 130e9, 1e12, 55e9, 2e9)


@pytest.fixture(scope="module", autouse=True)
def stand_in(cuda_on_cpu: SimpleNamespace) -> Iterator[None]:
    """Let engines run on the stand-in for a GPU, and workers in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_resident_module", lambda: cuda_on_cpu.module)
        patch.setattr(extension, "resident_unavailable", lambda device: None)
        patch.setattr("bhfast.sweep.limits.this_machine", lambda folder, gpus: replace(H200, pcie=1e12, disk=1e12))
        work_here(patch)
        yield


@pytest.fixture(scope="module")
def settings(text: str) -> dict[str, Any]:
    return {**SMALL, "corpus": text, "device": "cpu", "engine": "resident", "storage": "stream", "quiet": True}


def single(folder: Path, seeds: Sequence[int] = (1, 2), **settings: Any) -> dict[str, bytes]:
    """Return the traces of single runs of the grid."""
    for (name, sigma), seed in itertools.product({"0.001": 1e-3, "1e+38": 1e38}.items(), seeds):
        train(TrainConfig(sigma=sigma, seed=seed, out=str(folder / f"sigma{name}_seed{seed}.safetensors"), **settings))
    return traces(folder)


@pytest.fixture(scope="module")
def wanted(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return single(tmp_path_factory.mktemp("single"), **settings)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """The blocks of each program, and after how many steps its runs went on."""
    found, real = [], extension.resident_engine

    def engine(runs: list[dict[str, Any]], **settings: Any) -> Any:
        found.append((settings["blocks"], [run["start"] for run in runs]))
        return real(runs, **settings)

    monkeypatch.setattr(extension, "resident_engine", engine)
    return found


@pytest.fixture
def flags(text: str, tmp_path: Path) -> list[str]:
    return [*FLAGS, "--corpus", text, "--device", "cpu", "--engine", "resident", "--out-dir", str(tmp_path / "out")]


def runs_of(**grid: Any) -> list[Run]:
    return expand_grid(parse_grid({**SMALL, "device": "cpu", "engine": "resident", **grid}, "grid"), "out")


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves


def test_traces_are_those_of_single_runs(flags, wanted: dict[str, bytes], tmp_path: Path, launched, capsys) -> None:
    assert main([*flags, *GRID]) == 0
    assert launched == [(BLOCKS, [0] * 4)]
    out = tmp_path / "out"
    assert traces(out) == wanted
    assert [run["state"] for run in entries(out).values()] == ["done"] * 4
    assert [run["mean_loss"] is None for run in entries(out).values()] == [False, False, True, True]
    assert verify(out / NAMES[0]).difference is None
    printed = capsys.readouterr().out
    assert "side by side on a GPU: 4 of 4 runs, 2 of 132 multiprocessors each; limits: 66 by multiproc" in printed
    assert "not yet measured on a GPU" in printed


def test_compact_traces_are_those_of_single_runs(flags, settings: dict[str, Any], tmp_path: Path, launched) -> None:
    wanted = single(tmp_path / "single", [1], keyframes=3, **settings)
    assert main([*flags, *GRID[:-1], "--keyframes", "3", "--quiet"]) == 0
    assert launched == [(BLOCKS, [0])] * 2 + [(BLOCKS, [0, 0])]
    assert traces(tmp_path / "out") == wanted


def test_as_many_as_asked_for(flags, wanted: dict[str, bytes], tmp_path: Path, launched) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / NAMES[1]).write_bytes(wanted[NAMES[1]])  # is kept
    assert main([*flags, *GRID, "--quiet", "--jobs", "3"]) == 0
    assert launched == [(BLOCKS, [0]), (BLOCKS, [0, 0])]
    assert traces(out) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Bad luck


def test_a_run_that_cannot_begin_or_go_on_leaves_the_others_alone(
    flags, wanted: dict[str, bytes], tmp_path: Path, launched, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / NAMES[3]).write_text("something else")

    def write(self: Checkpoint, path: Path, write=Checkpoint.write) -> None:
        if NAMES[1] in path.name and self.step == 2:
            raise StorageError("the disk is full")
        write(self, path)

    monkeypatch.setattr(Checkpoint, "write", write)
    assert main([*flags, *GRID, "--checkpoint-every", "1"]) == 1
    assert launched == [(BLOCKS, [0] * 3), (BLOCKS, [2] * 2)]
    states = [(run["state"], run["error"]) for run in entries(out).values()]
    assert states[0] == states[2] == ("done", None)
    assert states[1] == ("failed", "the disk is full")
    assert "exists and is not a trace of bhfast" in states[3][1]
    found = traces(out)
    assert [found[name] for name in NAMES[::2]] == [wanted[name] for name in NAMES[::2]]
    cut = open_trace(out / NAMES[1])
    assert cut.steps.tolist() == [0, 1, 2]
    assert verify(cut.path).difference is None


def test_a_launch_that_fails_fails_its_runs(flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(runs: object, **settings: object) -> SimpleNamespace:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(extension, "resident_engine", broken)
    assert main([*flags, *GRID, "--quiet"]) == 1
    error = "RuntimeError: a launch shared by several runs failed: out of memory"
    assert [run["error"] for run in entries(tmp_path / "out").values()] == [error] * 4


def test_killed_runs_go_on_from_their_checkpoints(
    flags, wanted: dict[str, bytes], tmp_path: Path, launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes when one run has a checkpoint that the others do not have yet."""
    out, checkpoints = tmp_path / "out", ["--checkpoint-every", "1", "--quiet"]

    def killed() -> None:
        signal.alarm(30)
        others: list[Path] = []

        def write(self: Checkpoint, path: Path, write=Checkpoint.write) -> None:
            if self.step == 2 and NAMES[2] not in path.name:
                others.append(path)
                threading.Event().wait()
            write(self, path)
            if self.step == 2:
                while len(others) < 3:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Checkpoint, "write", write)
        main([*flags, *GRID, *checkpoints])

    assert status_of(fork(killed)) == -signal.SIGKILL
    assert traces(out) == {}
    assert main([*flags, *GRID, *checkpoints]) == 0
    assert launched == [(BLOCKS, [1, 1, 2, 1]), (BLOCKS, [3, 3, 3])]
    assert traces(out) == wanted
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, "sweep.json", "sweep.lock"])


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def test_nobody_waits_for_a_run_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ask for bursts of their own lengths, one leaves early, one has fewer steps and then saves its trace."""
    launches, steps = [], {"a": 7, "b": 10, "c": 10}

    def engine(runs: list[dict[str, Any]], **settings: Any) -> SimpleNamespace:
        names = "".join(run["name"] for run in runs)
        return SimpleNamespace(run=lambda count: launches.append((names, count)))

    monkeypatch.setattr(extension, "resident_engine", engine)
    shared = SharedLaunches(1)
    places = {name: shared.place() for name in steps}
    last, saw_it = threading.Event(), []

    def work(name: str, bursts: list[int]) -> None:
        with places[name] as place:
            place.join({"name": name, "start": 0, "offsets": range(steps[name])})
            for burst in bursts:
                place.run(burst)
            if name == "a":
                saw_it.append(last.wait(5))
        if name == "b":
            last.set()

    bursts = {"a": [3, 4], "b": [10], "c": [4]}
    threads = [threading.Thread(target=work, args=(name, bursts[name])) for name in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert launches == [("abc", 3), ("abc", 1), ("ab", 3), ("b", 3)]
    assert saw_it == [True]


# ---------------------------------------------------------------------------------------------------------------------
# How many


def test_each_limit_counts() -> None:
    needs = Needs(gpu_bytes=1e9, host_bytes=5e8, record_bytes=60_000, seconds={1: 3e-4, 2: 1.5e-4})
    machine = Machine(132, 8, 100e9, 20e9, 50e9, 3e9)
    assert limits(needs, machine, 1) == {
        "multiprocessors": 132, "GPU memory": 100, "memory": 40, "PCIe": 250, "disk": 15,
    }  # fmt: skip
    assert limits(needs, machine, 2) == {"multiprocessors": 66, "GPU memory": 100, "memory": 40, "PCIe": 125, "disk": 8}
    tiny = Machine(1, 1, 1, 1, 1, 1)
    assert set(limits(needs, tiny, 2).values()) == {1}


@pytest.mark.parametrize(
    ("machine", "runs", "wanted", "found"),
    [
        ({}, 500, None, (8, 8)),  # the disk
        ({"disk": 1e12}, 10, None, (10, 8)),  # there are no more
        ({"disk": 1e12}, 500, None, (132, 1)),  # the multiprocessors
        ({"disk": 1e12, "host_bytes": 4.8e9}, 500, None, (30, 4)),
        ({"disk": 1e12, "gpu_bytes": 4e9}, 500, None, (40, 2)),
        ({"disk": 1e12, "pcie": 5e9}, 500, None, (13, 8)),
        ({"disk": 1e12, "most_blocks": 1}, 10, None, (10, 1)),
        ({}, 500, 20, (20, 4)),
        ({}, 500, 300, (300, 1)),
        ({}, 5, 20, (5, 8)),
    ],
    ids=str,
)
def test_as_many_runs_as_the_tightest_limit_allows(machine, runs: int, wanted, found: tuple[int, int]) -> None:
    needs = Needs(gpu_bytes=1e8, host_bytes=1.6e8, record_bytes=20_000, seconds={1: 3e-4, 2: 1.6e-4, 4: 8e-5, 8: 5e-5})
    *counts, _ = divide(needs, replace(H200, **{"disk": 3e9, **machine}), runs, wanted)
    assert tuple(counts) == found


def test_needs_are_those_of_the_recording(settings: dict[str, Any], tmp_path: Path) -> None:
    shape = {"hidden_dim": 32, "steps": 100, "engine": "native"}
    for more in ({}, {"keyframes": 10}, {"record_every": 2}, {"params": "wte,h.*", "storage": "memory"}):
        config = TrainConfig(**{**settings, **shape, **more, "out": str(tmp_path / str(more))})
        needs, size = needs_of(config), train(config).path.stat().st_size
        assert 0.9 * size < 100 * needs.record_bytes < 1.02 * size
    assert needs.host_bytes > size


def test_the_disk_is_measured(tmp_path: Path) -> None:
    assert disk_speed(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"cannot write to .*gone: No such file"):
        disk_speed(tmp_path / "gone")


def test_what_the_engine_cannot_take_runs_by_itself(tmp_path: Path) -> None:
    said: list[str] = []
    runs = runs_of(hidden_dim=[16, 40], seed=range(6))
    jobs = make_jobs(runs, 4, 2, tmp_path, said.append)
    assert [(len(job.runs), job.blocks) for job in jobs] == [(1, None)] * 6 + [(2, BLOCKS)] * 3
    assert {run.config.engine for job in jobs[:6] for run in job.runs} == {"auto"}
    assert {run.config.engine for job in jobs[6:] for run in job.runs} == {"resident"}
    assert {run.name for job in jobs for run in job.runs} == {run.name for run in runs}
    assert said[0] == (
        "one process per run, with --engine auto, where the resident engine needs a hidden_dim divisible by 16 times "
        "heads, got 40 and 1"
    )
    assert divide_machine(jobs, ["0", "1"], 4).gpus == ["0", "1"]
    by_name = make_jobs(runs_of(hidden_dim=40, engine=["resident", "torch"]), None, 1, tmp_path, said.append)
    assert [run.config.engine for job in by_name for run in job.runs] == ["resident", "torch"]  # fails, and says why


def test_only_runs_of_one_shape_share_launches(tmp_path: Path) -> None:
    runs = runs_of(context=[7, 20], sigma=[0, 1], lr=[1e-3, 1e-4], record_every=[1, 2])
    jobs = make_jobs(runs, None, 1, tmp_path, lambda line: None)
    shapes = [{(run.config.context, run.config.record_every) for run in job.runs} for job in jobs]
    assert [len(job.runs) for job in jobs] == [4] * 4
    assert all(len(shape) == 1 for shape in shapes)


def test_no_other_engine_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhfast.sweep.limits.this_machine", None)
    jobs = make_jobs(runs_of(engine="auto", seed=[1, 2]), None, 1, tmp_path, print)
    assert [(len(job.runs), job.blocks) for job in jobs] == [(1, None)] * 2
