"""The tensors of a trace: views of a file, and tensors that several files share. Both read only what you index."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor


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

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Return a numpy view of the same bytes.

        For bfloat16 and float8 it has the dtype of that name from ``ml_dtypes`` if that is installed, else uint16 or
        uint8.
        """
        plain = self.as_subclass(Tensor)
        name = str(self.dtype).removeprefix("torch.")
        if name != "bfloat16" and not name.startswith("float8"):
            return plain.numpy(force=force)
        raw = plain.view(torch.uint16 if self.itemsize == 2 else torch.uint8).numpy(force=force)
        try:
            import ml_dtypes
        except ImportError:
            return raw
        return raw.view(getattr(ml_dtypes, name))


class ShardedTensor:
    """A tensor that several files share. Indexing it reads only the shards that the index touches.

    Indexing it like a tensor ``[R, ...]`` returns tensors. It cannot be computed with: operators and torch functions
    raise TypeError. Copying or saving it reads all of it.

    Args:
        parts: each with its offset in the whole tensor, axis 0 included.
        shape: the shape of the whole tensor, with at least two axes.

    Attributes:
        shape, dtype: those of the whole tensor.
    """

    __array_ufunc__ = None  # so that numpy leaves operators to this class
    __hash__ = object.__hash__

    def __init__(self, parts: Sequence[tuple[Tensor, Sequence[int]]], shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = parts[0][0].dtype
        self._parts = parts

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

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"ShardedTensor({list(self.shape)}, {self.dtype}, {len(self._parts)} parts)"

    # -----------------------------------------------------------------------------------------------------------------
    # What it reads

    def __getitem__(self, index: Any) -> Tensor:
        index = tuple(map(_simplified, index if isinstance(index, tuple) else (index,)))
        rest: list[Any]
        step, *rest = index or (slice(None),)
        is_several = isinstance(step, Tensor) and step.dim() == 1
        is_simple = type(step) is int or isinstance(step, slice) or is_several  # bool is an int, but not an index
        if any(x is Ellipsis or x is None for x in index) or not is_simple:
            return self._read(slice(None), 0, self.shape[1])[index]
        if is_several and not all(isinstance(x, int | slice) for x in rest):
            return self._read(slice(None), 0, self.shape[1])[index]  # pairs of indices
        if isinstance(step, int) and not -len(self) <= step < len(self):
            raise IndexError(f"index {step} is out of bounds for {len(self)} records")
        low, high = 0, self.shape[1]
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

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        """Return the rows from ``low`` to ``high`` of some steps."""
        whole: Tensor | None = None
        for part, (_, first, *columns) in self._parts:
            rows = part[:, max(low, first) - first : max(0, min(high, first + part.shape[1]) - first)][steps]
            if whole is None:
                whole = torch.empty((len(rows), high - low, *self.shape[2:]), dtype=self.dtype)
            at = max(first - low, 0)
            target = whole[:, at : at + rows.shape[1]]
            for axis, start in enumerate(columns, start=2):
                target = target.narrow(axis, start, rows.shape[axis])
            target.copy_(rows)
        assert whole is not None
        return whole.as_subclass(TraceTensor)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[record] for record in range(len(self)))

    def first(self, records: int) -> ShardedTensor:
        """Return the first ``records`` records, without reading them."""
        return ShardedTensor([(part[:records], offset) for part, offset in self._parts], [records, *self.shape[1:]])

    def float(self) -> Tensor:
        """Read all of it as float32."""
        return self[:].float()

    def numpy(self) -> np.ndarray:
        """Read all of it as a numpy array; see :meth:`TraceTensor.numpy`."""
        return self[:].numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a sharded tensor cannot become an array without a copy")
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
        raise TypeError(f"{func.__name__} does not take a sharded tensor: index it first, tensor[...]")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a sharded tensor has no {name}: index it first, tensor[...].{name}")


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
    def refuse(self: ShardedTensor, *others: Any) -> NoReturn:
        raise TypeError(f"a sharded tensor has no {operator}: index it first, tensor[...]")

    return refuse


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
_OPERATORS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "bool", "int", "float", "complex", "index"),
    *("contains", "setitem"),
    *(prefix + name for name in _BINARY for prefix in ("", "r", "i")),
)
for _name in _OPERATORS:
    setattr(ShardedTensor, f"__{_name}__", _refusing(f"__{_name}__"))
