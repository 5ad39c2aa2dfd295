"""All vectors of a record together: how many are distinct, where their center is, how far they spread."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.lattice.adjacency import fingerprints

ROWS = 256  # vectors whose distances to all others are computed at once


def count_distinct(vectors: Tensor) -> Tensor:
    """Count distinct vectors, by their 64-bit :func:`fingerprints`.

    Args:
        vectors: bfloat16 ``[..., V, D]``.

    Returns:
        int64 ``[...]``.
    """
    return count_distinct_values(fingerprints(vectors))


def count_distinct_values(values: Tensor) -> Tensor:
    """Count distinct values along the last axis of ``[..., V]``; returns int64 ``[...]``."""
    ordered = values.sort(-1).values
    return (ordered[..., 1:] != ordered[..., :-1]).sum(-1) + (values.shape[-1] > 0)


def centroid(vectors: Tensor) -> Tensor:
    """Return the mean of ``[..., V, D]`` over tokens: float64 ``[..., D]``."""
    return vectors.double().mean(-2)


def radii(vectors: Tensor, about: Tensor | None = None) -> Tensor:
    """Return the L2 distance of each vector from a point.

    Args:
        vectors: ``[..., V, D]``.
        about: ``[..., D]``; None for the origin.

    Returns:
        float64 ``[..., V]``.
    """
    centered = vectors.double() if about is None else vectors.double() - about[..., None, :]
    return torch.linalg.vector_norm(centered, dim=-1)


class PairwiseDistances(NamedTuple):
    """The largest and the mean L2 distance between two different vectors; 0 if there is only one."""

    largest: float
    mean: float


def pairwise_distances(vectors: Tensor) -> PairwiseDistances:
    """Return the largest and the mean L2 distance over all pairs of rows of ``[V, D]``, computed in float32.

    Distances are computed from differences, not from products, so that identical vectors are exactly 0 apart. Both are
    NaN if any value is.
    """
    x = vectors.float()
    maxima, total = [], 0.0
    for rows in x.split(ROWS):
        distances = torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")
        maxima.append(distances.max())
        total += distances.sum(dtype=torch.float64).item()
    return PairwiseDistances(torch.stack(maxima).max().item(), total / max(1, len(x) * (len(x) - 1)))


def temperature(vectors: Tensor) -> Tensor:
    """Return the variance about the mean vector, per degree of freedom: the temperature of a gas, for velocities.

    For updates or gradients it measures how much tokens differ in them: the mean over tokens and dimensions of
    (x - mean over tokens of x)².

    Args:
        vectors: ``[..., V, D]``.

    Returns:
        float64 ``[...]``.
    """
    x = vectors.double()
    return (x - x.mean(-2, keepdim=True)).square().mean((-2, -1))
