"""Values of bfloat16 as points of a lattice: the spacing there, and integer coordinates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_POWER = 2.0**-126  # of two that is a normal number: below it the spacing stays the same


def ulp(x: Tensor) -> Tensor:
    """Return the distance of each value to the next one of larger magnitude: 2^(E - 134), with E the biased exponent.

    Args:
        x: bfloat16, any shape.

    Returns:
        float64 of that shape: 2^-133 for zero and subnormal numbers, NaN for infinities and NaN.

    Raises:
        TypeError: it is not bfloat16.
    """
    power = _power_of_two(x).double()
    return torch.where(power.isinf(), torch.nan, power / 128)


def displacement(before: Tensor, after: Tensor) -> Tensor:
    """Return how far each value moved, in ulp at its start. Both bfloat16, of one shape; the result is float64."""
    if after.dtype != torch.bfloat16:
        raise TypeError(f"the lattice is that of bfloat16, got {after.dtype}")
    return (after.double() - before.double()) / _power_of_two(before).double() * 128


def coordinate(x: Tensor) -> Tensor:
    """Number the values in their order: neighbours differ by one, also at powers of two; both zeros are 0.

    Args:
        x: bfloat16, any shape.

    Returns:
        int16 of that shape: ±32640 for infinities, beyond for NaN. Differences need more bits.

    Raises:
        TypeError: it is not bfloat16.
    """
    if x.dtype != torch.bfloat16:
        raise TypeError(f"the lattice is that of bfloat16, got {x.dtype}")
    bits = x.view(torch.int16)
    magnitude = bits & 0x7FFF
    return torch.where(bits < 0, -magnitude, magnitude)


class Norms(NamedTuple):
    """Of displacements in ulp; float64 ``[...]``."""

    l1: Tensor
    l2: Tensor
    linf: Tensor


def norms(displacements: Tensor) -> Norms:
    """Return the norms along the last axis of ``[..., D]``."""
    size = displacements.abs()
    return Norms(size.sum(-1), size.square().sum(-1).sqrt(), size.amax(-1))


def _power_of_two(x: Tensor) -> Tensor:
    """Return the largest power of two that is not above each magnitude, in float32; 2^-126 at least."""
    if x.dtype != torch.bfloat16:
        raise TypeError(f"the lattice is that of bfloat16, got {x.dtype}")
    return (x.float().view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=SMALLEST_POWER)
