"""What of a parameter is recorded: one source for each of its fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.ops import checks
from bhfast.recording.shards import Piece, local

KEY = "{name}.{field}"  # of a tensor in the file; a parameter's own has its bare name


class Source(NamedTuple):
    """One field of a parameter.

    Attributes:
        field: ``param``, ``grad``, or a key of the optimizer's state.
        key: of its tensor in the file.
        name, param: of the parameter.
        rows: that are recorded of this process's part, int64; None for all.
        shape, dtype: of a record.
    """

    field: str
    key: str
    name: str
    param: Tensor
    rows: Tensor | None
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return self.shape.numel() * self.dtype.itemsize

    def rows_of(self, value: Tensor) -> Tensor:
        """Return what of ``value`` is recorded."""
        value = local(value.detach())
        return value if self.rows is None else value.index_select(0, self.rows)


def source_of(piece: Piece, field: str, key: str, optimizer: torch.optim.Optimizer) -> Source:
    """Describe one field of a parameter; its dtype is that of the optimizer's state, where there is one already.

    Args:
        piece: what this process records of the parameter.
        field: see :class:`Source`.
        key: with ``{name}`` and ``{field}`` to be filled in.
        optimizer: which has the state.
    """
    state = optimizer.state.get(piece.param, {})
    like = local(state[field]) if field in state else local(piece.param)
    shape = like.shape if piece.rows is None else torch.Size([len(piece.rows), *like.shape[1:]])
    key = key.format(name=piece.name, field=field)
    return Source(field, key, piece.name, piece.param, piece.rows, shape, like.dtype)


def default_fields(optimizer: torch.optim.Optimizer) -> Sequence[str]:
    """Return the fields to record where the user names none: those that Adam has, or SGD."""
    if not isinstance(optimizer, torch.optim.SGD):
        return checks.FIELDS
    has_momentum = any(group["momentum"] for group in optimizer.param_groups)
    return ("param", "grad", "momentum_buffer") if has_momentum else ("param", "grad")
