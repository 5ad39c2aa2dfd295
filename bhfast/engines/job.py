"""What an engine runs, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bhfast.errors import BhfastError
from bhfast.model import TiedGPT
from bhfast.optim import FusedAdam
from bhfast.recording.null import NullSlots
from bhfast.recording.slots import RecordSlots


@dataclass(frozen=True)
class Job:
    """What an engine runs.

    Attributes:
        model: on the device to train on.
        optimizer: of all its parameters.
        recorder: the slots of an open recorder. Each step is logged with ``losses``, ``logits``, ``learning_rates``,
            ``clip_coefs`` and ``grad_norms``; the optimizer records embeddings and moments.
        corpus: uint8 ``[bytes]``, on any device.
        offsets: ``[steps, grad_accum, batch]`` int64 on the CPU: where in the corpus each window starts.
        lrs: the learning rate of each step.
        target_offset: see :func:`bhfast.model.window_loss`.
    """

    model: TiedGPT
    optimizer: FusedAdam
    recorder: RecordSlots | NullSlots
    corpus: Tensor
    offsets: Tensor
    lrs: Sequence[float]
    target_offset: int

    def account(self, done: int, steps: int) -> None:
        """Tell the optimizer that ``steps`` were performed for it, which makes ``done`` in all."""
        self.optimizer.count(steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[done - 1]


class Addresses:
    """Where the tensors lie that an engine holds on to.

    Args:
        job: whose parameters, gradients and optimizer state are meant.
        holder: since when, and who goes on with them.
    """

    def __init__(self, job: Job, holder: str) -> None:
        self.job = job
        self.holder = holder
        self._then = self._now()

    def _now(self) -> list[int | None]:
        state = self.job.optimizer.state
        return [
            None if x is None else x.data_ptr()
            for p in self.job.model.parameters()
            for x in (p, p.grad, state[p].get("exp_avg"), state[p].get("exp_avg_sq"))
        ]

    def check(self) -> None:
        """Raise BhfastError if any of them has been moved or replaced."""
        if self._now() != self._then:
            raise BhfastError(
                f"a parameter, its gradient or its optimizer state was moved or replaced {self.holder} goes on with "
                "the old one; use --engine torch to do that"
            )


class Engine(Protocol):
    """What ``train`` needs of an engine.

    Attributes:
        losses, grad_norms: float32 ``[steps]`` on the model's device; filled up to the steps done.
    """

    losses: Tensor
    grad_norms: Tensor

    def run(self, steps: int) -> None:
        """Run and record the next ``steps`` training steps; on a GPU they may still be on their way at return."""
        ...
