"""All vectors of a record together: how many are distinct, where their center is, how they spread."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.lattice.adjacency import fingerprints, run_lengths

ROWS = 256  # vectors whose distances to all others are computed at once


def count_distinct(vectors: Tensor) -> Tensor:
    """Count distinct vectors, by their 64-bit :func:`fingerprints`.

    Args:
        vectors: bfloat16, float16 or float32 ``[..., V, D]``.

    Returns:
        int64 ``[...]``.
    """
    return count_distinct_values(fingerprints(vectors))


def count_distinct_values(values: Tensor) -> Tensor:
    """Count distinct values along the last axis of ``[..., V]``; returns int64 ``[...]``."""
    ordered = values.sort(-1).values
    return (ordered[..., 1:] != ordered[..., :-1]).sum(-1) + (values.shape[-1] > 0)


def cell_entropy(vectors: Tensor) -> Tensor:
    """Return the Shannon entropy of the occupied points of the lattice, in bits (Shannon, 1948).

    That is -Σ p log2 p over the sets of identical vectors, each with the share p of the vectors: 0 if all are in one
    black hole, log2 V if all are distinct. Vectors count as identical if their :func:`fingerprints` are.

    Args:
        vectors: bfloat16, float16 or float32 ``[..., V, D]``.

    Returns:
        float64 ``[...]``.
    """
    share = run_lengths(fingerprints(vectors))[1].double() / vectors.shape[-2]
    return -torch.xlogy(share, share).sum(-1) / math.log(2) + 0.0  # no -0


def centroid(vectors: Tensor) -> Tensor:
    """Return the mean of ``[..., V, D]`` over tokens: float64 ``[..., D]``."""
    return vectors.double().mean(-2)


def centered(vectors: Tensor) -> Tensor:
    """Return vectors relative to their centroid, float64 ``[..., V, D]``."""
    x = vectors.double()
    return x - x.mean(-2, keepdim=True)


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
    x, counts = torch.unique(vectors.float(), dim=0, return_counts=True)  # black holes count once
    maxima, total = [], 0.0
    for first in range(0, len(x), ROWS):
        rows = slice(first, first + ROWS)
        distances = torch.cdist(x[rows], x[first:], compute_mode="donot_use_mm_for_euclid_dist")
        maxima.append(distances.max())
        pairs = counts[rows, None] * counts[first:]
        pairs[:, len(x[rows]) :] *= 2  # and of the later vectors with these
        total += (distances.double() * pairs).sum().item()
    return PairwiseDistances(torch.stack(maxima).max().item(), total / max(1, len(vectors) * (len(vectors) - 1)))


def temperature(vectors: Tensor) -> Tensor:
    """Return the variance about the mean vector, per degree of freedom: the temperature of a gas, for velocities.

    For updates or gradients it measures how much tokens differ in them: the mean over tokens and dimensions of
    (x - mean over tokens of x)².

    Args:
        vectors: ``[..., V, D]``.

    Returns:
        float64 ``[...]``.
    """
    return centered(vectors).square().mean((-2, -1))


def principal_spectrum(vectors: Tensor) -> Tensor:
    """Return the variances of the cloud along its principal axes, the largest first.

    These are the eigenvalues of the covariance of vectors about their centroid, divided by V, not V - 1, so that they
    sum up to the mean squared distance from the centroid (Jolliffe, Principal Component Analysis, 2002). Those below
    about 1e-16 of the largest are rounding errors; none is below 0.

    Args:
        vectors: ``[..., V, D]``.

    Returns:
        float64 ``[..., D]``; NaN for a cloud with a value that is not finite.
    """
    x = centered(vectors)
    covariance = x.mT @ x / x.shape[-2]
    is_finite = covariance.isfinite().all(-1).all(-1)[..., None]
    spectrum = torch.linalg.eigvalsh(torch.where(is_finite[..., None], covariance, 0)).flip(-1).clamp(min=0)
    return torch.where(is_finite, spectrum, torch.nan)


def effective_dimension(spectrum: Tensor) -> Tensor:
    """Return the participation ratio (Σ λ)² / Σ λ²: n if n axes have the same variance and the others none.

    See Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", bioRxiv 214262, 2017.

    Args:
        spectrum: ``[..., D]``; see :func:`principal_spectrum`.

    Returns:
        ``[...]``, from 1 to D; NaN if all vectors are at one point.
    """
    relative = spectrum / spectrum.amax(-1, keepdim=True)
    return relative.sum(-1).square() / relative.square().sum(-1)


class Histogram(NamedTuple):
    """Counts in bins of equal width, each without its upper end, but for the last.

    Attributes:
        edges: float64 ``[bins + 1]``.
        counts: int64 ``[bins]``.
    """

    edges: Tensor
    counts: Tensor

    def add(self, values: Tensor) -> None:
        """Count values, float64 of any shape; leave out NaN and what is beyond the edges."""
        inside = values[(values >= self.edges[0]) & (values <= self.edges[-1])]
        which = torch.bucketize(inside, self.edges[1:-1], right=True)
        self.counts.add_(which.bincount(minlength=len(self.counts)))


def empty_histogram(low: float, high: float, bins: int) -> Histogram:
    """Return a histogram of no values."""
    return Histogram(torch.linspace(low, high, bins + 1, dtype=torch.float64), torch.zeros(bins, dtype=torch.int64))


def cosine_histogram(vectors: Tensor, bins: int = 40) -> Histogram:
    """Count the cosines of the angles between all pairs of two vectors, a few vectors at a time.

    Cosines are computed in float64, from -1 to 1. Vectors of length 0, and vectors with values that are not finite,
    have no direction: their pairs are left out.

    Args:
        vectors: ``[V, D]``: positions, positions relative to a point (see :func:`centered`), or velocities.
        bins: how many.
    """
    x = vectors.double()
    units = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    units = units[units.isfinite().all(1)]
    histogram = empty_histogram(-1, 1, bins)
    for begin in range(0, len(units), ROWS):
        cosines = (units[begin : begin + ROWS] @ units[begin:].T).clamp(-1, 1)
        later = torch.ones_like(cosines, dtype=torch.bool).triu(1)
        histogram.add(cosines[later])
    return histogram
