"""Gradients as a backward pass leaves them: after all processes have reduced them, and before they are clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._pytree import tree_leaves

from bhfast.recording.clipping import clip_coefficient
from bhfast.recording.cycle import StepCycle
from bhfast.recording.fields import RecordedField, RecordedParam, local
from bhfast.recording.loss_scaling import unscaled
from bhfast.recording.optimizer_description import OptimizerDescription
from bhfast.trace.recorded import RecordedTensor


class BackwardWatch:
    """Notices backward passes through recorded parameters, and calls back when one has begun and when it is over.

    ``DistributedDataParallel`` and ``fully_shard`` finish their reductions in callbacks at the end of the backward pass
    (``queue_callback`` of the autograd engine), which run in the order in which they were queued. A parameter's hook
    may run before or after these callbacks are queued. So the hook queues a callback that only queues another one,
    which runs after all of them.

    Args:
        begun: called in each backward pass, once the first gradient exists; and before each forward pass in training
            mode.
        over: called at the end of each backward pass; None for no call.
    """

    def __init__(self, begun: Callable[[], None], over: Callable[[], None] | None) -> None:
        self._begun = begun
        self._over = over
        self._pass = -1  # the last backward pass that was noticed

    @contextmanager
    def watching(self, params: Sequence[RecordedParam], model: nn.Module | None) -> Iterator[None]:
        """Inside the block, watch the backward passes through ``params``, and those from ``model``'s outputs.

        Hooks of parameters under ``fully_shard`` do not fire: their backward passes are noticed at the model's outputs.
        """
        with ExitStack() as stack:
            for of in params:
                stack.callback(of.param.register_post_accumulate_grad_hook(self._notice).remove)
            if model is not None:
                stack.callback(model.register_forward_pre_hook(self._before_forward).remove)
                stack.callback(model.register_forward_hook(self._after_forward).remove)
            yield

    def _before_forward(self, model: nn.Module, args: object) -> None:
        if model.training:
            self._begun()

    def _after_forward(self, model: nn.Module, args: object, output: object) -> None:
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._notice)

    def _notice(self, _: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if current == self._pass:
            return
        self._pass = current
        self._begun()
        if self._over is not None:
            queue, over = torch.autograd.Variable._execution_engine.queue_callback, self._over  # type: ignore[attr-defined]
            queue(lambda: queue(over))


class GradientRecorder:
    """Records the gradients of an optimizer's parameters, as its step finds them or as the backward pass left them.

    Args:
        cycle: the steps of the recording.
        description: of the optimizer; it is marked when a step cannot be replayed.
        unclipped: record gradients as the backward pass leaves them.
    """

    def __init__(self, cycle: StepCycle, description: OptimizerDescription, *, unclipped: bool) -> None:
        self._cycle = cycle
        self._slots = cycle.slots
        self._description = description
        self._unclipped = unclipped
        self._raw: dict[str, Tensor] = {}  # by parameter, as the backward pass left them

    def keep(self, fields: Sequence[RecordedField], step: int) -> None:
        """Keep the gradients that a backward pass has left for ``step``."""
        if step % self._slots.every or self._cycle.is_off:
            return
        for field in fields:
            grad = _laid_out_gradient(field.of)
            if grad is not None:
                self._raw[field.of.name] = field.of.part_of(grad).clone()

    def clear(self) -> None:
        """Forget the gradients that were kept."""
        self._raw.clear()

    def record(
        self, fields: Sequence[RecordedField], scaler: GradScaler | None, scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor | None:
        """Write the gradients of the current step.

        Args:
            fields: the gradients to write.
            scaler: the scaler that performs the step; None without one.
            scale: the loss scale, if the gradients still have it when ``found_inf`` is set: a fused step has unscaled
                them in place, unless it found infinities. None if they have no scale.
            found_inf: float32; above 0 if the step found infinities or NaN and was skipped. None without a scaler.

        Returns:
            The factor by which the gradients were clipped: a float32 scalar, NaN if there is no single factor. None if
            the gradients are recorded as the step finds them.
        """
        clipped: list[tuple[Tensor, Tensor]] = []  # before and after
        for field in fields:
            of, grad, raw = field.of, _laid_out_gradient(field.of), self._raw.pop(field.of.name, None)
            if of.param.grad is None:
                self.write_none(field, f"{of.name} has no gradient")
                continue
            if grad is None:
                self._lose(field, f"the gradient of {of.name} is not reduced over the processes yet")
                continue
            if scale is not None and found_inf is not None:
                grad = torch.where(found_inf.to(grad.device) > 0, unscaled(grad, scale), grad)
            if not self._unclipped:
                self._slots.write(field, grad)
            elif raw is None:
                self._lose(field, f"no backward pass made the gradient of {of.name}")
            else:
                raw = raw if scaler is None else unscaled(raw, scaler.get_scale())
                self._slots.write(field, raw, is_part=True)
                clipped.append((raw, of.part_of(grad)))
        return clip_coefficient(clipped) if clipped else None

    def _lose(self, field: RecordedField, why: str) -> None:
        """Record a gradient as missing, although the optimizer used one; so the step cannot be replayed."""
        self._description.mark_unknown(f"{why} at step {self._slots.step}", self._slots.step)
        self.write_none(field, why)

    def write_none(self, field: RecordedField, why: str) -> None:
        """Write zeros for a missing gradient, and mark it as missing in ``NAME.has_grad``."""
        name = f"{field.of.name}.has_grad"
        self._cycle.warn(
            why, f"{why} at step {self._slots.step}: zeros are recorded, and {name} says which steps have a gradient"
        )
        if name not in self._slots.tensors:
            self._slots.add(RecordedTensor(name, (), torch.bool, fill=1, start=0), local(field.of.param).device)
        self._slots.slot(name).fill_(False)
        self._slots.slot(field.name).zero_()


def _laid_out_gradient(of: RecordedParam) -> Tensor | None:
    """Return a parameter's gradient; None if it has none, or if that is not distributed like the parameter."""
    grad: Any = of.param.grad
    if grad is None or (of.is_distributed and grad.placements != of.param.placements):  # type: ignore[attr-defined]
        return None
    return grad.detach().to_dense() if grad.is_sparse else grad.detach()
