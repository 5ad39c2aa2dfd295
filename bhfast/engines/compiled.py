"""What the engines in C++ and CUDA share: one object gets all tensors of a run, and performs steps without Python."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from bhfast.engines.base import HIDDEN, StorageGuard, TrainingRun
from bhfast.optim import FusedAdam


class Program(Protocol):
    """An engine of the extension."""

    def run(self, steps: int) -> None:
        """Run and record the next ``steps`` steps."""
        ...


class CompiledEngine:
    """See :class:`bhfast.engines.base.Engine`. A subclass sets ``program``, from ``arguments``.

    Args:
        run: what to run, on the device where it will run.
        name: of the engine, for error messages.

    Attributes:
        arguments: of ``TrainingRun`` in the extension.
    """

    program: Program

    def __init__(self, run: TrainingRun, name: str) -> None:
        optimizer, device = run.optimizer, run.model.wte.weight.device
        assert isinstance(optimizer, FusedAdam)
        self.training_run = run
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = torch.zeros(sum(p.numel() for p in params), dtype=torch.bfloat16, device=device)
        for param, grad in zip(params, torch._utils._unflatten_dense_tensors(grads, params), strict=True):
            param.grad = grad
        self.losses, self.grad_norms = torch.empty(2, len(run.lrs), device=device).unbind()
        scalar = torch.zeros((), device=device)
        config = run.model.config
        logs = run.recorder.log_into(
            losses=scalar.bfloat16(),
            logits=scalar.bfloat16().expand(config.vocab_size),
            learning_rates=scalar.double(),
            clip_coefs=scalar,
            grad_norms=scalar,
            **{HIDDEN[name]: scalar.expand(config.hidden_dim) for name in run.hidden},
        )
        self.arguments: dict[str, Any] = {
            "parameters": list(run.model.parameters()),
            "heads": config.heads,
            "groups": [
                (own.params, own.exp_avgs, own.exp_avg_sqs, own.coefficients, list(own.rings), list(own.ring_of))
                for own in optimizer.schedule(run.lrs, run.start)
            ],
            "rounding": optimizer.rounding,
            "max_grad_norm": torch.inf if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
            "target_offset": run.target_offset,
            "corpus": run.corpus.to(device, torch.int32),
            # [steps, windows]: accumulation is a larger batch
            "offsets": run.offsets.flatten(1).contiguous().to(device),
            "learning_rates": torch.tensor(run.lrs, dtype=torch.float64, device=device),
            "start": run.start,
            "every": run.recorder.every,
            "recorded_rows": run.recorder.by_hand(),
            "frozen": run.frozen,
            "logs": logs,
            "losses": self.losses,
            "grad_norms": self.grad_norms,
        }
        self._guard = StorageGuard(run, f"the {name} engine")
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
