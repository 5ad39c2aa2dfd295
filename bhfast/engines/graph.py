"""The graph engine: a whole training step, recording included, captured once as a CUDA graph and replayed.

Everything that changes from step to step lies on the device before the first one: the corpus, where each window starts,
the learning rates, Adam's coefficients. A counter on the device says which of them a replay uses, and which slot of the
recorder's ring it fills, so the host has nothing to do but to launch, and never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bhfast.engines.job import Addresses, Job
from bhfast.engines.torch import corpus_windows, gradients

WARM_UP = 3  # steps


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Issue what is in the block on a stream of its own, in order with what comes before and after."""
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        yield
    main.wait_stream(stream)


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``work`` as a CUDA graph, without doing it; return what replays it."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the recorder may be pinning memory in another thread.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class GraphEngine:
    """See :class:`bhfast.engines.job.Engine`. Needs a CUDA device and the extension's CUDA kernels."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.windows = corpus_windows(job)
        device = self.windows.device
        self.offsets = job.offsets.to(device)
        self.lrs = torch.tensor(job.lrs, dtype=torch.float64, device=device)
        self.losses, self.grad_norms = torch.empty(2, len(job.lrs), device=device).unbind()
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # the step at hand, counted from 1
        with job.recorder.counted_by(self.step):
            self._warm_up()
            self._replay = capture(self._step, device)
        self._addresses = Addresses(job, "after the CUDA graph was captured, which")
        self.done = 0

    def _warm_up(self) -> None:
        """Do the first step some times, and undo it.

        Libraries set themselves up at first use, kernels are loaded, the recorder allocates: all of that must happen
        before a capture, and on a side stream. What is recorded meanwhile is recorded anew.
        """
        job = self.job
        with side_stream(self.step.device):
            gradients(job.model, self.windows[self.offsets[0]], job.target_offset)
            self.schedules = job.optimizer.schedule(job.lrs)
            state = [
                x
                for param in job.model.parameters()
                for x in (
                    param.detach(),
                    job.optimizer.state[param]["exp_avg"],
                    job.optimizer.state[param]["exp_avg_sq"],
                )
            ]
            before = [x.clone() for x in state]
            for _ in range(WARM_UP):
                self._step()
                self.step.zero_()
            torch._foreach_copy_(state, before)

    def _step(self) -> None:
        """Do a training step in operations that need nothing of the host."""
        job = self.job
        self.step += 1
        index = self.step.view(1) - 1
        windows = self.windows[self.offsets.index_select(0, index)[0]]  # [grad_accum, batch, context + 1]
        loss, logits = gradients(job.model, windows, job.target_offset)
        job.optimizer.scheduled_step(self.schedules, index)
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
        self._addresses.check()
        left = steps
        while left:
            burst = self.job.recorder.begin(left)
            for _ in range(burst):
                self._replay()
            self.job.recorder.end()
            left -= burst
        self.done += steps
        self.job.account(self.done, steps)
