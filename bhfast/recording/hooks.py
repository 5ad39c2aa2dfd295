"""The hooks by which a recorder follows optimizers, their gradients and their loss scaling."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from bhfast.errors import BhfastError, RecordingWarning
from bhfast.ops import checks
from bhfast.recording.clipping import clip_coefficient
from bhfast.recording.fields import FieldPlan, RecordedField, RecordedParam, local
from bhfast.recording.gradients import BackwardWatch
from bhfast.recording.loss_scaling import scaled_steps, unscaled
from bhfast.recording.optimizer_description import OptimizerDescription
from bhfast.recording.protocols import RecordsItself
from bhfast.recording.slots import RecordSlots
from bhfast.storage.base import RecordedTensor

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Keep ``torch.compile`` from tracing a hook: it runs between the graphs.

    ``torch.compiler.disable`` sets the same attribute, but takes a second to import.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


class StepCycle:
    """The steps of a recording: a record is complete when the last of its optimizers has stepped.

    Args:
        slots: where records are made.
        strict: raise an error where recording otherwise stops with a warning.

    Attributes:
        is_under_way: whether a forward or backward pass has begun since the last step.
        pending: values logged meanwhile, by name; they belong to the step that is under way.
        is_begun: whether one of the optimizers has begun its step, and the record is not complete yet.
    """

    def __init__(self, slots: RecordSlots, *, strict: bool) -> None:
        self.slots = slots
        self.is_under_way = False
        self.pending: dict[str, Tensor] = {}
        self.followers: list[OptimizerFollower] = []
        self._strict = strict
        self.is_begun = False
        self._own: set[str] | None = None  # values that the recorder itself logs
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
        """Whether nothing is recorded any more, or not in this process."""
        return self._has_stopped or self.is_in_other_process

    def note_activity(self) -> None:
        """Note that a forward or backward pass of the next step has begun."""
        self.is_under_way = True

    def begin(self) -> bool:
        """Begin a step, unless one of its optimizers has done so; return False if recording has stopped."""
        if not self.is_begun:
            if self.slots.step >= self.slots.steps and not self._strict:
                self._has_stopped = True
                for follower in self.followers:
                    follower.end_fused()
                self.warn(
                    "steps", f"recording stopped after step {self.slots.steps}, the last one announced with steps="
                )
                return False
            self.slots.begin(1)
            self.is_begun = True
        return True

    def end(self, follower: OptimizerFollower) -> None:
        """Complete the record, if ``follower`` is the last one that a step waits for."""
        if follower is not self.followers[-1]:
            return
        for other in self.followers:
            other.complete_record()
        self._log_own_values()
        self.slots.log(**self.pending)
        self.pending.clear()
        self.slots.end()
        self.is_begun = self.is_under_way = False

    def _log_own_values(self) -> None:
        """Log what a replay needs, except values the caller already logs."""
        if self.slots.record is None:
            return
        if self._own is None:
            own = {"learning_rates", "grad_norms", "clip_coefs", "skipped"}
            self._own = own - self.slots.tensors.keys() - self.pending.keys()
        rates = [float(group["lr"]) for follower in self.followers for group in follower.optimizer.param_groups]
        values = {"learning_rates": torch.tensor(rates if len(rates) > 1 else rates[0], dtype=torch.float64)}
        for follower in self.followers:
            values |= follower.logged
        self.slots.log(**{name: value for name, value in values.items() if name in self._own})


class OptimizerFollower:
    """Follows one optimizer, and writes what it does to the slots of the current record.

    Args:
        optimizer: without wrappers.
        params: what this process records of its parameters.
        plan: which fields of them to record.
        fields: those that are known at the start.
        cycle: the steps of the recording.
        unclipped: record gradients as the backward pass leaves them.

    Attributes:
        fields: what is recorded, by name in the file.
        description: what the trace says of the optimizer.
        logged: values of the current step that a replay needs.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[RecordedParam],
        plan: FieldPlan,
        fields: Sequence[RecordedField],
        cycle: StepCycle,
        *,
        unclipped: bool,
        on_new_field: Callable[[RecordedField], bool],
    ) -> None:
        self.optimizer = optimizer
        self.params = params
        self.fields = {field.name: field for field in fields}
        self.description = OptimizerDescription(optimizer)
        self.logged: dict[str, Tensor] = {}
        self._plan = plan
        self._cycle = cycle
        self._slots = cycle.slots
        self._unclipped = unclipped
        self._on_new_field = on_new_field
        self._raw: dict[str, Tensor] = {}  # by parameter, as the backward pass left them
        self._steps_in_record = 0
        self._state_sizes: dict[str, int] = {}  # by parameter, how many entries its state had
        self._compiled = [False]
        self._scaler: GradScaler | None = None
        self._scale: Tensor | None = None  # of a fused optimizer's gradients, in the current step
        self._by_hand: list[RecordedField] = []  # fields the fused optimizer does not record in this step
        self.end_fused: Callable[[], None] = lambda: None

    @contextmanager
    def following(self, model: nn.Module | None) -> Iterator[None]:
        """Record the optimizer's steps inside the block."""
        with ExitStack() as stack:
            if isinstance(self.optimizer, RecordsItself):
                self.record_fused()
                stack.callback(lambda: self.end_fused())
            watch = BackwardWatch(self._cycle.note_activity, self._keep_raw_gradients if self._unclipped else None)
            stack.enter_context(watch.watching(self.params, model))
            stack.enter_context(scaled_steps(self.optimizer, self._scaled_step))
            compiled = self._compiled

            def notice_compilation(*_: object) -> None:
                if torch.compiler.is_compiling():  # a constant in the graph, which then sets the flag when it runs
                    compiled[0] = True

            stack.callback(self.optimizer.register_step_pre_hook(notice_compilation).remove)
            stack.callback(self.optimizer.register_step_pre_hook(self._before_step).remove)
            stack.callback(self.optimizer.register_step_post_hook(self._after_step).remove)
            yield

    # -----------------------------------------------------------------------------------------------------------------
    # What the optimizer records itself

    def record_fused(self) -> None:
        """Let an optimizer that can do so write its fields itself, counted as the slots are now."""
        if not isinstance(self.optimizer, RecordsItself):
            return
        self.end_fused()
        slots: dict[Tensor, dict[str, Tensor]] = {}
        for field in filter(self._is_fused, self.fields.values()):
            slots.setdefault(field.of.param, {})[field.field] = self._slots.slots_of(field.name)
        self.end_fused = self.optimizer.record_into(slots, self._slots.step_tensor, self._slots.every)

    def _is_fused(self, field: RecordedField) -> bool:
        is_raw = self._unclipped and field.field == "grad"
        is_whole = field.of.rows is None and field.tensor.dtype == field.of.param.dtype
        return isinstance(self.optimizer, RecordsItself) and field.field in checks.FIELDS and is_whole and not is_raw

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    @outside_graphs
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._cycle.is_off or not self._begin():
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._before_update()
            return None
        calls = 0

        def recording_closure() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise BhfastError(
                    f"the recorder cannot follow {type(optimizer).__name__}, which calls the closure of a step more "
                    "than once"
                )
            loss = closure()
            self._before_update()
            return loss

        return (args[0], recording_closure), {k: v for k, v in kwargs.items() if k != "closure"}

    def _begin(self) -> bool:
        if not self._cycle.begin():
            return False
        self._steps_in_record += 1
        self.logged = {}
        self.description.look(self._slots.step)
        if self._steps_in_record > 1:
            self.description.mark_unknown(f"it did several steps in record {self._slots.record}")
        return True

    def _before_update(self) -> None:
        """Record the gradients, and find out which fields the optimizer does not record itself in this step."""
        if self._slots.record is None:
            return
        self._scale = getattr(self.optimizer, "grad_scale", None)
        self._by_hand = [
            field for field in self.fields.values() if field.of.param.grad is None or not self._is_fused(field)
        ]
        if self._scale is None:  # else the optimizer unscales them in its step
            self._record_gradients()

    @outside_graphs
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._cycle.is_off or not self._steps_in_record:
            return
        if self._compiled[0]:
            self.description.mark_unknown("its step was compiled")
        if self._slots.record is not None:
            if self._scale is not None:
                self._record_gradients()
            self._record_state()
            if self._scaler is not None:
                found = getattr(optimizer, "found_inf", None)
                self.logged["skipped"] = torch.tensor(False) if found is None else found.detach().reshape(()) > 0
            if getattr(optimizer, "max_grad_norm", None) is not None and not self._unclipped:
                self.logged |= {"grad_norms": optimizer.grad_norm, "clip_coefs": optimizer.clip_coef}  # type: ignore[attr-defined]
        self._cycle.end(self)

    def _scaled_step(self, scaler: GradScaler, proceed: Callable[[], Any]) -> Any:
        """Perform ``scaler.step(optimizer)``; if that skips the optimizer's step, record it as skipped."""
        before = self._steps_in_record, self._slots.step
        self._scaler = scaler
        try:
            result = proceed()
            if (self._steps_in_record, self._slots.step) == before and not self._cycle.is_off and self._begin():
                self._record_skipped_step()
        finally:
            self._scaler = None
        return result

    def _record_skipped_step(self) -> None:
        if self._slots.record is not None:
            self._scale = None
            self._by_hand = list(self.fields.values())
            self._record_gradients()
            self._record_state()
            self.logged["skipped"] = torch.tensor(True)
        self._cycle.end(self)

    def complete_record(self) -> None:
        """Fill the record of an optimizer that has not stepped since the last one."""
        if not self._steps_in_record and self._slots.record is not None:
            self._by_hand = list(self.fields.values())
            self.description.mark_unknown(f"it did no step in record {self._slots.record}")
            for field in self._fields("grad"):
                self._write_no_gradient(field)
            self._record_state()
        self._raw.clear()
        self._steps_in_record = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Gradients

    def _keep_raw_gradients(self) -> None:
        """Keep what a backward pass has left."""
        step = self._slots.step + (not self._cycle.is_begun)  # a closure, or another optimizer, may have begun it
        if step % self._slots.every or self._cycle.is_off:
            return
        for field in self._fields("grad"):
            grad = self._gradient(field.of)
            if grad is not None:
                self._raw[field.of.name] = field.of.part_of(grad).clone()

    def _record_gradients(self) -> None:
        clipped: list[tuple[Tensor, Tensor]] = []  # before and after
        for field in self._by_hand:
            if field.field != "grad":
                continue
            grad, raw = self._gradient(field.of), self._raw.pop(field.of.name, None)
            if grad is None:
                self._write_no_gradient(field)
                self._cycle.warn(
                    f"{field.of.name} has no gradient",
                    f"parameter {field.of.name} has no gradient at step {self._slots.step}: zeros are recorded, and "
                    f"{field.of.name}.has_grad says which steps had one",
                )
            elif not self._unclipped:
                self._write(field, self._unscaled_by_step(grad))
            elif raw is None:
                self._write_no_gradient(field)
                self._cycle.warn(
                    f"{field.of.name} has no unclipped gradient",
                    f"the gradient of {field.of.name} at step {self._slots.step} did not come from a backward pass "
                    "that the recorder could see, so it is not recorded; "
                    f"{field.of.name}.has_grad says which steps have one",
                )
            else:
                if self._scaler is not None:
                    raw = unscaled(raw, self._scaler.get_scale())
                self._write(field, raw, is_part=True)
                clipped.append((raw, field.of.part_of(self._unscaled_by_step(grad))))
        if clipped:
            self.logged["clip_coefs"] = clip_coefficient(clipped)

    def _unscaled_by_step(self, grad: Tensor) -> Tensor:
        """Return a gradient without loss scale: a fused step unscales it in place, unless it finds an infinity."""
        if self._scale is None:
            return grad
        found = self.optimizer.found_inf  # type: ignore[attr-defined]
        return torch.where(found.to(grad.device) > 0, unscaled(grad, self._scale), grad)

    def _gradient(self, of: RecordedParam) -> Tensor | None:
        grad = of.param.grad
        if grad is None:
            return None
        if getattr(grad, "placements", None) != getattr(of.param, "placements", None):
            self._cycle.warn(
                f"{of.name} is laid out differently",
                f"the gradient of {of.name} has placements {getattr(grad, 'placements', None)}, and the parameter "
                f"{getattr(of.param, 'placements', None)}: it is not recorded, because it is not reduced yet",
            )
            return None
        return grad.detach().to_dense() if grad.is_sparse else grad.detach()

    def _write_no_gradient(self, field: RecordedField) -> None:
        name = f"{field.of.name}.has_grad"
        if name not in self._slots.tensors:
            self._slots.add(RecordedTensor(name, (), torch.bool, fill=1, start=0), local(field.of.param).device)
        self._slots.slot(name).fill_(False)
        self._slots.slot(field.name).zero_()

    # -----------------------------------------------------------------------------------------------------------------
    # Parameters and state

    def record_start(self) -> None:
        """Write record 0: parameters and state as they are, and zeros."""
        for field in self.fields.values():
            self._write_value(field)

    def _record_state(self) -> None:
        self._discover_fields()
        for field in self._by_hand:
            if field.field != "grad":
                self._write_value(field)

    def _write_value(self, field: RecordedField) -> None:
        if field.field == "param":
            self._write(field, field.of.param.detach())
            return
        value = self.optimizer.state.get(field.of.param, {}).get(field.field)
        if value is None:
            self._slots.slot(field.name).zero_()
        else:
            self._write(field, value)

    def _discover_fields(self) -> None:
        """Record what has appeared in the optimizer's state, from now on."""
        for of in self.params:
            size = len(self.optimizer.state.get(of.param, ()))
            if size == self._state_sizes.get(of.name):
                continue
            self._state_sizes[of.name] = size
            if of.param.grad is not None and (missing := self._plan.missing(of)):
                raise BhfastError(
                    f"{type(self.optimizer).__name__} keeps no {', '.join(missing)} for parameter {of.name}; "
                    "leave it out of fields="
                )
            for field in self._plan.discover(of, {own.field for own in self.fields.values() if own.of is of}):
                if self._on_new_field(field):
                    self.fields[field.name] = field
                    self._by_hand.append(field)

    def _fields(self, kind: str) -> list[RecordedField]:
        return [field for field in self.fields.values() if field.field == kind]

    def _write(self, field: RecordedField, value: Tensor, *, is_part: bool = False) -> None:
        """Copy a value, or what is recorded of it, to the slot of the current record."""
        slot = self._slots.slot(field.name)
        rows = None if is_part else field.of.rows_of(value)
        value = local(value)
        shape = value.shape if rows is None else torch.Size([len(rows), *value.shape[1:]])
        if value.dtype != slot.dtype or shape != slot.shape:
            raise BhfastError(
                f"{field.field} of parameter {field.of.name} is {value.dtype} {list(value.shape)} at step "
                f"{self._slots.step}, wanted {slot.dtype} {list(slot.shape)}; open the recorder after the optimizer's "
                "first step"
            )
        if rows is None:
            slot.copy_(value)
        else:
            torch.index_select(value, 0, rows, out=slot)
