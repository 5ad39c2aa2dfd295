"""Replays the trace of another program: the user gives the settings of its optimizer, which the trace does not have."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import ConfigError, TraceError
from bhfast.foreign.clipping import inferred_clip_coefs
from bhfast.foreign.importing import IMPORTED
from bhfast.ops import arithmetic, torch_adam
from bhfast.ops.checks import FIELDS
from bhfast.replay import CHUNK, Difference, first_difference, replay, why_not
from bhfast.trace import Trace
from bhfast.trace.format import REFERENCE_NAMES
from bhfast.trace.updates import MOMENTS, STATE, Updates, why_unknown

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "linear")
ROUNDINGS = (*arithmetic.ROUNDINGS, torch_adam.FUSED)


@dataclass(frozen=True)
class GivenSettings:
    """The settings of an optimizer, as the user gives them.

    Attributes:
        optimizer: one of ``OPTIMIZERS``.
        lr: the learning rate of the first step; None if the trace has ``learning_rates``.
        lr_schedule: ``constant``, or ``linear``: step k uses ``lr * (steps - k + 1) / steps``.
        steps: in the whole run; for the linear schedule.
        betas: as for ``torch.optim.AdamW``, like the next two.
        eps: added to the denominator.
        weight_decay: decoupled.
        rounding: of ``ROUNDINGS``; None: ``per-op``, which is torch's own in bfloat16 on a CPU.
        max_grad_norm: at which gradients were clipped after they were recorded; None if they were not.

    Raises:
        ConfigError: a setting is out of range, or contradicts another.
    """

    optimizer: str
    lr: float | None = None
    lr_schedule: str = "constant"
    steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rounding: str | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", OPTIMIZERS), ("lr_schedule", SCHEDULES), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in (*choices, *([None] if name == "rounding" else [])):
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("weight_decay", self.weight_decay)):
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be at least 0, got {value:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be from 0 to less than 1, got {self.betas[0]:g} and {self.betas[1]:g}")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ConfigError(f"max_grad_norm must be more than 0, got {self.max_grad_norm:g}")
        if self.optimizer == "adam" and self.weight_decay:
            raise ConfigError("a replay knows adamw, not adam with weight decay")
        if (self.lr_schedule == "linear") != (self.steps is not None):
            raise ConfigError("the linear schedule needs the number of steps in the whole run, and only that one does")
        if self.steps is not None and (self.lr is None or self.steps < 1):
            raise ConfigError("the linear schedule needs the learning rate it starts from, and at least one step")


@dataclass(frozen=True)
class GivenReplay:
    """What a replay with given settings found.

    Attributes:
        replayed: number of steps replayed.
        reason: why nothing was replayed; None if it was.
        difference: None if all bits agree.
        tensors: the names of those whose bits were compared.
        remarks: on what the replay assumes, and what it cannot prove.
    """

    replayed: int
    reason: str | None
    difference: Difference | None
    tensors: list[str]
    remarks: list[str]


def replay_given(trace: Trace, settings: GivenSettings) -> GivenReplay:
    """Replay a trace whose optimizer is not described in it. Where moments were not recorded, they are computed.

    Raises:
        TraceError: the trace describes its optimizer itself, or contradicts the settings.
    """
    if trace.optimizer and IMPORTED not in trace.metadata:
        raise TraceError(f"{trace.path} describes its optimizer itself: verify it without --optimizer")
    if "recorded_steps" not in trace or not len(trace.steps):
        raise TraceError(f"{trace.path} has no recorded_steps: bhfast import can add them")
    params = _params(trace)
    trace.optimizer = _description(trace, params, settings)
    logged = ChainMap({"learning_rates": _learning_rates(trace, settings)}, dict(trace))
    remarks: list[str] = []
    reason = why_unknown(trace, logged) or _why_not(trace, params, settings)
    if not reason and settings.max_grad_norm is not None:
        reason = _add_clip_coefs(trace, settings, logged, remarks)
    difference, replayed = None, len(trace.steps) - 1
    is_whole = all(field in keys for keys in params.values() for field in FIELDS)
    if not reason and is_whole:
        reason = why_not(trace, logged)
        difference = None if reason else replay(trace, logged)
    elif not reason:
        reason, difference = _replay_without_moments(trace, params, logged, remarks)
    if difference:
        where = difference.text.partition(";")[0]
        text = f"{where}; the settings given are not those of this step, or something in the file is damaged"
        difference = replace(difference, text=text)
    tensors = [keys[field] for keys in params.values() for field in STATE if field in keys]
    return GivenReplay(0 if reason else replayed, reason, difference, tensors, remarks)


def _params(trace: Trace) -> dict[str, dict[str, str]]:
    """Return the names of the tensors of each parameter, by field: those of the reference run, or ``NAME.grad``."""
    if "embeddings" in trace:
        return {"embeddings": {field: key for field, key in REFERENCE_NAMES.items() if key in trace}}
    endings = {"param": "", "grad": ".grad", "exp_avg": ".exp_avg", "exp_avg_sq": ".exp_avg_sq"}
    names = [name for name in trace if f"{name}.grad" in trace]
    return {name: {field: name + end for field, end in endings.items() if name + end in trace} for name in names}


def _description(trace: Trace, params: Mapping[str, Mapping[str, str]], settings: GivenSettings) -> dict[str, Any]:
    """Return what a trace of bhfast says of its optimizer; see ``bhfast.recording.optimizer_description``."""
    group = {"betas": [*settings.betas], "eps": settings.eps, "weight_decay": settings.weight_decay}
    kernel = {"kernel": torch_adam.fused_kernel()} if settings.rounding == torch_adam.FUSED else {}
    return {
        "name": settings.optimizer,
        "arithmetic": settings.rounding or "per-op",
        "reason": "its settings were given",
        "groups": [{**group, **kernel}],
        "params": {
            name: {
                "group": 0,
                "steps_done": int(trace.steps[0]),
                "keys": dict(keys),
                "numel": math.prod(trace[keys["param"]].shape[1:]),
            }
            for name, keys in params.items()
        },
    }


def _learning_rates(trace: Trace, settings: GivenSettings) -> Tensor:
    """Return the learning rate of each record, float64 ``[R]``."""
    if "learning_rates" in trace:
        if settings.lr is not None:
            raise TraceError(f"{trace.path} has learning_rates of its own: verify it without --lr")
        return trace["learning_rates"].as_subclass(Tensor).double()
    if settings.lr is None:
        raise TraceError(f"{trace.path} has no learning_rates: give --lr")
    steps = trace.steps.as_subclass(Tensor)
    if settings.steps is None:
        return torch.full((len(steps),), settings.lr, dtype=torch.float64)
    if int(steps[-1]) > settings.steps:
        raise TraceError(
            f"{trace.path} goes to step {int(steps[-1]):,}, but the linear schedule ends at {settings.steps:,}"
        )
    rest = [(settings.steps - max(0, step - 1)) / settings.steps for step in steps.tolist()]
    return torch.tensor([settings.lr * x for x in rest], dtype=torch.float64)


def _why_not(trace: Trace, params: Mapping[str, Mapping[str, str]], settings: GivenSettings) -> str | None:
    if not params:
        return "it has no embeddings, nor any tensors NAME and NAME.grad; bhfast import can rename others"
    for name, keys in params.items():
        if "grad" not in keys:
            return f"the gradients of {name} are not in the file, and without them nothing follows"
        tensors = [trace[key] for key in keys.values()]
        if any(x.shape != tensors[0].shape or x.dtype != tensors[0].dtype for x in tensors):
            return f"parameter, gradients and moments of {name} have different shapes or dtypes"
        if tensors[0].dtype not in (torch.bfloat16, torch.float32):
            return f"a replay knows bfloat16 and float32, and {name} is {tensors[0].dtype}"
        if tensors[0].dtype == torch.float32 and settings.rounding is None:
            return "in float32 torch's Adam differs from CPU to CPU; name an arithmetic with --rounding"
        if len(tensors[0]) != len(trace.steps):
            return f"{name} has not one record for each step"
        if any(moment not in keys for moment in MOMENTS) and int(trace.steps[0]):
            return f"moments of {name} are not in the file, and they cannot be computed, as step 0 is not either"
    return None


def _add_clip_coefs(
    trace: Trace, settings: GivenSettings, logged: ChainMap[str, Any], remarks: list[str]
) -> str | None:
    """Add the clipping factor of each step to ``logged``; return why that is impossible, or None."""
    assert settings.max_grad_norm is not None
    if "clip_coefs" in trace:
        raise TraceError(f"{trace.path} has clip_coefs of its own: verify it without --max-grad-norm")
    name = max(trace.optimizer["params"], key=lambda name: trace.optimizer["params"][name]["numel"])
    keys = trace.optimizer["params"][name]["keys"]
    dtype = trace[keys["grad"]].dtype
    if "grad_norms" in trace:
        norms = trace["grad_norms"].as_subclass(Tensor).float()
        coefs = (settings.max_grad_norm / (norms + 1e-6)).clamp(max=1).to(dtype).float()
    elif "exp_avg" not in keys or dtype != torch.bfloat16 or settings.rounding == torch_adam.FUSED:
        return "the clipping factors are not known: that takes clip_coefs, grad_norms, or first moments in bfloat16"
    else:
        coefs = inferred_clip_coefs(trace, Updates(trace, logged, name))
        clipped = int((coefs < 1).sum())
        remarks.append(f"the clipping factors of {clipped:,} steps were inferred from {keys['exp_avg']}")
    logged.maps[0]["clip_coefs"] = coefs
    return None


def _replay_without_moments(
    trace: Trace, params: Mapping[str, Mapping[str, str]], logged: Mapping[str, Any], remarks: list[str]
) -> tuple[str | None, Difference | None]:
    """Replay from step 0, where moments are zero; compare what was recorded."""
    found = []
    for name, keys in params.items():
        if missing := [field for field in MOMENTS if field not in keys]:
            remarks.append(
                f"{' and '.join(missing)} of {name} were computed from the gradients, as they are not in the file"
            )
        found.append(_replay_from_zero(trace, keys, Updates(trace, logged, name)))
    return None, min((x for x in found if x), key=lambda difference: difference.record, default=None)


def _replay_from_zero(trace: Trace, keys: Mapping[str, str], updates: Updates) -> Difference | None:
    recorded = {field: trace[keys[field]].as_subclass(Tensor) for field in STATE if field in keys}
    grads = trace[keys["grad"]].as_subclass(Tensor)
    start = recorded["param"][0]
    for field in MOMENTS:
        if field in keys and (
            x := first_difference(trace, keys[field], 0, recorded[field][:1], torch.zeros_like(start)[None])
        ):
            return x
    state = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    chunk = max(1, CHUNK // max(1, start.numel()))
    for first in range(1, updates.records, chunk):
        now = slice(first, min(first + chunk, updates.records))
        replayed = [torch.empty_like(grads[now]) for _ in STATE]
        updates.advance(state, grads[now], now, replayed, 0)
        found = [
            first_difference(trace, keys[field], first, recorded[field][now], values)
            for field, values in zip(STATE, replayed, strict=True)
            if field in recorded
        ]
        if differences := [x for x in found if x]:
            return min(reversed(differences), key=lambda difference: difference.record)
    return None
