"""What a run shows while it goes on."""

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


class _Watch:
    """Shows the latest loss, and notes the first gradient that is not finite, without waiting for a GPU."""

    def __init__(self, engine: Engine, bar: tqdm, progress: Callable[[int, float], None] | None) -> None:
        self.engine = engine
        self.bar = bar
        self.progress = progress
        self.loss = math.nan
        self.first = self.seen = 0  # the steps that were asked for last: from first to before seen
        self.answer: Tensor | None = None  # loss, and the index of the first bad norm or -1; maybe on its way
        self.arrived: torch.cuda.Event | None = None
        self.is_finite = True

    def look(self, step: int, wait: bool = False) -> None:
        """Show what has arrived; ask for more if it is time. ``wait`` for all of it at the end of a run."""
        if self.answer is not None and (wait or self.arrived is None or self.arrived.query()):
            self._show(self.answer)
        if self.answer is None and step > self.seen and (wait or step - self.seen >= PROGRESS_EVERY):
            self._ask(step)
            if wait and self.answer is not None:
                self._show(self.answer)
        if self.progress is not None:
            self.progress(step, self.loss)

    def _ask(self, step: int) -> None:
        bad = ~self.engine.grad_norms[self.seen : step].isfinite()
        first_bad = torch.where(bad.any(), bad.float().argmax(), -1)
        answer = torch.stack([self.engine.losses[step - 1], first_bad.float()])
        self.answer = answer.to("cpu", non_blocking=answer.is_cuda)
        self.arrived = torch.cuda.current_stream().record_event() if answer.is_cuda else None
        self.first, self.seen = self.seen, step

    def _show(self, answer: Tensor) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        self.loss, first_bad = answer.tolist()
        self.answer = None
        self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
        if self.is_finite and first_bad >= 0:
            self.is_finite = False
            step = self.first + int(first_bad) + 1
            self.bar.write(f"note: gradients are not finite since step {step}; they are recorded as they are")


def printer(quiet: bool) -> Callable[[str], None]:
    """Return what prints a line at once; a reader that has gone away (``bhfast train | head``) must not end the run."""

    def say(text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")

    return (lambda text: None) if quiet else say
