"""Recorder: what an optimizer does to chosen parameters, bit for bit at every step, without changing the loop."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from bhfast import _ops
from bhfast.errors import BhfastError, ConfigError, StorageError
from bhfast.ring import Ring, half_size, host_tensor, make_lane, populator
from bhfast.trace import TraceWriter, format_bytes

FIELDS = _ops.FIELDS
KEYS = {
    "param": "{name}",
    "grad": "{name}.grad",
    "exp_avg": "{name}.exp_avg",
    "exp_avg_sq": "{name}.exp_avg_sq",
}


@runtime_checkable
class RecordsItself(Protocol):
    """An optimizer that can record in the pass that updates, as :class:`bhfast.FusedAdam` does."""

    def record_into(self, rings: Mapping[Tensor, Mapping[str, Tensor]], step: Tensor, every: int) -> Callable[[], None]:
        """See :meth:`bhfast.FusedAdam.record_into`."""
        ...


class _Source(NamedTuple):
    field: str
    key: str  # of its tensor in the file
    name: str
    param: Tensor


class Recorder:
    """Records parameters, their gradients and their optimizer state into one preallocated buffer per tensor.

    It hooks into ``optimizer.step()``. Record k holds the gradient that step k was given, unclipped if the optimizer
    clips inside, and the parameter and moments after step k. Record 0 holds the parameters at the start, and zeros.
    On leaving the ``with`` block the records so far become a trace file, also if an exception ends the block::

        with Recorder(optimizer, {"wte": model.wte.weight}, steps=1000, path="run.safetensors") as recorder:
            for batch in batches:
                ...
                loss.backward()
                optimizer.step()
                recorder.log(loss=loss)

    Nothing is cached between steps: a parameter or gradient whose storage is replaced is read where it then is.
    :class:`bhfast.FusedAdam` writes the records in the same pass that updates the parameters; on a CUDA device they
    go through a ring (:mod:`bhfast.ring`), and the run waits only if that is full.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that keeps the ``fields`` asked for, stepped without a closure.
        params: parameters by the name they get in the file.
        steps: the number of steps the run will have.
        path: the trace file; grown under ``PATH.partial``.
        every: record each step that is a multiple of this, beside step 0.
        fields: a subset of ``("param", "grad", "exp_avg", "exp_avg_sq")``.
        keys: for each field the name of its tensor in the file, with ``{name}`` for the parameter's.
        metadata: strings for the file's ``__metadata__``.
        overwrite: whether an existing file, and a ``.partial`` left by an earlier run, may be replaced. A run
            that is cut short replaces no file all the same: it is saved beside it, as ``STEM.cut-at-STEP.safetensors``.

    Attributes:
        path: where the file is, once it is written.
        saved_steps: the last recorded step in it.
        constants: tensors of the whole run, to be written as they are; fill it at any time inside the block.

    Raises:
        ConfigError: an argument is out of range, or two tensors would get one name.
        StorageError: on entering, if memory or disk are too small, or the folder cannot be written to.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Mapping[str, Tensor],
        *,
        steps: int,
        path: str | os.PathLike[str],
        every: int = 1,
        fields: Sequence[str] = FIELDS,
        keys: Mapping[str, str] = KEYS,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        if steps < 1 or every < 1:
            raise ConfigError(f"steps and every must be at least 1, got {steps=}, {every=}")
        if unknown := set(fields) - set(FIELDS):
            raise ConfigError(f"fields must be among {', '.join(FIELDS)}, got {', '.join(sorted(unknown))}")
        if not params:
            raise ConfigError("params must name at least one parameter, got none")
        self.optimizer = optimizer
        self.every = every
        self.records = steps // every + 1
        self.metadata = dict(metadata or {})
        self.path = Path(path)
        self.tensors: dict[str, Tensor] = {}  # by their name in the file, [records, ...]
        self.constants: dict[str, Tensor] = {}
        self.saved_steps = 0
        self._steps = steps
        self._step = 0  # steps begun, or on their way
        self._step_tensor = torch.zeros((), dtype=torch.int64)  # the same, for the operations
        self._row: int | None = 0  # the record that log() writes to; None: the last step is not recorded
        self._complete = 0  # records that are whole
        self._overwrite = overwrite
        self._slots: dict[str, Tensor] = {}  # where the records are made: on the source's device, or in tensors itself
        self._rings: dict[tuple[torch.device, int], Ring] = {}  # by the size of a half
        self._fused: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)  # slots that the optimizer fills itself
        self._end_fused: Callable[[], None] = lambda: None
        self._by_hand: list[_Source] = []  # what of the step at hand it does not fill
        self._sources = [
            _Source(field, keys[field].format(name=name), name, param)
            for name, param in params.items()
            for field in fields
        ]
        names = [source.key for source in self._sources]
        self._reserved = {*names, "recorded_steps"}
        if twice := {key for key in names if names.count(key) > 1}:
            raise ConfigError(f"keys must give every tensor a name of its own, got {', '.join(sorted(twice))} twice")

    # -----------------------------------------------------------------------------------------------------------------
    # Life

    def __enter__(self) -> Recorder:
        size = self.records * sum(source.param.nbytes for source in self._sources)
        if size > (available := available_memory()):
            raise StorageError(
                f"memory is too small for the recording: {format_bytes(size)} wanted, {format_bytes(available)} "
                "available; record less with --record-every or --steps"
            )
        with ExitStack() as stack:
            self._stack = stack
            self._writer = stack.enter_context(TraceWriter(self.path, overwrite=self._overwrite))
            self._populator = populator()
            stack.callback(self._populator.close)
            self._writer.reserve(size)
            for source in self._sources:
                param = source.param
                self.tensors[source.key] = host_tensor((self.records, *param.shape), param.dtype)
                self.tensors[source.key][0] = param.detach() if source.field == "param" else 0
                self._slots[source.key] = self._make_slots(source.key, param.device)
            self.tensors["recorded_steps"] = torch.arange(self.records) * self.every
            self._complete = 1
            if isinstance(self.optimizer, RecordsItself):
                own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
                for source in self._sources:
                    if id(source.param) in own:
                        self._fused[source.param][source.field] = self._slots[source.key]
                self._record_fused()
                stack.callback(lambda: self._end_fused())
            stack.callback(self.optimizer.register_step_pre_hook(self._before_step).remove)
            stack.callback(self.optimizer.register_step_post_hook(self._after_step).remove)
            self._stack = stack.pop_all()
        return self

    def _make_slots(self, key: str, device: torch.device, blank: float | None = None) -> Tensor:
        """Return where the records of a tensor are made: in a ring on its device, or where they are kept."""
        record = sum(source.param.nbytes for source in self._sources if source.param.device == device)
        half = half_size(max(record, self.tensors[key][0].nbytes), self.records)
        if (device, half) not in self._rings:
            lane = make_lane(device)
            if lane is None:
                self._populator.add(self.tensors[key])
                return self.tensors[key]
            self._stack.callback(lane.close)
            self._rings[device, half] = Ring(lane, half, first=self._row or 0)
        return self._rings[device, half].add(self.tensors[key], device, blank)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            fault = self._drain()
            tensors = {key: tensor[: self._complete] for key, tensor in self.tensors.items()}
            self.saved_steps = int(tensors["recorded_steps"][-1])
            if self._complete < self.records and self.path.exists():
                self.path = self.path.with_name(f"{self.path.stem}.cut-at-{self.saved_steps}{self.path.suffix}")
            self._writer.commit({**tensors, **self.constants}, self.metadata, path=self.path)
        if fault is not None and error is None:
            raise fault

    def _drain(self) -> Exception | None:
        """Bring all records to the host; if the device failed, go back to those that are there and return its error."""
        fault = None
        for ring in self._rings.values():
            try:
                ring.drain(self._complete)
            except RuntimeError as error:
                fault = error
                self._complete = max(1, min(self._complete, ring.landed))
        return fault

    @property
    def description(self) -> str:
        """Where the recording is kept and goes, for people."""
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return f"memory, {format_bytes(size)} for {self.records:,} records -> {self.path}"

    @property
    def stalls(self) -> int:
        """How often the run had to wait for the recording; complete after the block."""
        return sum(ring.lane.waits for ring in self._rings.values())

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise BhfastError(
                "the recorder cannot follow optimizer.step(closure): the closure makes new gradients after they were "
                "recorded; call backward() first, then optimizer.step()"
            )
        self.begin(1)
        if self._row is None:
            return
        self._by_hand = []
        for source in self._sources:
            grad = source.param.grad
            if source.param in self._fused and grad is not None:
                continue
            self._by_hand.append(source)
            if source.field == "grad":
                if grad is None:
                    raise BhfastError(
                        f"parameter {source.name} has no gradient at step {self._step}; call backward() first"
                    )
                self._write(source.key, grad)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._row is None:
            return
        for source in self._by_hand:
            if source.field == "param":
                self._write(source.key, source.param.detach())
            elif source.field != "grad":
                state = optimizer.state[source.param]
                if source.field not in state:
                    raise BhfastError(
                        f"{type(optimizer).__name__} keeps no {source.field} for parameter {source.name}; "
                        "leave it out of fields="
                    )
                self._write(source.key, state[source.field])
        self.end()

    def _write(self, key: str, value: Tensor) -> None:
        slots = self._slots[key]
        slots[self._step // self.every % len(slots)] = value

    def begin(self, most: int) -> int:
        """Begin up to ``most`` further steps; return how many there is room for, at least one.

        The hooks call it, and :meth:`end`; so do engines whose steps are not the optimizer's.

        Raises:
            BhfastError: the recorder was opened for fewer steps.
        """
        if self._step + most > self._steps:
            raise BhfastError(f"the recorder was opened for {self._steps} steps; open it with a larger steps=")
        for ring in self._rings.values():
            if self._step // self.every + 1 == ring.room:
                ring.turn()
            most = min(most, ring.room * self.every - 1 - self._step)
        self._step += most
        self._step_tensor.fill_(self._step)
        self._row = None if self._step % self.every else self._step // self.every
        return most

    def end(self) -> None:
        """Say that the steps begun are done, or on their way on the device."""
        self._complete = self._step // self.every + 1

    @contextmanager
    def counted_by(self, step: Tensor) -> Iterator[None]:
        """Inside the block, what the optimizer and :meth:`log` record goes by a counter on a device.

        So a CUDA graph captured there records step after step, whoever replays it between :meth:`begin` and
        :meth:`end`.

        Args:
            step: int64 scalar, which the graph itself counts up before each step.
        """
        own = self._step_tensor, self._row
        self._step_tensor, self._row = step, 0
        self._record_fused()
        try:
            yield
        finally:
            self._step_tensor, self._row = own
            self._record_fused()

    def _record_fused(self) -> None:
        if isinstance(self.optimizer, RecordsItself):
            self._end_fused()
            self._end_fused = self.optimizer.record_into(self._fused, self._step_tensor, self.every)

    def log(self, **values: Tensor) -> None:
        """Record more values with the last step, or with record 0 before the first; nothing if it is not recorded.

        Args:
            values: by the name they get in the file. The first one under a name fixes shape and dtype, and later ones
                are cast to that dtype. Records without one hold NaN, integers 0.

        Raises:
            ConfigError: a parameter's tensor has that name, or the shape has changed.
        """
        if self._row is None:
            return
        # Those with rings of one size together.
        records: dict[tuple[torch.device, int], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, value in values.items():
            if name not in self.tensors:
                self._add(name, value)
            elif name in self._reserved:
                raise ConfigError(f"log({name}=...) must have a name of its own, but {name} is recorded already")
            elif value.shape != self.tensors[name].shape[1:]:
                wanted, got = list(self.tensors[name].shape[1:]), list(value.shape)
                raise ConfigError(f"log({name}=...) must have one shape throughout: wanted {wanted}, got {got}")
            elif value.device.type == "cuda" and self._slots[name].device.type != "cuda":
                self._slots[name] = self._make_slots(name, value.device, _blank(value.dtype))
            slots = self._slots[name]
            sources, rings = records[slots.device, len(slots)]
            sources.append(value.detach().to(slots.device, slots.dtype))
            rings.append(slots)
        for sources, rings in records.values():
            _ops.record_(sources, rings, self._step_tensor, self.every)

    def _add(self, name: str, value: Tensor) -> None:
        tensor = host_tensor((self.records, *value.shape), value.dtype)
        self.tensors[name] = tensor.fill_(_blank(value.dtype))
        self._writer.reserve(sum(tensor.nbytes for tensor in self.tensors.values()))
        self._slots[name] = self._make_slots(name, value.device, _blank(value.dtype))


def _blank(dtype: torch.dtype) -> float:
    """What records without a logged value hold."""
    return math.nan if dtype.is_floating_point else 0


class NullRecorder:
    """Stands in for a Recorder where nothing is recorded."""

    path = None
    saved_steps = 0
    stalls = 0
    description = "nothing is recorded"

    def __init__(self) -> None:
        self.constants: dict[str, Tensor] = {}

    def __enter__(self) -> NullRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, most: int) -> int:
        return most

    def end(self) -> None:
        pass

    @contextmanager
    def counted_by(self, step: Tensor) -> Iterator[None]:
        yield

    def log(self, **values: Tensor) -> None:
        pass


def available_memory() -> int:
    """Return how many bytes of memory this process may still take: the machine's, or its control group's if less."""
    limits = []
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(int((group / "memory.max").read_text()) - int(used["anon"]))
    except (OSError, KeyError, ValueError):
        pass  # no control group, or one without a limit ("max")
    return min(limits)
