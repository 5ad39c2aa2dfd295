"""The slots that hold the current record. The recorder's hooks write to them, and so do engines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bhfast.errors import BhfastError, ConfigError
from bhfast.ops import kernels
from bhfast.recording.fields import RecordedField, local
from bhfast.recording.slot_memory import RESERVED, SlotMemory
from bhfast.trace.format import KEYFRAME_STEPS
from bhfast.trace.recorded import RecordedTensor


class RecordSlots(SlotMemory):
    """Counts the steps of a run, and has a slot for the current record of every tensor.

    Every step is bracketed by :meth:`begin` and :meth:`end`. The recorder's hooks call them for the steps of an
    optimizer, an engine calls them for its own. A slot is on the device of the tensor that it records; from a GPU the
    records go to the host through a :class:`bhfast.transfer.ring.Ring`.

    Args:
        steps: the number of steps the run will have; None if it is not known.
        every: each step that is a multiple of this is recorded. Steps are counted from record 0.
        keyframes: each record that is a multiple of this is a key frame; None: there are none.

    Attributes:
        every, keyframes: see above.
        step: how many steps have begun.
        step_tensor: the same as an int64 scalar, for operations; on a device inside :meth:`counted_by`.
        record: the current record; None if the current step is not recorded.
        complete: how many records are complete.
        frames: how many of them are key frames.
        tensors: what is recorded, by name in the file.
        constants: tensors of the whole run, which are written as they are.
    """

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def begin(self, most: int) -> int:
        """Reserve slots for up to ``most`` steps; return how many of them may run now, at least one.

        Raises:
            BhfastError: the recording was opened for fewer steps.
            StorageError: the disk filled up or failed.
        """
        if self.step + most > self.steps:
            raise BhfastError(f"the recorder was opened for {self.steps} steps; open it with a larger steps=")
        storage, rings = self._storage, self._rings.values()
        complete = self.step // self.every + 1
        if storage.is_due(complete) or complete >= storage.room or any(complete == ring.room for ring in rings):
            self._keep_constants()
            tickets = [ticket for ring in rings if (ticket := ring.send(complete)) is not None]
            storage.submit(complete, tickets)
        for ring in rings:
            if complete == ring.room:
                ring.turn()
        if complete >= storage.room and complete != self.records:
            storage.wait(complete)
        room = min([storage.room, *(ring.room for ring in rings)])
        most = min(most, room * self.every - 1 - self.step)
        if self.keyframes:
            most = min(most, self.keyframes - self.step % self.keyframes)  # to the next key frame
        self.step += most
        self.step_tensor.fill_(self.step)
        self.record = None if self.step % self.every else self.step // self.every
        if self.keyframes:
            self._frame = self.step // self.keyframes
        return most

    def end(self, *, has_keyframe: bool = False) -> None:
        """Mark the reserved steps as issued; on a GPU they may still be running.

        Args:
            has_keyframe: whether the key frame, if the step makes one, is written already.
        """
        self.complete = self.step // self.every + 1
        if self.is_keyframe and not has_keyframe:
            self.on_keyframe()

    def commit(self) -> None:
        """Wait until all complete records are safe in the file, or, with the storage in memory, on the host.

        Raises:
            StorageError: the disk filled up or failed.
        """
        self.on_commit()
        self._keep_constants()
        for ring in self._rings.values():
            ring.drain(self.complete)
        self._storage.submit(self.complete, [])
        self._storage.flush()

    @contextmanager
    def counted_by(self, step: Tensor) -> Iterator[None]:
        """Inside the block, let a counter on a device choose the slots.

        A CUDA graph that is captured in the block records the next step each time it is replayed, between :meth:`begin`
        and :meth:`end`.

        Args:
            step: int64 scalar; the graph itself increments it before each step.
        """
        own = self.step_tensor, self.record
        self.step_tensor, self.record = step, 0
        self.on_recount()
        try:
            yield
        finally:
            self.step_tensor, self.record = own
            self.on_recount()

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    def slot(self, name: str) -> Tensor:
        """Return the slot of a tensor's current record, ``[*shape]``."""
        slots = self._slots[name]
        entry = self.step // self.every if self.tensors[name].stride == 1 else self._frame
        return slots[entry % len(slots)]

    def write(self, field: RecordedField, value: Tensor, *, is_part: bool = False) -> None:
        """Copy a field's value, or with ``is_part`` only the recorded part of it, to the slot of the current record.

        See :meth:`bhfast.recording.fields.RecordedField.copy_into`.
        """
        field.copy_into(self.slot(field.name), value, is_part=is_part, step=self.step)

    def slots_of(self, name: str) -> Tensor:
        """Return all slots of a tensor, ``[slots, *shape]``. Record k goes to slot ``k % slots``."""
        return self._slots[name]

    def log(self, **values: Tensor) -> None:
        """Write values to the current record; nothing if the step is not recorded, or not in this process.

        Args:
            values: by name in the file. The first value under a name fixes its shape and dtype; later ones are cast to
                that dtype. Records without a value hold NaN, or 0 for integers.

        Raises:
            ConfigError: a recorded tensor already has that name, or the shape has changed.
            StorageError: the disk is too small for a new name.
        """
        if self.record is None or not self.is_logging:
            return
        groups: dict[tuple[torch.device, int], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, value in values.items():
            value = local(value.detach())
            slots = self._loggable_slots(name, value)
            sources, targets = groups[slots.device, len(slots)]
            sources.append(value.to(slots.device, slots.dtype))
            targets.append(slots)
        for sources, targets in groups.values():
            kernels.record_(sources, targets, self.step_tensor, self.every)

    def log_into(self, **values: Tensor) -> dict[str, Tensor]:
        """Make room for values as :meth:`log` does, but write nothing: engines use it that write records themselves.

        Args:
            values: as for :meth:`log`; only shape, dtype and device matter.

        Returns:
            For each name ``[slots, *shape]``; record k goes to slot ``k % slots``. Empty if this process records no
            logged values.
        """
        return {name: self._loggable_slots(name, value) for name, value in values.items()} if self.is_logging else {}

    def by_hand(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return what the optimizer does not record itself: an engine that does not call ``step()`` records it.

        Returns:
            For each field its tensor, the rows to record of it, int64 ``[n]``, and its slots, ``[slots, n, ...]``.
        """
        found = []
        for field, value in self.on_by_hand():
            rows = field.of.rows_of(value)
            rows = torch.arange(len(value), device=value.device) if rows is None else rows
            found.append((local(value), rows, self._slots[field.name]))
        return found

    def record_by_hand(self) -> None:
        """Write what :meth:`by_hand` returns to the current record, with operations that a CUDA graph can capture."""
        if self.record is None:
            return
        for value, rows, slots in self.by_hand():
            kernels.record_([value.index_select(0, rows)], [slots], self.step_tensor, self.every)

    def require_loggable(self, names: Iterable[str]) -> None:
        """Raise ConfigError if one of ``names`` is taken by something that is not logged."""
        for name in names:
            if name in self._not_loggable or name in (RESERVED, KEYFRAME_STEPS):
                raise ConfigError(f"log({name}=...) must have a name of its own, but {name} is recorded already")

    def _loggable_slots(self, name: str, value: Tensor) -> Tensor:
        self.require_loggable([name])
        if name not in self.tensors:
            fill = math.nan if value.dtype.is_floating_point or value.dtype.is_complex else 0
            self.add(RecordedTensor(name, tuple(value.shape), value.dtype, fill), value.device, is_loggable=True)
        tensor = self.tensors[name]
        if tuple(value.shape) != tensor.shape:
            wanted, got = list(tensor.shape), list(value.shape)
            raise ConfigError(f"log({name}=...) must have one shape throughout: wanted {wanted}, got {got}")
        if value.device.type == "cuda" and self._slots[name].device.type != "cuda":
            self._slots[name] = self._make_slots(tensor, value.device)
        return self._slots[name]
