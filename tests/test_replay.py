"""Clipping coefficients, found from the bits of gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bhfast.optim import FusedAdam
from bhfast.recording.clipping import clip_coefficient
from bhfast.recording.optimizer_description import OptimizerDescription

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def gradients(dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Of one element, of many, of none, and of zeros."""
    return [torch.randn(n, generator=generator).to(dtype) for n in (1, 1000, 3, 0)] + [torch.zeros(2, 2, dtype=dtype)]


@DTYPES
def test_one_coefficient_fits_all_gradients(dtype: torch.dtype, generator: torch.Generator) -> None:
    for _ in range(300):
        raws = gradients(dtype, generator)
        coefficient = torch.rand((), generator=generator).to(dtype)
        found = clip_coefficient([(raw, raw * coefficient) for raw in raws])
        assert found == coefficient


@DTYPES
def test_a_coefficient_of_few_elements_gives_their_bits(dtype: torch.dtype, generator: torch.Generator) -> None:
    for _ in range(300):
        raw = torch.randn(1, generator=generator).to(dtype)
        clipped = raw * torch.rand((), generator=generator).to(dtype)
        assert torch.equal(raw * clip_coefficient([(raw, clipped)]).to(dtype), clipped)


@DTYPES
def test_gradients_that_were_not_changed(dtype: torch.dtype, generator: torch.Generator) -> None:
    raws = gradients(dtype, generator)
    assert clip_coefficient([(raw, raw.clone()) for raw in raws]) == 1
    assert clip_coefficient([(raws[-1], raws[-1])]) == 1
    assert clip_coefficient([(raws[-2], raws[-2])]) == 1


def test_gradients_that_were_not_changed_by_one_factor(generator: torch.Generator) -> None:
    raws = gradients(torch.bfloat16, generator)
    assert math.isnan(clip_coefficient([(raw, raw * (0.5 + i / 8)) for i, raw in enumerate(raws)]))
    assert math.isnan(clip_coefficient([(raw, raw.clamp(-0.5, 0.5)) for raw in raws]))
    assert math.isnan(clip_coefficient([(raw * math.nan, raw * math.nan) for raw in raws]))


@pytest.mark.parametrize(("beta1", "arithmetic"), [(0.9, "per-op"), (0.0, None)])
def test_adamw_at_beta1_zero_is_not_known_to_the_bit(beta1: float, arithmetic: str | None) -> None:
    """torch gives its zeros a sign by their place; FusedAdam is specified there too."""
    params = {"w": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    keys = {"w": {"param": "w"}}
    torchs = torch.optim.AdamW(params.values(), betas=(beta1, 0.999))
    told = OptimizerDescription(torchs).describe(params, keys)
    assert told["arithmetic"] == arithmetic
    assert (
        told["reason"] == "at betas[0] = 0 the sign that torch's AdamW gives a zero depends on its place in the tensor"
    ) == (arithmetic is None)
    fused = FusedAdam(params.values(), betas=(beta1, 0.999))
    assert OptimizerDescription(fused).describe(params, keys)["arithmetic"] == "per-op"
