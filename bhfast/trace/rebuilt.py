"""States between key frames, rebuilt from the gradients when they are read.

A compact trace holds every gradient, but parameters and moments at key frames only. Adam is specified to the bit, so
each state in between follows from the key frame before it. Rebuilding starts at that key frame, or at a state that was
rebuilt a moment ago, and only for the rows asked for. It goes on to the next key frame, which must have the same bits:
a damaged gradient, or a parameter that was changed behind the recorder's back, raises an error.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import MALFORMED, DamageError, TraceError
from bhfast.ops import torch_adam
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES
from bhfast.trace.lazy import LazyTensor, wanted_records
from bhfast.trace.reader import Trace
from bhfast.trace.tensors import TraceTensor
from bhfast.trace.updates import STATE, Updates, differing, why_none_known

BLOCK_BYTES = 2 << 20  # of states that are rebuilt together when few are asked for
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

    def __init__(self, trace: Trace, name: str, cache: _Cache) -> None:
        self._trace = trace
        self._name = name
        self._cache = cache
        keys = trace.optimizer["params"][name]["keys"]
        self._grads = trace[keys["grad"]].as_subclass(Tensor)
        self._frames = [trace[f"{keys[field]}{KEYFRAMES}"].as_subclass(Tensor) for field in STATE]
        steps, frame_steps = trace.steps.as_subclass(Tensor), trace[KEYFRAME_STEPS].as_subclass(Tensor)
        self.records = frame_steps - steps[0] if len(steps) else frame_steps
        self._starts: list[int] = self.records.tolist()
        kinds = {(x.dtype, tuple(x.shape[1:])) for x in (self._grads, *self._frames)}
        lengths = {len(x) for x in (self.records, *self._frames)}
        is_rising = not self._starts or (self._starts[0] == 0 and bool((self.records.diff() > 0).all()))
        if len(kinds) > 1 or len(lengths) > 1 or not is_rising or len(self._grads) != len(steps):
            raise DamageError(f"{trace.path} is corrupted: the key frames of {name} do not fit its gradients")
        self._row_count = self._grads.shape[1] if self._grads.dim() > 1 else 1
        self._row_bytes = self._grads.itemsize * math.prod(self._grads.shape[2:])
        self._proven: dict[int, Tensor] = {}  # for each key frame, up to which rows lead to the next one: bool [rows]

    def tensors(self) -> dict[str, RebuiltTensor]:
        """Return param, exp_avg and exp_avg_sq of all records, by their names."""
        keys = self._trace.optimizer["params"][self._name]["keys"]
        shape = self._grads.shape
        return {keys[field]: RebuiltTensor(self, i, shape, self._frames[i].dtype) for i, field in enumerate(STATE)}

    @cached_property
    def _updates(self) -> Updates:
        return Updates(self._trace, self._trace.logged, self._name)

    @cached_property
    def _why_none_known(self) -> str | None:
        return why_none_known(self._trace, self._trace.logged)

    @cached_property
    def _is_known(self) -> Tensor:
        """Which records follow from those before them: bool ``[R]``."""
        found = torch.zeros(len(self._grads), dtype=torch.bool)
        if self._why_none_known is None:
            known = self._updates.is_known
            found[: len(known)] = known[: len(found)]
        return found

    def _require_known(self, start: int, stop: int) -> None:
        """Raise TraceError unless the records from ``start`` to ``stop`` follow from those before them."""
        if self._is_known[start:stop].all():
            return
        optimizer = self._trace.optimizer
        reason = self._why_none_known or optimizer["reason"]
        if self._why_none_known is None and not self._updates.has_one_factor[start:stop].all():
            reason = "between backward and step, gradients were changed by something other than one common factor"
        raise TraceError(
            f"{self._trace.path}: steps {self._step_of(start)} to {self._step_of(stop - 1)} of {self._name} cannot be "
            f"rebuilt: {reason}; its key frames can be read, see {KEYFRAME_STEPS}"
        )

    def _step_of(self, record: int) -> int:
        return int(self._trace.steps[record])

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    def read_checked(self, field: int, records: Sequence[int], low: int, high: int) -> Tensor:
        """Do the same as :meth:`read`.

        Raises:
            TraceError: the records cannot be rebuilt.
            DamageError: the description of the optimizer does not fit the tensors.
        """
        try:
            return self.read(field, records, low, high)
        except TraceError:
            raise
        except MALFORMED as error:
            raise DamageError(
                f"{self._trace.path} is corrupted: its description of the optimizer does not fit {self._name} ({error})"
            ) from None

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
        at, state = self._cache.take_cursor((self._name, low, high))
        done = 0
        for frame, grouped in groupby(self._parts(runs), key=lambda part: part[0]):
            parts = [*grouped]
            if not self._starts[frame] <= at <= parts[0][1]:
                at, state = self._starts[frame], self._keyframe(frame, low, high)
            for _, start, end in parts:
                outputs: list[Tensor | None] = [None] * len(STATE)
                outputs[field] = found[done : done + end - start]
                at = self._replay(state, at, start, end, low, high, outputs)
                done += end - start
            self._prove(frame, state, at, low, high)
        self._cache.put_cursor((self._name, low, high), at, state)
        return found

    def read_one(self, field: int, record: int) -> Tensor:
        """Return one record, ``[...]``; soon if its block was read a moment ago. Raises as :meth:`read_checked`."""
        start = self._block_start(record, 0, self._row_count)
        states = self._cache.get((self._name, start, 0, self._row_count))
        if states is None or record - start >= len(states[field]):
            return self.read_checked(field, [record], 0, self._row_count)[0]
        return states[field][record - start].clone()

    def _parts(self, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """Yield ranges of records, divided at key frames: the key frame before each part, its start, and its end."""
        for start, stop in runs:
            while start < stop:
                frame = self._frame_of(start)
                end = min(stop, self._end_of(frame))
                yield frame, start, end
                start = end

    @property
    def _rows_are_independent(self) -> bool:
        optimizer = self._trace.optimizer
        return torch_adam.FUSED not in (optimizer["arithmetic"], optimizer.get("known", {}).get("arithmetic"))

    def _frame_of(self, record: int) -> int:
        return bisect_right(self._starts, record) - 1

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
            self._updates.advance(state, grads, slice(at + 1, end), outputs, max(0, start - at - 1))
        return max(at, end - 1)

    def _prove(self, frame: int, state: list[Tensor], at: int, low: int, high: int) -> None:
        """Raise TraceError unless ``state``, rebuilt from key frame ``frame`` to record ``at``, leads to the next one.

        Where there is no next key frame, or the steps up to it are not known, nothing can be compared. The last key
        frame was written when the recording ended, so it is compared with the steps before it.
        """
        if at == self._starts[frame]:
            if frame and frame + 1 == len(self._starts):
                self._prove(frame - 1, self._keyframe(frame - 1, low, high), -1, low, high)
            return
        proven = self._proven.setdefault(frame, torch.zeros(self._row_count, dtype=torch.bool))
        if frame + 1 == len(self._starts) or proven[low:high].all():
            return
        at, end = max(at, self._starts[frame]), self._starts[frame + 1] + 1
        if not self._is_known[at + 1 : end].all():
            return
        state = [value.clone() for value in state]
        self._replay(state, at, end, end, low, high, [None] * len(STATE))
        if any(map(torch.any, map(differing, state, self._keyframe(frame + 1, low, high)))):
            first, last = (self._step_of(self._starts[i]) for i in (frame, frame + 1))
            raise TraceError(
                f"{self._trace.path}: steps {first + 1} to {last} do not lead from one key frame of {self._name} to "
                "the next, so nothing between them can be rebuilt: the file is damaged (bhfast verify says where), or "
                "something other than the optimizer's steps changed the parameter or its moments"
            )
        proven[low:high] = True

    def rebuilt_frame(self, frame: int) -> list[Tensor]:
        """Return what key frame ``frame`` must be, from the one before it: param, exp_avg, exp_avg_sq."""
        rows = self._row_count
        state, end = self._keyframe(frame - 1, 0, rows), self._starts[frame] + 1
        self._replay(state, self._starts[frame - 1], end, end, 0, rows, [None] * len(STATE))
        return state

    # -----------------------------------------------------------------------------------------------------------------
    # The cache

    def _block_length(self, low: int, high: int) -> int:
        """Return how many records of some rows are rebuilt together."""
        return max(1, BLOCK_BYTES // max(1, len(STATE) * self._row_bytes * (high - low)))

    def _read_cached(self, field: int, record: int, low: int, high: int, found: Tensor) -> None:
        """Fill ``found`` with the records from ``record`` on."""
        done = 0
        while done < len(found):
            at = record + done
            frame = self._frame_of(at)
            if at == self._starts[frame] and (done + 1 == len(found) or self._end_of(frame) == at + 1):
                part = self._keyframe(frame, low, high)[field][None]  # alone: the states after it are not asked for
                self._prove(frame, [], at, low, high)
            else:
                start, states = self._block(at, low, high)
                part = states[field][at - start :][: len(found) - done]
            found[done : done + len(part)] = part
            done += len(part)

    def _block_start(self, record: int, low: int, high: int) -> int:
        """Return the first record of the block that has ``record``."""
        return record - (record - self._starts[self._frame_of(record)]) % self._block_length(low, high)

    def _block(self, record: int, low: int, high: int) -> tuple[int, list[Tensor]]:
        """Return the first record of the block that has ``record``, and its states: ``[n, rows, ...]`` each."""
        frame, length = self._frame_of(record), self._block_length(low, high)
        first, start = self._starts[frame], self._block_start(record, low, high)
        end = min(start + length, self._end_of(frame))
        known = first + 1 + int(self._is_known[first + 1 : end].int().cumprod(0).sum())
        if record >= known:
            self._require_known(known, record + 1)
        end = min(end, known)
        found = self._cache.get((self._name, start, low, high))
        if found is None:
            before = self._cache.get((self._name, start - length, low, high)) if start > first else None
            state = self._keyframe(frame, low, high) if before is None else [own[-1].clone() for own in before]
            found = [torch.empty(end - start, *own.shape, dtype=own.dtype) for own in state]
            at = self._replay(state, first if before is None else start - 1, start, end, low, high, found)
            self._prove(frame, state, at, low, high)
            self._cache.put((self._name, start, low, high), found)
        return start, found


class _Cache:
    """The states that were rebuilt last, all of one file. Several threads may use it.

    It has blocks of records that were read one by one, and a cursor: the state at which the last long read ended.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[Any, list[Tensor]] = OrderedDict()
        self._size = 0
        self._cursor: tuple[Any, int, list[Tensor]] | None = None
        self._lock = threading.Lock()

    def get(self, key: Any) -> list[Tensor] | None:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
            return self._blocks.get(key)

    def put(self, key: Any, states: list[Tensor]) -> None:
        with self._lock:
            self._size -= sum(own.nbytes for own in self._blocks.pop(key, ()))
            self._blocks[key] = states
            self._size += sum(own.nbytes for own in states)
            while self._size > CACHE_BYTES and len(self._blocks) > 1:
                _, old = self._blocks.popitem(last=False)
                self._size -= sum(own.nbytes for own in old)

    def take_cursor(self, key: Any) -> tuple[int, list[Tensor]]:
        """Return the record of the cursor and its state, which the caller may change; -1 if it is not of ``key``."""
        with self._lock:
            cursor, self._cursor = self._cursor, None
        return (-1, []) if cursor is None or cursor[0] != key else cursor[1:]

    def put_cursor(self, key: Any, record: int, state: list[Tensor]) -> None:
        self._cursor = (key, record, state)

    def __reduce__(self) -> Any:
        return _Cache, ()  # a copy of a trace begins with none


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

    def __getitem__(self, index: Any) -> Tensor:
        if type(index) is int and -len(self) <= index < len(self):
            return self._param.read_one(self._field, index % len(self)).as_subclass(TraceTensor)
        return super().__getitem__(index)

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        records, inverse = wanted_records(steps, len(self)), None
        if not isinstance(records, range):
            increasing, inverse = torch.tensor(records, dtype=torch.int64).unique(return_inverse=True)
            records = increasing.tolist()
        found = self._param.read_checked(self._field, records, low, max(low, high))
        return (found if inverse is None else found[inverse]).as_subclass(TraceTensor)

    def first(self, records: int) -> RebuiltTensor:
        return RebuiltTensor(self._param, self._field, (records, *self.shape[1:]), self.dtype)


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
    cache = _Cache()
    for name, described in params.items():
        if _is_keyframed(trace, described["keys"]):
            yield name, KeyframedParam(trace, name, cache)


def _is_keyframed(trace: Trace, keys: Mapping[str, str]) -> bool:
    return all(field in keys and f"{keys[field]}{KEYFRAMES}" in trace for field in STATE)
