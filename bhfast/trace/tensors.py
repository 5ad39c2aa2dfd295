"""The tensors of a trace: views of a file, and tensors that several files share. Both read only what you index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.trace.lazy import LazyTensor

MAX_PRINTED = 1 << 20  # elements of a tensor whose values are printed


class TraceTensor(Tensor):
    """A tensor of a trace, or a slice of one: a view of the file. Operations on it return plain tensors.

    A copy (``copy.deepcopy``, ``pickle``, ``torch.save``) holds only the bytes of this view, not the whole file.
    Unpickling or loading gives a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(kind, Tensor) for kind in types):
            return NotImplemented  # the sharded tensor raises its own error
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(cls) if func is Tensor.__getitem__ else result

    def __format__(self, spec: str) -> str:
        return format(self.as_subclass(Tensor), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceTensor:
        copied = self.as_subclass(Tensor).clone().as_subclass(TraceTensor)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).clone().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        if self.numel() <= MAX_PRINTED:
            return super().__repr__()
        return f"TraceTensor({list(self.shape)}, {self.dtype})"  # torch would make a float32 copy of all of it

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Return the values: a numpy view of the same bytes, or, for bfloat16 and float8, a float32 copy.

        Numpy lacks those dtypes; :meth:`bits` returns a view for any.
        """
        plain = self.as_subclass(Tensor)
        return (plain.float() if _numpy_lacks(self.dtype) else plain).numpy(force=force)

    def bits(self) -> np.ndarray:
        """Return the bits: a numpy view of the same bytes as unsigned integers, uint16 for bfloat16."""
        return self.as_subclass(Tensor).view(_UNSIGNED[self.itemsize]).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False and _numpy_lacks(self.dtype):
            raise ValueError(f"a tensor of {self.dtype} cannot become an array without a copy; its bits() can")
        array = self.numpy()
        return np.array(array, dtype) if copy else np.asarray(array, dtype)


_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}  # by bytes


def _numpy_lacks(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 or str(dtype).startswith("torch.float8")


class ShardedTensor(LazyTensor):
    """A tensor that several files share. Indexing it reads only the shards that the index touches.

    Indexing it like a tensor ``[R, ...]`` returns tensors. It cannot be computed with: operators and torch functions
    raise TypeError. Copying or saving it reads all of it.

    Args:
        parts: each with its offset in the whole tensor, axis 0 included.
        shape: the shape of the whole tensor, with at least two axes.

    Attributes:
        shape: that of the whole tensor.
        dtype: of its values.
    """

    kind = "sharded"

    def __init__(self, parts: Sequence[tuple[Any, Sequence[int]]], shape: Sequence[int]) -> None:
        super().__init__(shape, parts[0][0].dtype)
        self._parts = parts

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        whole: Tensor | None = None
        for part, (_, first, *columns) in self._parts:
            rows = part[steps, max(low, first) - first : max(0, min(high, first + part.shape[1]) - first)]
            if whole is None:
                whole = torch.empty((len(rows), high - low, *self.shape[2:]), dtype=self.dtype)
            at = max(first - low, 0)
            target = whole[:, at : at + rows.shape[1]]
            for axis, start in enumerate(columns, start=2):
                target = target.narrow(axis, start, rows.shape[axis])
            target.copy_(rows)
        assert whole is not None
        return whole.as_subclass(TraceTensor)

    def __repr__(self) -> str:
        return f"ShardedTensor({list(self.shape)}, {self.dtype}, {len(self._parts)} parts)"

    def first(self, records: int) -> ShardedTensor:
        return ShardedTensor(
            [(first_records(part, records), offset) for part, offset in self._parts], [records, *self.shape[1:]]
        )


def first_records(part: Any, records: int) -> Any:
    """Return the first ``records`` records of any tensor of a trace, unread."""
    return part.first(records) if isinstance(part, LazyTensor) else part[:records]
