"""What a worker gets to do at once: a run, or several runs side by side in the launches of the resident engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bhfast.sweep.grid import Run
from bhfast.trace.format import format_bytes


@dataclass(frozen=True)
class Job:
    """Runs that one worker does at once.

    Attributes:
        runs: one, or several of one shape.
        blocks: of the resident engine, for each of several runs that share its launches; None if there is one run.
    """

    runs: Sequence[Run]
    blocks: int | None = None

    @property
    def steps(self) -> int:
        """Of all runs."""
        return sum(run.config.steps for run in self.runs)


def make_jobs(
    runs: Sequence[Run],
    wanted: int | None,
    gpus: int,
    folder: str | os.PathLike[str],
    print_status: Callable[[str], None],
) -> list[Job]:
    """Return the jobs of a sweep: those of the resident engine have as many runs as fit side by side on a GPU.

    A run whose network that engine cannot take is a job of its own, on the engine that ``auto`` takes.

    Args:
        runs: in order.
        wanted: how many runs to have side by side on all GPUs; None for as many as they allow.
        gpus: how many share the work.
        folder: for the traces; it must exist.
        print_status: prints a line.
    """
    alone, beside = _separated(runs, print_status)
    jobs = [Job([run]) for run in alone]
    if not beside:
        return jobs
    from bhfast.sweep.limits import divide, needs_of, this_machine

    machine = this_machine(folder, gpus)
    print_status("resident engine: not yet measured on a GPU; the limits assume its estimated speed and that of PCIe")
    for group in _by_shape(beside):
        share = -(-wanted // gpus) if wanted else None
        count, blocks, limits = divide(needs_of(group[0].config), machine, -(-len(group) // gpus), share)
        why = ", ".join(f"{number:,} by {what}" for what, number in limits.items())
        print_status(
            f"side by side on a GPU: {count:,} of {len(group):,} runs, {blocks} of {machine.multiprocessors} "
            f"multiprocessors each{' (as asked)' if wanted else ''}; limits: {why} at {format_bytes(machine.disk)}/s"
        )
        jobs += [Job(part, blocks) for part in _parts(group, count)]
    return jobs


def _separated(runs: Sequence[Run], print_status: Callable[[str], None]) -> tuple[list[Run], list[Run]]:
    """Return the runs that are to be alone, and those that can share launches of the resident engine."""
    if all(run.config.engine != "resident" for run in runs):
        return list(runs), []
    from bhfast.engines.choose import obstacle_to
    from bhfast.machine import select_device
    from bhfast.ops import extension

    alone: list[Run] = []
    beside: list[Run] = []
    reasons: dict[str, None] = {}
    for run in runs:
        device, _ = select_device(run.config.device)
        is_resident = run.config.engine == "resident" and extension.resident_unavailable(device) is None
        obstacle = obstacle_to("resident", device, run.config.demands()) if is_resident else None
        if obstacle and "engine" not in run.settings:  # else its name says which engine it has
            reasons[obstacle] = None
            run = replace(run, config=replace(run.config, engine="auto"))
        (beside if is_resident and not obstacle else alone).append(run)
    for reason in reasons:
        print_status(f"one process per run, with --engine auto, where {reason}")
    return alone, beside


def _by_shape(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs that can share launches and need as much, together."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        config = run.config
        shape = (config.model_config(), config.batch_size, config.grad_accum, config.device)
        recording = (config.rows, config.fields, config.params, config.keyframes, config.record_every, config.storage)
        groups.setdefault((shape, recording, config.steps), []).append(run)
    return list(groups.values())


def _parts(runs: Sequence[Run], most: int) -> Iterator[Sequence[Run]]:
    """Yield the runs in order, in parts that are as equal as can be."""
    count = -(-len(runs) // most)
    for part in range(count):
        yield runs[part * len(runs) // count : (part + 1) * len(runs) // count]
