"""Runs a grid of experiments side by side, and records each in a trace of its own.

    python -m bhfast.sweep --sigma 0 1e-5 1e-4 1e-3 --seed 42 43 --lr 1e-3 3e-4 --out-dir tensors/sweep

The settings are those of ``python -m bhfast.train``; every combination of their values is a run. To continue an
interrupted sweep, run the same command again: complete traces are kept. Processes started by torchrun or Slurm, on any
number of machines, divide the runs among themselves; all they need is a shared folder. ``sweep.json`` there says how
each run went. With several GPUs each run has one to itself, or, with ``--engine resident``, many runs share each GPU;
this has never been tried on such a machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import bhfast
from bhfast.cli import lasting_streams, run_program
from bhfast.errors import ConfigError
from bhfast.sweep.grid import (
    ALWAYS_NAMED,
    NOT_IN_GRID,
    SWEEP_DEFAULTS,
    expand_grid,
    parse_grid,
    rank_and_world,
    read_grid_file,
)
from bhfast.sweep.jobs import make_jobs
from bhfast.sweep.pool import WorkerPool, divide_machine, format_number, gpus_of
from bhfast.sweep.results import SweepResults
from bhfast.sweep.worker import Worker

# Modules that need torch are imported inside functions, so that the first worker can import it at the same time.

OUT_DIR = "tensors/sweep"


@dataclass(frozen=True)
class SweepSummary:
    """How this process's share of a sweep went.

    Attributes:
        runs: the entries of its runs in ``sweep.json``.
        kept: the names of the runs whose traces existed already.
        seconds: the time from the start of the first worker to the end.
        signal: SIGINT, SIGTERM or SIGHUP, if one of them interrupted the sweep; None if every run was tried.
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
    threads: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> SweepSummary:
    """Run a grid of experiments, or this process's share of it; keep complete traces.

    A run that fails does not stop the others. Ctrl-C, SIGTERM and SIGHUP stop all runs at once; the unfinished ones
    start over the next time, or go on from their last checkpoints if they write any.

    Args:
        grid: for each field of :class:`bhfast.TrainConfig` a value or several; not ``out``, ``overwrite``, ``quiet``.
        out_dir: folder for ``sweep.json`` and, for each run, ``NAME.safetensors``.
        jobs: how many runs side by side; None for one per core or GPU; with the resident engine, as many as fit.
        threads: of each run; None to divide the cores among the runs. Without ``jobs``, runs with several threads are
            as many as there are cores for.
        overwrite: whether to repeat runs that are done, and to replace traces of other experiments.
        quiet: print nothing but errors.

    Raises:
        BhfastError: a setting is wrong, and nothing was run; or the folder cannot be written to.
    """
    with Worker() as first_worker:
        checked = parse_grid(grid, "grid")
        return _sweep(first_worker, checked, out_dir, jobs=jobs, threads=threads, overwrite=overwrite, quiet=quiet)


def _sweep(
    first_worker: Worker,
    grid: Mapping[str, list[Any]],
    out_dir: str | os.PathLike[str],
    *,
    jobs: int | None,
    threads: int | None,
    overwrite: bool,
    quiet: bool,
) -> SweepSummary:
    from bhfast.machine import require_threads
    from bhfast.progress import status_printer

    grid = {**{name: [getattr(bhfast.TrainConfig, name)] for name in ALWAYS_NAMED}, **grid}
    runs = expand_grid(grid, out_dir)
    rank, world = rank_and_world(os.environ)
    share = runs[rank::world]
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if threads is not None:
        require_threads(threads)
    gpus = gpus_of(share)
    results = SweepResults(out_dir)
    results.begin(grid, runs, share, restart=overwrite)
    print_status = status_printer(quiet)
    planned = make_jobs(share, jobs, len(gpus), out_dir, print_status)
    resources = divide_machine(planned, gpus, jobs, threads)
    workers = f"{_count(len(resources.gpus), 'worker')} side by side, {_count(resources.threads, 'thread')} each"
    whole = f" of {len(runs):,}" if world > 1 else ""
    print_status(f"{_count(len(share), 'run')}{whole}, {workers} -> {out_dir}")
    with WorkerPool(
        first_worker,
        planned,
        resources,
        results,
        overwrite=overwrite,
        hide_bars=True if quiet else None,
        print_status=print_status,
    ) as pool:
        received = pool.wait()
    seconds = time.monotonic() - first_worker.started_at
    entries = [pool.entries.get(run.name) or run.waiting_entry() for run in share]
    if share:
        print_status(_table(entries, pool.kept))
    for entry in entries:
        if entry["state"] == "failed":
            print(f"bhfast sweep: error: {entry['name']}: {entry['error']}", file=sys.stderr)
    print_status(_totals(entries, pool.kept, seconds))
    if received:
        print_status(f"interrupted by {received.name}; run the same command again to continue")
    return SweepSummary(entries, pool.kept, seconds, received)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _table(entries: Sequence[Mapping[str, Any]], kept: Collection[str]) -> str:
    width = max(len(entry["name"]) for entry in entries)
    lines = [f"{'run':<{width}}  {'state':<7}  mean loss    steps/s"]
    for entry in entries:
        state = "kept" if entry["name"] in kept else entry["state"]
        mean, speed = format_number(entry["mean_loss"], 4), format_number(entry["steps_per_second"], 1)
        lines.append(f"{entry['name']:<{width}}  {state:<7}  {mean:>9}  {speed:>9}")
    return "\n".join(lines)


def _totals(entries: Sequence[Mapping[str, Any]], kept: Collection[str], seconds: float) -> str:
    done = [entry for entry in entries if entry["state"] == "done" and entry["name"] not in kept]
    failed = sum(entry["state"] == "failed" for entry in entries)
    speed = sum(entry["steps"] for entry in done) / seconds
    counts = f"{_count(len(done), 'run')} done, {len(kept):,} kept, {failed:,} failed"
    return f"{counts} in {seconds:.1f} s: {speed:.1f} steps/s"


def _parser() -> argparse.ArgumentParser:
    from bhfast.config import setting_type

    parser = argparse.ArgumentParser(
        prog="bhfast sweep",
        description="Run a grid of experiments, several side by side, and record each. Every setting takes one or more "
        "values, and every combination is a run; repeated values count once. Complete traces are kept.",
    )
    parser.add_argument("--grid", metavar="FILE.toml", help="settings and their values; flags override them")
    parser.add_argument("--out-dir", default=OUT_DIR, help=f"folder for the traces and sweep.json (default: {OUT_DIR})")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs side by side (default: one per core or GPU; with --engine resident, as many as GPUs and disk allow)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of each run; not part of the experiment (default: the cores are divided among the runs)",
    )
    parser.add_argument("--overwrite", action="store_true", help="repeat all runs; replace traces with other settings")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    for entry in fields(bhfast.TrainConfig):
        if entry.name not in NOT_IN_GRID:
            value = SWEEP_DEFAULTS.get(entry.name, entry.default)
            default = "" if value is None else f" (default: {value})"
            flag = f"--{entry.name.replace('_', '-')}"
            if setting_type(entry.name) is bool:
                parser.add_argument(
                    flag, action="store_const", const=[True], default=argparse.SUPPRESS, help=entry.metadata["help"]
                )
                continue
            parser.add_argument(
                flag,
                nargs="+",
                type=setting_type(entry.name),
                choices=entry.metadata.get("choices"),
                default=argparse.SUPPRESS,
                help=entry.metadata["help"] + default,
            )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status: 1 if a run failed."""
    with lasting_streams(), Worker() as first_worker:
        return run_program(_parser(), partial(_sweep_with_flags, first_worker), argv)


def _sweep_with_flags(first_worker: Worker, args: argparse.Namespace) -> int:
    given = vars(args)
    file = given.pop("grid")
    options = {name: given.pop(name) for name in ("out_dir", "jobs", "threads", "overwrite", "quiet")}
    grid = {**(read_grid_file(file) if file else {}), **parse_grid(given, "the command line")}
    summary = _sweep(first_worker, grid, **options)
    if summary.signal:
        return 128 + summary.signal
    return 1 if any(run["state"] == "failed" for run in summary.runs) else 0
