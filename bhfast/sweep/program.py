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
import os
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import bhfast
from bhfast.errors import BhfastError
from bhfast.sweep.grid import ALWAYS_NAMED, DEFAULTS, FIXED, plan, rank_and_world, read_grid, read_grid_file
from bhfast.sweep.pool import Crew, divide, figure
from bhfast.sweep.results import Register
from bhfast.sweep.worker import Worker

# What needs torch is imported where it is used, here and in the other files: by then a worker is importing it, too.

OUT_DIR = "tensors/sweep"


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
    from bhfast.progress import printer

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
    with Crew(first, share, machine, register, overwrite=overwrite, bars_off=bars, say=say) as crew:
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


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _table(entries: Sequence[Mapping[str, Any]], kept: Collection[str]) -> str:
    width = max(len(entry["name"]) for entry in entries)
    lines = [f"{'run':<{width}}  {'state':<7}  mean loss    steps/s"]
    for entry in entries:
        state = "kept" if entry["name"] in kept else entry["state"]
        mean, speed = figure(entry["mean_loss"], 4), figure(entry["steps_per_second"], 1)
        lines.append(f"{entry['name']:<{width}}  {state:<7}  {mean:>9}  {speed:>9}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    from bhfast.config import kind_of

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
            usual = DEFAULTS.get(entry.name, entry.default)
            default = "" if usual is None else f" (default: {usual})"
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
