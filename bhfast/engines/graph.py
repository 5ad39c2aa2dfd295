"""The graph engine: captures a whole training step, recording included, as a CUDA graph, and replays it.

Everything that differs between steps is on the device before the first one: the corpus, the start of each window, the
learning rates, Adam's coefficients. A step counter on the device tells each replay which of them to use, and which slot
of the recorder's ring to fill. So the host only launches replays, and never waits for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bhfast.engines.base import StorageGuard, TrainingRun
from bhfast.engines.torch import corpus_windows, gradients
from bhfast.optim import FusedAdam

WARM_UP = 3  # steps


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a stream of its own, ordered after the work before it and before the work after it."""
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        yield
    main.wait_stream(stream)


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture ``work`` as a CUDA graph without running it; return a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: another thread of the recorder may be pinning memory.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class GraphEngine:
    """See :class:`bhfast.engines.base.Engine`. Needs a CUDA device and the extension's CUDA kernels."""

    def __init__(self, run: TrainingRun) -> None:
        assert isinstance(run.optimizer, FusedAdam)
        self.training_run = run
        self.optimizer = run.optimizer
        self.windows = corpus_windows(run)
        device = self.windows.device
        self.offsets = run.offsets.to(device)
        self.lrs = torch.tensor(run.lrs, dtype=torch.float64, device=device)
        self.losses, self.grad_norms = torch.empty(2, len(run.lrs), device=device).unbind()
        self.step = torch.full((), run.start, device=device)  # the current step, counted from 1
        with run.recorder.counted_by(self.step):
            self._warm_up()
            self._replay = capture(self._step, device)
        self._guard = StorageGuard(run, "the CUDA graph")
        self.done = run.start

    def _warm_up(self) -> None:
        """Run the next step a few times, then restore the state before it.

        Libraries initialize, kernels load and the recorder allocates on first use. All of that must happen before the
        capture, and on a side stream. The run itself overwrites what is recorded here.
        """
        run = self.training_run
        with side_stream(self.step.device):
            gradients(run, self.windows[self.offsets[0]])
            self.schedules = self.optimizer.schedule(run.lrs, run.start)
            state = [
                x
                for param in run.model.parameters()
                for x in (
                    param.detach(),
                    run.optimizer.state[param]["exp_avg"],
                    run.optimizer.state[param]["exp_avg_sq"],
                )
            ]
            before = [x.clone() for x in state]
            for _ in range(WARM_UP):
                self._step()
                self.step.fill_(run.start)
            torch._foreach_copy_(state, before)

    def _step(self) -> None:
        """Run a training step without using values on the host."""
        run = self.training_run
        self.step += 1
        index = self.step.view(1) - 1
        windows = self.windows[self.offsets.index_select(0, index)[0]]  # [grad_accum, batch, context + 1]
        logged = gradients(run, windows)
        self.optimizer.scheduled_step(self.schedules, index)
        clip_coef, norm = self.optimizer.clip_coef, self.optimizer.grad_norm
        run.recorder.record_by_hand()
        run.recorder.log(
            **logged,
            learning_rates=self.lrs.index_select(0, index)[0],
            clip_coefs=clip_coef,
            grad_norms=norm,
        )
        self.losses.index_copy_(0, index, logged["losses"].view(1))
        self.grad_norms.index_copy_(0, index, norm.view(1))

    def run(self, steps: int) -> None:
        self._guard.check()
        left = steps
        while left:
            burst = self.training_run.recorder.begin(left)
            for _ in range(burst):
                self._replay()
            self.training_run.recorder.end()
            left -= burst
        self.done += steps
        self.training_run.advance_optimizer(steps, self.done)
