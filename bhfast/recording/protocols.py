"""What a recorder needs from an optimizer that records its own fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class RecordsItself(Protocol):
    """An optimizer that records in the same pass that updates the parameters, like :class:`bhfast.FusedAdam`."""

    def record_into(self, rings: Mapping[Tensor, Mapping[str, Tensor]], step: Tensor, every: int) -> Callable[[], None]:
        """See :meth:`bhfast.FusedAdam.record_into`."""
        ...
