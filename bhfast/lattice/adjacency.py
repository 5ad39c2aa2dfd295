"""Finds vectors that share a point of the lattice, vectors at adjacent points, and sets of vectors close together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bhfast.lattice.coordinates import coordinate

CHUNK = 1 << 22  # coordinates processed at once
LEAF_SIZE = 256  # points few enough to compare every pair
AXES_TRIED = 32  # random axes among which to look for a cut
AXES_TRIED_LATER = 256  # if none of those will do: this many at once, until all have been tried
MAX_KEPT = 0.8  # share of the points that either side of a cut may keep
FILTER_AXES = 16  # compared first: they rule out most pairs


def fingerprints(x: Tensor) -> Tensor:
    """Hash vectors to 64 bits; vectors at the same point of the lattice have the same hash, whatever the sign of zeros.

    The hash is the sum of the coordinates, each times a fixed random factor, modulo 2^64. Two different vectors collide
    with a probability below 2^-48.

    Args:
        x: bfloat16, float16 or float32 ``[..., D]``.

    Returns:
        int64 ``[...]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    parts = [
        (coordinate(part).long() * _hash_factors(x.shape[-1])).sum(-1) for part in rows.split(_chunk_rows(x.shape[-1]))
    ]
    return torch.cat(parts).view(x.shape[:-1]) if parts else torch.empty(x.shape[:-1], dtype=torch.int64)


def run_lengths(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often each value of a row occurs in it: int64 ``[..., V]`` twice.

    Args:
        values: ``[..., V]``.

    Returns:
        ``run``, the number of each value's run in the sorted row, and ``length``, the length of each run; 0 beyond the
        last.
    """
    ordered, position = values.sort(-1)
    starts = torch.zeros_like(ordered, dtype=torch.int64)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    run = starts.cumsum(-1)
    length = torch.zeros_like(run).scatter_add_(-1, run, torch.ones_like(run))
    return torch.empty_like(run).scatter_(-1, position, run), length


def _hash_factors(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (dim,), generator=generator) | 1


def _chunk_rows(dim: int) -> int:
    return max(1, CHUNK // max(1, dim))


class Cells(NamedTuple):
    """The points of the lattice that V vectors occupy.

    Attributes:
        cell: int64 ``[V]``: the number of each vector's point. Points are numbered in the order of their first vectors.
        first: int64 ``[C]``: the first vector at each point.
        multiplicity: int64 ``[C]``: how many vectors are there.
    """

    cell: Tensor
    first: Tensor
    multiplicity: Tensor

    @property
    def black_holes(self) -> Tensor:
        """The points with more than one vector, the most crowded first, as int64 ``[H]``."""
        order = self.multiplicity.argsort(descending=True, stable=True)
        return order[self.multiplicity[order] > 1]


def cells(vectors: Tensor) -> Cells:
    """Group identical vectors. The result is exact: vectors with the same fingerprint are compared value by value.

    Args:
        vectors: bfloat16, float16 or float32 ``[V, D]``.
    """
    fingerprint = fingerprints(vectors)
    order = fingerprint.argsort(stable=True)
    ordered = fingerprint[order]
    same_as_previous = torch.zeros(len(ordered), dtype=torch.bool)  # in this order
    candidates = (ordered[1:] == ordered[:-1]).nonzero()[:, 0] + 1
    for part in candidates.split(_chunk_rows(vectors.shape[1])):
        one, other = coordinate(vectors[order[part]]), coordinate(vectors[order[part - 1]])
        same_as_previous[part] = (one == other).all(1)
    if same_as_previous[candidates].all():
        label = torch.empty_like(order)
        label[order] = (~same_as_previous).cumsum(0) - 1
    else:  # a collision of fingerprints
        _, number = np.unique(coordinate(vectors).numpy(), axis=0, return_inverse=True)
        label = torch.from_numpy(number.reshape(-1).astype(np.int64))
    count = label.bincount() if len(label) else label
    first = torch.full_like(count, len(label)).scatter_reduce(0, label, torch.arange(len(label)), "amin")
    by_first = first.argsort()
    return Cells(by_first.argsort()[label], first[by_first], count[by_first])


class Neighbours(NamedTuple):
    """Pairs of points at Chebyshev distance 1: no coordinate differs by more than one.

    Attributes:
        pairs: int64 ``[P, 2]``: the first vector at each of the two points, in ascending order.
        axis_counts: int64 ``[P]``: along how many axes the two differ: 1 for orthogonal neighbours, more for diagonal
            ones.
    """

    pairs: Tensor
    axis_counts: Tensor


def neighbours(vectors: Tensor) -> Neighbours:
    """Find all pairs of neighbouring points, exactly.

    The points are cut in two along one axis, again and again, at places where few points lie at the cut. Those few go
    to both sides, so no pair of neighbours is separated. Once few points are left, every pair is compared.

    Args:
        vectors: bfloat16, float16 or float32 ``[V, D]``; the first of several identical ones stands for all.
    """
    first = cells(vectors).first
    points = np.empty((len(first), vectors.shape[1]), dtype=coordinate(vectors[:0]).numpy().dtype)
    step = _chunk_rows(vectors.shape[1])
    for begin in range(0, len(first), step):
        points[begin : begin + step] = coordinate(vectors[first[begin : begin + step]]).numpy()
    ids = np.unique(_concatenate([_close_pairs(points, rows) for rows in _leaves(points)]))
    one, other = np.divmod(ids, max(1, len(points)))
    axis_counts = [
        np.count_nonzero(points[one[i : i + step]] != points[other[i : i + step]], axis=1)
        for i in range(0, len(one), step)
    ]
    pairs = first[torch.from_numpy(np.stack([one, other], axis=1))]
    return Neighbours(pairs, torch.from_numpy(_concatenate(axis_counts)))


def _leaves(points: np.ndarray) -> Iterator[np.ndarray]:
    """Yield sets of row indices such that any two neighbours are together in at least one set."""
    rng = np.random.default_rng(0)
    todo = [np.arange(len(points))]
    while todo:
        rows = todo.pop()
        halves = _cut_in_two(points, rows, rng) if len(rows) > LEAF_SIZE else None
        if halves is None:
            yield rows
        else:
            todo += halves


def _cut_in_two(points: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> list[np.ndarray] | None:
    """Cut rows in two along some axis; return None if no axis allows a useful cut."""
    axes = rng.permutation(points.shape[1])
    groups = [axes[:AXES_TRIED]]
    groups += [axes[i : i + AXES_TRIED_LATER] for i in range(AXES_TRIED, len(axes), AXES_TRIED_LATER)]
    cuts = (_best_cut(points, rows, group) for group in groups)
    return next((halves for halves in cuts if halves is not None), None)


def _best_cut(points: np.ndarray, rows: np.ndarray, axes: np.ndarray) -> list[np.ndarray] | None:
    """Cut rows in two at or next to the median of the best of these axes; None if one side would keep most rows."""
    values = points[np.ix_(rows, axes)]
    median = np.partition(values, len(rows) // 2, axis=0)[len(rows) // 2].astype(np.int64)
    larger_side, (cut, axis) = min(
        (
            (max(np.count_nonzero(column <= cut), np.count_nonzero(column >= cut)), (cut, axis))
            for axis, column in enumerate(values.T)
            for cut in (median[axis] - 1, median[axis], median[axis] + 1)
        ),
        key=lambda option: option[0],
    )
    if larger_side > MAX_KEPT * len(rows):
        return None
    return [rows[values[:, axis] <= cut], rows[values[:, axis] >= cut]]


def _close_pairs(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return i * len(points) + j for all neighbours i < j among these rows, which are distinct points."""
    found = []
    rows = np.sort(rows)
    filter_values = points[rows, :FILTER_AXES]
    step = _chunk_rows(points.shape[1])
    for begin in range(0, len(rows), LEAF_SIZE):
        close = _within_one(filter_values[begin : begin + LEAF_SIZE, None], filter_values[None, begin:])
        one, other = np.nonzero(np.triu(close, 1))
        one, other = rows[begin + one], rows[begin + other]
        for i in range(0, len(one), step):
            a, b = one[i : i + step], other[i : i + step]
            both = _within_one(points[a], points[b])
            found.append(a[both] * len(points) + b[both])
    return _concatenate(found)


def _within_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return whether no coordinate differs by more than one.

    Differences may wrap around in int16 or int32, but not to -1, 0 or 1, as no coordinate is the smallest integer.
    """
    difference = a - b
    return ((difference + difference.dtype.type(1)).view(f"u{difference.itemsize}") <= 2).all(-1)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def components(count: int, pairs: Tensor) -> Tensor:
    """Find the connected components of a graph.

    Args:
        count: how many nodes there are.
        pairs: int64 ``[P, 2]``, the edges.

    Returns:
        int64 ``[count]``: the smallest node in the component of each node.
    """
    label = torch.arange(count)
    while True:
        least = label[pairs].amin(1)
        new = label.scatter_reduce(0, label[pairs[:, 0]], least, "amin")
        new = new.scatter_reduce(0, label[pairs[:, 1]], least, "amin")
        while not torch.equal(new, new[new]):
            new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def components_within(points: Tensor, distance: float) -> Tensor:
    """Find the sets of points that hang together by steps of at most some L2 distance: single-linkage clusters.

    Differences are computed in float64, so that identical points are exactly 0 apart. Memory grows with the number of
    points, not with that of pairs.

    Args:
        points: ``[V, D]`` of any dtype: vectors, for a distance in their own units, or their :func:`coordinate`, for a
            distance in steps of the lattice. A point with NaN is close to none.
        distance: the longest step.

    Returns:
        int64 ``[V]``: the smallest index in the component of each point. See :func:`components`.
    """
    x = points.double()
    label = torch.arange(len(x))
    for begin in range(0, len(x), LEAF_SIZE):
        apart = torch.cdist(x[begin : begin + LEAF_SIZE], x[begin:], compute_mode="donot_use_mm_for_euclid_dist")
        close = (apart <= distance).nonzero() + begin
        label = components(len(x), label[close])[label]
    return label
