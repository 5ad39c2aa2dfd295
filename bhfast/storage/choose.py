"""Chooses the storage of a recording."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bhfast.errors import StorageError
from bhfast.machine import available_memory
from bhfast.storage.base import Storage
from bhfast.storage.memory import MemoryStorage
from bhfast.storage.output import OutputFile
from bhfast.storage.stream import BUFFER, COMMIT_SECONDS, StreamStorage, slots_of
from bhfast.trace.format import format_bytes


def open_storage(
    output: OutputFile,
    wanted: str,
    *,
    records: int | None,
    every: int,
    start_step: int,
    sizes: Mapping[str, int],
    group: int,
    metadata: Mapping[str, str],
    buffer_bytes: int = BUFFER,
    commit_seconds: float = COMMIT_SECONDS,
) -> tuple[Storage, str]:
    """Return the storage for a recording, and a line of text that says which it is and why.

    Args:
        output, records, every, start_step, metadata, buffer_bytes, commit_seconds: see :class:`StreamStorage`.
        wanted: ``memory``, ``stream``, or ``auto``, which takes memory if the recording fits into half of what is free.
        sizes: bytes per record, on average, of the tensors known at the start, by name.
        group: how many records are sent from a device together.

    Raises:
        StorageError: memory or disk are too small.
    """
    memory, record = available_memory(), sum(sizes.values())
    size = math.inf if records is None else record * records
    free = f"the {format_bytes(memory)} of free memory"
    kind, why = wanted, "as asked"
    if wanted == "auto" and records is None:
        kind, why = "stream", "the number of steps is not known"
    elif wanted == "auto" and size > memory / 2:
        kind, why = "stream", f"{format_bytes(size)} is more than half of {free}"
    elif wanted == "auto":
        kind, why = "memory", f"it fits into {free}"
    storage: Storage
    if kind == "memory":
        assert records is not None
        needs, way_out = record * records, 'record less with every= or steps=, or use storage="stream"'
        output.reserve(needs)
        storage = MemoryStorage(output, records=records, every=every, start_step=start_step)
    else:
        storage = StreamStorage(
            output,
            records=records,
            every=every,
            start_step=start_step,
            names=sizes,
            metadata=metadata,
            buffer_bytes=buffer_bytes,
            commit_seconds=commit_seconds,
        )
        slots = slots_of(record, group, storage.capacity, buffer_bytes)
        needs, way_out = slots * record, "record fewer parameters or rows"
    if needs > memory:
        storage.close()
        raise StorageError(
            f"memory is too small for the recording: {format_bytes(needs)} wanted, {format_bytes(memory)} available",
            way_out,
        )
    return storage, f"{kind} ({why})"
