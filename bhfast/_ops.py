"""The arithmetic of bhfast in pure torch: clipping and Adam, bit for bit the same on every device.

Adam is written once, in :func:`adam`, and reads like its formula. It has two roundings:

``per-op``
    Every operation rounds to the parameter's dtype. On a CPU this equals
    ``torch.optim.AdamW(foreach=False, fused=False)`` bit for bit, for bfloat16 and float32.
``opmath``
    float32 inside, one rounding per output, as fused optimizers do.

Each float32 operation is IEEE 754 round-to-nearest-even, and a fused multiply-add is one rounding (:func:`fma`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDINGS = ("per-op", "opmath")
NORM_BLOCK = 1024
CHUNK = 1 << 16  # elements updated at once: the temporaries stay in the cache


def backend() -> tuple[str, str]:
    """Return the name of the implementation behind these operations, and why it was chosen."""
    return "torch", "pure torch, as this version of bhfast has no compiled extension"


# ---------------------------------------------------------------------------------------------------------------------
# Fused multiply-add


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


# ---------------------------------------------------------------------------------------------------------------------
# Clipping


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all ``grads`` as a float32 scalar, with a fixed order of summation.

    The squares, in the order given, are padded with zeros to a multiple of 1024. Each block of 1024 is summed by adding
    its second half to its first until one value is left; the block sums are summed the same way. The order depends on
    nothing but the sizes, so the bits are the same on every device and for any number of threads.

    Args:
        grads: non-empty; any shapes; bfloat16 or float32; of one device.
    """
    x = _flatten(grads).float()
    x = x * x
    while x.numel() > 1:
        x = torch.nn.functional.pad(x, (0, -x.numel() % NORM_BLOCK)).view(-1, NORM_BLOCK)
        while x.size(1) > 1:
            half = x.size(1) // 2
            x = x[:, :half] + x[:, half:]
        x = x.view(-1)
    return x.view(()).sqrt()


def clip_coefficient(norm: Tensor, max_norm: float, dtype: torch.dtype) -> Tensor:
    """Return ``min(1, max_norm / (norm + 1e-6))``, rounded to ``dtype``, as ``torch.nn.utils.clip_grad_norm_`` has it."""
    limit = torch.full_like(norm, max_norm)
    return torch.clamp(limit / (norm + 1e-6), max=1.0).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Adam


class AdamCoefficients(NamedTuple):
    """What one or several steps of Adam need beside the tensors: float32, shape ``[steps]`` or broadcastable."""

    decay: Tensor | None  # 1 - lr * weight_decay; None: no decay
    weight1: Tensor  # 1 - beta1
    beta2: Tensor
    weight2: Tensor  # 1 - beta2
    bias2_sqrt: Tensor  # sqrt(1 - beta2^step)
    step_size: Tensor  # -lr / (1 - beta1^step)
    eps: Tensor
    lerp_from_start: bool  # |1 - beta1| < 0.5, which decides how lerp is evaluated

    def unsqueeze(self, dims: int) -> AdamCoefficients:
        """Append ``dims`` axes of length 1 to every tensor, to broadcast steps against ``[steps, ...]`` tensors."""
        return self._make(x[(...,) + (None,) * dims] if isinstance(x, Tensor) else x for x in self)


def adam_coefficients(
    steps: Sequence[int],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    device: torch.device | str = "cpu",
) -> AdamCoefficients:
    """Compute the coefficients of ``steps`` (counted from 1) in double precision, each rounded once to float32."""
    beta1, beta2 = betas
    rows = [
        (
            1 - lr * weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            (1 - beta2**step) ** 0.5,
            -(lr / (1 - beta1**step)),
            eps,
        )
        for step, lr in zip(steps, lrs, strict=True)
    ]
    decay, *rest = torch.tensor(rows, dtype=torch.float32, device=device).unbind(-1)
    return AdamCoefficients(decay if weight_decay else None, *rest, lerp_from_start=abs(1 - beta1) < 0.5)


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    c: AdamCoefficients,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return param, exp_avg and exp_avg_sq after one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        param, grad, exp_avg, exp_avg_sq: one shape, one dtype (bfloat16 or float32), one device; none is written to.
            ``grad`` is already clipped.
        c: coefficients that broadcast against them: shape ``[1]`` for one step, ``[steps, 1, 1]`` to advance every step
            of a recording at once from its own recorded state.
        rounding: ``"per-op"`` or ``"opmath"``.
    """
    dtype = param.dtype
    p, g, m, v = param.float(), grad.float(), exp_avg.float(), exp_avg_sq.float()
    r = _round_to(dtype) if rounding == "per-op" else _keep

    if c.decay is not None:
        p = r(p * c.decay)
    m = r(fma(c.weight1, g - m, m) if c.lerp_from_start else fma(1 - c.weight1, m - g, g))
    v = r(fma(c.weight2 * g, g, r(v * c.beta2)))
    denom = r(r(r(v.sqrt()) / c.bias2_sqrt) + r(c.eps))
    p = p + c.step_size * m / denom
    return p.to(dtype), m.to(dtype), v.to(dtype)


def _round_to(dtype: torch.dtype):
    return lambda x: x.to(dtype).float()


def _keep(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    c: AdamCoefficients,
    clip_coef: Tensor | None,
    rounding: str,
) -> None:
    """Advance ``params``, ``exp_avgs`` and ``exp_avg_sqs`` in place by one step; ``grads`` are only read.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: equally long; tensors at one index have one shape; all of one dtype and device.
        c: coefficients of one step, shape ``[1]``.
        clip_coef: scalar of the gradients' dtype that every gradient is multiplied with on its way in; None: no clipping.
        rounding: ``"per-op"`` or ``"opmath"``.
    """
    flat = [_flatten(x) for x in (params, grads, exp_avgs, exp_avg_sqs)]
    for param, grad, exp_avg, exp_avg_sq in zip(*(x.split(CHUNK) for x in flat), strict=True):
        if clip_coef is not None:
            grad = grad * clip_coef
        results = adam(param, grad, exp_avg, exp_avg_sq, c, rounding)
        for old, new in zip((param, exp_avg, exp_avg_sq), results, strict=True):
            old.copy_(new)
    for destinations, result in zip((params, exp_avgs, exp_avg_sqs), (flat[0], flat[2], flat[3]), strict=True):
        pieces = result.split([x.numel() for x in destinations])
        torch._foreach_copy_(destinations, [piece.view_as(x) for piece, x in zip(pieces, destinations, strict=True)])


def exact_device(device: torch.device) -> torch.device:
    """Return where the arithmetic for tensors on ``device`` runs.

    That is ``device`` itself, but the CPU for MPS, which has no float64 to emulate fma with and promises no correct
    rounding of square root and division.
    """
    return torch.device("cpu") if device.type == "mps" else device


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.cat([x.reshape(-1) for x in tensors])
    return flat.to(exact_device(flat.device))
