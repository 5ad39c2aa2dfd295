"""What is recorded: parameters, or some of their rows, and for each parameter some fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bhfast.errors import BhfastError
from bhfast.ops import checks
from bhfast.recording.protocols import RecordsItself
from bhfast.trace.format import KEYFRAMES
from bhfast.trace.recorded import RecordedTensor
from bhfast.trace.updates import STATE

NAMES = {"param": "{name}"}  # of the fields' tensors in the file
STATE_NAME = "{name}.{field}"
NOT_RECORDED = ("step",)  # keys of an optimizer's state


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: the local part of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class RecordedParam:
    """A parameter, and the part of it that this process records.

    Attributes:
        name: the name it is recorded under.
        param: the parameter; a DTensor if it is sharded over several processes.
        rows: indices along axis 0 of the local part, int64 ``[n]``; None for all of them.
        all_rows: indices along axis 0 of the whole parameter that the user asked for, int64 ``[n]``; None for all.
        shape: the shape of a record over all processes.
        offset: where this process's part starts in that shape.
    """

    name: str
    param: Tensor
    rows: Tensor | None
    all_rows: Tensor | None
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @cached_property
    def is_distributed(self) -> bool:
        """Whether the parameter is a DTensor."""
        return hasattr(self.param, "placements")

    def part_of(self, value: Tensor) -> Tensor:
        """Return the part of a value to record: the chosen rows, if its rows are those of the parameter."""
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
        tensor: its tensor in the file.
    """

    of: RecordedParam
    field: str
    tensor: RecordedTensor

    @property
    def name(self) -> str:
        """The name of its tensor in the file."""
        return self.tensor.name

    @property
    def key(self) -> str:
        """The name under which a reader finds it at every step; of key frames not that of their tensor."""
        return self.name.removesuffix(KEYFRAMES) if self.is_keyframed else self.name

    @property
    def is_keyframed(self) -> bool:
        """Whether it is recorded at key frames only."""
        return self.tensor.stride > 1

    def copy_into(self, slot: Tensor, value: Tensor, *, is_part: bool, step: int) -> None:
        """Copy a value to the slot of its record.

        Args:
            slot: has the shape and dtype of a record.
            value: has the shape of the parameter; if ``is_part``, it is only the part to record.
            step: the current step, for the error message.

        Raises:
            BhfastError: shape or dtype are not those of a record.
        """
        rows = None if is_part or self.of.rows is None else self.of.rows_of(value)
        value = local(value) if self.of.is_distributed else value
        shape = value.shape if rows is None else torch.Size([len(rows), *value.shape[1:]])
        if value.dtype != slot.dtype or shape != slot.shape:
            raise BhfastError(
                f"{self.field} of parameter {self.of.name} is {value.dtype} {list(value.shape)} at step {step}, wanted "
                f"{slot.dtype} {list(slot.shape)}; open the recorder after the optimizer's first step"
            )
        if rows is None:
            slot.copy_(value)
        else:
            torch.index_select(value, 0, rows, out=slot)


class FieldPlan:
    """The fields to record of the parameters that one optimizer updates.

    Args:
        optimizer: without wrappers.
        params: what this process records; the plan covers those that the optimizer updates.
        chosen: the fields that the user asked for; None for ``param``, ``grad``, and every tensor in the optimizer's
            state.
        names: for some fields, the name of their tensors in the file, with ``{name}`` for the parameter's; and for
            some parameters such a mapping of their own.
        keyframes: parameters and moments are recorded at each record that is a multiple of this; None: at each.

    Attributes:
        params: those that the optimizer updates.
        at_start: the fields that are known before the first step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Sequence[RecordedParam],
        chosen: Sequence[str] | None,
        names: Mapping[str, str | Mapping[str, str]],
        keyframes: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._keyframes = keyframes
        self._chosen = chosen
        self._names = NAMES | {key: name for key, name in names.items() if isinstance(name, str)}
        self._names_of = {key: own for key, own in names.items() if not isinstance(own, str)}
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.params = [of for of in params if id(of.param) in updated]
        self.at_start = [field for of in self.params for field in self._at_start(of)]

    def _at_start(self, of: RecordedParam) -> list[RecordedField]:
        """Return the fields of a parameter that are known now.

        State that does not exist yet has the parameter's shape and dtype, in all optimizers whose state is known.
        """
        expected = _known_fields(self.optimizer)
        found = []
        for field in expected if self._chosen is None else self._chosen:
            value = self._state(of).get(field)
            if value is None and (field in ("param", "grad") or field in expected):
                value = of.param
            if value is not None:
                found.append(self._field(of, field, value, fill=None))
        return found + self.discover(of, {own.field for own in found})

    def discover(self, of: RecordedParam, known: set[str]) -> list[RecordedField]:
        """Return the fields in the optimizer's state that are not in ``known``. Their earlier records hold zeros."""
        return [
            self._field(of, key, value, fill=0.0)
            for key, value in self._state(of).items()
            if key not in known and (self._chosen is None or key in self._chosen)
        ]

    def require_chosen(self, of: RecordedParam) -> None:
        """Raise BhfastError if the state of a parameter that has a gradient lacks a field the user asked for."""
        state = self._state(of)
        missing = [field for field in self._chosen or () if field not in ("param", "grad") and field not in state]
        if missing and of.param.grad is not None:
            raise BhfastError(
                f"{type(self.optimizer).__name__} keeps no {', '.join(missing)} for parameter {of.name}; "
                "leave it out of fields="
            )

    def value_of(self, field: RecordedField) -> Tensor | None:
        """Return the current value of a field; None if it has none."""
        if field.field == "param":
            return field.of.param
        if field.field == "grad":
            return field.of.param.grad
        return self.optimizer.state.get(field.of.param, {}).get(field.field)

    def _state(self, of: RecordedParam) -> dict[str, Tensor]:
        state = self.optimizer.state.get(of.param, {})
        return {
            key: value
            for key, value in state.items()
            if isinstance(key, str) and isinstance(value, Tensor) and key not in NOT_RECORDED
        }

    def _field(self, of: RecordedParam, field: str, value: Tensor, fill: float | None) -> RecordedField:
        names = {**self._names, **self._names_of.get(of.name, {})}
        name = names.get(field, STATE_NAME).format(name=of.name, field=field)
        shape, dtype = of.record_shape(value), local(value).dtype
        if self._keyframes and field in STATE and fill is None:
            tensor = RecordedTensor(f"{name}{KEYFRAMES}", shape, dtype, stride=self._keyframes)
        else:
            tensor = RecordedTensor(name, shape, dtype, fill)
        return RecordedField(of, field, tensor)


def _known_fields(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the fields that an optimizer will keep for every parameter, as far as they are known before a step."""
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
