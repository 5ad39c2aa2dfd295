"""Adam's accounting: how much of each recorded update is the one that a formula predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.ops.arithmetic import AdamCoefficients
from bhfast.ops.checks import FIELDS
from bhfast.trace import Trace
from bhfast.trace.updates import MOMENTS, STATE, Updates, left_by_steps, why_unknown

CHUNK = 1 << 17  # values predicted at once
FORMULAS = {"recorded": FIELDS, "float32": STATE}  # and the fields that each needs


def predicted_shares(trace: Trace, param: str, formula: str = "recorded") -> Tensor:
    """Return which share of the components of each row moved, in each step, to where Adam should have moved them.

    ``"recorded"`` is the arithmetic that the trace names, bit for bit: its steps start from the parameter and moments
    before, and the gradient. In a trace that ``bhfast verify`` proves, all shares are 1. ``"float32"`` is the formula
    as it is usually written (Kingma and Ba, arXiv 1412.6980; weight decay as Loshchilov and Hutter, arXiv 1711.05101),
    in float32 and rounded once: it starts from the parameter before and the moments after the step, and misses the
    roundings in between. What the loop itself changed after a step does not count.

    Args:
        trace: one file.
        param: the name of a recorded parameter.
        formula: ``"recorded"`` or ``"float32"``.

    Returns:
        float64 ``[R - 1, V]`` for a parameter recorded as ``[R, V, ...]``: from 0 to 1; for a vector, V = 1. Two NaN
        are equal; so are both zeros.

    Raises:
        TraceError: the trace does not have what the formula needs.
        ValueError: there is no such formula.
    """
    if formula not in FORMULAS:
        raise ValueError(f"formula must be one of {', '.join(FORMULAS)}, got {formula!r}")
    if reason := _why_not(trace, param, formula):
        raise TraceError(f"{trace.path}: the updates of {param} cannot be predicted: {reason}")
    updates = Updates(trace, trace.logged, param)
    tensors = {field: trace[updates.keys[field]] for field in FORMULAS[formula]}
    recorded = tensors["param"]
    rows = recorded.shape[1] if len(recorded.shape) > 2 else 1
    shares = torch.empty(updates.records - 1, rows, dtype=torch.float64)
    advance = max(1, CHUNK // max(1, recorded[:1].numel()))
    for begin in range(1, updates.records, advance):
        now = slice(begin, min(begin + advance, updates.records))
        before = slice(now.start - 1, now.stop - 1)
        if formula == "float32":
            after = tuple(left_by_steps(trace, updates.keys[field], now) for field in MOMENTS)
            predicted = _textbook(updates, recorded[before], after, now)
        else:
            states = [tensors[field][before].as_subclass(Tensor) for field in STATE]
            predicted = updates.next_states(states, tensors["grad"][now].as_subclass(Tensor), now)[0]
        actual = left_by_steps(trace, updates.keys["param"], now)
        equal = (actual == predicted) | (actual.isnan() & predicted.isnan())
        shares[before] = equal.view(len(equal), rows, -1).double().mean(-1)
    return shares


def _textbook(updates: Updates, param: Tensor, moments: tuple[Tensor, ...], now: slice) -> Tensor:
    """Return parameters ``[n, ...]`` after a step each, from those before it and the moments after it."""
    ones = [1] * (param.dim() - 1)
    c = AdamCoefficients(*(x.view(-1, *ones) for x in updates.coefficients(now).unbind(-1)))
    p, m, v = (x.float() for x in (param, *moments))
    moved = p * c.decay + c.step_size * (m / (v.sqrt() / c.bias2_sqrt + c.eps))
    return torch.where(updates.updated[now].view(-1, *ones), moved.to(param.dtype), param)


def _why_not(trace: Trace, param: str, formula: str) -> str | None:
    """Return why the updates of a parameter cannot be predicted; None if they can be."""
    if param not in trace.optimizer.get("params", {}):
        return f"the trace describes no such parameter; it has {', '.join(trace.optimizer.get('params', {})) or 'none'}"
    described = trace.optimizer["params"][param]
    if missing := [field for field in FORMULAS[formula] if field not in described["keys"]]:
        return f"{', '.join(missing)} of it were not recorded"
    if "betas" not in trace.optimizer["groups"][described["group"]]:
        return f"a prediction knows Adam, not {trace.optimizer['name']}"
    if formula == "recorded":
        return why_unknown(trace, trace.logged)
    if not torch.equal(trace.steps - trace.steps[:1], torch.arange(len(trace.steps))):
        return "that needs every step, but this run recorded only some (--record-every)"
    return None if "learning_rates" in trace.logged else "learning_rates are not in the file"
