"""What an engine gets, and what it must provide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bhfast.engines.thermal import ThermalNoise
from bhfast.errors import BhfastError
from bhfast.model import TiedGPT
from bhfast.optim import FusedAdam
from bhfast.recording.null import NullSlots
from bhfast.recording.slots import RecordSlots

HIDDEN = {"mean": "hidden_means", "var": "hidden_vars"}  # the names in the file


@dataclass(frozen=True)
class TrainingRun:
    """What an engine runs.

    Attributes:
        model: on the device to train on.
        optimizer: updates all parameters of the model. Other than FusedAdam, only the torch engine takes it.
        recorder: the slots of an open recorder. The engine logs ``losses``, ``logits``, ``learning_rates``,
            ``clip_coefs`` and ``grad_norms`` of each step; the optimizer records embeddings and moments. An engine that
            does not call the optimizer's ``step()`` also records ``recorder.by_hand()``.
        corpus: token ids ``[tokens]``, uint8 or int32, on any device.
        offsets: int64 ``[steps, grad_accum, batch]``, on the CPU: where in the corpus each window starts.
        lrs: the learning rate of each step.
        target_offset: see :func:`bhfast.model.window_loss`.
        max_grad_norm: clip the global gradient norm to this, for an optimizer that does not clip; None: no clipping.
        hidden: names among ``HIDDEN``: log these of the final hidden state, for each dimension, over all positions of
            the step: float32 ``[D]``. The variance is that of the positions, not an estimate for others.
        frozen: bool ``[V]``: tokens whose vectors get no gradient; None if there are none.
        thermal: noise to add to token vectors after each step; None: none.
        start: how many of the steps are done already, if the run is resumed.
    """

    model: TiedGPT
    optimizer: torch.optim.Optimizer
    recorder: RecordSlots | NullSlots
    corpus: Tensor
    offsets: Tensor
    lrs: Sequence[float]
    target_offset: int
    max_grad_norm: float | None = None
    hidden: Sequence[str] = ()
    frozen: Tensor | None = None
    thermal: ThermalNoise | None = None
    start: int = 0

    def advance_optimizer(self, steps: int, done: int) -> None:
        """Update step counts and learning rates after an engine has performed ``steps`` more steps, ``done`` in all."""
        assert isinstance(self.optimizer, FusedAdam)
        self.optimizer.count(steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[done - 1]


class StorageGuard:
    """Notices when a tensor whose address an engine has cached is moved or replaced.

    Args:
        run: its parameters, gradients and optimizer state are guarded.
        holder: what cached the addresses, for the error message, such as "the CUDA graph".
    """

    def __init__(self, run: TrainingRun, holder: str) -> None:
        self.run = run
        self.holder = holder
        self._cached = self._addresses()

    def _addresses(self) -> list[int | None]:
        state = self.run.optimizer.state
        return [
            None if x is None else x.data_ptr()
            for p in self.run.model.parameters()
            for x in (p, p.grad, state[p].get("exp_avg"), state[p].get("exp_avg_sq"))
        ]

    def check(self) -> None:
        """Raise BhfastError if any of them has been moved or replaced."""
        if self._addresses() != self._cached:
            raise BhfastError(
                "a parameter, its gradient or its optimizer state was moved or replaced during the run, but "
                f"{self.holder} still uses the old one; use --engine torch, which allows this"
            )


class Engine(Protocol):
    """What ``train`` needs from an engine.

    Attributes:
        losses, grad_norms: float32 ``[steps]`` on the model's device; filled in for the steps that the engine has done.
        done: how many steps are done, with those before :attr:`TrainingRun.start`.
    """

    losses: Tensor
    grad_norms: Tensor
    done: int

    def run(self, steps: int) -> None:
        """Run and record the next ``steps`` training steps. On a GPU they may still be running when this returns."""
        ...
