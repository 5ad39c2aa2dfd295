"""What a run prints while it runs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from bhfast.engines.base import Engine

PROGRESS_EVERY = 100  # steps


class ProgressMonitor:
    """Shows the latest loss, and reports the first gradient that is not finite, without waiting for a GPU to finish.

    Args:
        engine: its losses and gradient norms are watched.
        bar: shows the loss.
        progress: called on every update with the steps done and the latest known loss; None for no calls.
    """

    def __init__(self, engine: Engine, bar: tqdm, progress: Callable[[int, float], None] | None) -> None:
        self.engine = engine
        self.bar = bar
        self.progress = progress
        self.loss = math.nan
        self.first = self.seen = (
            engine.done
        )  # the latest copy is of the steps from `first` up to, but not including, `seen`
        self.copy: Tensor | None = None  # loss, and the index of the first bad norm or -1; perhaps still being copied
        self.copied: torch.cuda.Event | None = None
        self.is_finite = True

    def update(self, step: int, *, wait: bool = False) -> None:
        """Show what has arrived from the device, and start another copy if it is time to.

        Args:
            step: how many steps are done.
            wait: wait until everything has arrived and is shown, at the end of a run.
        """
        if self.copy is not None and (wait or self.copied is None or self.copied.query()):
            self._show(self.copy)
        if self.copy is None and step > self.seen and (wait or step - self.seen >= PROGRESS_EVERY):
            self._start_copy(step)
            if wait and self.copy is not None:
                self._show(self.copy)
        if self.progress is not None:
            self.progress(step, self.loss)

    def _start_copy(self, step: int) -> None:
        is_bad = ~self.engine.grad_norms[self.seen : step].isfinite()
        first_bad = torch.where(is_bad.any(), is_bad.float().argmax(), -1)
        values = torch.stack([self.engine.losses[step - 1], first_bad.float()])
        self.copy = values.to("cpu", non_blocking=values.is_cuda)
        self.copied = torch.cuda.current_stream().record_event() if values.is_cuda else None
        self.first, self.seen = self.seen, step

    def _show(self, copy: Tensor) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        self.loss, first_bad = copy.tolist()
        self.copy = None
        self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
        if self.is_finite and first_bad >= 0:
            self.is_finite = False
            step = self.first + int(first_bad) + 1
            self.bar.write(f"note: gradients are not finite since step {step}; they are recorded as they are")


def status_printer(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a line and flushes it; if ``quiet``, one that does nothing.

    A run continues if the reader of its output goes away, as in ``bhfast train | head``.
    """

    def print_status(text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")

    return (lambda text: None) if quiet else print_status
