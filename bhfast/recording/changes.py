"""What a loop itself changes in recorded tensors, between the steps of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bhfast.recording.fields import RecordedField, local
from bhfast.recording.slots import RecordSlots
from bhfast.trace.format import AFTER_STEP, CHANGED
from bhfast.trace.recorded import RecordedTensor
from bhfast.trace.updates import bits


class LoopChanges:
    """Notices changes by the version counters of tensors, and adds them to the record of the last step.

    Args:
        slots: hold the current record.
        fields: what is recorded, by name in the file; more may be added later.
        value_of: returns the current value of a field; None if it has none.
    """

    def __init__(
        self,
        slots: RecordSlots,
        fields: Mapping[str, RecordedField],
        value_of: Callable[[RecordedField], Tensor | None],
    ) -> None:
        self._slots = slots
        self._fields = fields
        self._value_of = value_of
        self._versions: dict[str, tuple[int, int]] = {}

    def note(self) -> None:
        """Remember everything as the step has left it."""
        self._versions = self._current()

    def since(self) -> list[RecordedField]:
        """Return what has been written to or replaced since :meth:`note`."""
        now = self._current()
        return [self._fields[name] for name, version in self._versions.items() if now.get(name) != version]

    def record(self) -> None:
        """Write what has changed to the current record, and keep what the step had left. Key frames stay."""
        for field in self.since():
            if not field.is_keyframed:
                self._record(field)

    def _current(self) -> dict[str, tuple[int, int]]:
        values = {name: self._value_of(field) for name, field in self._fields.items() if field.field != "grad"}
        return {name: (id(value), local(value)._version) for name, value in values.items() if value is not None}

    def _record(self, field: RecordedField) -> None:
        slot, value = self._slots.slot(field.name), self._value_of(field)
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
