"""Floating-point values as points of the lattice of their dtype: integer coordinates, and the spacing of neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Format(NamedTuple):
    """A floating-point format: integers of its size, its fraction bits, the exponent of its smallest normal number."""

    integer: torch.dtype
    fraction_bits: int
    least_exponent: int


_FORMATS = {
    torch.bfloat16: _Format(torch.int16, 7, -126),
    torch.float16: _Format(torch.int16, 10, -14),
    torch.float32: _Format(torch.int32, 23, -126),
}


def ulp(x: Tensor) -> Tensor:
    """Return the distance from each value to the next one of larger magnitude, in its own dtype.

    For bfloat16 that is 2^(E - 134) for a value whose biased exponent is E.

    Args:
        x: bfloat16, float16 or float32, any shape.

    Returns:
        float64 of the same shape. For zero and subnormal numbers, the smallest subnormal number, 2^-133 for bfloat16,
        2^-24 for float16, 2^-149 for float32. For infinities and NaN, NaN.

    Raises:
        TypeError: ``x`` has another dtype.
    """
    power = _power_of_two(x)
    return torch.where(power.isinf(), torch.nan, power * 2.0 ** -_format(x).fraction_bits)


def displacement(before: Tensor, after: Tensor) -> Tensor:
    """Return how far each value moved, in ulp at the starting value.

    Args:
        before, after: of one shape and one dtype: bfloat16, float16 or float32.

    Returns:
        float64 of that shape.

    Raises:
        TypeError: they have another dtype, or two.
    """
    if _format(after) != _format(before):
        raise TypeError(f"before and after must be of one dtype, got {before.dtype} and {after.dtype}")
    return (after.double() - before.double()) / _power_of_two(before) * 2.0 ** _format(before).fraction_bits


def coordinate(x: Tensor) -> Tensor:
    """Number the values of a dtype in ascending order: neighbours differ by one, across powers of two as well.

    Args:
        x: bfloat16, float16 or float32, any shape.

    Returns:
        int16, for float32 int32, of the same shape. It is 0 for both zeros, one more than the largest finite magnitude
        for infinities, a larger magnitude for NaN. The difference of two coordinates may not fit into this dtype.

    Raises:
        TypeError: ``x`` has another dtype.
    """
    integer = _format(x).integer
    bits = x.view(integer)
    magnitude = bits & torch.iinfo(integer).max
    return torch.where(bits < 0, -magnitude, magnitude)


class Norms(NamedTuple):
    """Norms of displacements, in ulp; float64 ``[...]`` each."""

    l1: Tensor
    l2: Tensor
    linf: Tensor


def norms(displacements: Tensor) -> Norms:
    """Return the norms along the last axis of ``[..., D]``."""
    size = displacements.abs()
    return Norms(size.sum(-1), size.square().sum(-1).sqrt(), size.amax(-1))


def _power_of_two(x: Tensor) -> Tensor:
    """Return the largest power of two not above each magnitude, but at least the smallest normal number; float64."""
    least = 2.0 ** _format(x).least_exponent
    return (x.float().view(torch.int32) & 0x7F800000).view(torch.float32).double().clamp(min=least)


def _format(x: Tensor) -> _Format:
    if x.dtype not in _FORMATS:
        raise TypeError(f"the lattice is that of bfloat16, float16 or float32, got {x.dtype}; convert it first")
    return _FORMATS[x.dtype]
