"""What many records say together: the paths of tokens, how far they lead, and how long a velocity lasts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.lattice import motion
from bhfast.lattice.motion import chunks
from bhfast.lattice.velocity import velocities

WINDOW = 5  # a sum over lags ends after this many correlation times


class Path(NamedTuple):
    """The paths of tokens, in the units of the vectors; float64 ``[V]`` each.

    Attributes:
        length: the sum of the distances (L2) from each record to the next.
        displacement: the distance from the first record to the last.
    """

    length: Tensor
    displacement: Tensor

    @property
    def efficiency(self) -> Tensor:
        """The share ``displacement / length``, 1 for a straight path, NaN if a token never moved; float64 ``[V]``.

        Also called straightness index (Batschelet, Circular Statistics in Biology, 1981).
        """
        return self.displacement / self.length


def path(records: Tensor) -> Path:
    """Measure the path of each token, from record to record, in constant memory.

    For the path of the centroid: ``path(per_record(centroid, records)[:, None])``.

    Args:
        records: ``[R, V, D]``, R at least 1.
    """
    length = torch.zeros(records.shape[1], dtype=torch.float64)
    for _, chunk in chunks(records, overlap=1):
        length += torch.linalg.vector_norm(velocities(chunk), dim=-1).sum(0)
    return Path(length, torch.linalg.vector_norm(records[-1].double() - records[0].double(), dim=-1))


def mean_squared_displacement(records: Tensor, lags: Sequence[int]) -> Tensor:
    """Return the mean over records t of ``|x(t + lag) - x(t)|²`` for each token, in constant memory.

    See Allen and Tildesley, Computer Simulation of Liquids, 2nd ed. 2017, section 2.7. Each lag takes a walk through
    all records. For all tokens together, take the mean.

    Args:
        records: ``[R, V, D]``.
        lags: in records, from 0 to R - 1.

    Returns:
        float64 ``[lags, V]``, in the square of the vectors' units.

    Raises:
        ValueError: a lag is negative, or not below R.
    """
    _require_lags(lags, len(records))
    advance = max(1, motion.CHUNK // max(1, math.prod(records.shape[1:])))
    sums = torch.zeros(len(lags), records.shape[1], dtype=torch.float64)
    for total, lag in zip(sums, lags, strict=True):
        origins = len(records) - lag
        for begin in range(0, origins, advance):
            end = min(begin + advance, origins)
            moved = records[begin + lag : end + lag].double() - records[begin:end].double()
            total += moved.square().sum((0, 2)) / origins
    return sums


class Autocorrelation(NamedTuple):
    """The autocorrelation of velocities, token by token.

    Attributes:
        sums: Σ over t of v(t)·v(t + k), for k = 0, 1, ...: float64 ``[K + 1, V]``. NaN for tokens with NaN.
    """

    sums: Tensor

    def pooled(self, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Return the normalised autocorrelation ρ(k) of some tokens together: float64 ``[K + 1]``.

        As is usual in molecular dynamics it is the ratio of two averages over tokens and times,
        ``<v(t)·v(t + k)> / <v(t)·v(t)>`` (Allen and Tildesley, Computer Simulation of Liquids, 2nd ed. 2017, section
        2.7), not the average of cosines: who moves faster counts for more. Velocities are not taken relative to their
        mean over time. Both sums are divided by the number of velocities, not of pairs, so that ``|ρ|`` is never above
        1, even if velocities decay (Priestley, Spectral Analysis and Time Series, 1981, section 5.3).

        Args:
            tokens: a mask or indices.
        """
        sums = self.sums[:, tokens].sum(1)
        return sums / sums[0]

    def per_token(self) -> Tensor:
        """Return the same for each token by itself: float64 ``[K + 1, V]``; NaN for a token that never moved."""
        return self.sums / self.sums[0]


def autocorrelation(records: Tensor, max_lag: int) -> Autocorrelation:
    """Correlate the velocities of each token with its later ones.

    The memory does not grow with the number of records. At least 2 × ``max_lag`` records are read at once; of those, a
    few tokens at a time are converted to float64.

    Args:
        records: ``[R, V, D]``.
        max_lag: K, in records, from 0 to R - 2.

    Raises:
        ValueError: ``max_lag`` is negative, or not below the number of velocities.
    """
    _require_lags([max_lag], len(records) - 1)
    tokens, dim = records.shape[1:]
    sums = torch.zeros(tokens, max_lag + 1, dtype=torch.float64)
    advance = max(1, max_lag, motion.CHUNK // max(1, tokens * dim))
    block = max(1, motion.CHUNK // ((advance + max_lag + 1) * max(1, dim, advance)))  # tokens at once
    for begin in range(0, len(records) - 1, advance):
        chunk = records[begin : begin + advance + max_lag + 1].as_subclass(Tensor)
        for first in range(0, tokens, block):
            v = velocities(chunk[:, first : first + block]).transpose(0, 1)
            sums[first : first + block] += _lagged_products(v, min(advance, v.shape[1]), max_lag)
    return Autocorrelation(sums.T)


def _lagged_products(v: Tensor, origins: int, max_lag: int) -> Tensor:
    """Return Σ over the first ``origins`` times t of v(t)·v(t + k): of ``[V, T, D]``, ``[V, max_lag + 1]``.

    Velocities after the end count as 0. The products of all pairs of times are one product of matrices; the lags are
    its diagonals.
    """
    width = origins + max_lag
    products = v.new_zeros(len(v), origins, width)
    products[:, :, : v.shape[1]] = v[:, :origins] @ v.mT
    return products.as_strided((len(v), origins, max_lag + 1), (origins * width, width + 1, 1)).sum(1)


def correlation_time(rho: Tensor) -> float:
    """Return the integrated autocorrelation time, in records: τ = ½ + Σ ρ(k) over k from 1 to M.

    M is the smallest lag that is at least 5 τ, as later lags would add mostly noise (Sokal, "Monte Carlo Methods in
    Statistical Mechanics: Foundations and New Algorithms", 1997). A velocity whose ρ(k) is exp(-k / T) has τ of about
    T.

    Args:
        rho: ``[K + 1]``, from lag 0 on; see :meth:`Autocorrelation.pooled`.

    Returns:
        NaN if K is too small for such an M, or ``rho`` has NaN before it.
    """
    times = rho.double().cumsum(0) - 0.5
    enough = torch.arange(len(rho)) >= WINDOW * times
    return times[int(enough.int().argmax())].item() if enough.any() else math.nan


def _require_lags(lags: Sequence[int], end: int) -> None:
    for lag in lags:
        if not 0 <= lag < end:
            raise ValueError(f"a lag must be from 0 to {end - 1} for so many records, got {lag}")
