"""The memory in which records are made, on the host and on devices, and its way to the storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bhfast.recording.fields import RecordedField
from bhfast.storage.base import Storage
from bhfast.storage.choose import open_storage
from bhfast.storage.output import OutputFile
from bhfast.trace.format import KEYFRAME_STEPS, format_bytes
from bhfast.trace.recorded import RecordedTensor
from bhfast.transfer.copy_stream import make_copy_stream
from bhfast.transfer.host_memory import page_prefaulter
from bhfast.transfer.ring import Ring, half_size

RESERVED = "recorded_steps"


class SlotMemory:
    """The memory and the storage behind the slots of a recording. See :class:`bhfast.recording.slots.RecordSlots`."""

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
        self.on_by_hand: Callable[[], list[tuple[RecordedField, Tensor]]] = list  # called to find what engines record
        self.on_keyframe: Callable[[], None] = lambda: None  # called to write the key frame of a step that had no hooks
        self.on_last: Callable[[], bool] = lambda: (
            True
        )  # called to write the last one; returns whether that is possible
        self.on_commit: Callable[[], None] = lambda: None  # called to record what was changed since the last step
        self.on_carry: Callable[[], dict[str, Tensor]] = (
            dict  # called when all state was replaced; returns what it is now
        )
        self.carried = 0  # how many records the earlier trace has that this recording goes on with, and may replace
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
