"""The arithmetic of the operations in pure torch: Adam, gradient norm, fused multiply-add, square root."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDINGS = ("per-op", "opmath")
NORM_BLOCK = 1024  # values that grad_norm sums together


# ---------------------------------------------------------------------------------------------------------------------
# Fused multiply-add and square root


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return ``a * b + c``, rounded once. All are float32, on one device, and broadcast.

    ``torch.addcmul`` is fused on a CPU with FMA instructions; no other device promises it. Elsewhere the sum is
    computed in float64, rounded to odd, then to float32 (Boldo and Melquiond, "Emulation of FMA and correctly rounded
    sums", 2008).
    """
    if a.device.type == "cpu" and _addcmul_is_fused():
        return torch.addcmul(c, a, b)
    return _fma_float64(a, b, c)


@cache
def _addcmul_is_fused() -> bool:
    """Return whether ``torch.addcmul`` rounds once, by trying values for which rounding the product first matters."""
    a = torch.full((67,), 1 + 2.0**-12)  # 67: whole vectors and a remainder on every instruction set
    return bool((torch.addcmul(-a, a, a) == _fma_float64(a, a, -a)).all())


def _fma_float64(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    product, addend = a.double() * b.double(), c.double()  # 24 + 24 bits: the product is exact
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # TwoSum: product + addend == total + error
    bits = total.view(torch.int64)
    toward_error = torch.where((error > 0) == (total > 0), 1, -1)
    make_odd = (error.abs() > 0) & (bits & 1 == 0)  # a NaN error means an infinite or NaN total, which stays
    return torch.where(make_odd, bits + toward_error, bits).view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    """Return the square root of float32 or bfloat16, correctly rounded to its dtype.

    On some CPUs ``torch.sqrt`` in float32 is off by one ulp for a sixth of all values. In float64 the last bit does not
    matter: the root of a 24-bit number is never that close to a tie between two float32 values.
    """
    return x.double().sqrt().to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all ``grads`` as a float32 scalar, with a fixed order of summation.

    The squares, in the order given, are padded with zeros to a multiple of 1024. Each block of 1024 is summed by adding
    its second half to its first until one value is left; the block sums are summed in the same way. The order depends
    only on the sizes, so the bits are the same on every device and with any number of threads.

    Args:
        grads: non-empty; any shapes; bfloat16 or float32; on one device.
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


# ---------------------------------------------------------------------------------------------------------------------
# Adam


class AdamCoefficients(NamedTuple):
    """The scalars of one Adam step: float32, of a shape that broadcasts against the tensors."""

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
        param, grad, exp_avg, exp_avg_sq: of one shape, one dtype (bfloat16 or float32) and one device; not modified.
            ``grad`` is already clipped.
        coefficients: float32 ``[1, 7]`` for one step. To advance many states at once, such as all steps of a recording
            in ``[steps, V, D]``: ``[steps, 1, 1, 7]``. On the tensors' device.
        rounding: ``"per-op"`` rounds to the dtype after every operation, ``"opmath"`` once per output.
    """
    dtype = param.dtype
    if rounding == "opmath":
        param, grad, exp_avg, exp_avg_sq = (x.float() for x in (param, grad, exp_avg, exp_avg_sq))
    p, m, v = _adam(param, grad, exp_avg, exp_avg_sq, AdamCoefficients(*coefficients.unbind(-1)))
    return p.to(dtype), m.to(dtype), v.to(dtype)


def _adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: AdamCoefficients) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW, with every operation computed in float32 and rounded to the tensors' dtype."""
    dtype = p.dtype
    g32, m32 = g.float(), m.float()
    p = (p * c.decay).to(dtype)
    m = _lerp(m32, g32, c.weight1).to(dtype)
    v = fma(c.weight2 * g32, g32, (v * c.beta2).to(dtype).float()).to(dtype)
    denom = (sqrt(v) / c.bias2_sqrt).to(dtype) + c.eps.to(dtype)  # rounds eps, as torch's unfused AdamW does
    p = (p + c.step_size * m / denom).to(dtype)
    return p, m, v


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """Interpolate with the bits of ``torch.lerp``, which starts from the nearer end."""
    near_start = fma(weight, end - start, start)
    near_end = fma(1 - weight, -(end - start), end)
    return torch.where(weight < 0.5, near_start, near_end)


def exact_device(device: torch.device) -> torch.device:
    """Return where the arithmetic for tensors on ``device`` runs.

    That is ``device`` itself, except for MPS: it has no float64 to emulate fma with, and does not promise correctly
    rounded square roots and divisions. There it is the CPU.
    """
    return torch.device("cpu") if device.type == "mps" else device


def row_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a 1-D view of all elements if the tensors are adjacent in one storage; else None."""
    first = tensors[0]
    start = end = first.data_ptr()
    for x in tensors:
        if x.data_ptr() != end or not x.is_contiguous():
            return None
        end += x.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():
        return None  # adjacent by chance, in different storages
    return first.as_strided(((end - start) // first.itemsize,), (1,))


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return all elements as one 1-D tensor on the exact device: a view if the tensors are adjacent, else a copy."""
    flat = row_view(tensors)
    if flat is None:
        flat = torch._utils._flatten_dense_tensors(tensors)
    return flat.to(exact_device(flat.device))
