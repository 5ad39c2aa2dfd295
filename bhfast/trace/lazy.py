"""Tensors of a trace that are not in memory as a whole: indexing one reads, or computes, what the index touches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor


def wanted_records(steps: slice | Tensor, length: int) -> Sequence[int]:
    """Return the records that an index along axis 0 wants, in its order.

    Args:
        steps: a slice, or a tensor as an index: it may count from the end, or be a mask.
        length: how many records there are.

    Raises:
        IndexError, ValueError: as torch does.
    """
    if not isinstance(steps, slice):
        return torch.arange(length)[steps].tolist()
    records = range(length)[steps]
    if records.step < 0:
        raise ValueError("step must be greater than zero")
    return records


class LazyTensor:
    """Stands for a tensor ``[R, ...]``. Indexing it like a tensor returns tensors.

    It cannot be computed with: operators and torch functions raise TypeError. Copying or saving it reads all of it.

    Args:
        shape, dtype: those of the whole tensor.

    Attributes:
        shape, dtype: see above.
        kind: what errors call it.
    """

    kind = "lazy"
    __array_ufunc__ = None  # so that numpy leaves operators to this class
    __hash__ = object.__hash__

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        """Return the rows from ``low`` to ``high`` of some records: ``[n, high - low, ...]``; of scalars ``[n]``.

        Args:
            steps: along axis 0, a slice or int64 ``[n]``.
        """
        raise NotImplementedError

    def first(self, records: int) -> LazyTensor:
        """Return the first ``records`` records, unread."""
        raise NotImplementedError

    def rows(self, low: int, high: int) -> LazyTensor:
        """Return the rows from ``low`` to ``high`` of all records, unread; records of scalars have no rows."""
        return self if self.dim() == 1 else _Rows(self, low, high)

    def matrices(self) -> LazyTensor:
        """Return all records as matrices ``[R, rows, values of a row]``, unread; a row of a vector has one value."""
        return _Matrices(self)

    # -----------------------------------------------------------------------------------------------------------------
    # What it is

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel() * self.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"

    # -----------------------------------------------------------------------------------------------------------------
    # What it reads

    def __getitem__(self, index: Any) -> Tensor:
        index = tuple(map(_simplified, index if isinstance(index, tuple) else (index,)))
        low, high = 0, self.shape[1] if self.dim() > 1 else 1
        rest: list[Any]
        step, *rest = index or (slice(None),)
        is_several = isinstance(step, Tensor) and step.dim() == 1
        is_simple = type(step) is int or isinstance(step, slice) or is_several  # bool is an int, but not an index
        if any(x is Ellipsis or x is None for x in index) or not is_simple or len(index) > self.dim():
            return self._read(slice(None), low, high)[index]
        if is_several and not all(isinstance(x, int | slice) for x in rest):
            return self._read(slice(None), low, high)[index]  # pairs of indices
        if isinstance(step, int) and not -len(self) <= step < len(self):
            raise IndexError(f"index {step} is out of bounds for {len(self)} records")
        if rest and isinstance(rest[0], int):
            if not -high <= rest[0] < high:
                raise IndexError(f"index {rest[0]} is out of bounds for axis 1, which has {high}")
            low = rest[0] % high
            high, rest[0] = low + 1, 0
        elif rest and isinstance(rest[0], slice) and rest[0].step in (None, 1):
            low, high, _ = rest[0].indices(high)
            rest[0] = slice(None)
        steps = slice(step, step + 1 or None) if isinstance(step, int) else step
        found = self._read(steps, low, max(low, high))
        return found[(0 if isinstance(step, int) else slice(None), *rest)]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[record] for record in range(len(self)))

    def float(self) -> Tensor:
        """Read all of it as float32."""
        return self[:].float()

    def numpy(self) -> np.ndarray:
        """Read all of it as a numpy array; see :meth:`bhfast.trace.TraceTensor.numpy`."""
        return self[:].numpy()

    def bits(self) -> np.ndarray:
        """Read the bits of all of it; see :meth:`bhfast.trace.TraceTensor.bits`."""
        return self[:].bits()  # type: ignore[attr-defined]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"a {self.kind} tensor cannot become an array without a copy")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = copied = self[:]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self[:].__reduce_ex__(protocol)

    # -----------------------------------------------------------------------------------------------------------------
    # What it refuses

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise TypeError(f"{func.__name__} does not take a {cls.kind} tensor: index it first, tensor[...]")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a {self.kind} tensor has no {name}: index it first, tensor[...].{name}")


class _Rows(LazyTensor):
    """Some rows of another lazy tensor."""

    def __init__(self, whole: LazyTensor, low: int, high: int) -> None:
        super().__init__((len(whole), high - low, *whole.shape[2:]), whole.dtype)
        self._whole = whole
        self._low = low

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        return self._whole._read(steps, self._low + low, self._low + high)


class _Matrices(LazyTensor):
    """The records of another lazy tensor, of two axes at least, as matrices."""

    def __init__(self, whole: LazyTensor) -> None:
        super().__init__((*whole.shape[:2], math.prod(whole.shape[2:])), whole.dtype)
        self._whole = whole

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        found = self._whole._read(steps, low, high)
        return found.reshape(len(found), high - low, self.shape[2])


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)  # uint8 is a mask


def _simplified(index: Any) -> Any:
    """Turn an index of one axis into an int, a slice or a tensor, if it is equivalent to one."""
    if isinstance(index, bool | slice):
        return index
    if isinstance(index, int | np.integer):
        return int(index)
    if isinstance(index, list | np.ndarray):
        index = torch.as_tensor(index) if len(index) else torch.empty(0, dtype=torch.int64)
    is_number = isinstance(index, Tensor) and index.dim() == 0 and index.dtype in _INTEGERS
    return int(index) if is_number else index


def _refusing(operator: str) -> Any:
    def refuse(self: LazyTensor, *others: Any) -> NoReturn:
        raise TypeError(f"a {self.kind} tensor has no {operator}: index it first, tensor[...]")

    return refuse


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "bool", "int", "float", "complex", "index"),
    *("contains", "setitem"),
    *(prefix + name for name in _BINARY for prefix in ("", "r", "i")),
)
for _name in _OPERATORS:
    setattr(LazyTensor, f"__{_name}__", _refusing(f"__{_name}__"))
