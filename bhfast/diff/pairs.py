"""The tensors that two traces share, at the steps and rows that both recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace import Trace
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES

BLOCK = 1 << 18  # bytes of each trace that are read at once: what is computed of them fits into the cache
PER_RUN = ("bh_center", "token_counts")  # not per step, even if they happen to have as many entries as there are steps
ROWS = ".rows"  # ends the name of the tensor that says which rows of a parameter were recorded


@dataclass(frozen=True)
class Pair:
    """A tensor with an entry for each record, in two traces.

    Attributes:
        name: in both of them.
        tensors: those of A and B, ``[R, ...]``, each with its own R.
        records: which of their entries are of common steps: int64 ``[N]`` each.
        rows: which of their rows are common rows of the parameter, int64 ``[n]`` each; None for all.
        numbers: of the common rows in the parameter, int64 ``[n]``; None if all rows were recorded.
    """

    name: str
    tensors: tuple[Any, Any]
    records: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor] | None = None
    numbers: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is compared of each record."""
        _, *shape = self.tensors[0].shape
        return tuple(shape) if self.rows is None else (len(self.rows[0]), *shape[1:])

    def read(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of the common records, int64 ``[n]``, of A and B: contiguous, ``[n, ...]`` each."""
        return self._read(0, which), self._read(1, which)

    def _read(self, side: int, which: Tensor) -> Tensor:
        records = self.records[side][which]
        first, last = int(records[0]), int(records[-1])
        is_run = last - first + 1 == len(records)
        values = self.tensors[side][slice(first, last + 1) if is_run else records].as_subclass(Tensor)
        return (values if self.rows is None else values[:, self.rows[side]]).contiguous()

    def blocks(self, which: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield some of the common records in blocks: which they are, and as :meth:`read`."""
        each = max(1, BLOCK // max(1, math.prod(self.shape) * self.dtype.itemsize))
        for some in which.split(each) if len(which) else ():
            yield some, *self.read(some)

    def numbered(self, index: Sequence[int]) -> tuple[int, ...]:
        """Return the index of an element within a record, with the row's number in the parameter."""
        return tuple(index) if self.numbers is None else (int(self.numbers[index[0]]), *index[1:])


@dataclass(frozen=True)
class Pairs:
    """What two traces have in common, and what they have not.

    Attributes:
        steps: the common steps, int64 ``[N]``.
        only_steps: the steps that only A has, and only B; int64.
        by_step: the tensors with an entry for each record.
        once: names of the other tensors.
        only: names of the tensors that only A has, and only B.
        unlike: why a tensor of both cannot be compared, by name.
        rows: of each parameter that was recorded with other rows: how many rows A has, B has, and both have.
    """

    steps: Tensor
    only_steps: tuple[Tensor, Tensor]
    by_step: list[Pair] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    only: tuple[list[str], list[str]] = ([], [])
    unlike: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[int, int, int]] = field(default_factory=dict)


def pair(a: Trace, b: Trace) -> Pairs:
    """Match the tensors of two traces by name, their records by step, and their rows by number.

    Raises:
        TraceError: one of them has no increasing steps, or they have no step in common.
    """
    steps = _steps(a), _steps(b)
    shared = torch.isin(steps[0], steps[1]), torch.isin(steps[1], steps[0])
    records = shared[0].nonzero()[:, 0], shared[1].nonzero()[:, 0]
    if not len(records[0]):
        raise TraceError(f"{a.path} and {b.path} have no step in common, so there is nothing to compare")
    names = _names(a), _names(b)
    found = Pairs(
        steps=steps[0][records[0]],
        only_steps=(steps[0][~shared[0]], steps[1][~shared[1]]),
        only=([x for x in names[0] if x not in names[1]], [x for x in names[1] if x not in names[0]]),
    )
    for name in names[0]:
        if name in names[1]:
            _match(found, name, (a, b), records)
    return found


def _match(found: Pairs, name: str, traces: tuple[Trace, Trace], records: tuple[Tensor, Tensor]) -> None:
    """Add a tensor that both traces have."""
    one, other = tensors = traces[0][name], traces[1][name]
    by_step = all(_is_by_step(name, x, len(trace.steps)) for x, trace in zip(tensors, traces, strict=True))
    numbers = [_row_numbers(trace, name) for trace in traces] if by_step and one.dim() > 1 else [None, None]
    if one.dtype != other.dtype:
        found.unlike[name] = f"it is {_short(one.dtype)} in A, {_short(other.dtype)} in B"
    elif any(x is not None for x in numbers) and one.shape[2:] == other.shape[2:]:
        first, second = (
            torch.arange(x.shape[1]) if own is None else own for x, own in zip(tensors, numbers, strict=True)
        )
        common = first[torch.isin(first, second)]
        sizes = len(first), len(second), len(common)
        if torch.equal(first, second):
            found.by_step.append(Pair(name, tensors, records, None, first))
            return
        found.rows[name] = sizes
        if len(common):
            rows = [torch.argsort(own)[torch.searchsorted(own.sort().values, common)] for own in (first, second)]
            found.by_step.append(Pair(name, tensors, records, (rows[0], rows[1]), common))
    elif by_step and one.shape[1:] == other.shape[1:]:
        found.by_step.append(Pair(name, tensors, records))
    elif by_step or one.shape != other.shape:
        start = 1 if by_step else 0
        found.unlike[name] = f"its shape is {list(one.shape[start:])} in A, {list(other.shape[start:])} in B"
    else:
        found.once.append(name)


def _steps(trace: Trace) -> Tensor:
    if "recorded_steps" not in trace:
        raise TraceError(f"{trace.path} cannot be compared: it has no recorded_steps, so it is not a trace")
    steps = trace.steps.as_subclass(Tensor)
    if steps.dim() != 1 or steps.dtype != torch.int64 or bool((steps.diff() <= 0).any()):
        raise TraceError(f"{trace.path} cannot be compared: its recorded_steps must be increasing int64")
    return steps


def _names(trace: Trace) -> list[str]:
    """Return the names of all tensors to compare, without steps, rows, and key frames whose states can be rebuilt."""
    frames = {KEYFRAME_STEPS, *(name + KEYFRAMES for name in trace.rebuilt)} if trace.rebuilt else set()
    return [name for name in trace if name not in frames and name != "recorded_steps" and not name.endswith(ROWS)]


def _is_by_step(name: str, tensor: Any, records: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == records and name not in PER_RUN


def _row_numbers(trace: Trace, name: str) -> Tensor | None:
    """Return which rows of its parameter a tensor has, int64 ``[n]``; None for all."""
    for param, described in trace.optimizer.get("params", {}).items():
        if name in described["keys"].values() and param + ROWS in trace:
            return trace[param + ROWS].as_subclass(Tensor)
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
