"""What a loop itself changes in recorded tensors, between the steps of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import starmap
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor

from bhfast.recording.fields import FieldPlan, RecordedField, local
from bhfast.recording.slots import RecordSlots
from bhfast.trace.format import AFTER_STEP, CHANGED
from bhfast.trace.recorded import RecordedTensor
from bhfast.trace.updates import bits


class LoopChanges:
    """Notices changes by the version counters of tensors, and adds them to the record of the last step.

    It looks at every tensor twice in each step. So the tensors are looked up once, and again only if one was replaced.

    Args:
        slots: hold the current record.
        fields: what is recorded, by name in the file; more may be added later.
        plan: finds their values.
    """

    def __init__(self, slots: RecordSlots, fields: Mapping[str, RecordedField], plan: FieldPlan) -> None:
        self._slots = slots
        self._fields = fields
        self._plan = plan
        self._watched: list[RecordedField] = []
        self._values: list[Tensor] = []  # of what is watched
        self._locals: list[Tensor] = []  # the parts of them that this process holds; they have the same versions
        self._holders: list[tuple[Mapping[str, Any], str]] = []  # the mappings that have the values, and their keys
        self._states: list[tuple[Tensor, Any]] = []  # the optimizer's state of each parameter
        self._versions: list[int] = []
        self._is_whole = False  # whether all that is recorded besides gradients is watched
        self._count = 0  # of the fields when they were looked up

    def note(self) -> None:
        """Remember everything as the step has left it."""
        if not self._is_whole or self._count != len(self._fields) or self._has_replaced_one():
            self._look_up()
        self._versions = [value._version for value in self._locals]

    def since(self) -> list[RecordedField]:
        """Return what has been written to or replaced since :meth:`note`."""
        versions = [value._version for value in self._locals]
        if versions == self._versions and not self._has_replaced_one():
            return []
        before = zip(self._watched, self._values, self._versions, versions, strict=True)
        return [field for field, value, old, new in before if self._plan.value_of(field) is not value or old != new]

    def record(self) -> None:
        """Write what has changed to the current record, and keep what the step had left. Key frames stay."""
        for field in self.since():
            if not field.is_keyframed:
                self._record(field)

    def _has_replaced_one(self) -> bool:
        state = self._plan.optimizer.state
        try:
            has_same_values = all(map(is_, starmap(getitem, self._holders), self._values))
        except KeyError:
            return True
        return not has_same_values or any(state.get(param) is not own for param, own in self._states)

    def _look_up(self) -> None:
        state = self._plan.optimizer.state
        fields = [field for field in self._fields.values() if field.field != "grad"]
        found = [(field, value) for field in fields if (value := self._plan.value_of(field)) is not None]
        self._watched = [field for field, _ in found]
        self._values = [value for _, value in found]
        self._locals = [local(value) for _, value in found]
        self._holders = [
            ({"param": value} if field.field == "param" else state[field.of.param], field.field)
            for field, value in found
        ]
        self._states = [(of.param, state[of.param]) for of in self._plan.params if of.param in state]
        self._is_whole = len(found) == len(fields)
        self._count = len(self._fields)

    def _record(self, field: RecordedField) -> None:
        slot, value = self._slots.slot(field.name), self._plan.value_of(field)
        left_by_step = slot.clone()
        if value is None:
            slot.zero_()
        else:
            self._slots.write(field, value.detach())
        if torch.equal(bits(slot), bits(left_by_step)):
            return  # tensors that are views of one share a version
        changed, after_step = field.name + CHANGED, field.name + AFTER_STEP
        if changed not in self._slots.tensors:
            device = local(field.of.param).device
            self._slots.add(RecordedTensor(changed, (), torch.bool, fill=0), device)
            self._slots.add(replace(field.tensor, name=after_step, fill=0.0), device)
        self._slots.slot(changed).fill_(True)
        self._slots.slot(after_step).copy_(left_by_step)
