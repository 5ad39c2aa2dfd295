"""Fused multiply-add, compared with exact sums."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import same_bits

from bhfast.ops import arithmetic

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def exact_fma(a: float, b: float, c: float) -> float:
    """a * b + c in rational numbers, rounded once to float32 (to nearest, ties to even)."""
    total = Fraction(a) * Fraction(b) + Fraction(c)
    nearest = np.float32(float(total))
    candidates = [nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))]
    finite = [x for x in candidates if np.isfinite(x)]
    return float(min(finite, key=lambda x: (abs(Fraction(float(x)) - total), int(x.view(np.uint32)) & 1)))


@settings(max_examples=400, deadline=None)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    total = abs(Fraction(a) * Fraction(b) + Fraction(c))
    if total > Fraction(2) ** 127:
        return  # may round to infinity, which has no nearest candidate
    args = [torch.tensor([x], dtype=torch.float32) for x in (a, b, c)]
    wanted = exact_fma(*(x.item() for x in args))
    assert arithmetic.fma(*args).item() == wanted
    assert arithmetic._fma_float64(*args).item() == wanted


def test_fma_emulation_equals_the_instruction(generator: torch.Generator) -> None:
    if not arithmetic._addcmul_is_fused():
        pytest.skip("this CPU has no fused multiply-add to compare with")
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 500_000), dtype=torch.int32, generator=generator)
    a, b, c = bits.view(torch.float32)
    assert same_bits(arithmetic._fma_float64(a, b, c), torch.addcmul(c, a, b))


def test_fma_emulation_does_not_round_twice() -> None:
    """The product lies 2^-70 below half an ulp: float64 alone would see a tie, and round it to the even neighbour."""
    a, b, c = (torch.tensor([x]) for x in (2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23))
    assert (a.double() * b.double() + c.double()).float().item() == 1 + 2.0**-22
    assert arithmetic._fma_float64(a, b, c).item() == 1 + 2.0**-23
