"""The steps of a recording. Each may consist of the steps of several optimizers."""

from __future__ import annotations

import math
import os
import warnings
from typing import Protocol

import torch
from torch import Tensor

from bhfast.errors import RecordingWarning
from bhfast.recording.slots import RecordSlots


class Follower(Protocol):
    """What a step needs from an :class:`bhfast.recording.hooks.OptimizerFollower`."""

    rates: list[float]
    logged: dict[str, Tensor]
    has_stepped: bool

    def complete_record(self) -> None: ...

    def end_fused(self) -> None: ...

    def record_changes(self) -> None: ...


class StepCycle:
    """The steps of a recording: a record is complete when the last of its optimizers has stepped.

    Args:
        slots: where records are made.
        strict: raise an error where recording otherwise stops with a warning.

    Attributes:
        is_under_way: whether a forward or backward pass has begun since the last step.
        pending: values logged since then, by name; they belong to the step that is under way.
        is_begun: whether an optimizer has begun its step, and the record is not complete yet.
    """

    def __init__(self, slots: RecordSlots, *, strict: bool) -> None:
        self.slots = slots
        self.is_under_way = False
        self.pending: dict[str, Tensor] = {}
        self.followers: list[Follower] = []
        self._strict = strict
        self.is_begun = False
        self._own: set[str] | None = None  # names of the values that the recorder itself logs
        self._has_stopped = False
        self._process = os.getpid()
        self._warned: set[str] = set()

    def warn(self, topic: str, text: str) -> None:
        """Warn the user, once per topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(text, RecordingWarning, stacklevel=2)

    @property
    def is_in_other_process(self) -> bool:
        """Whether this process is a fork of the one that opened the recorder."""
        return os.getpid() != self._process

    @property
    def is_off(self) -> bool:
        """Whether recording has stopped, or this process is a fork."""
        return self._has_stopped or self.is_in_other_process

    def note_activity(self) -> None:
        """Note that a forward or backward pass of the next step has begun."""
        self.is_under_way = True

    def begin(self) -> bool:
        """Begin a step, unless another optimizer has already begun it; return False if recording has stopped."""
        if not self.is_begun:
            if self.slots.step >= self.slots.steps and not self._strict:
                self._has_stopped = True
                for follower in self.followers:
                    follower.end_fused()
                self.warn(
                    "steps", f"recording stopped after step {self.slots.steps}, the last one announced with steps="
                )
                return False
            self.record_changes()
            self.slots.begin(1)
            self.is_begun = True
        return True

    def record_changes(self) -> None:
        """Record again what the loop has changed since the last step, unless a step is under way."""
        if not self.is_begun and not self.is_off and self.slots.record is not None:
            for follower in self.followers:
                follower.record_changes()

    def end(self, follower: Follower) -> None:
        """Complete the record, if ``follower`` follows the last optimizer."""
        if follower is not self.followers[-1]:
            return
        for other in self.followers:
            other.complete_record()
        self._log_own_values()
        self.slots.log(**self.pending)
        self.pending.clear()
        self.slots.end(has_keyframe=True)
        self.is_begun = self.is_under_way = False

    def _log_own_values(self) -> None:
        """Log what a replay needs, except values the caller already logs."""
        if self.slots.record is None:
            return
        if self._own is None:
            own = {"learning_rates", "grad_norms", "clip_coefs", "skipped"}
            self._own = own - self.slots.tensors.keys() - self.pending.keys()
        rates = [rate for follower in self.followers for rate in follower.rates]
        values = {"learning_rates": torch.tensor(rates if len(rates) > 1 else rates[0], dtype=torch.float64)}
        values |= self.followers[0].logged if len(self.followers) == 1 else self._values_of_each()
        self.slots.log(**{name: value for name, value in values.items() if name in self._own})

    def _values_of_each(self) -> dict[str, Tensor]:
        """Return the values of a step that each optimizer has one of, by name: ``[optimizers]`` each."""
        found = {}
        for name, dtype in (("clip_coefs", torch.float32), ("grad_norms", torch.float32), ("skipped", torch.bool)):
            if name not in self.slots.tensors and not any(name in follower.logged for follower in self.followers):
                continue
            values = []
            for follower in self.followers:
                missing = False if name == "skipped" else math.nan
                if name == "clip_coefs" and follower.has_stepped:
                    missing = 1.0  # it used the gradients as they are recorded
                values.append(follower.logged.get(name, torch.tensor(missing, dtype=dtype)))
            found[name] = torch.stack([value.to(values[0].device, dtype) for value in values])
        return found
