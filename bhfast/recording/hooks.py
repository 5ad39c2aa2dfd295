"""The hooks with which a recorder follows an optimizer, its gradients and its loss scaling."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from bhfast.errors import BhfastError
from bhfast.ops import checks
from bhfast.recording.changes import LoopChanges
from bhfast.recording.cycle import StepCycle
from bhfast.recording.fields import FieldPlan, RecordedField
from bhfast.recording.gradients import BackwardWatch, GradientRecorder
from bhfast.recording.loss_scaling import scaled_steps
from bhfast.recording.optimizer_description import OptimizerDescription
from bhfast.recording.protocols import RecordsItself

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Keep ``torch.compile`` from tracing a hook: it runs between the graphs.

    ``torch.compiler.disable`` sets the same attribute, but takes a second to import.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


class NestedCalls:
    """Tells whether a step was called by another step of the same optimizer, as in ``super().step()``.

    torch calls the hooks of both. A counter would not do: a step that raises an exception never ends. So this looks for
    the frame of the outer step on the stack.
    """

    def __init__(self) -> None:
        self._outer: FrameType | None = None
        self._depth = 0  # of steps inside it

    def begin(self, frame: FrameType) -> bool:
        """Note that a step begins, called with ``frame``; return whether it is a nested one."""
        caller: FrameType | None = frame
        while self._outer is not None and caller is not None:
            if caller is self._outer:
                self._depth += 1
                return True
            caller = caller.f_back
        self._outer, self._depth = frame, 0
        return False

    def end(self) -> bool:
        """Note that a step ends; return whether it is a nested one."""
        if self._depth:
            self._depth -= 1
            return True
        self._outer = None
        return False


class OptimizerFollower:
    """Follows one optimizer, and writes what it does to the slots of the current record.

    Args:
        plan: the optimizer, and what to record of it.
        cycle: the steps of the recording.
        unclipped: record gradients as the backward pass leaves them.
        on_new_field: makes room for a field that has appeared in the optimizer's state; returns False if it cannot.

    Attributes:
        plan: what to record.
        optimizer: without wrappers.
        params: what this process records of its parameters.
        fields: what is recorded, by name in the file.
        description: what the trace says of the optimizer.
        rates: the learning rates of its groups in its last step.
        logged: values of the current step that a replay needs.
        plan: what to record.
        has_stepped: whether it did a step in the last complete record.
    """

    def __init__(
        self,
        plan: FieldPlan,
        cycle: StepCycle,
        *,
        unclipped: bool,
        on_new_field: Callable[[RecordedField], bool],
    ) -> None:
        self.optimizer = plan.optimizer
        self.plan = plan
        self.params = plan.params
        self.fields = {field.name: field for field in plan.at_start}
        self.description = OptimizerDescription(plan.optimizer)
        self.rates: list[float] = []
        self.logged: dict[str, Tensor] = {}
        self.has_stepped = False
        self._cycle = cycle
        self._slots = cycle.slots
        self._unclipped = unclipped
        self._on_new_field = on_new_field
        self._gradients = GradientRecorder(cycle, self.description, unclipped=unclipped)
        self._steps_in_record = self._steps_seen = 0
        self._state_sizes: dict[str, int] = {}  # by parameter, how many entries its state had
        self._compiled = [False]
        self._calls = NestedCalls()
        self._scaler: GradScaler | None = None
        self._scale: Tensor | None = None  # of a fused optimizer's gradients, in the current step
        self._records_itself = isinstance(plan.optimizer, RecordsItself)
        self._keyframed = [field for field in plan.at_start if field.is_keyframed]
        self._fused = [field for field in plan.at_start if self._is_fused(field)]
        self._not_fused = [field for field in plan.at_start if field not in (*self._keyframed, *self._fused)]
        self._grads = [field for field in plan.at_start if field.field == "grad"]
        self._changes = LoopChanges(self._slots, self.fields, self.plan)
        self._by_hand: list[RecordedField] = []  # what the optimizer does not record itself in this step
        self.end_fused: Callable[[], None] = lambda: None

    @contextmanager
    def following(self, model: nn.Module | None) -> Iterator[None]:
        """Record the optimizer's steps inside the block."""
        with ExitStack() as stack:
            self.record_fused()
            stack.callback(lambda: self.end_fused())
            watch = BackwardWatch(self._cycle.note_activity, self._keep_raw_gradients if self._unclipped else None)
            stack.enter_context(watch.watching(self.params, model))
            stack.enter_context(scaled_steps(self.optimizer, self._scaled_step))
            compiled = self._compiled

            def notice_compilation(*_: object) -> None:
                if torch.compiler.is_compiling():  # becomes a constant: the compiled graph sets the flag when it runs
                    compiled[0] = True

            stack.callback(self.optimizer.register_step_pre_hook(notice_compilation).remove)
            stack.callback(self.optimizer.register_step_pre_hook(self._before_step).remove)
            stack.callback(self.optimizer.register_step_post_hook(self._after_step).remove)
            yield

    # -----------------------------------------------------------------------------------------------------------------
    # What the optimizer records itself

    def record_fused(self) -> None:
        """If the optimizer can, let it write its fields itself, with the slots' current step counter."""
        if not isinstance(self.optimizer, RecordsItself):
            return
        self.end_fused()
        slots: dict[Tensor, dict[str, Tensor]] = {}
        for field in self._fused:
            slots.setdefault(field.of.param, {})[field.field] = self._slots.slots_of(field.name)
        self.end_fused = self.optimizer.record_into(slots, self._slots.step_tensor, self._slots.every)

    def _is_fused(self, field: RecordedField) -> bool:
        is_raw = self._unclipped and field.field == "grad"
        is_whole = field.of.rows is None and field.tensor.dtype == field.of.param.dtype
        return self._records_itself and field.field in checks.FIELDS and is_whole and not is_raw | field.is_keyframed

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    @outside_graphs
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._calls.begin(sys._getframe(1)) or self._cycle.is_off or not self._begin():
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
        self._steps_seen += 1
        self.logged = {}
        self.description.look(self._slots.step)
        if self._steps_in_record > 1:
            self.description.mark_unknown(f"it did several steps in record {self._slots.record}", self._slots.step)
        self._look_for_changes(self._slots.step)
        return True

    def _look_for_changes(self, step: int) -> None:
        if self.was_changed():
            self.description.mark_unknown(
                f"parameters or their state were changed between steps, before step {step}", step
            )

    def was_changed(self) -> bool:
        """Return whether something other than a step has changed what is recorded at key frames."""
        return bool(self._keyframed) and self._is_hooked and any(field.is_keyframed for field in self._changes.since())

    @property
    def _is_hooked(self) -> bool:
        """Whether steps are performed by the optimizer's ``step()``, not by an engine."""
        return not self._slots.step or self._steps_seen > 0

    def record_changes(self) -> None:
        """Record again what something other than a step has changed since; keep what the step had left."""
        if self._is_hooked:
            self._changes.record()

    def _before_update(self) -> None:
        """Record the gradients, and determine which fields the optimizer does not record itself in this step."""
        if self._slots.record is None:
            return
        self._scale = getattr(self.optimizer, "grad_scale", None)
        self._by_hand = [*self._not_fused, *(field for field in self._fused if field.of.param.grad is None)]
        if self._scale is None:  # else the optimizer unscales them in its step
            self._record_gradients()

    @outside_graphs
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls.end() or self._cycle.is_off or not self._steps_in_record:
            return
        if self._compiled[0]:
            self.description.mark_unknown("its step was compiled", self._slots.step)
        if self._slots.record is not None:
            if self._scale is not None:
                self._record_gradients()
            self._record_state()
            if self._scaler is not None:
                found = getattr(optimizer, "found_inf", None)
                self.logged["skipped"] = torch.tensor(False) if found is None else found.detach().reshape(()) > 0
            if getattr(optimizer, "max_grad_norm", None) is not None and not self._unclipped:
                self.logged |= {"grad_norms": optimizer.grad_norm, "clip_coefs": optimizer.clip_coef}  # type: ignore[attr-defined]
        self._end()

    def _end(self) -> None:
        self.note_state()
        self._cycle.end(self)

    def note_state(self) -> None:
        """Remember what may change before the record is complete, or before the next step."""
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._changes.note()

    def _scaled_step(self, scaler: GradScaler, proceed: Callable[[], Any]) -> Any:
        """Perform ``scaler.step(optimizer)``; if that skips the optimizer's step, record it as skipped."""
        before = self._steps_seen
        self._scaler = scaler
        try:
            result = proceed()
            if self._steps_seen == before and not self._cycle.is_off and self._begin():
                self._record_skipped_step()
        finally:
            self._scaler = None
        return result

    def _record_skipped_step(self) -> None:
        if self._slots.record is not None:
            self._scale = None
            self._by_hand = [*self._fused, *self._not_fused]
            self._record_gradients()
            self._record_state()
            self.logged["skipped"] = torch.tensor(True)
        self._end()

    def complete_record(self) -> None:
        """If the optimizer has not stepped since the last record, fill in its part of this one."""
        self.has_stepped = self._steps_in_record > 0
        if self.has_stepped:
            self._look_for_changes(self._slots.step + 1)
        else:
            self.logged = {}
            self.note_state()
        if not self.has_stepped and self._slots.record is not None:
            self._by_hand = [*self._fused, *self._not_fused]
            self.description.mark_unknown(f"it did no step in record {self._slots.record}", self._slots.step)
            for field in self._grads:
                self._gradients.write_none(field, f"{type(self.optimizer).__name__} did no step")
            self._record_state()
        self._gradients.clear()
        self._steps_in_record = 0
        if self._keyframed and (reason := self.description.unknown):
            self._cycle.warn(
                "keyframes",
                f"from step {self.description.unknown_since} on, states between key frames cannot be rebuilt: {reason}",
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    def _keep_raw_gradients(self) -> None:
        step = self._slots.step + (not self._cycle.is_begun)  # a closure, or another optimizer, may have begun it
        self._gradients.keep(self._grads, step)

    def _record_gradients(self) -> None:
        fields = [field for field in self._by_hand if field.field == "grad"]
        found_inf = getattr(self.optimizer, "found_inf", None)
        factor = self._gradients.record(fields, self._scaler, self._scale, found_inf)
        if factor is not None:
            self.logged["clip_coefs"] = factor
            if self._keyframed and factor.device.type == "cpu" and factor.isnan():  # elsewhere, asking would wait
                self._cycle.warn(
                    "factor",
                    f"states from step {self._slots.step} to the next key frame cannot be rebuilt: between backward "
                    "and step, gradients were changed by something other than one common factor",
                )

    def record_start(self) -> None:
        """Write record 0: parameters and state as they are, and zeros for the gradients."""
        for field in self.fields.values():
            if field.field == "grad":
                self._slots.slot(field.name).zero_()
            else:
                self._write_value(field)
        self._changes.note()

    def by_hand(self) -> list[tuple[RecordedField, Tensor]]:
        """Return what the optimizer does not record itself at every step, with its values."""
        values = [(field, self.plan.value_of(field)) for field in self._not_fused]
        return [(field, value.detach()) for field, value in values if value is not None]

    def _record_state(self) -> None:
        self._discover_fields()
        if self._slots.is_keyframe:
            self.record_keyframe()
        for field in self._by_hand:
            if field.field != "grad":
                self._write_value(field)

    def record_keyframe(self) -> None:
        """Write the current key frame."""
        for field in self._keyframed:
            self._write_value(field)

    def _write_value(self, field: RecordedField) -> None:
        if (value := self.plan.value_of(field)) is None:
            self._slots.slot(field.name).zero_()
        else:
            self._slots.write(field, value.detach())

    def _discover_fields(self) -> None:
        """From now on, also record what is new in the optimizer's state."""
        for of in self.params:
            size = len(self.optimizer.state.get(of.param, ()))
            if size == self._state_sizes.get(of.name):
                continue
            self._state_sizes[of.name] = size
            self.plan.require_chosen(of)
            for field in self.plan.discover(of, {own.field for own in self.fields.values() if own.of is of}):
                if self._on_new_field(field):
                    self.fields[field.name] = field
                    self._not_fused.append(field)
                    self._by_hand.append(field)
