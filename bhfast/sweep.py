"""A grid of experiments, several side by side, each recorded in a trace of its own.

    python -m bhfast.sweep --sigma 0 1e-5 1e-4 1e-3 --seed 42 43 --lr 1e-3 3e-4 --out-dir tensors/sweep

The settings are those of ``python -m bhfast.train``; every combination of the values given is a run. The same command
again goes on where it was interrupted: complete traces are kept. Processes that torchrun or Slurm starts, on any number
of machines, share the runs among them and need nothing but a common folder; ``sweep.json`` there says how each run
went. On machines with several GPUs each run has one of them to itself; that is the one thing here that was never tried
on the machine it is for.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import bhfast
from bhfast.errors import BhfastError, ConfigError, StorageError
from bhfast.signals import deferred_signals
from bhfast.workers import Worker

# What needs torch is imported where it is used: by then a worker is importing it, too.

OUT_DIR = "tensors/sweep"
FIXED = ("out", "overwrite", "quiet")  # the same for all runs
ALWAYS_NAMED = ("sigma", "seed")
FORMAT = {"format": "bhfast-sweep", "version": 1}
FIGURES = ("first_loss", "last_loss", "mean_loss", "steps_per_second", "seconds")

# ---------------------------------------------------------------------------------------------------------------------
# The grid


@dataclass(frozen=True)
class Run:
    """One experiment of a grid.

    Attributes:
        name: of the trace, without its suffix.
        settings: those that the name tells.
        config: all of them.
    """

    name: str
    settings: dict[str, Any]
    config: bhfast.TrainConfig

    @property
    def path(self) -> Path:
        return self.config.path

    def waiting(self) -> dict[str, Any]:
        """Return the entry in ``sweep.json`` of a run that is still to be done."""
        return {
            "name": self.name,
            "file": self.path.name,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "state": "waiting",
            "error": None,
            "steps": self.config.steps,
            **dict.fromkeys(FIGURES),
        }


def read_grid(grid: Mapping[str, Any], source: str) -> dict[str, list[Any]]:
    """Check a grid; return all values as lists, without repetitions.

    Args:
        grid: by setting, with ``-`` or ``_`` in its name, a value or several.
        source: where it comes from, for messages.

    Raises:
        ConfigError: there is no such setting, or a value is of the wrong kind.
    """
    from bhfast.train import kind_of

    names = [entry.name for entry in fields(bhfast.TrainConfig) if entry.name not in FIXED]
    checked: dict[str, list[Any]] = {}
    for key, given in grid.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ConfigError(f"{source}: there is no setting {key!r}; there are {', '.join(names)}")
        if name in checked:
            raise ConfigError(f"{source}: {name} stands twice")
        kind = kind_of(name)
        values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        taken = (int, float) if kind is float else kind
        if not values or not all(isinstance(value, taken) and not isinstance(value, bool) for value in values):
            what = {int: "an integer", float: "a number", str: "a text"}[kind]
            raise ConfigError(f"{source}: {name} must be {what}, or a list of such, got {given!r}")
        checked[name] = list(dict.fromkeys(map(kind, values)))
    return checked


def read_grid_file(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read a grid from a TOML file, see :func:`read_grid`.

    Raises:
        ConfigError: it is not there, no TOML, or not a grid.
    """
    try:
        with open(path, "rb") as file:
            grid = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the grid {path}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError included
        raise ConfigError(f"the grid {path} is no TOML: {error}") from None
    return read_grid(grid, str(path))


def plan(grid: Mapping[str, list[Any]], out_dir: str | os.PathLike[str]) -> list[Run]:
    """Return the runs of a grid, in its order: the last setting varies fastest.

    Args:
        grid: as :func:`read_grid` returns it. The order of settings is that of :class:`bhfast.TrainConfig`.

    Raises:
        ConfigError: a setting is out of range, nothing would be recorded, or two runs would have one name.
    """
    if 0 in grid.get("record_every", ()):
        raise ConfigError("record_every must be at least 1 in a sweep, got 0: what it leaves are its traces")
    order = [entry.name for entry in fields(bhfast.TrainConfig) if entry.name in grid]
    varied = [*ALWAYS_NAMED, *(name for name in order if name not in ALWAYS_NAMED and len(grid[name]) > 1)]
    runs: dict[str, Run] = {}
    for values in itertools.product(*(grid[name] for name in order)):
        config = bhfast.TrainConfig(**dict(zip(order, values, strict=True)), quiet=True)
        settings = {name: getattr(config, name) for name in varied}
        name = "_".join(f"{setting}{_in_a_name(value)}" for setting, value in settings.items())
        if name in runs:
            raise ConfigError(f"two runs would be called {name}; give files with different names, or sweep twice")
        runs[name] = Run(name, settings, replace(config, out=str(Path(out_dir) / f"{name}.safetensors")))
    return list(runs.values())


def _in_a_name(value: Any) -> str:
    if isinstance(value, str):
        return re.sub(r"[^\w.+-]", "-", Path(value).stem)
    return repr(value).removesuffix(".0")


def _plain(value: Any) -> Any:
    """Return a value for JSON, which knows no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Sharing the runs out


def rank_and_world(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return which of how many processes this is, as torchrun, a Slurm array or srun tell it; else 0 of 1.

    Raises:
        ConfigError: what they tell makes no sense.
    """
    for rank_name, world_name, first_name, step_name in (
        ("RANK", "WORLD_SIZE", "", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
        ("SLURM_PROCID", "SLURM_NTASKS", "", ""),
    ):
        if rank_name not in environment or world_name not in environment:
            continue
        number, world = environment[rank_name], environment[world_name]
        first, step = environment.get(first_name, "0"), environment.get(step_name, "1")
        try:
            rank, rest = divmod(int(number) - int(first), int(step))
            fits = rest == 0 and 0 <= rank < int(world)
        except (ValueError, ZeroDivisionError):
            fits = False
        if not fits:
            raise ConfigError(
                f"{rank_name}={number} and {world_name}={world} name no share of the runs"
                + (f" (from {first} in steps of {step})" if first_name else "")
            )
        return rank, int(world)
    return 0, 1


@dataclass(frozen=True)
class Machine:
    """What workers run on.

    Attributes:
        gpus: by worker the GPU it has to itself, None elsewhere.
        threads: of each.
        memory: bytes that a trace may take before it is streamed.
    """

    gpus: list[str | None]
    threads: int
    memory: int


def divide(runs: Sequence[Run], jobs: int | None) -> Machine:
    """Divide this machine among workers.

    Args:
        jobs: how many there shall be; None: one for each GPU if a run needs any, else one for each core. There are
            never more than runs.

    Raises:
        ConfigError: a device is not available here, or ``jobs`` is not positive.
    """
    import torch

    from bhfast.storage import available_memory
    from bhfast.train import select_device

    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    local, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    devices = {select_device(device)[0].type for device in {run.config.device for run in runs}}
    gpus: Sequence[str | None] = [None]
    if "cuda" in devices:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        there = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
        gpus = there[local::processes] or [there[local % len(there)]]
    jobs = min(jobs or (cores if devices <= {"cpu"} else len(gpus)), max(1, len(runs)))
    return Machine(
        [gpus[worker % len(gpus)] for worker in range(jobs)],
        threads=max(1, cores // jobs),
        memory=available_memory() // (2 * processes * jobs),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is known of the runs


class Register:
    """``sweep.json``: how each run of the sweeps in a folder went. Any number of processes may update it.

    Raises:
        StorageError: the folder cannot be written to, or ``sweep.json`` there is something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "sweep.json"
        self._lock = Path(folder) / "sweep.lock"

    @contextmanager
    def _update(self) -> Iterator[dict[str, Any]]:
        """Yield what is in the file, and write what the block makes of it."""
        from bhfast.journal import sync_folder

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._lock, "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                content = self._read()
                yield content
                new = self.path.with_name(f"{self.path.name}.new")
                with open(new, "w") as file:
                    json.dump(content, file, indent=1, allow_nan=False)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, self.path)
                sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; choose another folder with --out-dir"
            ) from None

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {**FORMAT, "grid": {}, "runs": []}
        try:
            content = json.loads(self.path.read_text())
            fits = {key: content[key] for key in FORMAT} == FORMAT
            _ = [(run["name"], run["state"]) for run in content["runs"]]
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise StorageError(f"{self.path} is no register of a sweep; delete it, or choose another --out-dir")
        return content

    def begin(self, grid: Mapping[str, list[Any]], runs: Sequence[Run], share: Sequence[Run], anew: bool) -> None:
        """Enter a sweep: its runs come first, in order, then those of others that are known here.

        Args:
            share: the runs of this process. They are waiting from now on, but those done already only if ``anew``.
        """
        mine = {run.name for run in share}
        with self._update() as content:
            known = {run["name"]: run for run in content["runs"]}
            stays = {
                name: run for name, run in known.items() if name not in mine or (run["state"] == "done" and not anew)
            }
            own = {run.name: stays.get(run.name, run.waiting()) for run in runs}
            content["grid"] = {name: [_plain(value) for value in values] for name, values in grid.items()}
            content["runs"] = [*own.values(), *(run for name, run in known.items() if name not in own)]

    def enter(self, run: Run, **outcome: Any) -> dict[str, Any]:
        """Enter how a run went; return its entry. The speed of a trace that was there already stays."""
        entry = {**run.waiting(), **outcome}
        with self._update() as content:
            for place, known in enumerate(content["runs"]):
                if known["name"] == run.name:
                    if "seconds" not in outcome and known["state"] == entry["state"] == "done":
                        entry |= {name: known.get(name) for name in ("steps_per_second", "seconds")}
                    content["runs"][place] = entry
                    return entry
            content["runs"].append(entry)
        return entry


# ---------------------------------------------------------------------------------------------------------------------
# The sweep


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves.

    Attributes:
        runs: the entries in ``sweep.json`` of this process's share of the runs.
        kept: the names of those whose traces were there already.
        seconds: it took, from the start of the first worker.
        signal: what interrupted it, SIGINT or SIGTERM; None if every run was tried.
    """

    runs: list[dict[str, Any]]
    kept: set[str]
    seconds: float
    signal: signal.Signals | None


def sweep(
    grid: Mapping[str, Any],
    out_dir: str | os.PathLike[str] = OUT_DIR,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> SweepResult:
    """Run a grid of experiments, or this process's share of it; keep what is done already.

    A run that fails does not stop the others. Ctrl-C and SIGTERM stop all at once: those under way are to be done
    again.

    Args:
        grid: by field of :class:`bhfast.TrainConfig` a value or several; not ``out``, ``overwrite`` and ``quiet``.
        out_dir: gets ``NAME.safetensors`` for each run, and ``sweep.json``.
        jobs: runs side by side; None: one for each core, or for each GPU.
        overwrite: whether to do runs again that are there, and to replace traces of other experiments.
        quiet: print nothing but errors.

    Raises:
        BhfastError: a setting is wrong, and no run was begun; or the folder cannot be written to.
    """
    with Worker() as first:
        return _sweep(first, read_grid(grid, "grid"), out_dir, jobs=jobs, overwrite=overwrite, quiet=quiet)


def _sweep(
    first: Worker,
    grid: Mapping[str, list[Any]],
    out_dir: str | os.PathLike[str],
    *,
    jobs: int | None,
    overwrite: bool,
    quiet: bool,
) -> SweepResult:
    from bhfast.train import printer

    grid = {**{name: [getattr(bhfast.TrainConfig, name)] for name in ALWAYS_NAMED}, **grid}
    runs = plan(grid, out_dir)
    rank, world = rank_and_world(os.environ)
    share = runs[rank::world]
    machine = divide(share, jobs)
    register = Register(out_dir)
    register.begin(grid, runs, share, anew=overwrite)
    say = printer(quiet)
    side_by_side = f"{len(machine.gpus)} side by side, {_count(machine.threads, 'thread')} each"
    whole = f" of {len(runs):,}" if world > 1 else ""
    say(f"{_count(len(share), 'run')}{whole}, {side_by_side} -> {out_dir}")
    bars = True if quiet else None  # None: on a terminal only
    with _Crew(first, share, machine, register, overwrite=overwrite, bars_off=bars, say=say) as crew:
        received = crew.wait()
    seconds = time.monotonic() - first.started_at
    entries = [crew.entries.get(run.name) or run.waiting() for run in share]
    if share:
        say(_table(entries, crew.kept))
    for entry in entries:
        if entry["state"] == "failed":
            print(f"bhfast sweep: error: {entry['name']}: {entry['error']}", file=sys.stderr)
    done = [entry for entry in entries if entry["state"] == "done" and entry["name"] not in crew.kept]
    failed = sum(entry["state"] == "failed" for entry in entries)
    say(
        f"{_count(len(done), 'run')} done, {len(crew.kept):,} kept, {failed:,} failed in {seconds:.1f} s: "
        f"{sum(entry['steps'] for entry in done) / seconds:.1f} steps/s"
    )
    if received:
        say(f"interrupted by {received.name}; the same command goes on with the rest")
    return SweepResult(entries, crew.kept, seconds, received)


class _Crew:
    """Workers at work: a thread for each gives it the next run when it is done with one.

    Entering starts them. Leaving ends all at once, and removes what the runs under way have written.

    Attributes:
        entries: of runs that are done or failed, by name.
        kept: the names of those whose traces were there already.
    """

    def __init__(
        self,
        first: Worker,
        runs: Sequence[Run],
        machine: Machine,
        register: Register,
        *,
        overwrite: bool,
        bars_off: bool | None,
        say: Callable[[str], None],
    ) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.kept: set[str] = set()
        self._runs = runs
        self._machine = machine
        self._register = register
        self._overwrite = overwrite
        self._bars_off = bars_off
        self._say = say
        self._lock = threading.Lock()  # on what follows, on the attributes above, and on printing
        self._waiting = iter(runs)
        self._workers = {0: first}
        self._is_over = False

    def __enter__(self) -> _Crew:
        with ExitStack() as stack:
            steps = sum(run.config.steps for run in self._runs)
            self._bar = stack.enter_context(tqdm(total=steps, unit="step", disable=self._bars_off))
            self._signals = stack.enter_context(deferred_signals())
            pool = stack.enter_context(ThreadPoolExecutor(len(self._machine.gpus)))
            stack.callback(self._end)
            self._threads = {pool.submit(self._work, number) for number in range(len(self._machine.gpus))}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            for worker in self._workers.values():
                worker.kill()

    def wait(self) -> signal.Signals | None:
        """Wait until all runs are done or failed, or for a signal; return it.

        Raises:
            StorageError: the register cannot be written any more.
        """
        threads = self._threads
        while threads and not self._signals:
            ended, threads = wait(threads, timeout=0.1, return_when=FIRST_COMPLETED)
            for thread in ended:
                thread.result()
        return self._signals[0] if self._signals else None

    def _work(self, number: int) -> None:
        from bhfast.storage import Claim

        with ExitStack() as stack:
            while True:
                with self._lock:
                    run = None if self._is_over else next(self._waiting, None)
                    if run is None:
                        return
                    worker = self._workers.get(number)
                    if worker is None or not worker.is_alive:
                        worker = self._workers[number] = stack.enter_context(Worker())
                outcome = self._run(worker, number, run)
                if self._is_over and outcome["state"] != "done":  # it was ended, and is to be done again
                    with suppress(StorageError), Claim(run.path, overwrite=True):
                        pass
                    return
                is_kept = outcome.pop("is_kept", False)
                entry = self._register.enter(run, **outcome)
                with self._lock:
                    self.entries[run.name] = entry
                    self.kept |= {run.name} if is_kept else set()
                    if self._bar.disable:
                        self._say(f"[{len(self.entries)}/{len(self._runs)}] {_line(entry, is_kept)}")

    def _run(self, worker: Worker, number: int, run: Run) -> dict[str, Any]:
        """Return the outcome of a run, showing how it goes on."""
        task = asdict(run.config) | {"overwrite": self._overwrite}
        if run.config.storage == "auto" and trace_size(run.config) > self._machine.memory:
            task["storage"] = "stream"
        replies = worker.run(config=task, threads=self._machine.threads, gpu=self._machine.gpus[number])
        steps, done = run.config.steps, 0
        with tqdm(
            total=steps, desc=run.name, unit="step", position=number + 1, leave=False, disable=self._bars_off
        ) as bar:
            for reply in replies:
                now = reply.get("step", steps)  # the last one has none
                with self._lock:
                    if "loss" in reply:
                        bar.set_postfix(loss=f"{reply['loss']:.4f}", refresh=False)
                    bar.update(now - done)
                    self._bar.update(now - done)
                done = now
        return reply


def trace_size(config: bhfast.TrainConfig) -> int:
    """Return about how many bytes the trace of a run has."""
    records = config.steps // config.record_every + 1
    return records * config.vocab_size * 2 * (4 * config.hidden_dim + 1)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(entry: Mapping[str, Any], is_kept: bool) -> str:
    if entry["state"] == "failed":
        return f"{entry['name']}: failed"
    speed = "kept" if is_kept else f"{_figure(entry['steps_per_second'], 1)} steps/s"
    return f"{entry['name']}: mean loss {_figure(entry['mean_loss'], 4)}, {speed}"


def _table(entries: Sequence[Mapping[str, Any]], kept: Collection[str]) -> str:
    width = max(len(entry["name"]) for entry in entries)
    lines = [f"{'run':<{width}}  {'state':<7}  mean loss    steps/s"]
    for entry in entries:
        state = "kept" if entry["name"] in kept else entry["state"]
        mean, speed = _figure(entry["mean_loss"], 4), _figure(entry["steps_per_second"], 1)
        lines.append(f"{entry['name']:<{width}}  {state:<7}  {mean:>9}  {speed:>9}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def _parser() -> argparse.ArgumentParser:
    from bhfast.train import kind_of

    parser = argparse.ArgumentParser(
        prog="bhfast sweep",
        description="Run a grid of experiments, several side by side, and record each. Every setting takes one or more "
        "values, every combination is a run, and one that is given twice is run once. What is done already is kept.",
    )
    parser.add_argument("--grid", metavar="FILE.toml", help="settings and their values; flags go before it")
    parser.add_argument("--out-dir", default=OUT_DIR, help=f"folder for the traces and sweep.json (default: {OUT_DIR})")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one for each core, or for each GPU)")
    parser.add_argument("--overwrite", action="store_true", help="run all again; replace traces of other settings")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    for entry in fields(bhfast.TrainConfig):
        if entry.name not in FIXED:
            default = "" if entry.default is None else f" (default: {entry.default})"
            parser.add_argument(
                f"--{entry.name.replace('_', '-')}",
                nargs="+",
                type=kind_of(entry.name),
                choices=entry.metadata.get("choices"),
                default=argparse.SUPPRESS,
                help=entry.metadata["help"] + default,
            )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status: 1 if a run failed."""
    with Worker() as first:
        try:
            given = vars(_parser().parse_args(argv))
            file = given.pop("grid")
            options = {name: given.pop(name) for name in ("out_dir", "jobs", "overwrite", "quiet")}
            grid = {**(read_grid_file(file) if file else {}), **read_grid(given, "the command line")}
            result = _sweep(first, grid, **options)
        except BhfastError as error:
            print(f"bhfast sweep: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # before the first run
            return 128 + signal.SIGINT
    if result.signal:
        return 128 + result.signal
    return 1 if any(run["state"] == "failed" for run in result.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
