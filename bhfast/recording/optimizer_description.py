"""The description of an optimizer in a trace, from which :mod:`bhfast.verify` can replay it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bhfast.ops import kernels

SETTINGS = ("betas", "eps", "weight_decay")
DTYPES = (torch.bfloat16, torch.float32)


class OptimizerDescription:
    """Settings of an optimizer, and whether its arithmetic is one that a replay has.

    Args:
        optimizer: to be described, as it is now.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.settings = _settings(optimizer)
        self.unknown: str | None = None  # why the arithmetic of its steps is not known, whatever its kind
        self.steps_done: dict[str, int] = {}  # before the recording, by parameter

    def look(self, step: int) -> None:
        """Note if the settings, except learning rates, have been changed before ``step``."""
        if self.unknown is None and _settings(self.optimizer) != self.settings:
            self.mark_unknown(f"the optimizer's settings were changed before step {step}")

    def mark_unknown(self, reason: str) -> None:
        """Note why the steps cannot be replayed; the first reason stays."""
        self.unknown = self.unknown or reason

    def describe(self, params: Mapping[str, Tensor], keys: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """Return the description, for JSON; called before the first step, and again after the last.

        Args:
            params: the recorded parameters by name.
            keys: for each of them, for each field the name of its tensor in the file.
        """
        for name, param in params.items():  # as it is at the first call
            self.steps_done.setdefault(name, int(self.optimizer.state.get(param, {}).get("step", 0)))
        arithmetic, reason = self._arithmetic(list(params.values()))
        groups = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        return {
            "name": type(self.optimizer).__name__,
            "arithmetic": arithmetic,
            "reason": reason,
            "groups": self.settings,
            "params": {
                name: {"group": groups[id(p)], "steps_done": self.steps_done[name], "keys": dict(keys[name])}
                for name, p in params.items()
            },
        }

    def _arithmetic(self, params: list[Tensor]) -> tuple[str | None, str]:
        """Return the rounding of :func:`bhfast.ops.arithmetic.adam` that the optimizer's arithmetic equals, and why."""
        optimizer, kind = self.optimizer, type(self.optimizer).__name__
        if self.unknown is not None:
            return None, self.unknown
        if rounding := getattr(optimizer, "rounding", None):
            return rounding, f"{kind} is specified to the bit"
        groups = optimizer.param_groups
        is_decoupled = isinstance(optimizer, torch.optim.AdamW) or not any(g.get("weight_decay") for g in groups)
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) or not is_decoupled:
            return None, f"a replay knows AdamW, not {kind}" + ("" if is_decoupled else " with weight decay")
        for flag in ("amsgrad", "maximize", "capturable", "differentiable", "fused"):
            if any(group.get(flag) for group in groups):
                return None, f"a replay does not know {kind} with {flag}"
        if any(param.device.type != "cpu" for param in params):
            return None, f"{kind} is only on a CPU known to the bit"
        if any(param.dtype not in DTYPES for param in params):
            return None, "a replay knows bfloat16 and float32"
        if inexact := [p.dtype for p in params if not kernels.torch_rounds_per_op(p.dtype)]:
            return None, f"torch's {kind} of {inexact[0]} is not exact to the bit on this CPU"
        if not all(kernels.torch_has_one_lerp(float(group["betas"][0])) for group in groups):
            return None, f"at betas[0] = 0 the sign that torch's {kind} gives a zero depends on where it lies"
        return "per-op", f"{kind} on a CPU rounds after every operation"


def joined_descriptions(described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one description for several optimizers that step together, their groups one after the other."""
    if len(described) == 1:
        return described[0]
    groups: list[Any] = []
    params: dict[str, Any] = {}
    for own in described:
        params |= {name: {**p, "group": p["group"] + len(groups)} for name, p in own["params"].items()}
        groups += own["groups"]
    unknown = next((own["reason"] for own in described if own["arithmetic"] is None), None)
    arithmetics = {own["arithmetic"] for own in described}
    if unknown is None and len(arithmetics) > 1:
        unknown = "the optimizers have different arithmetics"
    return {
        "name": " + ".join(own["name"] for own in described),
        "arithmetic": None if unknown else arithmetics.pop(),
        "reason": unknown or described[0]["reason"],
        "groups": groups,
        "params": params,
    }


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: _plain(group[name]) for name in SETTINGS if name in group} for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    return [float(x) for x in value] if isinstance(value, tuple | list) else float(value)
