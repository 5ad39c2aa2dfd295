"""Processes that run experiments, one after another, so that torch is imported once in each.

A :class:`Worker` writes tasks to the process, a line of JSON each, and reads what it says of them. The process ends by
itself when the one that started it is gone, whatever it is doing; nothing but a ``NAME.partial`` is left of its run.
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
from pathlib import Path
from types import TracebackType
from typing import IO, Any

WINDOW = 1000  # steps whose losses are averaged


class Worker:
    """The near side of a process that runs experiments. Leaving the block kills it.

    Attributes:
        started_at: on the clock of :func:`time.monotonic`.
    """

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from bhfast.sweep.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # a terminal's Ctrl-C is not for it
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.tasks: IO[str] = self.process.stdin
        self.replies: IO[str] = self.process.stdout

    def run(self, **task: Any) -> Iterator[dict[str, Any]]:
        """Run one experiment, see :func:`run_task`.

        Yields:
            ``step`` and ``loss`` while it runs; then its outcome, which has ``state``: ``done``, or ``failed`` with
            ``error``.
        """
        try:
            print(json.dumps(task), file=self.tasks, flush=True)
        except BrokenPipeError:
            pass  # it has died; there will be no reply
        for line in self.replies:
            if not line.endswith("\n"):
                break
            reply = json.loads(line)
            yield reply
            if "state" in reply:
                return
        status = self.process.wait()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        yield {"state": "failed", "error": f"the process ended {how}"}

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
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
            pass  # a task that it never read


def run_task(task: dict[str, Any], say: Callable[..., None]) -> dict[str, Any]:
    """Run one experiment, unless its complete trace is there.

    Args:
        task: ``config``, the fields of a :class:`bhfast.TrainConfig`; ``threads`` to run it with; ``gpu``, the number
            of the only one it may use, or None.
        say: called with ``step=`` and ``loss=`` while it runs.

    Returns:
        ``state`` is ``done``; ``is_kept``, whether the trace was there; ``first_loss``, ``last_loss`` and
        ``mean_loss``; ``seconds`` and ``steps_per_second``, if it was run.
    """
    import torch

    from bhfast.config import TrainConfig
    from bhfast.experiment import is_run_of
    from bhfast.train import train

    torch.set_num_threads(task["threads"])
    if task["gpu"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = task["gpu"]  # read when CUDA is first used
    config = TrainConfig(**task["config"])
    if not config.overwrite and is_run_of(config.path, config):
        return {"state": "done", "is_kept": True, **losses(config.path)}
    begun = time.monotonic()
    # What an interrupted run left is in nobody's way.
    config = TrainConfig(**{**task["config"], "overwrite": config.overwrite or not config.path.exists()})
    result = train(config, progress=lambda step, loss: say(step=step, loss=loss))
    seconds = time.monotonic() - begun
    speed = {"steps_per_second": result.steps_per_second, "seconds": seconds}
    return {"state": "done", "is_kept": False, **losses(config.path), **speed}


def losses(path: Path) -> dict[str, float | None]:
    """Return the first, the last and the mean of a trace's losses; None for what is not finite.

    The mean is of those recorded in the last 1000 steps.
    """
    from bhfast.trace import open_trace

    trace = open_trace(path)
    steps, recorded = trace.steps[1:], trace["losses"][1:].double()
    values = {
        "first_loss": recorded[0].item(),
        "last_loss": recorded[-1].item(),
        "mean_loss": recorded[steps > steps[-1] - WINDOW].mean().item(),
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _serve(tasks: queue.SimpleQueue[dict[str, Any]], replies: IO[str]) -> None:
    """Run task after task, outside the main thread: there a run takes no signal as a wish to save what it has."""

    def say(**reply: Any) -> None:
        try:
            print(json.dumps(reply), file=replies, flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody is listening; an exception would end the run, and save a part of it

    try:
        import bhfast.train  # noqa: F401 - while the first task is on its way
        from bhfast.errors import BhfastError

        while True:
            task = tasks.get()
            try:
                outcome = run_task(task, say)
            except BhfastError as error:
                outcome = {"state": "failed", "error": str(error)}
            except Exception as error:
                traceback.print_exc()
                outcome = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
            say(**outcome)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    """Be the far side: run the tasks that come from stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed must not come among the replies
    tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(tasks, replies), daemon=True).start()
    for line in sys.stdin:
        tasks.put(json.loads(line))
    os._exit(0)
