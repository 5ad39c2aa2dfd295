"""A recorder that records nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from bhfast.storage.base import Stats


class NullSlots:
    """See :class:`bhfast.recording.slots.RecordSlots`."""

    every = 1

    def begin(self, most: int) -> int:
        return most

    def end(self) -> None:
        pass

    @contextmanager
    def counted_by(self, step: Tensor) -> Iterator[None]:
        yield

    def by_hand(self) -> list[Any]:
        return []

    def record_by_hand(self) -> None:
        pass

    def log(self, **values: Tensor) -> None:
        pass

    def log_into(self, **values: Tensor) -> dict[str, Any]:
        return {}


class NullRecorder:
    """See :class:`bhfast.Recorder`."""

    path = None
    saved_steps = 0
    description = "nothing is recorded"

    def __init__(self) -> None:
        self.constants: dict[str, Tensor] = {}
        self.slots = NullSlots()

    def __enter__(self) -> NullRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stats(self) -> Stats:
        return Stats(0, 0, 0, 0, 0, 0.0)
