"""Sweeps: the grid, what remains when something goes wrong, and that many processes leave what one does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Program, fork, status_of

from bhfast.checkpoint import Checkpoint
from bhfast.config import TrainConfig
from bhfast.errors import ConfigError
from bhfast.recording.carried import carry_over
from bhfast.sweep import main, pool, sweep, worker
from bhfast.sweep.grid import expand_grid, parse_grid, rank_and_world, read_grid_file
from bhfast.sweep.jobs import Job
from bhfast.sweep.pool import divide_machine, gpus_of
from bhfast.sweep.results import SweepResults
from bhfast.sweep.worker import Worker, run_job
from bhfast.trace import open_trace
from bhfast.train import train
from bhfast.verify import verify

LONG = 600  # steps that take long enough to be disturbed


@pytest.fixture
def flags(text: str, tmp_path: Path) -> list[str]:
    """Of a sweep over short runs, into ``tmp_path / "out"``."""
    return ["--steps", "20", "--device", "cpu", "--corpus", text, "--out-dir", str(tmp_path / "out")]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)


class Here:
    """A worker without a process: it does its jobs in the thread that asks, one at a time."""

    alone = threading.Lock()
    is_alive = True

    def __init__(self) -> None:
        self.started_at = time.monotonic()

    def run(self, **task: Any) -> Iterator[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        with self.alone:
            run_job({**task, "threads": 1}, lambda **reply: said.append(reply))
        yield from said

    def kill(self) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhfast.sweep.program.Worker", Here)
    monkeypatch.setattr(pool, "Worker", Here)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sweep whose workers are not what is tested: torch is imported already."""
    work_here(monkeypatch)


def names(**grid: object) -> list[str]:
    return [run.name for run in expand_grid(parse_grid(grid, "grid"), "out")]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sweep that needs workers with processes of their own, but not ones that import torch first."""
    monkeypatch.setattr(worker.subprocess, "Popen", lambda command, **options: Program(worker.main))


def start(*arguments: str, **environment: str) -> Program:
    return Program(lambda: main([*arguments]), **environment)


def entries(folder: Path) -> dict[str, dict[str, object]]:
    return {run["name"]: run for run in json.loads((folder / "sweep.json").read_text())["runs"]}


def traces(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has ended
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

# ---------------------------------------------------------------------------------------------------------------------
# The grid


def test_names_tell_sigma_seed_and_what_varies() -> None:
    assert names(seed=7, steps=[20]) == ["sigma0_seed7"]
    assert names(sigma=[0, 1e-5], seed=range(42, 44), lr=[1e-3, 3e-4], steps=20, heads=2)[:3] == [
        "sigma0_seed42_lr0.001", "sigma0_seed42_lr0.0003", "sigma0_seed43_lr0.001"
    ]  # fmt: skip
    assert names(corpus=["a/b c.txt", "d.txt"], max_grad_norm=[1, float("inf")])[1:3] == [
        "sigma0_seed42_max_grad_norm1_corpusd", "sigma0_seed42_max_grad_norminf_corpusb-c"
    ]  # fmt: skip


def test_a_value_given_twice_is_run_once() -> None:
    assert names(sigma=[0, 0.0, 1e-5], seed=[1, 1]) == ["sigma0_seed1", "sigma1e-05_seed1"]


def test_runs_have_the_settings_of_the_grid() -> None:
    run = expand_grid(parse_grid({"sigma": [0, 1], "weight-decay": 1}, "grid"), "folder")[1]
    out = "folder/sigma1_seed42.safetensors"
    assert run.config == TrainConfig(sigma=1.0, weight_decay=1.0, storage="stream", quiet=True, out=out)
    assert run.settings == {"sigma": 1.0, "seed": 42}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"sgima": 0}, r"f\.toml: there is no setting 'sgima'; there are sigma, steps, seed,"),
        ({"out": "x"}, "there is no setting 'out'"),
        ({"sigma": "x"}, r"f\.toml: sigma must be a number, or a list of such values, got 'x'"),
        ({"seed": [1, 2.5]}, r"seed must be an integer, or a list of such values, got \[1, 2\.5\]"),
        ({"seed": True}, "seed must be an integer"),
        ({"seed": []}, "seed must be an integer"),
        ({"sigma": {"from": 1}}, "sigma must be a number"),
        ({"batch-size": 1, "batch_size": 2}, "batch_size is given twice"),
        ({"sigma": [0, -1]}, r"sigma must be finite and at least 0, got -1\.0"),
        ({"record_every": [1, 0]}, "record_every must be at least 1 in a sweep, got 0"),
        ({"engine": ["auto", "warp"]}, "engine must be one of"),
        ({"corpus": ["a/x.txt", "b/x.txt"]}, "two runs would be called sigma0_seed42_corpusx"),
    ],
    ids=str,
)
def test_refuses_a_bad_grid(grid: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_grid(parse_grid(grid, "f.toml"), "out")


def test_refuses_a_file_that_is_not_a_grid(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the grid .*: No such file"):
        read_grid_file(tmp_path / "gone")
    (tmp_path / "bad").write_text("sigma = ")
    with pytest.raises(ConfigError, match="bad is not TOML"):
        read_grid_file(tmp_path / "bad")


@pytest.mark.usefixtures("in_process")
def test_flags_override_the_file(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text("sigma = [0, 1e-4]\nseed = 43\nhidden-dim = 32\nsteps = 7")
    assert main([*flags, "--grid", str(tmp_path / "grid.toml"), "--seed", "1", "2", "--quiet"]) == 0
    runs = entries(tmp_path / "out")
    assert [*runs] == [f"sigma{sigma}_seed{seed}" for sigma in ("0", "0.0001") for seed in (1, 2)]
    config = open_trace(tmp_path / "out" / "sigma0.0001_seed2.safetensors").config
    assert [config[name] for name in ("sigma", "seed", "hidden_dim", "steps")] == [1e-4, 2, 32, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sigma", "nan"], "sigma must be finite and at least 0, got nan"),
        (
            ["--record-every", "0"],
            "record_every must be at least 1 in a sweep, got 0: a sweep keeps nothing but its traces",
        ),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--threads", "0"], "threads must be 1 to 1024, got 0"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], message: str, flags: list[str], tmp_path, capsys) -> None:
    assert main([*flags, *arguments]) == 2
    assert capsys.readouterr() == ("", f"bhfast sweep: error: {message}\n")
    assert not (tmp_path / "out").exists()


def test_a_file_of_something_else_is_not_replaced(flags: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    assert main(flags) == 2
    assert "sweep.json does not belong to a sweep; delete it" in capsys.readouterr().err
    assert (tmp_path / "out" / "sweep.json").read_text() == "{}"


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves


def test_traces_are_those_of_train(text: str, tmp_path: Path) -> None:
    grid = {"sigma": [0, 1e-4], "steps": 25, "record_every": 10, "corpus": text, "device": "cpu"}
    result = sweep(grid, tmp_path / "out", jobs=2, quiet=True)
    assert [run["state"] for run in result.runs] == ["done"] * 2
    settings = {"steps": 25, "record_every": 10, "corpus": text, "device": "cpu", "quiet": True, "storage": "stream"}
    alone = train(TrainConfig(**settings, sigma=1e-4, out=str(tmp_path / "alone")))
    path = tmp_path / "out" / "sigma0.0001_seed42.safetensors"
    assert verify(path).difference is None
    assert open_trace(path).metadata.keys() == open_trace(alone.path).metadata.keys()
    if open_trace(path).metadata["engine"] == "native":
        assert path.read_bytes() == alone.path.read_bytes()

    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (content["format"], content["version"], content["runs"]) == ("bhfast-sweep", 1, result.runs)
    assert content["grid"]["sigma"] == [0, 1e-4]
    assert content["grid"]["seed"] == [42]
    run, losses = content["runs"][1], open_trace(path)["losses"]
    assert run["name"] == "sigma0.0001_seed42"
    assert run["file"] == path.name
    assert run["settings"] == {"sigma": 1e-4, "seed": 42}
    assert (run["error"], run["steps"]) == (None, 25)
    assert (run["first_loss"], run["last_loss"]) == (losses[1].item(), losses[2].item())
    assert run["mean_loss"] == losses[1:].double().mean().item()
    assert run["steps_per_second"] > 0
    assert run["seconds"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sigma0.0001_seed42.safetensors", "sigma0_seed42.safetensors", "sweep.json", "sweep.lock"
    ]  # fmt: skip


@pytest.mark.usefixtures("forked")
def test_a_run_that_fails_does_not_stop_the_rest(flags: list[str], tmp_path: Path, text: str, capsys) -> None:
    """One has a trace of other settings in its way, one lacks its corpus, one diverges."""
    out, gone = tmp_path / "out", str(tmp_path / "gone.txt")
    other = out / f"sigma0_seed1_lr0.001_corpus{Path(text).stem}.safetensors"
    train(TrainConfig(steps=3, corpus=text, device="cpu", quiet=True, out=str(other)))
    before = identity(other)
    arguments = [*flags, "--corpus", text, gone, "--seed", "1", "--lr", "1e-3", "1e38", "--lr-schedule", "constant"]
    assert main([*arguments, "--jobs", "1"]) == 1
    printed = capsys.readouterr()
    runs = list(entries(out).values())
    assert [run["state"] for run in runs] == ["failed", "failed", "done", "failed"]
    assert "holds a run with other settings (" in runs[0]["error"]
    assert "cannot read the corpus" in runs[1]["error"]
    assert runs[2]["mean_loss"] is None
    assert identity(other) == before
    assert printed.err.count("\n") == printed.err.count("bhfast sweep: error: sigma0_seed1_lr") == 3
    assert "1 run done, 0 kept, 3 failed in" in printed.out

    assert main([*arguments, "--jobs", "1", "--overwrite", "--quiet"]) == 1
    assert [run["state"] for run in entries(out).values()] == ["done", "failed", "done", "failed"]
    assert identity(other) != before
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("in_process")
def test_what_is_done_is_kept(flags: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main([*flags, "--sigma", "0", "1e-4", "--quiet"]) == 0
    before, first = traces(out), entries(out)
    kept, redone = (out / f"sigma{sigma}_seed42.safetensors" for sigma in ("0", "0.0001"))
    seen = identity(kept)
    redone.unlink()
    partial = redone.with_name(redone.name + ".partial")
    partial.write_text("of a run that was killed")
    assert main([*flags, "--sigma", "0", "1e-4", "1e-3"]) == 0
    printed = capsys.readouterr().out
    assert "2 runs done, 1 kept, 0 failed" in printed
    assert "sigma0_seed42       kept" in printed
    assert identity(kept) == seen
    assert not partial.exists()
    assert before.items() < traces(out).items()
    assert entries(out)["sigma0_seed42"] == first["sigma0_seed42"]

    assert main([*flags, "--seed", "43", "--quiet"]) == 0  # another sweep
    assert [*entries(out)] == ["sigma0_seed43", "sigma0_seed42", "sigma0.0001_seed42", "sigma0.001_seed42"]
    (out / "sweep.json").unlink()
    assert main([*flags, "--quiet"]) == 0
    assert identity(kept) == seen
    entry = entries(out)["sigma0_seed42"]
    assert entry == {**first["sigma0_seed42"], "steps_per_second": None, "seconds": None}

    assert main([*flags, "--quiet", "--overwrite"]) == 0
    assert identity(kept) != seen


# ---------------------------------------------------------------------------------------------------------------------
# Many processes


@pytest.mark.usefixtures("forked")
def test_two_ranks_leave_what_one_process_does(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ["--sigma", "0", "1e-4", "1e-3", "--seed", "1", "2", "3", "--jobs", "1"]
    ranks = [start(*flags, *grid, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    printed = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert "5 runs of 9, " in printed[0][0]
    assert "4 runs done, 0 kept, 0 failed" in printed[1][0]
    one = tmp_path / "one"
    work_here(monkeypatch)
    assert main([*flags, *grid, "--out-dir", str(one), "--quiet"]) == 0
    there = traces(tmp_path / "out")
    assert len(there) == 9
    assert there == traces(one)
    figures = ("name", "file", "settings", "state", "steps", "first_loss", "last_loss", "mean_loss")
    for a, b in zip(entries(tmp_path / "out").values(), entries(one).values(), strict=True):
        assert [a[name] for name in figures] == [b[name] for name in figures]
        assert a["state"] == "done"


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (1, 4)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"SLURM_STEP_NUM_TASKS": "8"}, (0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}, (2, 4)),
        (
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5",
             "SLURM_ARRAY_TASK_STEP": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            (2, 4),
        ),
    ],
)  # fmt: skip
def test_knows_its_share(environment: dict[str, str], share: tuple[int, int]) -> None:
    assert rank_and_world(environment) == share


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"},
    ],
)
def test_refuses_a_share_that_is_none(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="do not determine a share of the runs"):
        rank_and_world(environment)


def test_no_update_of_the_results_is_lost(tmp_path: Path) -> None:
    runs = expand_grid(parse_grid({"seed": range(40)}, "grid"), tmp_path)
    SweepResults(tmp_path).begin({}, runs, runs, restart=False)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: SweepResults(tmp_path).update(run, state="done"), runs))
    assert [run["state"] for run in entries(tmp_path).values()] == ["done"] * 40


@pytest.mark.usefixtures("in_process")
def test_threads_are_divided_and_runs_streamed(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, real = [], Here.run
    monkeypatch.setattr(Here, "run", lambda self, **task: tasks.append(task) or real(self, **task))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    for more, storage in (([], "stream"), (["--storage", "auto"], "auto")):
        assert main([*flags, *more, "--seed", "1", "2", "--quiet", "--overwrite"]) == 0
        told = [(task["threads"], task["gpu"], [config["storage"] for config in task["configs"]]) for task in tasks]
        assert told == [(4, None, [storage])] * 2
        tasks.clear()


@pytest.mark.parametrize(
    ("jobs", "threads", "workers", "each"),
    [
        (None, None, 5, 1),
        (2, None, 2, 4),
        (None, 2, 4, 2),
        (None, 3, 2, 3),
        (None, 9, 1, 9),
        (3, 2, 3, 2),
        (3, 9, 3, 9),
    ],
)
def test_a_number_of_threads_leaves_cores_for_fewer_runs(jobs, threads, workers: int, each: int, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    runs = expand_grid(parse_grid({"seed": range(5), "device": "cpu"}, "grid"), "out")
    resources = divide_machine([Job([run]) for run in runs], [None], jobs, threads)
    assert (len(resources.gpus), resources.threads) == (workers, each)


@pytest.mark.usefixtures("in_process")
def test_workers_are_told_the_number_of_threads(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told, real = [], Here.run
    monkeypatch.setattr(Here, "run", lambda self, **task: told.append(task["threads"]) or real(self, **task))
    assert main([*flags, "--threads", "3", "--quiet"]) == 0
    assert told == [3]


@pytest.mark.parametrize(
    ("environment", "jobs", "gpus"),
    [
        ({}, None, ["0", "1", "2"]),
        ({}, 2, ["0", "1"]),
        ({}, 4, ["0", "1", "2", "0"]),
        ({"CUDA_VISIBLE_DEVICES": "5,7"}, None, ["5", "7"]),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None, ["1"]),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, None, ["0", "2"]),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "6"}, None, ["6"]),
    ],
)
def test_each_worker_has_a_gpu(environment: dict[str, str], jobs, gpus: list[str], monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("bhfast.machine.select_device", lambda name: (torch.device("cuda"), ""))
    runs = expand_grid(parse_grid({"seed": range(5)}, "grid"), "out")
    assert divide_machine([Job([run]) for run in runs], gpus_of(runs), jobs).gpus == gpus


@pytest.mark.usefixtures("in_process")
def test_a_slurm_task_does_its_share_alone(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert main([*flags, "--seed", "1", "2", "3", "--quiet"]) == 0
    assert [run["state"] for run in entries(tmp_path / "out").values()] == ["waiting", "done", "waiting"]


# ---------------------------------------------------------------------------------------------------------------------
# Bad luck


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["KILL", "INT", "TERM"])
def test_a_sweep_that_is_ended_goes_on(
    number: signal.Signals,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """A short run is done, a long one is under way; the same command again leaves what an undisturbed sweep does."""
    if number != signal.SIGINT:  # there the worker is started as users have it
        request.getfixturevalue("forked")
    out, steps = tmp_path / "out", ["--steps", "20", str(LONG), "--jobs", "1"]
    sweeping = start(*flags, *steps)
    done, cut = (out / f"sigma0_seed42_steps{steps}.safetensors" for steps in (20, LONG))
    partial = cut.with_name(cut.name + ".partial")
    wait_for(partial.exists)
    (its_worker,) = children(sweeping.pid)
    assert os.getpgid(its_worker) != sweeping.pid  # out of a terminal's reach
    os.kill(its_worker, signal.SIGSTOP)  # so that the run stays under way
    before = identity(done)
    os.killpg(sweeping.pid, number)  # as a terminal does
    sweeping.wait()
    if number == signal.SIGKILL:  # otherwise the worker is killed as it is
        os.kill(its_worker, signal.SIGCONT)
    printed, errors = sweeping.communicate()
    wait_for(lambda: not is_alive(its_worker), seconds=10)
    assert list(traces(out)) == [done.name]
    assert [run["state"] for run in entries(out).values()] == ["done", "waiting"]
    if number == signal.SIGKILL:
        assert sweeping.returncode == -number
        assert partial.exists()
    else:
        assert sweeping.returncode == 128 + number
        assert f"interrupted by {number.name}; run the same command again to continue" in printed
        assert errors == ""
        assert not partial.exists()

    work_here(monkeypatch)
    assert main([*flags, *steps, "--quiet"]) == 0
    assert identity(done) == before
    assert [run["state"] for run in entries(out).values()] == ["done", "done"]
    assert verify(cut).difference is None
    assert sorted(path.name for path in out.iterdir()) == sorted([done.name, cut.name, "sweep.json", "sweep.lock"])


@pytest.mark.usefixtures("in_process")
def test_a_killed_run_goes_on_from_its_checkpoint(flags: list[str], tmp_path: Path, monkeypatch) -> None:
    out, file, checkpoints = tmp_path / "out", "sigma0_seed42.safetensors", ["--checkpoint-every", "5", "--quiet"]
    assert main([*flags, "--quiet"]) == 0
    wanted = traces(out)
    (out / file).unlink()

    def killed_at_the_third_checkpoint() -> None:
        def write(self: Checkpoint, path: Path, write=Checkpoint.write) -> None:
            write(self, path)
            if self.step == 15:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Checkpoint, "write", write)
        main([*flags, *checkpoints])

    assert status_of(fork(killed_at_the_third_checkpoint)) == -signal.SIGKILL
    starts = []
    monkeypatch.setattr("bhfast.train.carry_over", lambda *args: (starts.append(args[2]), carry_over(*args)))
    assert main([*flags, *checkpoints]) == 0
    assert starts == [15]
    assert traces(out) == wanted
    assert main([*flags, *checkpoints]) == 0  # now it is kept
    assert starts == [15]


def test_a_worker_without_a_sweep_ends() -> None:
    with Worker() as lonely:
        lonely.tasks.close()
        assert lonely.process.wait(timeout=30) == 0


@needs_proc
@pytest.mark.usefixtures("forked")
def test_a_worker_that_dies_fails_its_run_alone(flags: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    sweeping = start(*flags, "--steps", "20", str(LONG), "30", "--jobs", "1")
    partial = out / f"sigma0_seed42_steps{LONG}.safetensors.partial"
    wait_for(partial.exists)
    os.kill(*children(sweeping.pid), signal.SIGKILL)
    _, errors = sweeping.communicate()
    assert sweeping.returncode == 1
    assert errors == f"bhfast sweep: error: sigma0_seed42_steps{LONG}: the process ended by signal 9\n"
    assert [run["state"] for run in entries(out).values()] == ["done", "failed", "done"]
    assert len(traces(out)) == 2


def test_a_grid_may_have_switches() -> None:
    assert parse_grid({"untied": [True, False], "norm": "rmsnorm"}, "grid") == {
        "untied": [True, False],
        "norm": ["rmsnorm"],
    }
    for grid, message in (
        ({"untied": 1}, "untied must be true or false, or a list of such values, got 1"),
        ({"steps": True}, "steps must be an integer, or a list of such values, got True"),
        ({"init_seed": "x"}, "init_seed must be an integer, or a list of such values, got 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_grid(grid, "grid")
