"""Values that users log, as tensors by the name they get in the file."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import ConfigError
from bhfast.recording.fields import local
from bhfast.trace.recorded import RecordedTensor


def as_tensors(values: Mapping[str, Any], known: Mapping[str, RecordedTensor | Tensor]) -> dict[str, Tensor]:
    """Return values as tensors by name.

    Args:
        values: tensors, numpy arrays and numbers. A number becomes float64, int64 or bool, or the dtype that its name
            already has.
        known: for each name in use, something with its shape and dtype.

    Raises:
        ConfigError: a value is of another type, or its shape or dtype differs from that of earlier values.
    """
    found = {}
    for name, value in values.items():
        found[name] = _as_tensor(name, value)
        if name not in known:
            continue
        wanted, got = known[name], found[name]
        if isinstance(value, Number) and torch.can_cast(got.dtype, wanted.dtype):
            got = found[name] = got.to(wanted.dtype)
        for what in ("shape", "dtype"):
            a, b = getattr(wanted, what), getattr(got, what)
            if a != b:
                a, b = (list(x) if what == "shape" else x for x in (a, b))
                raise ConfigError(f"log({name}=...) must have one {what} throughout: wanted {a}, got {b}")
    return found


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings, joining their names with dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return local(value.detach())
    try:
        return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"log({name}=...) takes tensors, numpy arrays, numbers and mappings of these, got {type(value).__name__}"
        ) from None
