"""The factor by which gradients were clipped, found from their bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WITNESSES = 256  # elements of each gradient from which the factor is found


@torch.no_grad()
def clip_coefficient(gradients: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the factor by which gradients were clipped together, found from their bits.

    One gradient may allow several factors, if it has few elements or zeros. So this looks for one that fits all.

    Args:
        gradients: for each parameter, the gradient before clipping and after it: floating point ``[...]``.

    Returns:
        A float32 scalar c: at the 256 largest elements of each gradient, ``raw * c`` rounded to the dtype equals
        ``clipped``. 1 if nothing was changed, NaN if there is no such factor.
    """
    witnesses = [_witnesses(raw, clipped) for raw, clipped in gradients if raw.numel()]
    if not witnesses:
        return torch.ones(())
    dtype = min((raw.dtype for raw, _ in witnesses), key=lambda dtype: torch.finfo(dtype).eps)
    device = witnesses[0][0].device
    largest = torch.stack(
        [torch.stack([raw[0], clipped[0]]).to(device) for raw, clipped in witnesses if raw.dtype == dtype]
    )
    before, after = largest[largest[:, 0].abs().argmax()].double()
    ratio = after / before  # off by up to half a unit in the last place of after
    steps = torch.arange(-2, 3, dtype=torch.float64, device=device) / 2
    near = (ratio + steps * torch.finfo(dtype).eps * ratio.abs()).to(dtype)
    candidates = torch.cat([torch.ones_like(near[:1]), near])
    fits = torch.stack(
        [(raw * candidates.to(raw)[:, None] == clipped).all(dim=1).to(device) for raw, clipped in witnesses]
    ).all(dim=0)
    return torch.where(fits.any(), candidates[fits.int().argmax()].float(), math.nan)


def _witnesses(raw: Tensor, clipped: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest elements of a gradient in descending order, and their values after clipping."""
    raw, clipped = raw.flatten(), clipped.flatten()
    at = raw.abs().topk(min(WITNESSES, len(raw))).indices
    return raw[at], clipped[at]
