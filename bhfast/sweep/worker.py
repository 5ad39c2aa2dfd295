"""Processes that run experiments one after another, so that each imports torch only once.

A :class:`Worker` writes tasks to its process, each as a line of JSON, and reads the replies. The process exits when the
process that started it is gone, even in the middle of a run; then only ``NAME.partial`` of that run is left.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bhfast.config import TrainConfig
    from bhfast.engines.launches import Place
    from bhfast.train import TrainResult


class Worker:
    """A process that runs experiments, seen from its parent. Leaving the block kills it.

    Attributes:
        started_at: when it was started, in seconds of :func:`time.monotonic`.
    """

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from bhfast.sweep.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # so that Ctrl-C in a terminal does not reach it
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.tasks: IO[str] = self.process.stdin
        self.replies: IO[str] = self.process.stdout

    def run(self, **task: Any) -> Iterator[dict[str, Any]]:
        """Do a job, see :func:`run_job`; yield its replies.

        If the process dies, the runs without an outcome have failed.
        """
        waiting = set(range(len(task["configs"])))
        try:
            print(json.dumps(task), file=self.tasks, flush=True)
        except BrokenPipeError:
            pass  # it has died; the loop below finds that out
        for line in self.replies:
            if not line.endswith("\n"):
                break
            reply = json.loads(line)
            waiting -= {reply["run"]} if "state" in reply else set()
            yield reply
            if not waiting:
                return
        status = self.process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        for number in sorted(waiting):
            yield {"run": number, "state": "failed", "error": f"the process ended {how}"}

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        self.process.wait()
        self.replies.close()
        try:
            self.tasks.close()
        except BrokenPipeError:
            pass  # it never read the last task


def run_job(task: dict[str, Any], reply: Callable[..., None]) -> None:
    """Run one experiment, or several side by side, in threads that share the launches of the resident engine.

    Args:
        task: ``configs``, for each experiment the fields of a :class:`bhfast.TrainConfig`; ``threads``, how many to
            use; ``gpu``, the GPU to use, as in ``CUDA_VISIBLE_DEVICES``, or None; ``blocks``, that work on each of
            several runs.
        reply: called with ``run=``, the number of the experiment, and with ``step=`` and ``loss=`` while it runs, and
            at its end with its outcome, see :func:`_outcome`. With several, from their threads.
    """
    import torch

    from bhfast.config import TrainConfig

    torch.set_num_threads(task["threads"])
    if task["gpu"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task["gpu"]  # read when CUDA is first used
    configs = [TrainConfig(**config) for config in task["configs"]]

    def run(number: int, place: Place | None = None) -> None:
        with place or nullcontext():
            outcome = _outcome(configs[number], partial(reply, run=number), place)
        reply(run=number, **outcome)

    if len(configs) == 1:
        run(0)
        return
    from bhfast.engines.launches import SharedLaunches

    launches = SharedLaunches(task["blocks"])
    places = [launches.place() for _ in configs]
    with ThreadPoolExecutor(len(configs)) as threads:
        list(threads.map(run, range(len(configs)), places))  # raises what a thread has raised


def _outcome(config: TrainConfig, reply: Callable[..., None], place: Place | None) -> dict[str, Any]:
    """Run one experiment, unless its complete trace exists.

    Returns:
        ``state``: ``done``, or ``failed`` with an ``error``. If it is done: ``is_kept``, whether the trace existed;
        ``first_loss``, ``last_loss`` and ``mean_loss``; and, unless it was kept, ``seconds`` and
        ``steps_per_second``.
    """
    from bhfast.errors import BhfastError
    from bhfast.experiment import is_run_of

    try:
        if not config.overwrite and is_run_of(config.path, config):
            return {"state": "done", "is_kept": True, **_losses(config.path)}
        begun = time.monotonic()
        result = _run(config, lambda step, loss: reply(step=step, loss=loss), place)
        seconds = time.monotonic() - begun
        speed = {"steps_per_second": result.steps_per_second, "seconds": seconds}
        return {"state": "done", "is_kept": False, **_losses(config.path), **speed}
    except BhfastError as error:
        return {"state": "failed", "error": error.with_flags}
    except Exception as error:
        traceback.print_exc()
        return {"state": "failed", "error": f"{type(error).__name__}: {error}"}


def _run(config: TrainConfig, progress: Callable[[int, float], None], place: Place | None) -> TrainResult:
    """Run an experiment; go on with an interrupted one if that is possible."""
    from bhfast.checkpoint import checkpoint_path
    from bhfast.errors import ConfigError, TraceError
    from bhfast.train import resume, train

    if not config.overwrite and checkpoint_path(config.path).exists():
        with suppress(ConfigError, TraceError):
            return resume(config.path, progress=progress, place=place, **asdict(config))
    # Overwrite the partial file of an interrupted run.
    fresh = replace(config, overwrite=config.overwrite or not config.path.exists())
    return train(fresh, progress=progress, place=place)


def _losses(path: Path) -> dict[str, float | None]:
    """Return the first and the last loss of a trace, and the mean of the last 1,000 steps; None if not finite."""
    from bhfast.summary import final_loss
    from bhfast.trace import open_trace

    trace = open_trace(path)
    losses = trace["losses"][1:]
    values = {
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
        "mean_loss": final_loss(trace.steps[1:], losses),
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _serve(tasks: queue.SimpleQueue[dict[str, Any]], replies: IO[str]) -> None:
    """Do task after task, in a thread other than the main one, so that no signal ends a run with a shorter trace."""
    one_at_a_time = threading.Lock()

    def reply(**message: Any) -> None:
        try:
            with one_at_a_time:
                print(json.dumps(message), file=replies, flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody is listening; an exception would end the run with a shorter trace

    try:
        import bhfast.train  # noqa: F401 - imports torch before the first task arrives

        while True:
            run_job(tasks.get(), reply)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Run the tasks that come from stdin, until it is closed. This is the worker's own process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what a run prints out of the replies
    tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(tasks, replies), daemon=True).start()
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)
