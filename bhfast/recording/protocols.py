"""What a recorder asks of an optimizer, and what stands in for it where nothing is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor

from bhfast.storage.base import Stats


@runtime_checkable
class RecordsItself(Protocol):
    """An optimizer that can record in the pass that updates, as :class:`bhfast.FusedAdam` does."""

    def record_into(self, rings: Mapping[Tensor, Mapping[str, Tensor]], step: Tensor, every: int) -> Callable[[], None]:
        """See :meth:`bhfast.FusedAdam.record_into`."""
        ...


class NullRecorder:
    """Stands in for a Recorder where nothing is recorded."""

    path = None
    every = 1
    saved_steps = 0
    description = "nothing is recorded"

    def __init__(self) -> None:
        self.constants: dict[str, Tensor] = {}

    def __enter__(self) -> NullRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, most: int) -> int:
        return most

    def end(self) -> None:
        pass

    def stats(self) -> Stats:
        return Stats(0, 0, 0, 0, 0, 0.0)

    @contextmanager
    def counted_by(self, step: Tensor) -> Iterator[None]:
        yield

    def log(self, **values: Tensor) -> None:
        pass

    def log_into(self, **values: Tensor) -> dict[str, Tensor]:
        return {}
