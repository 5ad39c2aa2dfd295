"""States between key frames, rebuilt from the gradients when they are read.

A compact trace holds every gradient, but parameters and moments at key frames only. Adam is specified to the bit, so
each state in between follows from the key frame before it. Rebuilding starts at that key frame, or at a state that was
rebuilt a moment ago, and only for the rows asked for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import DamageError, TraceError
from bhfast.ops import torch_adam
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES
from bhfast.trace.lazy import LazyTensor
from bhfast.trace.reader import Trace
from bhfast.trace.tensors import TraceTensor
from bhfast.trace.updates import STATE, Updates, why_unknown

BLOCK_BYTES = 4 << 20  # of states that are rebuilt together when few are asked for
CACHE_BYTES = 32 << 20  # of such blocks that are kept


class KeyframedParam:
    """The states of a parameter at all steps.

    Args:
        trace: one file.
        name: of the parameter.
        cache: of the file.

    Attributes:
        records: which records the key frames are, int64 ``[F]``.

    Raises:
        DamageError: the tensors do not fit together.
    """

    def __init__(self, trace: Trace, name: str, cache: _Blocks) -> None:
        self._trace = trace
        self._name = name
        self._cache = cache
        keys = trace.optimizer["params"][name]["keys"]
        self._grads = trace[keys["grad"]].as_subclass(Tensor)
        self._frames = [trace[f"{keys[field]}{KEYFRAMES}"].as_subclass(Tensor) for field in STATE]
        steps, frame_steps = trace.steps.as_subclass(Tensor), trace[KEYFRAME_STEPS].as_subclass(Tensor)
        self.records = frame_steps - steps[0] if len(steps) else frame_steps
        self._starts: list[int] = self.records.tolist()
        shapes = {tuple(x.shape[1:]) for x in (self._grads, *self._frames)}
        lengths = {len(x) for x in (self.records, *self._frames)}
        is_rising = not self._starts or (self._starts[0] == 0 and bool((self.records.diff() > 0).all()))
        if len(shapes) > 1 or len(lengths) > 1 or not is_rising or len(self._grads) != len(steps):
            raise DamageError(f"{trace.path} is corrupted: the key frames of {name} do not fit its gradients")
        self._size = max(1, math.prod(self._grads.shape[1:]))
        self._updates: Updates | None = None

    def tensors(self) -> dict[str, RebuiltTensor]:
        """Return param, exp_avg and exp_avg_sq of all records, by their names."""
        keys = self._trace.optimizer["params"][self._name]["keys"]
        shape = self._grads.shape
        return {keys[field]: RebuiltTensor(self, i, shape, self._frames[i].dtype) for i, field in enumerate(STATE)}

    @property
    def updates(self) -> Updates:
        """What the steps did.

        Raises:
            TraceError: that is not known.
        """
        if self._updates is None:
            reason = why_unknown(self._trace, self._trace.logged)
            if reason and "known" not in self._trace.optimizer:
                raise self._unknown(reason)
            self._updates = Updates(self._trace, self._trace.logged, self._name)
        return self._updates

    def _unknown(self, reason: object) -> TraceError:
        return TraceError(
            f"{self._trace.path}: {self._name} is known at its {len(self._starts)} key frames only, see "
            f"{KEYFRAME_STEPS}; between them it cannot be rebuilt: {reason}"
        )

    def _require_known(self, start: int, stop: int) -> None:
        """Raise TraceError unless the records from ``start`` to ``stop`` follow from those before them."""
        is_known = self.updates.is_known[start:stop]
        if len(is_known) < stop - start or not is_known.all():
            reason = self._trace.optimizer.get("reason")
            if not self.updates.has_one_factor[start:stop].all():
                reason = "between backward and step, gradients were changed by something other than one common factor"
            raise self._unknown(reason)

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    def read(self, field: int, records: Sequence[int], low: int, high: int) -> Tensor:
        """Return rows ``low`` to ``high`` of some records: ``[n, high - low, ...]``; of scalars ``[n]``.

        Args:
            field: 0 for param, 1 for exp_avg, 2 for exp_avg_sq.
            records: increasing.
        """
        if self._grads.dim() > 1 and not self._rows_are_independent and (low, high) != (0, self._grads.shape[1]):
            return self.read(field, records, 0, self._grads.shape[1])[:, low:high]
        shape = self._grads[:0, low:high].shape[1:] if self._grads.dim() > 1 else ()
        found = torch.empty((len(records), *shape), dtype=self._grads.dtype)
        if not found.numel():
            return found
        runs = _runs(records)
        if len(runs) == 1 and len(records) <= self._block_length(low, high):
            self._read_cached(field, records[0], low, high, found)
            return found
        state, at = None, -1
        done = 0
        for start, stop in runs:
            while start < stop:
                frame = self._frame_of(start)
                end = min(stop, self._end_of(frame))
                if state is None or at < self._starts[frame]:
                    state, at = self._keyframe(frame, low, high), self._starts[frame]
                target = found[done : done + end - start]
                outputs: list[Tensor | None] = [None] * len(STATE)
                outputs[field] = target
                at = self._replay(state, at, start, end, low, high, outputs)
                done += end - start
                start = end
        return found

    @property
    def _rows_are_independent(self) -> bool:
        return self.updates.rounding != torch_adam.FUSED

    def _frame_of(self, record: int) -> int:
        return int(torch.searchsorted(self.records, record, right=True)) - 1

    def _end_of(self, frame: int) -> int:
        """Return the record of the next key frame, or the number of records."""
        return self._starts[frame + 1] if frame + 1 < len(self._starts) else len(self._grads)

    def _rows(self, tensor: Any, low: int, high: int) -> Any:
        if isinstance(tensor, LazyTensor):
            return tensor.rows(low, high)
        return tensor[:, low:high] if tensor.dim() > 1 else tensor

    def _keyframe(self, frame: int, low: int, high: int) -> list[Tensor]:
        return [self._rows(own, low, high)[frame].clone() for own in self._frames]

    def _replay(
        self, state: list[Tensor], at: int, start: int, end: int, low: int, high: int, outputs: Sequence[Tensor | None]
    ) -> int:
        """Advance ``state`` from record ``at`` to ``end - 1``, and put the records from ``start`` on into ``outputs``.

        Returns:
            The record that the state is of now.
        """
        if start == at:
            for value, output in zip(state, outputs, strict=True):
                if output is not None:
                    output[0] = value
            start += 1
            outputs = [output if output is None else output[1:] for output in outputs]
        if end - 1 > at:
            self._require_known(at + 1, end)
            grads = self._rows(self._grads, low, high)[at + 1 : end]
            self.updates.advance(state, grads, slice(at + 1, end), outputs, max(0, start - at - 1))
        return max(at, end - 1)

    def rebuilt_frame(self, frame: int) -> list[Tensor]:
        """Return what key frame ``frame`` must be, from the one before it: param, exp_avg, exp_avg_sq."""
        rows = self._grads.shape[1] if self._grads.dim() > 1 else 1
        state, end = self._keyframe(frame - 1, 0, rows), self._starts[frame] + 1
        self._replay(state, self._starts[frame - 1], end, end, 0, rows, [None] * len(STATE))
        return state

    # -----------------------------------------------------------------------------------------------------------------
    # The cache

    def _block_length(self, low: int, high: int) -> int:
        """Return how many records of some rows are rebuilt together."""
        rows = max(1, self._grads.shape[1]) if self._grads.dim() > 1 else 1
        size = len(STATE) * self._grads.itemsize * self._size * (high - low) // rows
        return max(1, BLOCK_BYTES // max(1, size))

    def _read_cached(self, field: int, record: int, low: int, high: int, found: Tensor) -> None:
        """Fill ``found`` with the records from ``record`` on."""
        done = 0
        while done < len(found):
            start, states = self._block(record + done, low, high)
            part = states[field][record + done - start :][: len(found) - done]
            found[done : done + len(part)] = part
            done += len(part)

    def _block(self, record: int, low: int, high: int) -> tuple[int, list[Tensor]]:
        """Return the first record of the block that has ``record``, and its states: ``[n, rows, ...]`` each."""
        frame, length = self._frame_of(record), self._block_length(low, high)
        first = self._starts[frame]
        start = record - (record - first) % length
        end = min(start + length, self._end_of(frame))
        found = self._cache.get((self._name, start, low, high))
        if found is None:
            before = self._cache.get((self._name, start - length, low, high)) if start > first else None
            state = self._keyframe(frame, low, high) if before is None else [own[-1].clone() for own in before]
            found = [torch.empty(end - start, *own.shape, dtype=own.dtype) for own in state]
            self._replay(state, first if before is None else start - 1, start, end, low, high, found)
            self._cache.put((self._name, start, low, high), found)
        return start, found


class _Blocks:
    """The blocks of states that were rebuilt last, all of one file."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[Any, list[Tensor]] = OrderedDict()
        self._size = 0

    def get(self, key: Any) -> list[Tensor] | None:
        if key in self._blocks:
            self._blocks.move_to_end(key)
        return self._blocks.get(key)

    def put(self, key: Any, states: list[Tensor]) -> None:
        self._blocks[key] = states
        self._size += sum(own.nbytes for own in states)
        while self._size > CACHE_BYTES and len(self._blocks) > 1:
            _, old = self._blocks.popitem(last=False)
            self._size -= sum(own.nbytes for own in old)


class RebuiltTensor(LazyTensor):
    """A tensor of every step that the file holds at key frames only. Indexing it rebuilds what the index touches.

    Args:
        param: the parameter that it is of.
        field: see :meth:`KeyframedParam.read`.
        shape, dtype: of all records.
    """

    kind = "rebuilt"

    def __init__(self, param: KeyframedParam, field: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._param = param
        self._field = field

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        records, inverse = _records(steps, len(self))
        found = self._param.read(self._field, records, low, max(low, high))
        return (found if inverse is None else found[inverse]).as_subclass(TraceTensor)

    def first(self, records: int) -> RebuiltTensor:
        return RebuiltTensor(self._param, self._field, (records, *self.shape[1:]), self.dtype)


def _records(steps: slice | Tensor, length: int) -> tuple[Sequence[int], Tensor | None]:
    """Return records in increasing order, each once, and which of them an index along axis 0 wants at each place."""
    if isinstance(steps, slice):
        records = range(*steps.indices(length))
        if records.step < 0:
            raise ValueError("step must be greater than zero")
        return records, None
    wanted = torch.arange(length)[steps]  # counts from the end, takes a mask, raises IndexError
    unique, inverse = wanted.unique(return_inverse=True)
    return unique.tolist(), inverse


def _runs(records: Sequence[int]) -> list[tuple[int, int]]:
    """Return increasing records as ranges of consecutive ones."""
    runs: list[tuple[int, int]] = []
    for record in records:
        if runs and runs[-1][1] == record:
            runs[-1] = (runs[-1][0], record + 1)
        else:
            runs.append((record, record + 1))
    return runs


def keyframed_params(trace: Trace) -> Iterator[tuple[str, KeyframedParam]]:
    """Yield the parameters of a file that are recorded at key frames only, by name.

    Raises:
        DamageError: their tensors do not fit together.
    """
    params = trace.optimizer.get("params", {}) if "keyframes" in trace.metadata else {}
    cache = _Blocks()
    for name, described in params.items():
        if _is_keyframed(trace, described["keys"]):
            yield name, KeyframedParam(trace, name, cache)


def _is_keyframed(trace: Trace, keys: Mapping[str, str]) -> bool:
    return all(field in keys and f"{keys[field]}{KEYFRAMES}" in trace for field in STATE)
