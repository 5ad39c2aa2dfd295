"""Bfloat16 values as points of a lattice: integer coordinates, and the spacing between neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_NORMAL = 2.0**-126  # below it the spacing stays the same
ULPS_PER_BINADE = 128  # bfloat16 has 7 fraction bits


def ulp(x: Tensor) -> Tensor:
    """Return the distance from each value to the next one of larger magnitude.

    That is 2^(E - 134) for a value whose biased exponent is E.

    Args:
        x: bfloat16, any shape.

    Returns:
        float64 of the same shape: 2^-133 for zero and subnormal numbers, NaN for infinities and NaN.

    Raises:
        TypeError: ``x`` is not bfloat16.
    """
    power = _power_of_two(x).double()
    return torch.where(power.isinf(), torch.nan, power / ULPS_PER_BINADE)


def displacement(before: Tensor, after: Tensor) -> Tensor:
    """Return how far each value moved, in ulp at the starting value.

    Args:
        before, after: bfloat16 of the same shape.

    Returns:
        float64 of that shape.

    Raises:
        TypeError: one of them is not bfloat16.
    """
    _require_bfloat16(after)
    return (after.double() - before.double()) / _power_of_two(before).double() * ULPS_PER_BINADE


def coordinate(x: Tensor) -> Tensor:
    """Number the bfloat16 values in ascending order: neighbours differ by one, across powers of two as well.

    Args:
        x: bfloat16, any shape.

    Returns:
        int16 of the same shape: 0 for both zeros, ±32640 for infinities, a larger magnitude for NaN. The difference of
        two coordinates may not fit into int16.

    Raises:
        TypeError: ``x`` is not bfloat16.
    """
    _require_bfloat16(x)
    bits = x.view(torch.int16)
    magnitude = bits & 0x7FFF
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
    """Return the largest power of two not above each magnitude, but at least 2^-126; float32."""
    _require_bfloat16(x)
    return (x.float().view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=SMALLEST_NORMAL)


def _require_bfloat16(x: Tensor) -> None:
    if x.dtype != torch.bfloat16:
        raise TypeError(f"the lattice is that of bfloat16, got {x.dtype}")
