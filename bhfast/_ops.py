"""The arithmetic of bhfast in pure torch: clipping and Adam, bit for bit the same on every device.

Adam is written once, in :func:`adam`, and reads like its formula. It has two roundings:

``per-op``
    Every operation rounds to the parameter's dtype. For bfloat16 on a CPU this equals
    ``torch.optim.AdamW(foreach=False, fused=False)`` bit for bit; for float32 where torch's square root is exact.
``opmath``
    float32 inside, one rounding per output, as fused optimizers do.

Each float32 operation is IEEE 754 round-to-nearest-even, and a fused multiply-add is one rounding (:func:`fma`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDINGS = ("per-op", "opmath")
NORM_BLOCK = 1024
CHUNK = 1 << 15  # elements updated at once: in cache, and one thread each, as torch splits larger operations at a loss


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

    Args:
        grads: non-empty; any shapes; bfloat16 or float32; of one device.
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
    return sqrt(x.reshape(()))


def clip_coefficient(norm: Tensor, max_norm: float, dtype: torch.dtype) -> Tensor:
    """Return ``min(1, max_norm / (norm + 1e-6))`` in ``dtype``, as ``torch.nn.utils.clip_grad_norm_`` has it."""
    limit = torch.full_like(norm, max_norm)
    return torch.clamp(limit / (norm + 1e-6), max=1.0).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Adam


class AdamCoefficients(NamedTuple):
    """What one or several steps of Adam need beside the tensors.

    The tensors are float32, of shape ``[steps]`` or broadcastable to it; the numbers are the same at every step.
    """

    decay: Tensor | None  # 1 - lr * weight_decay; None: no decay
    bias2_sqrt: Tensor  # sqrt(1 - beta2^step)
    step_size: Tensor  # -lr / (1 - beta1^step)
    weight1: Tensor  # 1 - beta1
    weight2: Tensor  # 1 - beta2
    beta2: float
    eps: float

    def unsqueeze(self, dims: int) -> AdamCoefficients:
        """Append ``dims`` axes of length 1 to every tensor, to broadcast steps against ``[steps, ...]`` tensors."""
        axes = (..., *[None] * dims)
        tensors: dict[str, Any] = {name: x[axes] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)


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
        (1 - lr * weight_decay, (1 - beta2**step) ** 0.5, -(lr / (1 - beta1**step)), 1 - beta1, 1 - beta2)
        for step, lr in zip(steps, lrs, strict=True)
    ]
    decay, bias2_sqrt, step_size, weight1, weight2 = torch.tensor(rows, dtype=torch.float32, device=device).unbind(-1)
    return AdamCoefficients(decay if weight_decay else None, bias2_sqrt, step_size, weight1, weight2, beta2, eps)


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
        rounding: ``"per-op"`` rounds to the dtype after every operation, ``"opmath"`` once per output.
    """
    dtype = param.dtype
    if rounding == "opmath":
        param, grad, exp_avg, exp_avg_sq = (x.float() for x in (param, grad, exp_avg, exp_avg_sq))
    p, m, v = _adam(param, grad, exp_avg, exp_avg_sq, c)
    return p.to(dtype), m.to(dtype), v.to(dtype)


def _adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: AdamCoefficients) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW with each operation computed in float32 and rounded to the dtype of the tensors."""
    dtype = p.dtype
    g32, m32 = g.float(), m.float()
    if c.decay is not None:
        p = (p * c.decay).to(dtype)
    m = _lerp(m32, g32, c.weight1).to(dtype)
    v = fma(c.weight2 * g32, g32, (v * c.beta2).float()).to(dtype)
    eps = torch.tensor(c.eps).to(dtype).item()  # torch's unfused AdamW adds eps in the parameter's dtype
    denom = (sqrt(v) / c.bias2_sqrt).to(dtype) + eps
    p = (p + c.step_size * m / denom).to(dtype)
    return p, m, v


def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """``torch.lerp`` to the bit: from the nearer end."""
    if weight.reshape(-1)[0] < 0.5:
        return fma(weight, end - start, start)
    return fma(1 - weight, start - end, end)


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
        params, grads, exp_avgs, exp_avg_sqs: equally long, of equal shapes by index; one dtype, one device.
        c: coefficients of one step, shape ``[1]``.
        clip_coef: scalar of the gradients' dtype, to multiply each gradient with on its way in; None: no clipping.
        rounding: ``"per-op"`` or ``"opmath"``.
    """
    # A factor of 1 changes nothing, and on a CPU costs nothing to find out.
    clips = clip_coef is not None and not (clip_coef.device.type == "cpu" and clip_coef == 1)
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    flat = [_flatten(x) for x in lists]
    is_plain = rounding == "per-op" and flat[0].device.type == "cpu" and _torch_rounds_per_op(flat[0].dtype)
    for param, grad, exp_avg, exp_avg_sq in zip(*(x.split(CHUNK) for x in flat), strict=True):
        if clips:
            grad = grad * clip_coef
        if is_plain:
            _adam_torch_(param, grad, exp_avg, exp_avg_sq, c)
            continue
        results = adam(param, grad, exp_avg, exp_avg_sq, c, rounding)
        for old, new in zip((param, exp_avg, exp_avg_sq), results, strict=True):
            old.copy_(new)
    for i in (0, 2, 3):
        if flat[i].data_ptr() != lists[i][0].data_ptr():
            torch._foreach_copy_(list(lists[i]), torch._utils._unflatten_dense_tensors(flat[i], lists[i]))


def _adam_torch_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: AdamCoefficients) -> None:
    """One step of per-op :func:`adam`, in place, in the operations of torch's unfused AdamW: a third of the time."""
    if c.decay is not None:
        p.mul_(c.decay.item())
    m.lerp_(g, c.weight1.item())
    v.mul_(c.beta2).addcmul_(g, g, value=c.weight2.item())
    denom = v.sqrt().div_(c.bias2_sqrt.item()).add_(c.eps)
    p.addcdiv_(m, denom, value=c.step_size.item())


@cache
def _torch_rounds_per_op(dtype: torch.dtype) -> bool:
    """Try whether torch's operations on this CPU round as :func:`adam` specifies.

    For bfloat16 they do where there is FMA; for float32 they need a correctly rounded square root besides.
    """
    generator = torch.Generator().manual_seed(0)
    c = adam_coefficients([7], [1e-3], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    scale = torch.logspace(0, -10, 4099)  # a vector body and a tail; down to where eps counts
    p, g, m, root = ((torch.randn(4099, generator=generator) * scale).to(dtype) for _ in range(4))
    v = root.square()
    wanted = adam(p, g, m, v, c, "per-op")
    _adam_torch_(p, g, m, v, c)
    return all(torch.equal(x, y) for x, y in zip((p, m, v), wanted, strict=True))


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
