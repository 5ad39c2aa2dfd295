"""What is recorded: parameters, or rows of them, and of each parameter some fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bhfast.ops import checks
from bhfast.recording.protocols import RecordsItself
from bhfast.storage.base import RecordedTensor

NAMES = {"param": "{name}"}  # of a field's tensor in the file
STATE_NAME = "{name}.{field}"
NOT_RECORDED = ("step",)  # of an optimizer's state: a count that says nothing new


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class RecordedParam:
    """A parameter, and which part of it this process records.

    Attributes:
        name: under which it is recorded.
        param: the parameter; a DTensor if it is sharded over several processes.
        rows: indices along axis 0 of the local part, int64 ``[n]``; None for all of them.
        all_rows: indices along axis 0 of the whole parameter that the user asked for; None for all of them.
        shape: of a record of the whole, over all processes.
        offset: where in it this process's part starts.
    """

    name: str
    param: Tensor
    rows: Tensor | None
    all_rows: Tensor | None
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def is_shaped_like(self, value: Tensor) -> bool:
        """Whether ``value`` has an entry for each of the parameter's (in this process)."""
        return local(value).shape == local(self.param).shape

    def part_of(self, value: Tensor) -> Tensor:
        """Return what is recorded of a value: the chosen rows, where it has rows as the parameter does."""
        rows = self.rows_of(value)
        return local(value) if rows is None else local(value).index_select(0, rows)

    def rows_of(self, value: Tensor) -> Tensor | None:
        """Return the rows to record of a value; None for all of it."""
        value, param = local(value), local(self.param)
        has_rows = value.dim() == param.dim() and value.shape[:1] == param.shape[:1]
        return self.rows if has_rows else None

    def record_shape(self, value: Tensor) -> tuple[int, ...]:
        """Return the shape of a record of a value."""
        rows = self.rows_of(value)
        return tuple(local(value).shape) if rows is None else (len(rows), *local(value).shape[1:])


@dataclass(frozen=True)
class RecordedField:
    """One field of a recorded parameter.

    Attributes:
        of: the parameter.
        field: ``param``, ``grad``, or a key of the optimizer's state.
        tensor: what becomes of it in the file.
    """

    of: RecordedParam
    field: str
    tensor: RecordedTensor

    @property
    def name(self) -> str:
        """The name of its tensor in the file."""
        return self.tensor.name


class FieldPlan:
    """Which fields of its parameters an optimizer gives the recorder.

    Args:
        optimizer: has the state.
        fields: that the user asked for; None for ``param``, ``grad``, and every tensor of the optimizer's state.
        names: for some fields the name of their tensors in the file, with ``{name}`` for the parameter's.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, fields: Sequence[str] | None, names: dict[str, str] | None = None
    ) -> None:
        self._optimizer = optimizer
        self._names = {**NAMES, **(names or {})}
        self.chosen = fields
        self.known = _known_fields(optimizer) if fields is None else tuple(fields)

    def at_start(self, of: RecordedParam) -> list[RecordedField]:
        """Return the fields that are known before the first step.

        The dtype of a state that is not there yet is the parameter's, as all optimizers here that are known do it.
        """
        found = []
        for field in self.known:
            value = self._state(of).get(field)
            if value is None and (field in ("param", "grad") or field in _known_fields(self._optimizer)):
                value = of.param
            if value is not None:
                found.append(self._field(of, field, value, fill=None))
        found += self.discover(of, {one.field for one in found})
        return found

    def discover(self, of: RecordedParam, known: set[str]) -> list[RecordedField]:
        """Return the fields that the optimizer's state has and ``known`` lacks: zeros until they appeared."""
        return [
            self._field(of, key, value, fill=0.0)
            for key, value in self._state(of).items()
            if key not in known and (self.chosen is None or key in self.chosen)
        ]

    def missing(self, of: RecordedParam) -> list[str]:
        """Return the fields that the user asked for and the optimizer's state lacks."""
        state = self._state(of)
        return [field for field in self.chosen or () if field not in ("param", "grad") and field not in state]

    def _state(self, of: RecordedParam) -> dict[str, Tensor]:
        state = self._optimizer.state.get(of.param, {})
        return {
            key: value
            for key, value in state.items()
            if isinstance(key, str) and isinstance(value, Tensor) and key not in NOT_RECORDED
        }

    def _field(self, of: RecordedParam, field: str, value: Tensor, fill: float | None) -> RecordedField:
        name = self._names.get(field, STATE_NAME).format(name=of.name, field=field)
        return RecordedField(of, field, RecordedTensor(name, of.record_shape(value), local(value).dtype, fill))


def _known_fields(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the fields that an optimizer is known to keep for every parameter, before it has done a step."""
    if isinstance(optimizer, torch.optim.Adam | RecordsItself):
        return checks.FIELDS
    if isinstance(optimizer, torch.optim.SGD) and any(group["momentum"] for group in optimizer.param_groups):
        return ("param", "grad", "momentum_buffer")
    return ("param", "grad")


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside wrappers that keep it as ``.optimizer``, as Accelerate's and Lightning's do."""
    *_, inner = _chain(optimizer)
    return inner


def _chain(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        yield optimizer
        seen.add(id(optimizer))
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            return
        optimizer = inner
