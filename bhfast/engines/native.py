"""The native engine: whole training steps in C++, on the CPU, see ``csrc/native``.

Forward, backward, clipping, Adam and recording are one program that a few threads run together; Python calls it once
for many steps, without holding the interpreter's lock. Values round to bfloat16 where the torch engine's do, or in
fewer places; sums accumulate in float32, in an order that depends on nothing but sizes and the instruction set: a run's
bits are the same for any number of threads.
"""

from __future__ import annotations

import torch

from bhfast.engines.job import Addresses, Job
from bhfast.ops import extension

BLOCK = 16  # rows that a thread works on together


class NativeEngine:
    """See :class:`bhfast.engines.job.Engine`. Needs the extension, and a network on the CPU in bfloat16.

    Args:
        job: its network's ``hidden_dim`` must be divisible by 32 and by 16 times ``heads``.
        threads: None: torch's number, or as many as there are blocks of rows, if that is less.
        instruction_set: one of :func:`bhfast.ops.extension.native_instruction_sets`; None: the best of them.

    Raises:
        ValueError, TypeError: a tensor of the job is not as said.
    """

    def __init__(self, job: Job, *, threads: int | None = None, instruction_set: str | None = None) -> None:
        self.job = job
        config = job.model.config
        params = list(job.model.parameters())
        grads = torch.zeros(sum(p.numel() for p in params), dtype=torch.bfloat16)
        for param, grad in zip(params, torch._utils._unflatten_dense_tensors(grads, params), strict=True):
            param.grad = grad
        self.losses, self.grad_norms = torch.empty(2, len(job.lrs)).unbind()
        offsets = job.offsets.flatten(1).contiguous()  # [steps, grad_accum * batch]
        blocks = offsets.size(1) * -(-config.context // BLOCK)
        self.threads = threads or min(torch.get_num_threads(), blocks)
        scalar = torch.zeros(())
        logs = job.recorder.log_into(
            losses=scalar.bfloat16(),
            logits=torch.zeros(config.vocab_size, dtype=torch.bfloat16),
            learning_rates=scalar.double(),
            clip_coefs=scalar,
            grad_norms=scalar,
        )
        max_grad_norm = job.optimizer.max_grad_norm
        self.program = extension.native_engine(
            parameters=params,
            heads=config.heads,
            groups=[
                (own.params, own.exp_avgs, own.exp_avg_sqs, own.coefficients, list(own.rings), list(own.ring_of))
                for own in job.optimizer.schedule(job.lrs)
            ],
            rounding=job.optimizer.rounding,
            max_grad_norm=torch.inf if max_grad_norm is None else max_grad_norm,
            target_offset=job.target_offset,
            corpus=job.corpus,
            offsets=offsets,
            learning_rates=torch.tensor(job.lrs, dtype=torch.float64),
            every=job.recorder.every,
            logs=logs,
            losses=self.losses,
            grad_norms=self.grad_norms,
            threads=self.threads,
            instruction_set=instruction_set or extension.native_instruction_sets()[0],
        )
        self._addresses = Addresses(job, "after the native engine was built, which")
        self.done = 0

    def run(self, steps: int) -> None:
        self._addresses.check()
        left = steps
        while left:
            burst = self.job.recorder.begin(left)
            self.program.run(burst)
            self.job.recorder.end()
            left -= burst
        self.done += steps
        self.job.account(self.done, steps)
