"""Replays Adam over a trace: each step starts from the state recorded before it, and every bit is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bhfast.ops import arithmetic, checks, torch_adam
from bhfast.trace import Trace

CHUNK = 1 << 19  # elements replayed at once
REPLAYED = ("exp_avg", "exp_avg_sq", "param")


@dataclass(frozen=True)
class Difference:
    """The first place where a trace differs from what was recorded.

    Attributes:
        tensor: its name in the file; None for the header.
        record: the index along axis 0; -1 if a checksum failed that covers no single record.
        step: the step of that record; None if ``record`` is -1.
        index: the element within the record; None if a checksum found the difference.
        text: all this in one line, with the values found.
    """

    tensor: str | None
    record: int
    step: int | None
    index: tuple[int, ...] | None
    text: str


def why_not(trace: Trace, logged: Mapping[str, Tensor]) -> str | None:
    """Return why a trace cannot be replayed; None if it can be.

    Args:
        trace: one file.
        logged: has the values that were recorded once per step (``learning_rates``, ``clip_coefs``, ``grad_norms``,
            ``skipped``): the trace itself, or, for one of several files, the trace that joins them.
    """
    optimizer, steps = trace.optimizer, trace.steps
    if steps.dim() != 1 or not torch.equal(steps - steps[:1], torch.arange(len(steps))):
        return "a replay needs every step, but this run recorded only some (--record-every)"
    rounding = optimizer["arithmetic"]
    if rounding is None:
        return str(optimizer["reason"])
    if rounding not in (*arithmetic.ROUNDINGS, torch_adam.FUSED):
        return f"this bhfast does not know the arithmetic {rounding!r}"
    for kernel in {group["kernel"] for group in optimizer["groups"]} if rounding == torch_adam.FUSED else ():
        if kernel != (here := torch_adam.fused_kernel()):
            return f"it was recorded with the fused AdamW of {kernel}, whose bits may differ from those of {here} here"
    if "learning_rates" not in logged:
        return "learning_rates are not in the file"
    if not optimizer["params"]:
        return "no parameter was recorded"
    for name, param in optimizer["params"].items():
        if reason := _why_not_param(trace, logged, name, param):
            return reason
    return None


def _why_not_param(trace: Trace, logged: Mapping[str, Tensor], name: str, described: dict[str, Any]) -> str | None:
    keys = described["keys"]
    if missing := [field for field in checks.FIELDS if field not in keys]:
        return f"a replay needs {', '.join(missing)} of {name}"
    tensors = [trace[keys[field]] for field in checks.FIELDS]
    if dtypes := {str(x.dtype) for x in tensors if x.dtype != tensors[0].dtype}:
        return f"{name} is {tensors[0].dtype}, but its gradient or moments are {', '.join(sorted(dtypes))}"
    if any(x.shape != tensors[0].shape or len(x) != len(trace.steps) for x in tensors):
        raise ValueError(f"the fields of {name} have different shapes, or not one record for each step")
    flags = _flags(trace, logged, name, described)
    for flag, values in flags.items():
        if values.dim() != 1:
            return f"{flag} is not one value for each step"
    if trace.optimizer["arithmetic"] == torch_adam.FUSED:
        size = described["numel"]
        if tensors[0][0].numel() != size and size % torch_adam.FUSED_BLOCK:
            return (
                f"only some rows of {name} were recorded, but the bits of torch's fused AdamW depend on where in the "
                "parameter an element is"
            )
    gone = flags.get(f"{name}.has_grad", torch.ones(0)) == 0
    for record in gone.nonzero().flatten().tolist():
        if 0 < record < len(trace.steps) and any(_changes(trace[keys[field]], record) for field in REPLAYED):
            return f"{name} changed in step {int(trace.steps[record])}, in which it had no gradient"
    if "clip_coefs" in logged:
        changed = _of_optimizer(logged["clip_coefs"], described).isnan()
        if "grad_norms" in logged:  # NaN in the gradients makes NaN of the coefficient
            changed &= ~_of_optimizer(logged["grad_norms"], described).isnan()
        records = min(len(changed), len(trace.steps))
        if bool((changed[:records] & _updated(flags, records)).any()):
            return "between backward and step, gradients were changed by something other than one common factor"
    return None


def _changes(tensor: Tensor, record: int) -> bool:
    return not torch.equal(_bits(tensor[record]), _bits(tensor[record - 1]))


def _of_optimizer(values: Tensor, described: dict[str, Any]) -> Tensor:
    """Return the logged values of a parameter's optimizer, ``[R]``: its column, if there is one for each optimizer."""
    return values[:, described["optimizer"]] if values.dim() > 1 and "optimizer" in described else values


def _flags(trace: Trace, logged: Mapping[str, Tensor], name: str, described: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that say in which steps a parameter was not updated: bool ``[R]`` each."""
    keys = ("skipped", f"{name}.has_grad")
    found = {key: source[key] for source in (logged, trace) for key in keys if key in source}
    return {key: _of_optimizer(x, described) if key == "skipped" else x for key, x in found.items()}


def _updated(flags: Mapping[str, Tensor], records: int) -> Tensor:
    """Return in which records a parameter was updated: it had a gradient and the step was not skipped. bool ``[R]``."""
    updated = torch.arange(records) > 0
    for key, values in flags.items():
        updated &= (values[:records] == 0) == (key == "skipped")
    return updated


def replay(trace: Trace, logged: Mapping[str, Tensor]) -> Difference | None:
    """Replay all parameters; return the first difference. Only for traces that :func:`why_not` returns None for."""
    found = [_replay_param(trace, logged, name, x) for name, x in trace.optimizer["params"].items()]
    return min((x for x in found if x), key=lambda difference: difference.record, default=None)


def _replay_param(
    trace: Trace, logged: Mapping[str, Tensor], name: str, described: dict[str, Any]
) -> Difference | None:
    keys, done = described["keys"], described["steps_done"]
    if not done:
        for key in (keys["exp_avg"], keys["exp_avg_sq"]):
            if difference := _first_difference(trace, key, 0, trace[key][:1], torch.zeros_like(trace[key][:1])):
                return difference
    records = min(len(trace.steps), len(logged["learning_rates"]))
    updated = _updated(_flags(trace, logged, name, described), records)
    steps = (done + updated.cumsum(0)).clamp(min=1)  # of the optimizer
    chunk = max(1, CHUNK // max(1, trace[keys["param"]][0].numel()))
    for start in range(1, records, chunk):
        now = slice(start, min(start + chunk, records))
        values = _advanced(trace, logged, described, now, steps[now], updated[now])
        found = [_first_difference(trace, keys[f], start, trace[keys[f]][now], values[f]) for f in REPLAYED]
        differences = [difference for difference in found if difference]
        if differences:
            return min(differences, key=lambda difference: difference.record)
    return None


def _advanced(
    trace: Trace,
    logged: Mapping[str, Tensor],
    described: dict[str, Any],
    now: slice,
    steps: Tensor,
    updated: Tensor,
) -> dict[str, Tensor]:
    """Return what the records ``now`` of a parameter must be, computed from the records before them."""
    settings = trace.optimizer["groups"][described["group"]]
    before = slice(now.start - 1, now.stop - 1)
    tensors = {field: trace[described["keys"][field]].as_subclass(Tensor) for field in checks.FIELDS}
    param, exp_avg, exp_avg_sq = (tensors[field][before] for field in ("param", "exp_avg", "exp_avg_sq"))
    grad = tensors["grad"][now]
    ones = [1] * (param.dim() - 1)
    if "clip_coefs" in logged:
        coefs = _of_optimizer(logged["clip_coefs"], described)
        grad = grad * coefs[now].as_subclass(Tensor).to(grad.dtype).view(-1, *ones)
    rates = logged["learning_rates"]
    lrs = (rates[:, described["group"]] if rates.dim() > 1 else rates)[now].tolist()
    own = {"betas": tuple(settings["betas"]), "eps": settings["eps"], "weight_decay": settings["weight_decay"]}
    rounding = trace.optimizer["arithmetic"]
    if rounding == torch_adam.FUSED:
        is_whole = param[0].numel() == described["numel"]
        values = torch_adam.fused_adamw(
            param, grad, exp_avg, exp_avg_sq, steps=steps.tolist(), lrs=lrs, is_whole=is_whole, **own
        )
    else:
        coefficients = arithmetic.adam_coefficients(steps.tolist(), lrs, **own)
        coefficients = coefficients.view(-1, *ones, coefficients.shape[-1])
        values = arithmetic.adam(param, grad, exp_avg, exp_avg_sq, coefficients, rounding)
    found = dict(zip(("param", "exp_avg", "exp_avg_sq"), values, strict=True))
    if not updated.all():
        found = {f: torch.where(updated.view(-1, *ones), x, tensors[f][before]) for f, x in found.items()}
    return found


def _bits(values: Tensor) -> Tensor:
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def _first_difference(trace: Trace, name: str, first: int, recorded: Tensor, replayed: Tensor) -> Difference | None:
    """Compare bits; two NaN are equal, as the payload of a NaN depends on the instruction that made it."""
    if torch.equal(_bits(recorded), _bits(replayed)):
        return None
    differs = _bits(recorded) != _bits(replayed)
    differs &= ~(recorded.isnan() & replayed.isnan())
    if not differs.any():
        return None
    record, *index = differs.nonzero()[0].tolist()
    at = (record, *index)
    step = int(trace.steps[first + record])
    text = (
        f"step {step}, {name}{index}: recorded {_describe(recorded[at])}, replayed {_describe(replayed[at])}; "
        "the recorded value, the state before it, or the gradient is damaged"
    )
    return Difference(name, first + record, step, tuple(index), text)


def _describe(value: Tensor) -> str:
    digits = 2 * value.itemsize
    return f"{value.item():.8g} (0x{int(_bits(value)) & (1 << 4 * digits) - 1:0{digits}x})"
