"""The native engine: whole training steps in C++ on the CPU; see ``csrc/native``.

A few threads run forward, backward, clipping, Adam and recording together. Python calls them once for many steps and
releases the GIL. Values round to bfloat16 where the torch engine's do, or in fewer places. Sums accumulate in float32,
in an order that depends only on sizes and the instruction set, so a run has the same bits with any number of threads.
"""

from __future__ import annotations

import torch

from bhfast.engines.base import HIDDEN, StorageGuard, TrainingRun
from bhfast.ops import extension
from bhfast.optim import FusedAdam


class NativeEngine:
    """See :class:`bhfast.engines.base.Engine`. Needs the extension, and a bfloat16 network on the CPU.

    Args:
        run: what to run; :func:`bhfast.ops.extension.native_unsupported` must return None for the network's sizes.
        threads: how many; None for as many as torch uses, but no more than there is work for.
        instruction_set: one of :func:`bhfast.ops.extension.native_instruction_sets`; None for the fastest.

    Raises:
        ValueError, TypeError: the network or a tensor is not as required.
    """

    def __init__(self, run: TrainingRun, *, threads: int | None = None, instruction_set: str | None = None) -> None:
        optimizer = run.optimizer
        assert isinstance(optimizer, FusedAdam)
        self.training_run = run
        config = run.model.config
        params = list(run.model.parameters())
        grads = torch.zeros(sum(p.numel() for p in params), dtype=torch.bfloat16)
        for param, grad in zip(params, torch._utils._unflatten_dense_tensors(grads, params), strict=True):
            param.grad = grad
        self.losses, self.grad_norms = torch.empty(2, len(run.lrs)).unbind()
        scalar = torch.zeros(())
        logs = run.recorder.log_into(
            losses=scalar.bfloat16(),
            logits=torch.zeros(config.vocab_size, dtype=torch.bfloat16),
            learning_rates=scalar.double(),
            clip_coefs=scalar,
            grad_norms=scalar,
            **{HIDDEN[name]: torch.zeros(config.hidden_dim) for name in run.hidden},
        )
        max_grad_norm = optimizer.max_grad_norm
        self.program = extension.native_engine(
            parameters=params,
            heads=config.heads,
            groups=[
                (own.params, own.exp_avgs, own.exp_avg_sqs, own.coefficients, list(own.rings), list(own.ring_of))
                for own in optimizer.schedule(run.lrs, run.start)
            ],
            rounding=optimizer.rounding,
            max_grad_norm=torch.inf if max_grad_norm is None else max_grad_norm,
            target_offset=run.target_offset,
            corpus=run.corpus.int(),
            offsets=run.offsets.flatten(1).contiguous(),  # [steps, windows]: accumulation is a larger batch
            learning_rates=torch.tensor(run.lrs, dtype=torch.float64),
            start=run.start,
            every=run.recorder.every,
            recorded_rows=run.recorder.by_hand(),
            frozen=run.frozen,
            logs=logs,
            losses=self.losses,
            grad_norms=self.grad_norms,
            threads=threads,
            instruction_set=instruction_set or extension.native_instruction_sets()[0],
        )
        self._guard = StorageGuard(run, "the native engine")
        self.done = run.start

    def run(self, steps: int) -> None:
        self._guard.check()
        left = steps
        while left:
            burst = self.training_run.recorder.begin(left)
            self.program.run(burst)
            self.training_run.recorder.end()
            left -= burst
        self.done += steps
        self.training_run.advance_optimizer(steps, self.done)
