"""The operations of bhfast: clipping, Adam and recording, with the same bits on every device.

Each is declared here, with a pure-torch kernel that runs anywhere. The optional extension ``bhfast._C`` adds faster
kernels for CPU and CUDA under the same names (``torch.ops.bhfast.*``). Code that calls an operation need not know
whether the extension is there.

:func:`bhfast.ops.arithmetic.adam` is Adam as a formula. There are two roundings:

``per-op``
    Every operation rounds to the parameter's dtype. For bfloat16 on a CPU this equals
    ``torch.optim.AdamW(foreach=False, fused=False)`` bit for bit; for float32 it does where torch's square root is
    exact. (With beta1 = 0 the sign of zeros may differ: see :func:`torch_has_one_lerp`.)
``opmath``
    Computes in float32 and rounds each output once, as fused optimizers do.

Each float32 operation is IEEE 754 round-to-nearest-even, and a fused multiply-add rounds once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from bhfast.ops.arithmetic import AdamCoefficients, _flatten, adam, adam_coefficients, grad_norm
from bhfast.ops.checks import FIELDS, _check_adam, _check_adam_steps, _check_clip, _check_record

CHUNK = 1 << 15  # elements updated at once: they fit in the cache, and are too few for torch to split among threads


# ---------------------------------------------------------------------------------------------------------------------
# The operations

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _operation(
    schema: str, check: Callable[..., None]
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Declare a torch operation with its default kernel; return a function that calls the fastest kernel available.

    The default kernel itself is the function's ``__wrapped__``; ``check`` raises what the operation refuses.
    """

    def declare(default: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        name = f"bhfast::{default.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "CompositeExplicitAutograd")(default)
        return caller(getattr(torch.ops.bhfast, default.__name__).default, default, check)

    return declare


def caller(
    operation: Callable[..., Any], default: Callable[_Arguments, _Result], check: Callable[..., None]
) -> Callable[_Arguments, _Result]:
    """Return a function that calls an operation, and does what its compiled kernels cannot.

    They refuse the same arguments as ``check``, which then says why; and autograd is told what they have written to.
    """
    names = [argument.name for argument in operation._schema.arguments]  # type: ignore[attr-defined]
    written = [x.name for x in operation._schema.arguments if x.alias_info and x.alias_info.is_write]  # type: ignore[attr-defined]

    @wraps(default)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            result = operation(*args, **kwargs)
        except RuntimeError:
            check(*args, **kwargs)
            raise
        if written:
            given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
            tensors: list[Tensor] = []
            for name in written:
                value = given[name]
                tensors += [value] if isinstance(value, Tensor) else value or ()
            torch.autograd.graph.increment_version(tensors)
        return result

    call.check = check  # type: ignore[attr-defined]
    return call


# ---------------------------------------------------------------------------------------------------------------------
# Clipping


@_operation("(Tensor[] grads, float max_norm) -> (Tensor, Tensor)", _check_clip)
def clip_coefficient(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Return the global norm of ``grads``, as :func:`grad_norm` sums it, and the factor that clips it to ``max_norm``.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_``, rounded to bfloat16 if
    any gradient is bfloat16.

    Args:
        grads: non-empty; any shapes; bfloat16 or float32; on one device.
        max_norm: above 0. inf makes the factor 1.

    Returns:
        Two float32 scalars on the gradients' device.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_clip(grads, max_norm)
    norm = grad_norm(grads)
    coefficient = torch.clamp(torch.full_like(norm, max_norm) / (norm + 1e-6), max=1.0)
    if any(grad.dtype == torch.bfloat16 for grad in grads):
        coefficient = coefficient.bfloat16().float()
    return norm, coefficient


# ---------------------------------------------------------------------------------------------------------------------
# Adam


@_operation(
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor coefficients,"
    " Tensor? clip_coef, str rounding, Tensor(d!)[] rings, int[] ring_of, Tensor? step, int every) -> ()",
    _check_adam,
)
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    coefficients: Tensor,
    clip_coef: Tensor | None,
    rounding: str,
    rings: Sequence[Tensor],
    ring_of: Sequence[int],
    step: Tensor | None,
    every: int,
) -> None:
    """Advance ``params``, ``exp_avgs`` and ``exp_avg_sqs`` in place by one step, and record the step.

    ``grads`` are not modified. The recorded gradient is the one passed in, before clipping; the other fields are
    recorded after the step. Call this under ``torch.no_grad()``.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: of one length, with matching shapes; one dtype (bfloat16 or float32), one
            device.
        coefficients: float32 ``[7]``, a row of :func:`adam_coefficients`; on the CPU or on the parameters' device.
        clip_coef: float32 scalar by which gradients are multiplied first, on either of these; None: no clipping.
        rounding: ``"per-op"`` or ``"opmath"``.
        rings: where to record; may be empty. Each ``[slots, *shape]``, contiguous, all with the same number of slots.
        ring_of: what each ring records: 4 times the parameter's index, plus the field's index in ``FIELDS``.
        step: int64 scalar, counted from 1, on the CPU or on the parameters' device; required with rings.
        every: record the steps that are a multiple of this, to slot ``step / every % slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_adam(params, grads, exp_avgs, exp_avg_sqs, coefficients, clip_coef, rounding, rings, ring_of, step, every)
    if not params:
        return
    if clip_coef is not None and clip_coef.device.type == "cpu" and clip_coef == 1:
        clip_coef = None  # multiplying by it would change nothing
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    flat = [_flatten(x) for x in lists]
    is_plain = (
        rounding == "per-op"
        and flat[0].device.type == "cpu"
        and torch_rounds_per_op(flat[0].dtype)
        and AdamCoefficients(*coefficients).weight1 != 1
    )
    coefficients = coefficients.to(flat[0].device)[None]
    for param, grad, exp_avg, exp_avg_sq in zip(*(x.split(CHUNK) for x in flat), strict=True):
        if clip_coef is not None:
            grad = grad * clip_coef.to(grad.device)
        if is_plain:
            _adam_torch_(param, grad, exp_avg, exp_avg_sq, coefficients)
            continue
        results = adam(param, grad, exp_avg, exp_avg_sq, coefficients, rounding)
        for old, new in zip((param, exp_avg, exp_avg_sq), results, strict=True):
            old.copy_(new)
    for i in (0, 2, 3):
        if flat[i].data_ptr() != lists[i][0].data_ptr():
            torch._foreach_copy_(list(lists[i]), torch._utils._unflatten_dense_tensors(flat[i], lists[i]))
    if step is not None:
        _write([lists[which % len(FIELDS)][which // len(FIELDS)] for which in ring_of], rings, step, every)


@_operation(
    "(Tensor(a!) param, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grads, Tensor coefficients,"
    " Tensor clip_coefs, Tensor updated, str rounding, Tensor(d!)? params, Tensor(e!)? exp_avgs,"
    " Tensor(f!)? exp_avg_sqs, int first) -> ()",
    _check_adam_steps,
)
def adam_steps_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grads: Tensor,
    coefficients: Tensor,
    clip_coefs: Tensor,
    updated: Tensor,
    rounding: str,
    params: Tensor | None,
    exp_avgs: Tensor | None,
    exp_avg_sqs: Tensor | None,
    first: int,
) -> None:
    """Advance a state of Adam in place by several steps, on the CPU, and keep the states after the last of them.

    Args:
        param, exp_avg, exp_avg_sq: ``[*shape]``, bfloat16 or float32; the state before the first step.
        grads: ``[steps, *shape]``, before clipping.
        coefficients: float32 ``[steps, 7]``; see :func:`adam_coefficients`.
        clip_coefs: float32 ``[steps]``, multiply the gradients.
        updated: bool ``[steps]``; a step for which it is False changes nothing.
        rounding: ``"per-op"`` or ``"opmath"``.
        params, exp_avgs, exp_avg_sqs: ``[steps - first, *shape]``, contiguous: get the states after the steps from
            ``first`` on. None: not wanted.
        first: counted from 0.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_adam_steps(
        param,
        exp_avg,
        exp_avg_sq,
        grads,
        coefficients,
        clip_coefs,
        updated,
        rounding,
        params,
        exp_avgs,
        exp_avg_sqs,
        first,
    )
    state = (param, exp_avg, exp_avg_sq)
    for i in range(len(grads)):
        if updated[i]:
            grad = grads[i] * clip_coefs[i].to(grads.dtype)
            values = adam(param, grad, exp_avg, exp_avg_sq, coefficients[i : i + 1], rounding)
            for old, new in zip(state, values, strict=True):
                old.copy_(new)
        if i >= first:
            for value, records in zip(state, (params, exp_avgs, exp_avg_sqs), strict=True):
                if records is not None:
                    records[i - first] = value


def _adam_torch_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, coefficients: Tensor) -> None:
    """One step of per-op :func:`adam`, in place, with the operations of torch's unfused AdamW: three times as fast."""
    decay, bias2_sqrt, step_size, weight1, weight2, beta2, eps = coefficients[0].tolist()
    if decay != 1:
        p.mul_(decay)
    m.lerp_(g, weight1)
    v.mul_(beta2).addcmul_(g, g, value=weight2)
    denom = v.sqrt().div_(bias2_sqrt).add_(eps)
    p.addcdiv_(m, denom, value=step_size)


@cache
def torch_rounds_per_op(dtype: torch.dtype) -> bool:
    """Return whether torch's operations on this CPU round as :func:`adam` specifies, by trying them.

    For bfloat16 they do on a CPU with FMA; for float32 they also need a correctly rounded square root.
    """
    generator = torch.Generator().manual_seed(0)
    coefficients = adam_coefficients([7], [1e-3], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    scale = torch.logspace(0, -10, 4099)  # whole vectors and a remainder; down to where eps matters
    p, g, m, root = ((torch.randn(4099, generator=generator) * scale).to(dtype) for _ in range(4))
    v = root.square()
    wanted = adam(p, g, m, v, coefficients, "per-op")
    _adam_torch_(p, g, m, v, coefficients)
    return all(torch.equal(x, y) for x, y in zip((p, m, v), wanted, strict=True))


def torch_has_one_lerp(beta1: float) -> bool:
    """Return whether ``torch.lerp`` with weight ``1 - beta1`` depends only on its arguments.

    With a weight of 1 it does not: the sign of a zero differs between the vectorized part of a tensor and its tail.
    """
    return bool(torch.tensor(1 - beta1, dtype=torch.float32) != 1)


# ---------------------------------------------------------------------------------------------------------------------
# Recording


@_operation("(Tensor[] values, Tensor(a!)[] rings, Tensor step, int every) -> ()", _check_record)
def record_(values: Sequence[Tensor], rings: Sequence[Tensor], step: Tensor, every: int) -> None:
    """Copy each value to its ring's slot for ``step``, if that step is recorded; see :func:`adam_`.

    The pure-torch kernel synchronizes with the GPU if ``step`` is there.

    Args:
        values: tensors of any dtypes, on one device.
        rings: one for each value: ``[slots, *shape]``, contiguous.
        step, every: see :func:`adam_`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_record(values, rings, step, every)
    _write(values, rings, step, every)


def _write(values: Sequence[Tensor], rings: Sequence[Tensor], step: Tensor, every: int) -> None:
    number = int(step)
    if number % every:
        return
    for value, ring in zip(values, rings, strict=True):
        ring[number // every % len(ring)] = value


# ---------------------------------------------------------------------------------------------------------------------
# Fake kernels, for tracing


@torch.library.register_fake("bhfast::clip_coefficient")
def _clip_coefficient_fake(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    scalar = grads[0].new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


torch.library.register_fake("bhfast::adam_", _check_adam)
torch.library.register_fake("bhfast::record_", _check_record)
