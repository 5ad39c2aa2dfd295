"""What a trace says of its optimizer, so that :mod:`bhfast.verify` can replay it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bhfast.ops import kernels, torch_adam
from bhfast.recording.shards import local

SETTINGS = ("betas", "eps", "weight_decay")
UNKNOWN = ("amsgrad", "maximize", "capturable", "differentiable")
FLAGS = (*UNKNOWN, "fused", "foreach", "decoupled_weight_decay")
DTYPES = (torch.bfloat16, torch.float32)


class Description:
    """Settings of an optimizer, and whether its arithmetic is one that a replay has.

    Args:
        optimizer: to be described, as it is now.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.settings = _settings(optimizer)
        self.flags = _flags(optimizer)
        self.changed_at: int | None = None
        self.is_scaled = False  # by a GradScaler, inside a step
        self.steps_done: dict[str, int] = {}  # before the recording, by parameter

    def look(self, step: int) -> None:
        """Note if the settings, learning rates apart, have been changed before ``step``."""
        now = _settings(self.optimizer), _flags(self.optimizer)
        if self.changed_at is None and now != (self.settings, self.flags):
            self.changed_at = step
        self.is_scaled |= getattr(self.optimizer, "grad_scale", None) is not None

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
        described: dict[str, Any] = {
            "name": type(self.optimizer).__name__,
            "arithmetic": arithmetic,
            "reason": reason,
            "groups": self.settings,
            "params": {
                name: {"group": groups[id(p)], "steps_done": self.steps_done[name], "keys": dict(keys[name])}
                for name, p in params.items()
            },
        }
        if arithmetic == torch_adam.FUSED:
            described["kernel"] = torch_adam.fused_kernel()
            for name, param in params.items():
                described["params"][name]["numel"] = local(param).numel()
        return described

    def _arithmetic(self, params: list[Tensor]) -> tuple[str | None, str]:
        """Return the arithmetic of the optimizer, and why it is that; None and why a replay does not know it.

        The arithmetic is a rounding of :func:`bhfast.ops.arithmetic.adam`, or that of torch's own fused kernel.
        """
        optimizer, kind = self.optimizer, type(self.optimizer).__name__
        if self.changed_at is not None:
            return None, f"the optimizer's settings were changed before step {self.changed_at}"
        if rounding := getattr(optimizer, "rounding", None):
            return rounding, f"{kind} is specified to the bit"
        if reason := self._unknown(params):
            return None, reason
        if any(group.get("fused") for group in optimizer.param_groups):
            return self._fused(params)
        if inexact := [p.dtype for p in params if not kernels.torch_rounds_per_op(p.dtype)]:
            return None, f"torch's {kind} of {inexact[0]} is not exact to the bit on this CPU"
        is_foreach = any(group.get("foreach") for group in optimizer.param_groups)
        if is_foreach and not all(torch_adam.foreach_rounds_per_op(p.dtype) for p in params):
            return None, f"{kind} with foreach does not have the bits of {kind} without it on this CPU"
        if not all(kernels.torch_has_one_lerp(float(group["betas"][0])) for group in optimizer.param_groups):
            return None, f"at betas[0] = 0 the sign that torch's {kind} gives a zero depends on where it lies"
        return "per-op", f"{kind} on a CPU rounds after every operation"

    def _unknown(self, params: list[Tensor]) -> str | None:
        """Return why no replay knows an optimizer of torch with such parameters; None if one may."""
        optimizer, kind = self.optimizer, type(self.optimizer).__name__
        groups = optimizer.param_groups
        if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
            return f"a replay knows AdamW, not {kind}"
        steps = {inspect.unwrap(known.step) for known in (torch.optim.Adam, torch.optim.AdamW)}
        if inspect.unwrap(type(optimizer).step) not in steps:
            return f"a replay knows AdamW, not {kind}, which has a step() of its own"
        is_adamw = isinstance(optimizer, torch.optim.AdamW)
        if any(g["weight_decay"] and not g.get("decoupled_weight_decay", is_adamw) for g in groups):
            return f"a replay knows AdamW, not {kind} with weight decay"
        for flag in UNKNOWN:
            if any(group.get(flag) for group in groups):
                return f"a replay does not know {kind} with {flag}"
        if any(isinstance(x, Tensor) for group in groups for x in (group["lr"], *group["betas"])):
            return f"a replay does not know {kind} with a learning rate or betas that are tensors"
        if any(param.device.type != "cpu" for param in params):
            return f"{kind} is only on a CPU known to the bit"
        if any(param.dtype not in DTYPES for param in params):
            return "a replay knows bfloat16 and float32"
        return None

    def _fused(self, params: list[Tensor]) -> tuple[str | None, str]:
        kind = type(self.optimizer).__name__
        if not all(group.get("fused") for group in self.optimizer.param_groups):
            return None, f"a replay does not know {kind} that is fused in some parameter groups only"
        if self.is_scaled:
            return None, f"a GradScaler changed gradients inside the step of {kind}"
        if not all(local(param).is_contiguous() for param in params):
            return (
                None,
                f"the bits of {kind} with fused depend on where elements lie, and a parameter is not contiguous",
            )
        return torch_adam.FUSED, f"{kind} with fused runs torch's own kernel"


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: _plain(group[name]) for name in SETTINGS if name in group} for group in optimizer.param_groups]


def _flags(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    return [tuple(group.get(flag) for flag in FLAGS) for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    return [float(x) for x in value] if isinstance(value, tuple | list) else float(value)
