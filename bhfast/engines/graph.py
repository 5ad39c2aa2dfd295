"""The graph engine: a whole training step, recording included, captured once as a CUDA graph and replayed.

Everything that changes from step to step lies on the device before the first one: the corpus, where each window starts,
the learning rates, Adam's coefficients. A counter on the device says which of them a replay uses, and which slot of the
recorder's ring it fills, so the host has nothing to do but to launch, and never waits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bhfast.engines import Job
from bhfast.engines.torch import corpus_windows, gradients
from bhfast.errors import BhfastError

WARM_UP = 3  # runs forward and backward


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``work`` as a CUDA graph, without doing it; return what replays it."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the recorder may be pinning memory in another thread.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class GraphEngine:
    """See :class:`bhfast.engines.Engine`. Needs a CUDA device and the extension's CUDA kernels."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.windows = corpus_windows(job)
        device = self.windows.device
        self.offsets = job.offsets.to(device)
        self.lrs = torch.tensor(job.lrs, dtype=torch.float64, device=device)
        self.losses, self.grad_norms = torch.empty(2, len(job.lrs), device=device).unbind()
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # the step at hand, counted from 1
        self._warm_up()
        self.coefficients = job.optimizer.schedule(job.lrs)
        with job.recorder.counted_by(self.step):
            self._replay = capture(self._step, device)
        self._addresses = self._current_addresses()

    def _warm_up(self) -> None:
        """Let libraries set themselves up, on a side stream as a capture needs it, and make gradients."""
        stream = torch.cuda.Stream(self.step.device)
        stream.wait_stream(torch.cuda.current_stream(self.step.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                gradients(self.job.model, self.windows[self.offsets[0]], self.job.target_offset)
        torch.cuda.current_stream(self.step.device).wait_stream(stream)

    def _step(self) -> None:
        """Do a training step in operations that need nothing of the host."""
        job = self.job
        self.step += 1
        index = self.step.view(1) - 1
        windows = self.windows[self.offsets.index_select(0, index)[0]]  # [grad_accum, batch, context + 1]
        loss, logits = gradients(job.model, windows, job.target_offset)
        job.optimizer.scheduled_step(self.coefficients, index)
        clip_coef, norm = job.optimizer.clip_coef, job.optimizer.grad_norm
        job.recorder.log(
            losses=loss,
            logits=logits,
            learning_rates=self.lrs.index_select(0, index)[0],
            clip_coefs=clip_coef,
            grad_norms=norm,
        )
        self.losses.index_copy_(0, index, loss.view(1))
        self.grad_norms.index_copy_(0, index, norm.view(1))

    def run(self, steps: int) -> None:
        if self._current_addresses() != self._addresses:
            raise BhfastError(
                "a parameter, its gradient or its optimizer state was moved or replaced after the CUDA graph was "
                "captured, which goes on with the old one; use --engine torch to do that"
            )
        left = steps
        while left:
            burst = self.job.recorder.begin(left)
            for _ in range(burst):
                self._replay()
            self.job.recorder.end()
            left -= burst
        self.job.optimizer.count(steps)

    def _current_addresses(self) -> list[int | None]:
        state = self.job.optimizer.state
        return [
            None if x is None else x.data_ptr()
            for p in self.job.model.parameters()
            for x in (p, p.grad, state[p].get("exp_avg"), state[p].get("exp_avg_sq"))
        ]
