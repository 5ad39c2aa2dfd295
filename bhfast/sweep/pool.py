"""Workers at work on the runs of a sweep."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from bhfast.errors import ConfigError, StorageError
from bhfast.signals import deferred_signals
from bhfast.sweep.grid import Run
from bhfast.sweep.results import Register
from bhfast.sweep.worker import Worker


@dataclass(frozen=True)
class Machine:
    """What workers run on.

    Attributes:
        gpus: by worker the GPU it has to itself, None elsewhere.
        threads: of each.
    """

    gpus: list[str | None]
    threads: int


def divide(runs: Sequence[Run], jobs: int | None) -> Machine:
    """Divide this machine among workers.

    Args:
        jobs: how many there shall be; None: one for each GPU if a run needs any, else one for each core. There are
            never more than runs.

    Raises:
        ConfigError: a device is not available here, or ``jobs`` is not positive.
    """
    import torch

    from bhfast.machine import select_device

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
    )


class Crew:
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

    def __enter__(self) -> Crew:
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
        from bhfast.storage.output import OutputFile

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
                    with suppress(StorageError), OutputFile(run.path, overwrite=True):
                        pass
                    return
                is_kept = outcome.pop("is_kept", False)
                entry = self._register.enter(run, **outcome)
                with self._lock:
                    self.entries[run.name] = entry
                    self.kept |= {run.name} if is_kept else set()
                    if self._bar.disable:
                        self._say(f"[{len(self.entries)}/{len(self._runs)}] {outcome_line(entry, is_kept)}")

    def _run(self, worker: Worker, number: int, run: Run) -> dict[str, Any]:
        """Return the outcome of a run, showing how it goes on."""
        task = asdict(run.config) | {"overwrite": self._overwrite}
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


def outcome_line(entry: Mapping[str, Any], is_kept: bool) -> str:
    """Return how a run went, from its entry in ``sweep.json``."""
    if entry["state"] == "failed":
        return f"{entry['name']}: failed"
    speed = "kept" if is_kept else f"{figure(entry['steps_per_second'], 1)} steps/s"
    return f"{entry['name']}: mean loss {figure(entry['mean_loss'], 4)}, {speed}"


def figure(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"
