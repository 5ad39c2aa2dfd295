"""The operations of bhfast: clipping, Adam and recording, bit for bit the same on every device.

Each is declared once, here, with a kernel in pure torch that runs anywhere. The extension ``bhfast._C``, where it is
built, brings faster kernels for the CPU and for CUDA under the same names (``torch.ops.bhfast.*``); nothing but
:func:`backend` knows whether it is there.

Adam is written once, in :func:`adam`, and reads like its formula. It has two roundings:

``per-op``
    Every operation rounds to the parameter's dtype. For bfloat16 on a CPU this equals
    ``torch.optim.AdamW(foreach=False, fused=False)`` bit for bit; for float32 where torch's square root is exact. (At
    beta1 = 0 but for the sign of zeros: see :func:`torch_has_one_lerp`.)
``opmath``
    float32 inside, one rounding per output, as fused optimizers do.

Each float32 operation is IEEE 754 round-to-nearest-even, and a fused multiply-add is one rounding (:func:`fma`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

ROUNDINGS = ("per-op", "opmath")
FIELDS = ("param", "grad", "exp_avg", "exp_avg_sq")  # of a parameter, in the order of ``ring_of``
NORM_BLOCK = 1024
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


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("bhfast._C"), ""
    except ModuleNotFoundError:
        return None, "the extension is not built: pip install --no-build-isolation -e . builds it where a compiler is"
    except ImportError as error:  # built for another torch, say
        return None, f"the extension does not load: {error}; build it anew"


def backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Return the name of the implementation behind these operations on ``device``, and why it was chosen."""
    kind = torch.device(device).type
    if _extension is None:
        return "torch", _unavailable
    if kind == "cpu":
        return "C++", f"compiled; {_extension.instruction_set()}"
    if kind == "cuda" and _extension.cuda_architectures:
        return "CUDA", f"compiled for {_extension.cuda_architectures}"
    return "torch", f"the extension was built without kernels for {kind}"


def native_instruction_sets() -> list[str]:
    """Return the instruction sets that the native engine can use here, best first; none if it is not built."""
    return [] if _extension is None else _extension.native_instruction_sets()


def native_engine(**arguments: Any) -> Any:
    """Return a new object that runs training steps; see :mod:`bhfast.engines.native`, its only user."""
    assert _extension is not None
    return _extension.NativeEngine(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Fused multiply-add and square root


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * b + c``, rounded once. All float32, of one device, broadcastable.

    ``torch.addcmul`` fuses on a CPU with FMA instructions, on no other device reliably; elsewhere the sum is formed in
    float64, rounded to odd, then to float32 (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    if a.device.type == "cpu" and _addcmul_is_fused():
        return torch.addcmul(c, a, b)
    return _fma_float64(a, b, c)


@cache
def _addcmul_is_fused() -> bool:
    """Try ``torch.addcmul`` on a triple whose answer differs when the product is rounded first."""
    a = torch.full((67,), 1 + 2.0**-12)  # 67: a vector body and a tail on every instruction set
    return bool((torch.addcmul(-a, a, a) == _fma_float64(a, a, -a)).all())


def _fma_float64(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    product, addend = a.double() * b.double(), c.double()  # 24 + 24 bits: the product is exact
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # TwoSum: product + addend == total + error
    bits = total.view(torch.int64)
    toward_error = torch.where((error > 0) == (total > 0), 1, -1)
    make_odd = (error.abs() > 0) & (bits & 1 == 0)  # a NaN error means an infinite or NaN total: left alone
    return torch.where(make_odd, bits + toward_error, bits).view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    """Return the square root of float32 or bfloat16, correctly rounded to its dtype.

    ``torch.sqrt`` in float32 is off by one ulp for a sixth of all values on some CPUs. The root of a 24-bit number is
    never so near to a tie of float32 that an error in the last place of float64 could change the rounding.
    """
    return x.double().sqrt().to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all ``grads`` as a float32 scalar, with a fixed order of summation.

    The squares, in the order given, are padded with zeros to a multiple of 1024. Each block of 1024 is summed by adding
    its second half to its first until one value is left; the block sums are summed the same way. The order depends on
    nothing but the sizes, so the bits are the same on every device and for any number of threads.
    """
    x = _flatten([*grads, grads[0].new_zeros(-sum(grad.numel() for grad in grads) % NORM_BLOCK)]).float()
    x.mul_(x)
    while x.numel() > 1:
        width = min(NORM_BLOCK, 1 << (x.numel() - 1).bit_length())  # the zeros beyond it would change no sum
        x = torch.nn.functional.pad(x, (0, -x.numel() % width)).view(-1, width)
        while width > 1:
            width //= 2
            x[:, :width].add_(x[:, width : 2 * width])
        x = x[:, 0]
    return sqrt(x.reshape(())).to(grads[0].device)


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


class AdamCoefficients(NamedTuple):
    """What a step of Adam needs beside the tensors: float32, of a shape that broadcasts against them."""

    decay: Tensor  # 1 - lr * weight_decay
    bias2_sqrt: Tensor  # sqrt(1 - beta2^step)
    step_size: Tensor  # -lr / (1 - beta1^step)
    weight1: Tensor  # 1 - beta1
    weight2: Tensor  # 1 - beta2
    beta2: Tensor
    eps: Tensor


def adam_coefficients(
    steps: Iterable[int],
    lrs: Iterable[float],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """Compute the coefficients of ``steps`` (counted from 1) in double precision, each rounded once to float32.

    Returns:
        ``[steps, 7]`` on the CPU, its columns in the order of :class:`AdamCoefficients`.
    """
    beta1, beta2 = betas
    rows = [
        (
            1 - lr * weight_decay,
            (1 - beta2**step) ** 0.5,
            -(lr / (1 - beta1**step)),
            1 - beta1,
            1 - beta2,
            beta2,
            eps,
        )
        for step, lr in zip(steps, lrs, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    coefficients: Tensor,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return param, exp_avg and exp_avg_sq after one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        param, grad, exp_avg, exp_avg_sq: one shape, one dtype (bfloat16 or float32), one device; none is written to.
            ``grad`` is already clipped.
        coefficients: ``[1, 7]`` for one step, or ``[steps, 1, 1, 7]``, say, to advance ``[steps, V, D]``: every step of
            a recording at once, from its own recorded state. On the tensors' device.
        rounding: ``"per-op"`` rounds to the dtype after every operation, ``"opmath"`` once per output.
    """
    dtype = param.dtype
    if rounding == "opmath":
        param, grad, exp_avg, exp_avg_sq = (x.float() for x in (param, grad, exp_avg, exp_avg_sq))
    p, m, v = _adam(param, grad, exp_avg, exp_avg_sq, AdamCoefficients(*coefficients.unbind(-1)))
    return p.to(dtype), m.to(dtype), v.to(dtype)


def _adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: AdamCoefficients) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW with each operation computed in float32 and rounded to the dtype of the tensors."""
    dtype = p.dtype
    g32, m32 = g.float(), m.float()
    p = (p * c.decay).to(dtype)
    m = _lerp(m32, g32, c.weight1).to(dtype)
    v = fma(c.weight2 * g32, g32, (v * c.beta2).to(dtype).float()).to(dtype)
    denom = (sqrt(v) / c.bias2_sqrt).to(dtype) + c.eps.to(dtype)  # eps too: torch's unfused AdamW rounds it
    p = (p + c.step_size * m / denom).to(dtype)
    return p, m, v


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``torch.lerp`` to the bit: from the nearer end."""
    near_start = fma(weight, end - start, start)
    near_end = fma(1 - weight, -(end - start), end)
    return torch.where(weight < 0.5, near_start, near_end)


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


def exact_device(device: torch.device) -> torch.device:
    """Return where the arithmetic for tensors on ``device`` runs.

    That is ``device`` itself, but the CPU for MPS, which has no float64 to emulate fma with and promises no correct
    rounding of square root and division.
    """
    return torch.device("cpu") if device.type == "mps" else device


def row_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return one view of all elements in a row, if the tensors lie side by side in one storage; else None."""
    first = tensors[0]
    start = end = first.data_ptr()
    for x in tensors:
        if x.data_ptr() != end or not x.is_contiguous():
            return None
        end += x.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None  # neighbours by chance
    return first.as_strided(((end - start) // first.itemsize,), (1,))


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements in a row, where the arithmetic runs: a view if the tensors lie side by side, else a copy."""
    flat = row_view(tensors)
    if flat is None:
        flat = torch._utils._flatten_dense_tensors(tensors)
    return flat.to(exact_device(flat.device))


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


def _check(holds: bool, kind: type[Exception], message: str) -> None:
    if not holds:
        raise kind(message)


def _check_length(name: str, one: Sequence[object], like: str, other: Sequence[object]) -> None:
    _check(len(one) == len(other), ValueError, f"{name} must be as many as {like} ({len(other)}), got {len(one)}")


def _check_dense(name: str, grad: Tensor) -> None:
    message = f"{name} must be dense, got a sparse one: build the embedding with sparse=False"
    _check(grad.layout == torch.strided, TypeError, message)


def _check_dtype(name: str, tensor: Tensor) -> None:
    dtypes = (torch.bfloat16, torch.float32)
    _check(tensor.dtype in dtypes, TypeError, f"{name} must be bfloat16 or float32, got {_name(tensor.dtype)}")


def _check_same(name: str, verb: str, got: object, wanted: object, like: str) -> None:
    kind = TypeError if isinstance(wanted, torch.dtype) else ValueError
    _check(got == wanted, kind, f"{name} must {verb} {_name(wanted)} like {like}, got {_name(got)}")


def _name(thing: object) -> str:
    return str(list(thing)) if isinstance(thing, torch.Size) else str(thing).removeprefix("torch.")


def _check_adam(params, grads, exp_avgs, exp_avg_sqs, coefficients, clip_coef, rounding, rings, ring_of, step, every):  # type: ignore[no-untyped-def]
    if not params:
        return
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_dtype("params[0]", params[0])
    for name, tensors in lists.items():
        _check_length(name, tensors, "params", params)
    _check(rounding in ROUNDINGS, ValueError, f"rounding must be per-op or opmath, got {rounding}")
    _check_length("ring_of", ring_of, "rings", rings)
    for i, param in enumerate(params):
        _check_dense(f"grads[{i}]", grads[i])
        _check_same(f"params[{i}]", "be", param.dtype, params[0].dtype, "params[0]")
        _check_same(f"params[{i}]", "be on", param.device, params[0].device, "params[0]")
        for name, tensors in lists.items():
            _check_same(f"{name}[{i}]", "be", tensors[i].dtype, param.dtype, f"params[{i}]")
            _check_same(f"{name}[{i}]", "have shape", tensors[i].shape, param.shape, f"params[{i}]")
            _check_same(f"{name}[{i}]", "be on", tensors[i].device, param.device, f"params[{i}]")
    _check_number("coefficients", coefficients, torch.float32, len(AdamCoefficients._fields))
    if clip_coef is not None:
        _check_number("clip_coef", clip_coef, torch.float32, 1)
    if rings:
        _check(step is not None, ValueError, "step must be given with rings, got None")
        most = len(FIELDS) * len(params)
        for j, which in enumerate(ring_of):
            message = f"ring_of[{j}] must be a field of one of the params (below {most}), got {which}"
            _check(0 <= which < most, ValueError, message)
        _check_record([params[which // len(FIELDS)] for which in ring_of], rings, step, every)


def _check_number(name: str, tensor: Tensor, dtype: torch.dtype, numel: int) -> None:
    _check(tensor.dtype == dtype, TypeError, f"{name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    _check(tensor.numel() == numel, ValueError, f"{name} must have {numel} elements, got {tensor.numel()}")


def _check_record(values: Sequence[Tensor], rings: Sequence[Tensor], step: Tensor, every: int) -> None:
    _check_length("rings", rings, "values", values)
    _check_number("step", step, torch.int64, 1)
    _check(every > 0, ValueError, f"every must be at least 1, got {every}")
    slots = len(rings[0]) if rings and rings[0].dim() else 0
    for i, (value, ring) in enumerate(zip(values, rings, strict=True)):
        name = f"rings[{i}]"
        _check_same(name, "be", ring.dtype, value.dtype, "what it records")
        message = f"{name} must have shape [slots, *{list(value.shape)}], got {list(ring.shape)}"
        _check(ring.dim() > 0 and ring.shape[1:] == value.shape, ValueError, message)
        message = f"{name} must have as many slots as the first ring ({slots}), at least 1, got {len(ring)}"
        _check(len(ring) == slots > 0, ValueError, message)
        _check(ring.is_contiguous(), ValueError, f"{name} must be contiguous")


@torch.library.register_fake("bhfast::clip_coefficient")
def _clip_coefficient_fake(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    scalar = grads[0].new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


torch.library.register_fake("bhfast::adam_", _check_adam)
torch.library.register_fake("bhfast::record_", _check_record)

_extension, _unavailable = _load()  # after the declarations, which its kernels are for
