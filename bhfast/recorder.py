"""Recorder: what an optimizer does to chosen parameters, bit for bit at every step, without changing the loop."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import BhfastError, ConfigError, StorageError
from bhfast.trace import TraceWriter, format_bytes

FIELDS = ("param", "grad", "exp_avg", "exp_avg_sq")
KEYS = {
    "param": "{name}",
    "grad": "{name}.grad",
    "exp_avg": "{name}.exp_avg",
    "exp_avg_sq": "{name}.exp_avg_sq",
}


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
        self._step = 0
        self._row: int | None = 0  # the record that log() writes to; None: the last step is not recorded
        self._complete = 0  # records that are whole
        self._overwrite = overwrite
        self._sources = [
            (field, keys[field].format(name=name), name, param) for name, param in params.items() for field in fields
        ]
        names = [key for _, key, _, _ in self._sources]
        self._reserved = {*names, "recorded_steps"}
        if twice := {key for key in names if names.count(key) > 1}:
            raise ConfigError(f"keys must give every tensor a name of its own, got {', '.join(sorted(twice))} twice")

    # -----------------------------------------------------------------------------------------------------------------
    # Life

    def __enter__(self) -> Recorder:
        shapes = {key: (param.shape, param.dtype) for _, key, _, param in self._sources}
        size = self.records * sum(shape.numel() * dtype.itemsize for shape, dtype in shapes.values())
        if size > (available := available_memory()):
            raise StorageError(
                f"memory is too small for the recording: {format_bytes(size)} wanted, {format_bytes(available)} "
                "available; record less with --record-every or --steps"
            )
        with ExitStack() as stack:
            self._writer = stack.enter_context(TraceWriter(self.path, overwrite=self._overwrite))
            self._writer.reserve(size)
            for key, (shape, dtype) in shapes.items():
                self.tensors[key] = _empty((self.records, *shape), dtype)
            self.tensors["recorded_steps"] = torch.zeros(self.records, dtype=torch.int64)
            for field, key, _, param in self._sources:
                self.tensors[key][0] = param.detach() if field == "param" else 0
            self._complete = 1
            stack.callback(self.optimizer.register_step_pre_hook(self._before_step).remove)
            stack.callback(self.optimizer.register_step_post_hook(self._after_step).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            tensors = {key: tensor[: self._complete] for key, tensor in self.tensors.items()}
            self.saved_steps = int(tensors["recorded_steps"][-1])
            if self._complete < self.records and self.path.exists():
                self.path = self.path.with_name(f"{self.path.stem}.cut-at-{self.saved_steps}{self.path.suffix}")
            self._writer.commit({**tensors, **self.constants}, self.metadata, path=self.path)

    @property
    def description(self) -> str:
        """Where the recording is kept and goes, for people."""
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        return f"memory, {format_bytes(size)} for {self.records:,} records -> {self.path}"

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise BhfastError(
                "the recorder cannot follow optimizer.step(closure): the closure makes new gradients after they were "
                "recorded; call backward() first, then optimizer.step()"
            )
        if self._step == self._steps:
            raise BhfastError(f"the recorder was opened for {self._steps} steps; open it with a larger steps=")
        self._step += 1
        self._row = None
        if self._step % self.every:
            return
        self._row = self._step // self.every
        for field, key, name, param in self._sources:
            if field == "grad":
                if param.grad is None:
                    raise BhfastError(f"parameter {name} has no gradient at step {self._step}; call backward() first")
                self.tensors[key][self._row] = param.grad

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._row is None:
            return
        for field, key, name, param in self._sources:
            if field == "param":
                self.tensors[key][self._row] = param.detach()
            elif field != "grad":
                state = optimizer.state[param]
                if field not in state:
                    raise BhfastError(
                        f"{type(optimizer).__name__} keeps no {field} for parameter {name}; leave it out of fields="
                    )
                self.tensors[key][self._row] = state[field]
        self.tensors["recorded_steps"][self._row] = self._step
        self._complete = self._row + 1

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
        for name, value in values.items():
            if name not in self.tensors:
                self._add(name, value)
            elif name in self._reserved:
                raise ConfigError(f"log({name}=...) must have a name of its own, but {name} is recorded already")
            elif value.shape != self.tensors[name].shape[1:]:
                wanted, got = list(self.tensors[name].shape[1:]), list(value.shape)
                raise ConfigError(f"log({name}=...) must have one shape throughout: wanted {wanted}, got {got}")
            self.tensors[name][self._row] = value.detach()

    def _add(self, name: str, value: Tensor) -> None:
        fill = float("nan") if value.is_floating_point() else 0
        self.tensors[name] = torch.full((self.records, *value.shape), fill, dtype=value.dtype)
        self._writer.reserve(sum(tensor.nbytes for tensor in self.tensors.values()))


class NullRecorder:
    """Stands in for a Recorder where nothing is recorded."""

    path = None
    saved_steps = 0
    description = "nothing is recorded"

    def __init__(self) -> None:
        self.constants: dict[str, Tensor] = {}

    def __enter__(self) -> NullRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, **values: Tensor) -> None:
        pass


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate without touching. Through numpy, which asks for huge pages: fewer page faults while the run fills it."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.empty(count * dtype.itemsize, dtype=np.uint8)).view(dtype).view(*shape)


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
