"""The workers that run a sweep, side by side."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from bhfast.errors import StorageError
from bhfast.signals import deferred_signals
from bhfast.sweep.grid import Run
from bhfast.sweep.jobs import Job
from bhfast.sweep.results import SweepResults
from bhfast.sweep.worker import Worker


@dataclass(frozen=True)
class WorkerResources:
    """What each worker may use.

    Attributes:
        gpus: the GPU of each worker, as in ``CUDA_VISIBLE_DEVICES``; None without GPUs.
        threads: how many CPU threads each worker has.
    """

    gpus: list[str | None]
    threads: int


def gpus_of(runs: Sequence[Run]) -> list[str | None]:
    """Return this process's share of the GPUs, as in ``CUDA_VISIBLE_DEVICES``; only None if no run uses one.

    Raises:
        ConfigError: a device is not available here.
    """
    import torch

    from bhfast.machine import select_device

    devices = {select_device(device)[0].type for device in {run.config.device for run in runs}}
    if "cuda" not in devices:
        return [None]
    local, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    all_gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return [*(all_gpus[local::processes] or [all_gpus[local % len(all_gpus)]])]


def divide_machine(
    jobs: Sequence[Job], gpus: Sequence[str | None], workers: int | None, threads: int | None = None
) -> WorkerResources:
    """Divide this process's share of the machine among workers.

    Args:
        jobs: what they have to do.
        gpus: see :func:`gpus_of`.
        workers: how many; None for one per GPU if any run uses one, else as many as there are cores for. Where runs
            share the launches of a GPU, there is one per GPU. There are never more workers than jobs.
        threads: of each worker; None to divide the cores among the workers.
    """
    from bhfast.machine import select_device

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    devices = {select_device(device)[0].type for device in {run.config.device for job in jobs for run in job.runs}}
    if any(job.blocks for job in jobs):
        workers = len(gpus)
    fitting = max(1, cores // (threads or 1)) if devices <= {"cpu"} else len(gpus)
    workers = min(workers or fitting, max(1, len(jobs)))
    return WorkerResources(
        [gpus[worker % len(gpus)] for worker in range(workers)],
        threads=threads or max(1, cores // workers),
    )


class WorkerPool:
    """Workers, each with a thread that gives it one job after another.

    Entering starts them. Leaving kills all workers at once, and removes what unfinished runs cannot go on with.

    Args:
        first_worker: a worker that is already started.
        jobs: what they are to do, in order.
        resources: what each worker may use; also says how many there are.
        results: gets the result of each run.
        overwrite: whether to repeat runs that are done, and to replace traces of other experiments.
        hide_bars: passed to tqdm as ``disable``: None hides the bars unless there is a terminal.
        print_status: prints a line.

    Attributes:
        entries: the entries in ``sweep.json`` of the runs that are done or failed, by name.
        kept: the names of the runs whose traces existed already.
    """

    def __init__(
        self,
        first_worker: Worker,
        jobs: Sequence[Job],
        resources: WorkerResources,
        results: SweepResults,
        *,
        overwrite: bool,
        hide_bars: bool | None,
        print_status: Callable[[str], None],
    ) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.kept: set[str] = set()
        self._jobs = jobs
        self._count = sum(len(job.runs) for job in jobs)
        self._resources = resources
        self._results = results
        self._overwrite = overwrite
        self._hide_bars = hide_bars
        self._print_status = print_status
        self._lock = threading.Lock()  # guards what follows, the attributes above, and printing
        self._remaining = iter(jobs)
        self._workers = {0: first_worker}
        self._is_closing = False

    def __enter__(self) -> WorkerPool:
        with ExitStack() as stack:
            steps = sum(job.steps for job in self._jobs)
            self._bar = stack.enter_context(tqdm(total=steps, unit="step", disable=self._hide_bars))
            self._signals = stack.enter_context(deferred_signals())
            threads = stack.enter_context(ThreadPoolExecutor(len(self._resources.gpus)))
            stack.callback(self._close)
            self._threads = {threads.submit(self._work, number) for number in range(len(self._resources.gpus))}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _close(self) -> None:
        with self._lock:
            self._is_closing = True
            for worker in self._workers.values():
                worker.kill()

    def wait(self) -> signal.Signals | None:
        """Wait until every run is done or failed, or a signal arrives; return the signal.

        Raises:
            StorageError: the results cannot be written any more.
        """
        threads = self._threads
        while threads and not self._signals:
            ended, threads = wait(threads, timeout=0.1, return_when=FIRST_COMPLETED)
            for thread in ended:
                thread.result()
        return self._signals[0] if self._signals else None

    def _work(self, number: int) -> None:
        """Give worker ``number`` one job after another, and write down the results."""
        with ExitStack() as stack:
            while True:
                with self._lock:
                    job = None if self._is_closing else next(self._remaining, None)
                    if job is None:
                        return
                    worker = self._workers.get(number)
                    if worker is None or not worker.is_alive:
                        worker = self._workers[number] = stack.enter_context(Worker())
                for run, outcome in self._outcomes(worker, number, job):
                    self._write_down(run, outcome)

    def _write_down(self, run: Run, outcome: dict[str, Any]) -> None:
        if self._is_closing and outcome["state"] != "done":  # killed with its worker: it stays waiting
            if not run.config.checkpoint_every:  # else the next time goes on with it
                _remove_partial(run)
            return
        is_kept = outcome.pop("is_kept", False)
        entry = self._results.update(run, **outcome)
        with self._lock:
            self.entries[run.name] = entry
            self.kept |= {run.name} if is_kept else set()
            if self._bar.disable:
                self._print_status(f"[{len(self.entries)}/{self._count}] {outcome_line(entry, is_kept)}")

    def _outcomes(self, worker: Worker, number: int, job: Job) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Do a job, showing its progress; yield the outcome of each of its runs."""
        replies = worker.run(
            configs=[asdict(run.config) | {"overwrite": self._overwrite} for run in job.runs],
            blocks=job.blocks,
            threads=self._resources.threads,
            gpu=self._resources.gpus[number],
        )
        done = [0] * len(job.runs)
        name = job.runs[0].name + (f" and {len(done) - 1} more" if len(done) > 1 else "")
        with tqdm(
            total=job.steps, desc=name, unit="step", position=number + 1, leave=False, disable=self._hide_bars
        ) as bar:
            for reply in replies:
                which = reply.pop("run")
                run = job.runs[which]
                now = reply.get("step", run.config.steps)  # the last reply, the outcome, has no step
                with self._lock:
                    if "loss" in reply:
                        bar.set_postfix(loss=f"{reply['loss']:.4f}", refresh=False)
                    bar.update(now - done[which])
                    self._bar.update(now - done[which])
                done[which] = now
                if "state" in reply:
                    yield run, reply


def _remove_partial(run: Run) -> None:
    """Remove the partial file of a run whose worker was killed, unless another process is writing it."""
    from bhfast.storage.output import OutputFile

    with suppress(StorageError), OutputFile(run.path, overwrite=True):
        pass  # leaving it removes the partial file


def outcome_line(entry: Mapping[str, Any], is_kept: bool) -> str:
    """Return one line that says how a run went, from its entry in ``sweep.json``."""
    if entry["state"] == "failed":
        return f"{entry['name']}: failed"
    speed = "kept" if is_kept else f"{format_number(entry['steps_per_second'], 1)} steps/s"
    return f"{entry['name']}: mean loss {format_number(entry['mean_loss'], 4)}, {speed}"


def format_number(value: float | None, digits: int) -> str:
    """Return a number with ``digits`` digits after the point; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"
