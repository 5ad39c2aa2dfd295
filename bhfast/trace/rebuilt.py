"""States between key frames, rebuilt from the gradients when they are read.

A compact trace holds every gradient, but parameters and moments at key frames only. Adam is specified to the bit, so
each state in between follows from the key frame before it. Rebuilding starts at that key frame, or at a state that was
rebuilt a moment ago, and only for the rows asked for. It goes on to the next key frame, which must have the same bits:
a damaged gradient, or a parameter that was changed behind the recorder's back, raises an error.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
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
from bhfast.transfer.host_memory import host_tensor

BLOCK_BYTES = 4 << 20  # of the states that the cache keeps or drops together
CACHE_BYTES = 32 << 20  # of such blocks, from which on old ones make room for new ones
HUGE_PAGE = 2 << 20  # bytes
SHARED_BYTES = CACHE_BYTES // 2  # of the states of a read that keeps those of all three tensors


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

    @cached_property
    def _unknown(self) -> list[int]:
        return (~self._is_known).nonzero()[:, 0].tolist()

    def _known_until(self, start: int, stop: int) -> int:
        """Return the first record from ``start`` on that does not follow from the one before it, at most ``stop``."""
        at = bisect_left(self._unknown, start)
        return min([stop, *self._unknown[at : at + 1]])

    def _require_known(self, start: int, stop: int) -> None:
        """Raise TraceError unless the records from ``start`` to ``stop`` follow from those before them."""
        if self._known_until(start, stop) == stop:
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
        if len(runs) == 1 and len(records) * self._state_bytes(low, high) <= SHARED_BYTES:
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
        """Return one record, ``[...]``; soon if it is in the block read last. Raises as :meth:`read_checked`."""
        name, start, states = self._cache.latest
        if name != self._name or not 0 <= record - start < len(states[field]):
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
        if self._known_until(at + 1, end) < end:
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

    def _state_bytes(self, low: int, high: int) -> int:
        """Return the bytes of parameter and moments of some rows."""
        return max(1, len(STATE) * self._row_bytes * (high - low))

    def _block_length(self, low: int, high: int) -> int:
        """Return how many records of some rows make a block."""
        return max(1, BLOCK_BYTES // self._state_bytes(low, high))

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

    def _block(self, record: int, low: int, high: int) -> tuple[int, Sequence[Tensor]]:
        """Return the first record of the block that has ``record``, and its states: ``[n, rows, ...]`` each."""
        start = self._block_start(record, low, high)
        states = self._cache.get((self._name, start, low, high))
        if states is None or record - start >= len(states[0]):
            states = self._rebuild_blocks(record, start, low, high)
        if high - low == self._row_count:
            self._cache.latest = self._name, start, states
        return start, states

    def _rebuild_blocks(self, record: int, start: int, low: int, high: int) -> Sequence[Tensor]:
        """Rebuild the block that starts at ``start`` and has ``record``, and return its states.

        The proof needs all steps up to the next key frame, so the first time the blocks on the way are kept as well.
        """
        frame, length = self._frame_of(record), self._block_length(low, high)
        first, end = self._starts[frame], self._end_of(frame)
        known = self._known_until(first + 1, end)
        if record >= known:
            self._require_known(known, record + 1)
        is_proven = frame in self._proven and bool(self._proven[frame][low:high].all())
        count = max(1, SHARED_BYTES // (length * self._state_bytes(low, high)))
        if is_proven or frame + 1 == len(self._starts):
            count = 1
        before = self._cache.get((self._name, start - length, low, high)) if start > first else None
        state = self._keyframe(frame, low, high) if before is None else [own[-1].clone() for own in before]
        at = first if before is None else start - 1
        blocks: list[tuple[Any, Tensor, Sequence[Tensor]]] = []
        for begin in range(start, min(start + count * length, known), length):
            stop = min(begin + length, known)
            shape = (len(STATE), min(length, end - first), *state[0].shape)
            memory = self._cache.memory(shape, state[0].dtype)
            states = memory[:, : stop - begin].unbind()
            at = self._replay(state, at, begin, stop, low, high, states)
            blocks.append(((self._name, begin, low, high), memory, states))
        self._prove(frame, state, at, low, high)
        for block in blocks:
            self._cache.put(*block)
        return blocks[0][-1]


class _Cache(threading.local):
    """The states that were rebuilt last, all of one file. Each thread has its own.

    It has blocks of records, and a cursor: the state at which the last long read ended.

    Attributes:
        latest: the block of whole records that was read last: its parameter, first record, and states.
    """

    def __init__(self) -> None:
        self.latest: tuple[str | None, int, Sequence[Tensor]] = (None, 0, ())
        self._blocks: OrderedDict[Any, tuple[Tensor, Sequence[Tensor]]] = OrderedDict()
        self._size = 0
        self._cursor: tuple[Any, int, list[Tensor]] | None = None

    def get(self, key: Any) -> Sequence[Tensor] | None:
        """Return the states of a block, ``[n, ...]`` each; they are valid until :meth:`memory` is called."""
        if (found := self._blocks.get(key)) is None:
            return None
        self._blocks.move_to_end(key)
        return found[1]

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory for a block: that of an old one, which is dropped, if it fits, as new pages are dear."""
        self.latest = (None, 0, ())
        size = math.prod(shape) * dtype.itemsize
        while self._size > CACHE_BYTES - size and self._blocks:
            _, (old, _) = self._blocks.popitem(last=False)
            self._size -= old.nbytes
            if old.shape == shape and old.dtype == dtype:
                return old
        return host_tensor(shape, dtype) if size >= HUGE_PAGE else torch.empty(shape, dtype=dtype)

    def put(self, key: Any, memory: Tensor, states: Sequence[Tensor]) -> None:
        """Keep a block, and the memory that it lies in."""
        if key in self._blocks:
            self._size -= self._blocks.pop(key)[0].nbytes
        self._blocks[key] = memory, states
        self._size += memory.nbytes

    def take_cursor(self, key: Any) -> tuple[int, list[Tensor]]:
        """Return the record of the cursor and its state, which the caller may change; -1 if it is not of ``key``."""
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
