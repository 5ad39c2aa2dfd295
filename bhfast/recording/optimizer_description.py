"""The description of an optimizer in a trace, from which :mod:`bhfast.verify` can replay it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import ConfigError
from bhfast.ops import checks, kernels, torch_adam
from bhfast.recording.fields import RecordedField, local

SETTINGS = ("betas", "eps", "weight_decay")
UNKNOWN = ("amsgrad", "maximize", "capturable", "differentiable")
FLAGS = (*UNKNOWN, "fused", "foreach", "decoupled_weight_decay")
DTYPES = (torch.bfloat16, torch.float32)


class OptimizerDescription:
    """The settings of an optimizer, and its arithmetic if a replay knows it.

    Args:
        optimizer: what to describe; its settings are read now.

    Attributes:
        on_unknown: called when the steps can no longer be replayed, before the record of such a step is complete.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.settings = _settings(optimizer)
        self.flags = _flags(optimizer)
        self.unknown: str | None = None  # why its steps cannot be replayed, whatever kind of optimizer it is
        self.on_unknown: Callable[[], None] = lambda: None
        self.unknown_since = 0  # the first step that this reason holds for
        self._arithmetic_at_start: str | None = None
        self.steps_done: dict[str, int] = {}  # by parameter: steps done before the recording

    def look(self, step: int) -> None:
        """Note if settings other than learning rates changed before ``step``, or if its gradients have a loss scale."""
        if self.unknown is None and (_settings(self.optimizer), _flags(self.optimizer)) != (self.settings, self.flags):
            self.mark_unknown(f"the optimizer's settings were changed before step {step}", step)
        if getattr(self.optimizer, "grad_scale", None) is not None:
            kind = type(self.optimizer).__name__
            self.mark_unknown(f"a GradScaler changed gradients inside the step of {kind}", step)

    def mark_unknown(self, reason: str, step: int) -> None:
        """Note why the steps cannot be replayed; the first reason stays."""
        if self.unknown is None:
            self.unknown, self.unknown_since = reason, step
            self.on_unknown()

    def describe(self, params: Mapping[str, Tensor], keys: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """Return the description, for JSON; called before the first step, and again after the last.

        Args:
            params: the recorded parameters by name.
            keys: for each of them, for each field the name of its tensor in the file.
        """
        for name, param in params.items():  # keeps the counts of the first call
            self.steps_done.setdefault(name, int(self.optimizer.state.get(param, {}).get("step", 0)))
        arithmetic, reason = self._arithmetic(list(params.values()))
        self._arithmetic_at_start = self._arithmetic_at_start or arithmetic
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
        known = self._arithmetic_at_start
        if known and not arithmetic:
            described["known"] = {"arithmetic": known, "records": self.unknown_since}
        if known == torch_adam.FUSED:
            described["groups"] = [{**group, "kernel": torch_adam.fused_kernel()} for group in self.settings]
            for name, param in params.items():
                described["params"][name]["numel"] = local(param).numel()
        return described

    def _arithmetic(self, params: list[Tensor]) -> tuple[str | None, str]:
        """Return the optimizer's arithmetic and the reason for it; or None, and why a replay does not know it.

        The arithmetic is a rounding of :func:`bhfast.ops.arithmetic.adam`, or that of torch's own fused kernel.
        """
        if self.unknown is not None:
            return None, self.unknown
        optimizer, kind = self.optimizer, type(self.optimizer).__name__
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
            return None, f"at betas[0] = 0 the sign that torch's {kind} gives a zero depends on its place in the tensor"
        return "per-op", f"{kind} on a CPU rounds after every operation"

    def _unknown(self, params: list[Tensor]) -> str | None:
        """Return why a replay does not know this optimizer, or not with these parameters; None if it may."""
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
            return f"{kind} is known to the bit on a CPU only"
        if any(param.dtype not in DTYPES for param in params):
            return "a replay knows bfloat16 and float32"
        return None

    def _fused(self, params: list[Tensor]) -> tuple[str | None, str]:
        kind = type(self.optimizer).__name__
        if not all(group.get("fused") for group in self.optimizer.param_groups):
            return None, f"a replay does not know {kind} that is fused in only some parameter groups"
        if not all(local(param).is_contiguous() for param in params):
            return (
                None,
                f"the bits of {kind} with fused depend on the memory layout, and a parameter is not contiguous",
            )
        return torch_adam.FUSED, f"{kind} with fused runs torch's own kernel"


def joined_descriptions(described: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one description for several optimizers that step together.

    Their groups are joined in order. Each parameter has the index of its ``optimizer``: its column in the tensors with
    one value per optimizer. The result has an arithmetic only if all optimizers have the same one.
    """
    if len(described) == 1:
        return described[0]
    groups: list[Any] = []
    params: dict[str, Any] = {}
    for i, own in enumerate(described):
        params |= {name: {**p, "optimizer": i, "group": p["group"] + len(groups)} for name, p in own["params"].items()}
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
        **_known(described, unknown),
    }


def _known(described: Sequence[dict[str, Any]], unknown: str | None) -> dict[str, Any]:
    """Return the entry that says up to which record all arithmetic was known, if it no longer is."""
    known = [own.get("known", {"arithmetic": own["arithmetic"]}) for own in described]
    kinds = {own["arithmetic"] for own in known}
    if unknown is None or len(kinds) > 1 or None in kinds:
        return {}
    return {"known": {"arithmetic": kinds.pop(), "records": min(own["records"] for own in known if "records" in own)}}


def require_rebuildable(described: dict[str, Any], fields: Iterable[RecordedField]) -> None:
    """Raise ConfigError unless parameters and moments of every step follow from the gradients.

    Args:
        described: the optimizers, as the trace describes them.
        fields: what is recorded.
    """
    reason = None if described["arithmetic"] else described["reason"]
    by_param: dict[str, list[RecordedField]] = defaultdict(list)
    for field in fields:
        by_param[field.of.name].append(field)
    for name, own in by_param.items():
        dtypes = {str(field.tensor.dtype) for field in own}
        numel = local(own[0].of.param).numel()
        if missing := set(checks.FIELDS) - {field.field for field in own}:
            reason = reason or f"{', '.join(sorted(missing))} of {name} are not recorded"
        elif len(dtypes) > 1:
            reason = reason or f"parameter, gradient and moments of {name} have different dtypes"
        elif (
            described["arithmetic"] == torch_adam.FUSED
            and own[0].of.rows is not None
            and numel % torch_adam.FUSED_BLOCK
        ):
            reason = reason or f"the bits of torch's fused AdamW depend on where in {name} a row is"
    if reason:
        raise ConfigError(f"keyframes need steps that can be rebuilt to the bit: {reason}; record without keyframes")


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: _plain(group[name]) for name in SETTINGS if name in group} for group in optimizer.param_groups]


def _flags(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    own = [tuple(group.get(flag) for flag in FLAGS) for group in optimizer.param_groups]
    return [(getattr(optimizer, "rounding", None), getattr(optimizer, "max_grad_norm", None) is None), *own]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    return None if value is None else float(value)
