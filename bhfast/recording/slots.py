"""The slots that hold the current record. The recorder's hooks write to them, and so do engines."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bhfast.errors import BhfastError, ConfigError
from bhfast.ops import kernels
from bhfast.recording.fields import RecordedField, local
from bhfast.storage.base import Storage
from bhfast.storage.choose import open_storage
from bhfast.storage.output import OutputFile
from bhfast.trace.format import KEYFRAME_STEPS, format_bytes
from bhfast.trace.recorded import RecordedTensor
from bhfast.transfer.copy_stream import make_copy_stream
from bhfast.transfer.host_memory import page_prefaulter
from bhfast.transfer.ring import Ring, half_size

RESERVED = "recorded_steps"


class RecordSlots:
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

    _open_storage = staticmethod(open_storage)
    _half_size = staticmethod(half_size)
    _make_copy_stream = staticmethod(make_copy_stream)

    def __init__(self, *, steps: int | None, every: int, keyframes: int | None = None) -> None:
        self.every = every
        self.keyframes = keyframes
        self.step = 0
        self.step_tensor = torch.zeros((), dtype=torch.int64)
        self.record: int | None = 0
        self.complete = 0
        self.tensors: dict[str, RecordedTensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.is_logging = True  # whether this process records what is logged
        self.on_recount: Callable[[], None] = lambda: None  # called after step_tensor was replaced
        self.on_keyframe: Callable[[], None] = lambda: None  # called to write the key frame of a step that had no hooks
        self.on_last: Callable[[], bool] = lambda: (
            True
        )  # called to write the last one; returns whether that is possible
        self.records = None if steps is None else steps // every + 1
        self.steps = math.inf if steps is None else steps
        self._storage: Storage
        self._hosts: dict[str, Tensor] = {}  # by name, [slots, ...]
        self._slots: dict[str, Tensor] = {}  # by name, [slots, ...]: in a ring on the device, or the host's
        self._rings: dict[tuple[torch.device, int], Ring] = {}  # by the size of a half
        self._kept_constants: set[str] = set()  # names of those that the storage already has
        self._frame = 0  # the current key frame
        self.frames = 0
        self._not_loggable: set[str] = set()
        self._known_size = 0  # bytes per record of all tensors known at the start

    # -----------------------------------------------------------------------------------------------------------------
    # Opening and closing

    @contextmanager
    def opened(
        self,
        output: OutputFile,
        storage: str,
        tensors: Mapping[str, RecordedTensor],
        *,
        start_step: int,
        metadata: Mapping[str, str],
    ) -> Iterator[None]:
        """Open the storage and the memory for records; close them when the block ends.

        Args:
            output: the file to write.
            storage: the kind that is wanted; see :func:`bhfast.storage.choose.open_storage`.
            tensors: those known at the start, by name; :meth:`add` adds them.
            start_step: the step of record 0.
            metadata: for the file's ``__metadata__``.

        Raises:
            StorageError: memory or disk are too small.
        """
        self._known_size = sum(tensor.bytes_per_record for tensor in tensors.values())
        with ExitStack() as self._stack:
            self._stack.callback(self._hosts.clear)  # a recorder may live on long after its recording
            self._stack.callback(self._slots.clear)
            self._prefaulter = page_prefaulter()
            self._stack.callback(self._prefaulter.close)
            self._storage, self.storage_reason = self._open_storage(
                output,
                storage,
                records=self.records,
                every=self.every,
                start_step=start_step,
                sizes={name: tensor.bytes_per_record for name, tensor in tensors.items()},
                group=self._half(0),
                metadata=metadata,
            )
            self._stack.callback(self._storage.close)
            yield

    def add(self, tensor: RecordedTensor, device: torch.device, *, is_loggable: bool = False) -> None:
        """Make room for the records of a tensor, on the host and on ``device``; earlier records hold its fill value."""
        first, group = self.record or 0, self._half(tensor.bytes_per_record)
        self._hosts[tensor.name] = self._storage.add(tensor, group=group, first=first)
        self.tensors[tensor.name] = tensor
        self._slots[tensor.name] = self._make_slots(tensor, device)
        if not is_loggable:
            self._not_loggable.add(tensor.name)

    def reserve_name(self, name: str) -> None:
        """Refuse ``name`` in :meth:`log`."""
        self._not_loggable.add(name)

    def _half(self, size: int) -> int:
        """Return how many records of a tensor, with ``size`` bytes each, are sent from a device together."""
        return self._half_size(max(size, self._known_size), self.records or 1 << 62)

    def _make_slots(self, tensor: RecordedTensor, device: torch.device) -> Tensor:
        host, half = self._hosts[tensor.name], self._half(tensor.nbytes)
        if tensor.stride > 1:
            return host  # key frames are rare: they are copied to the host one by one
        if (device, half) not in self._rings:
            stream = self._make_copy_stream(device)
            if stream is None:
                if tensor.fill is None:
                    self._prefaulter.add(host)
                return host
            self._rings[device, half] = Ring(stream, half, first=self.record or 0)
            self._stack.callback(self._rings[device, half].close)
        return self._rings[device, half].add(host, device, tensor.fill)

    def _keep_constants(self) -> None:
        for name, value in self.constants.items():
            if name not in self._kept_constants:
                self._storage.set_constant(name, value)
                self._kept_constants.add(name)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Add to the file's metadata, so that readers of the unfinished file know what later records mean."""
        self._storage.set_metadata(metadata)

    def settle(self) -> tuple[int, Exception | None]:
        """Bring all records to the host and, when streaming, to the disk.

        Returns:
            How many records can be saved, and the device's error if some were lost to it.
        """
        self._keep_constants()
        fault = None
        for ring in self._rings.values():
            try:
                ring.drain(self.complete)
            except RuntimeError as error:
                fault = error
                self.complete = max(1, min(self.complete, ring.landed))
        saved = self._storage.settle(self.complete)
        if self.keyframes:
            self.frames = -(-saved // self.keyframes)
        if self.keyframes and saved == self.complete and saved % self.keyframes != 1 and not self._is_in_step:
            self._frame = self.frames
            self.frames += self.on_last() and self._storage.add_last()
        return saved, fault

    @property
    def _is_in_step(self) -> bool:
        return self.complete != self.step // self.every + 1

    @property
    def is_keyframe(self) -> bool:
        """Whether the current step makes a key frame."""
        return bool(self.keyframes) and self.record is not None and self.step == self._frame * (self.keyframes or 1)

    def save(self, metadata: Mapping[str, str], path: Path) -> list[str]:
        """Write the settled records to the trace ``path``; return the names of its tensors."""
        self._storage.save(metadata, path)
        return [*self.tensors, RESERVED, *([KEYFRAME_STEPS] if self.keyframes else []), *self._kept_constants]

    # -----------------------------------------------------------------------------------------------------------------
    # Figures

    @property
    def nbytes(self) -> int:
        """Bytes of one record of all tensors, on average."""
        return sum(tensor.bytes_per_record for tensor in self.tensors.values())

    @property
    def waits(self) -> int:
        """How often the run had to wait for the recording."""
        return self._storage.waits + sum(ring.stream.waits for ring in self._rings.values())

    @property
    def committed(self) -> int:
        """How many records are safe in the file, whatever happens to the process."""
        return self._storage.committed

    @property
    def failure(self) -> str | None:
        """Why writing failed; None while it is healthy."""
        return self._storage.failure

    @property
    def description(self) -> str:
        """The kind of storage, why it was chosen, and the size of the recording."""
        size = f"{format_bytes(self.nbytes)} a step"
        if self.records is not None:
            size = f"{format_bytes(self.nbytes * self.records)} for {self.records:,} records"
        return f"{self.storage_reason}: {size}"

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
