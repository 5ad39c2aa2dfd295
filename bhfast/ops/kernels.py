"""The operations of bhfast: clipping, Adam and recording, bit for bit the same on every device.

Each is declared once, here, with a kernel in pure torch that runs anywhere. The extension ``bhfast._C``, where it is
built, brings faster kernels for the CPU and for CUDA under the same names (``torch.ops.bhfast.*``); nothing but
:func:`bhfast.ops.backend` knows whether it is there.

Adam is written once, in :func:`bhfast.ops.arithmetic.adam`, and reads like its formula. It has two roundings:

``per-op``
    Every operation rounds to the parameter's dtype. For bfloat16 on a CPU this equals
    ``torch.optim.AdamW(foreach=False, fused=False)`` bit for bit; for float32 where torch's square root is exact. (At
    beta1 = 0 but for the sign of zeros: see :func:`torch_has_one_lerp`.)
``opmath``
    float32 inside, one rounding per output, as fused optimizers do.

Each float32 operation is IEEE 754 round-to-nearest-even, and a fused multiply-add is one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from bhfast.ops.arithmetic import AdamCoefficients, _flatten, adam, adam_coefficients, grad_norm
from bhfast.ops.checks import FIELDS, _check, _check_adam, _check_dense, _check_dtype, _check_record, _check_same

CHUNK = 1 << 15  # elements updated at once: in cache, and one thread each, as torch splits larger operations at a loss


# ---------------------------------------------------------------------------------------------------------------------
# The operations

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _operation(schema: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Declare an operation of torch by its default kernel; return what calls the best kernel there is.

    The default kernel itself is that function's ``__wrapped__``.
    """

    def declare(default: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        name = f"bhfast::{default.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "CompositeExplicitAutograd")(default)
        operation = getattr(torch.ops.bhfast, default.__name__)

        @wraps(default)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            return operation(*args, **kwargs)

        return call

    return declare


# ---------------------------------------------------------------------------------------------------------------------
# Clipping


@_operation("(Tensor[] grads, float max_norm) -> (Tensor, Tensor)")
def clip_coefficient(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Return the global norm of ``grads``, see :func:`grad_norm`, and the factor that clips it to ``max_norm``.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` has it, rounded to
    bfloat16 if any gradient is bfloat16.

    Args:
        grads: non-empty; any shapes; bfloat16 or float32; of one device.
        max_norm: above 0; inf for a factor of 1.

    Returns:
        Two float32 scalars on the gradients' device.

    Raises:
        TypeError, ValueError: an argument is not as said.
    """
    _check(bool(grads), ValueError, "grads must be at least one, got none")
    for i, grad in enumerate(grads):
        _check_dense(f"grads[{i}]", grad)
        _check_dtype(f"grads[{i}]", grad)
        _check_same(f"grads[{i}]", "be on", grad.device, grads[0].device, "grads[0]")
    norm = grad_norm(grads)
    coefficient = torch.clamp(torch.full_like(norm, max_norm) / (norm + 1e-6), max=1.0)
    if any(grad.dtype == torch.bfloat16 for grad in grads):
        coefficient = coefficient.bfloat16().float()
    return norm, coefficient


# ---------------------------------------------------------------------------------------------------------------------
# Adam


@_operation(
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor coefficients,"
    " Tensor? clip_coef, str rounding, Tensor(d!)[] rings, int[] ring_of, Tensor? step, int every) -> ()"
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
    """Advance ``params``, ``exp_avgs`` and ``exp_avg_sqs`` in place by one step; ``grads`` are only read.

    What a step made of them is recorded on the way: the gradient as it came in, the rest after the step. Call it under
    ``torch.no_grad()``.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: equally long, of equal shapes by index; one dtype (bfloat16 or float32),
            one device.
        coefficients: float32 ``[7]``, a row of :func:`adam_coefficients`; on the CPU, or on the parameters' device.
        clip_coef: float32 scalar to multiply each gradient with on its way in, likewise; None: no clipping.
        rounding: ``"per-op"`` or ``"opmath"``.
        rings: where to record, each ``[slots, *shape]`` and contiguous, with one number of slots; maybe none.
        ring_of: for each ring what it records: 4 times the parameter's index plus the field's in ``FIELDS``.
        step: int64 scalar, counted from 1, on the CPU or on the parameters' device; needed with rings. If it is a
            multiple of ``every``, the record goes to slot ``step / every % slots``.
        every: see ``step``.

    Raises:
        TypeError, ValueError: an argument is not as said; the message names it, what was wanted and what it got.
    """
    _check_adam(params, grads, exp_avgs, exp_avg_sqs, coefficients, clip_coef, rounding, rings, ring_of, step, every)
    if not params:
        return
    if clip_coef is not None and clip_coef.device.type == "cpu" and clip_coef == 1:
        clip_coef = None  # it would change nothing
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


def _adam_torch_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, coefficients: Tensor) -> None:
    """One step of per-op :func:`adam`, in place, in the operations of torch's unfused AdamW: a third of the time."""
    decay, bias2_sqrt, step_size, weight1, weight2, beta2, eps = coefficients[0].tolist()
    if decay != 1:
        p.mul_(decay)
    m.lerp_(g, weight1)
    v.mul_(beta2).addcmul_(g, g, value=weight2)
    denom = v.sqrt().div_(bias2_sqrt).add_(eps)
    p.addcdiv_(m, denom, value=step_size)


@cache
def torch_rounds_per_op(dtype: torch.dtype) -> bool:
    """Try whether torch's operations on this CPU round as :func:`adam` specifies.

    For bfloat16 they do where there is FMA; for float32 they need a correctly rounded square root besides.
    """
    generator = torch.Generator().manual_seed(0)
    coefficients = adam_coefficients([7], [1e-3], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    scale = torch.logspace(0, -10, 4099)  # a vector body and a tail; down to where eps counts
    p, g, m, root = ((torch.randn(4099, generator=generator) * scale).to(dtype) for _ in range(4))
    v = root.square()
    wanted = adam(p, g, m, v, coefficients, "per-op")
    _adam_torch_(p, g, m, v, coefficients)
    return all(torch.equal(x, y) for x, y in zip((p, m, v), wanted, strict=True))


def torch_has_one_lerp(beta1: float) -> bool:
    """Whether ``torch.lerp`` with weight ``1 - beta1`` is a function of its arguments.

    At a weight of 1 it gives a zero one sign in its vector body, another in its tail.
    """
    return bool(torch.tensor(1 - beta1, dtype=torch.float32) != 1)


# ---------------------------------------------------------------------------------------------------------------------
# Recording


@_operation("(Tensor[] values, Tensor(a!)[] rings, Tensor step, int every) -> ()")
def record_(values: Sequence[Tensor], rings: Sequence[Tensor], step: Tensor, every: int) -> None:
    """Copy each value to its ring's slot for ``step``, if that is recorded; see :func:`adam_`.

    In pure torch it waits for ``step`` where that is on a GPU.

    Args:
        values: tensors of one device, any dtypes.
        rings: for each value one, ``[slots, *shape]``, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as said.
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
# Checks. The extension makes the same ones, in the same words.


@torch.library.register_fake("bhfast::clip_coefficient")
def _clip_coefficient_fake(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    scalar = grads[0].new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


torch.library.register_fake("bhfast::adam_", _check_adam)
torch.library.register_fake("bhfast::record_", _check_record)
