"""What is recorded: tensors with one entry per record, and the steps that the records are of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bhfast.trace.format import KEYFRAME_STEPS


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor of the trace with one entry per record: its name, and the shape and dtype of a record.

    Attributes:
        name: in the file.
        shape, dtype: of one record.
        fill: what a record holds if nothing is written to it; None if every record is written.
        start: what record 0 of a tensor that is added later holds; None for ``fill``.
        stride: only record 0, each record that is a multiple of this, and, at the end of a
            recording, the last one have an entry in the tensor. An entry has no ``fill`` if this is more than 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float | None = None
    start: float | None = None
    stride: int = 1

    def entries(self, records: int) -> int:
        """Return how many of the first ``records`` records have an entry."""
        return -(-records // self.stride)

    @property
    def nbytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_record(self) -> int:
        """Bytes for each record, on average, rounded up."""
        return -(-self.nbytes // self.stride)

    @property
    def is_zero_at_first(self) -> bool:
        """Whether records hold zeros until something is written to them."""
        return not self.fill and not self.start

    def unwritten(self, low: int, high: int) -> Tensor:
        """Return the records ``[low, high)`` as they are before anything is written: ``[high - low, *shape]``."""
        records = torch.full((high - low, *self.shape), self.fill or 0.0, dtype=self.dtype)
        if low == 0 < high and self.start is not None:
            records[0] = self.start
        return records


def steps_of(records: int, every: int, start_step: int, strides: set[int], *, has_last: bool) -> dict[str, Tensor]:
    """Return the tensors that say which steps are recorded, and which of them are key frames, if there are any.

    Args:
        records: how many there are.
        every: how many steps apart.
        start_step: the step of record 0.
        strides: of all tensors; at most one is larger than 1.
        has_last: whether the last record was added to the key frames.
    """
    steps = start_step + torch.arange(records) * every
    found = {"recorded_steps": steps}
    for stride in strides - {1}:
        frames = steps[::stride].contiguous()
        found[KEYFRAME_STEPS] = torch.cat([frames, steps[-1:]]) if has_last else frames
    return found
