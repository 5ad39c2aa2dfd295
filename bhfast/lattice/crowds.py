"""Which vectors share a point of the lattice, and which are one step apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bhfast.lattice.cells import coordinate

LEAF = 256  # points whose pairs are all looked at
TRIED = 32  # axes of which the best is taken to split points in two
FIRST = 16  # axes that rule out most pairs
VALUES = 1 << 22  # coordinates worked on at once


def keys(x: Tensor) -> Tensor:
    """Hash vectors to 64 bits: the same for those at one point of the lattice, where -0 is 0.

    Two that differ have the same key with a probability below 2^-48: multiples, drawn once, of their coordinates are
    summed modulo 2^64.

    Args:
        x: bfloat16 ``[..., D]``.

    Returns:
        int64 ``[...]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    parts = [
        (coordinate(part).long() * _multiples(x.shape[-1])).sum(-1)
        for part in rows.split(max(1, VALUES // max(1, rows.shape[-1])))
    ]
    return torch.cat(parts).view(x.shape[:-1]) if parts else torch.empty(x.shape[:-1], dtype=torch.int64)


def _multiples(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (dim,), generator=generator) | 1


class Cells(NamedTuple):
    """The points at which vectors are.

    Attributes:
        cell: int64 ``[V]``: the number of each vector's point, in the order of their first vectors.
        first: int64 ``[C]``: the first vector at each point.
        multiplicity: int64 ``[C]``: how many vectors are there.
    """

    cell: Tensor
    first: Tensor
    multiplicity: Tensor

    @property
    def black_holes(self) -> Tensor:
        """The points of several vectors, those of most first: int64 ``[H]``."""
        order = self.multiplicity.argsort(descending=True, stable=True)
        return order[self.multiplicity[order] > 1]


def cells(vectors: Tensor) -> Cells:
    """Find the vectors that are identical, value by value; bfloat16 ``[V, D]``."""
    own = keys(vectors)
    order = own.argsort(stable=True)
    key = own[order]
    same = torch.zeros(len(own), dtype=torch.bool)  # as the one before in this order
    suspects = (key[1:] == key[:-1]).nonzero()[:, 0] + 1
    for part in suspects.split(max(1, VALUES // max(1, vectors.shape[1]))):
        one, other = coordinate(vectors[order[part]]), coordinate(vectors[order[part - 1]])
        same[part] = (one == other).all(1)
    if not same[suspects].all():  # two points have one key
        _, number = np.unique(coordinate(vectors).numpy(), axis=0, return_inverse=True)
        label = torch.from_numpy(number.reshape(-1).astype(np.int64))
    else:
        label = torch.empty_like(order)
        label[order] = (~same).cumsum(0) - 1
    count = label.bincount() if len(label) else label
    first = torch.full_like(count, len(label)).scatter_reduce(0, label, torch.arange(len(label)), "amin")
    order = first.argsort()
    return Cells(order.argsort()[label], first[order], count[order])


class Neighbours(NamedTuple):
    """Vectors at Chebyshev distance 1: no coordinate differs by more than one.

    Attributes:
        pairs: int64 ``[P, 2]``: of each point the first vector; the smaller first, in order.
        axes: int64 ``[P]``: along how many axes they differ: 1 for orthogonal neighbours, more for diagonal ones.
    """

    pairs: Tensor
    axes: Tensor


def neighbours(vectors: Tensor) -> Neighbours:
    """Find all pairs of neighbouring points, exactly.

    Points are split in two, again and again, along an axis on which few lie at the place of the cut: these go to both
    sides, as no two that are further apart than one can be neighbours. Within a few points all pairs are looked at.

    Args:
        vectors: bfloat16 ``[V, D]``; of identical ones the first stands for all.
    """
    first = cells(vectors).first
    points = np.empty((len(first), vectors.shape[1]), dtype=np.int16)
    step = max(1, VALUES // max(1, vectors.shape[1]))
    for begin in range(0, len(first), step):
        points[begin : begin + step] = coordinate(vectors[first[begin : begin + step]]).numpy()
    found = [_close_pairs(points, rows) for rows in _leaves(points)]
    ids = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *found]))
    one, other = np.divmod(ids, max(1, len(points)))
    axes = [
        np.count_nonzero(points[one[i : i + step]] != points[other[i : i + step]], axis=1)
        for i in range(0, len(one), step)
    ]
    pairs = first[torch.from_numpy(np.stack([one, other], axis=1))]
    return Neighbours(pairs, torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *axes])))


def _leaves(points: np.ndarray) -> Iterator[np.ndarray]:
    """Yield sets of rows such that any two neighbours are together in one of them."""
    rng = np.random.default_rng(0)
    todo = [np.arange(len(points))]
    while todo:
        rows = todo.pop()
        if len(rows) > LEAF:
            axes = rng.permutation(points.shape[1])
            tries = [axes[:TRIED]] + [axes[i : i + 8 * TRIED] for i in range(TRIED, len(axes), 8 * TRIED)]
            split = next((s for some in tries if (s := _split(points, rows, some)) is not None), None)
            if split is not None:
                todo += split
                continue
        yield rows


def _split(points: np.ndarray, rows: np.ndarray, axes: np.ndarray) -> list[np.ndarray] | None:
    """Cut rows in two at a value of the best of some axes; None if all would leave nearly all on one side."""
    values = points[np.ix_(rows, axes)]
    middle = np.partition(values, len(rows) // 2, axis=0)[len(rows) // 2].astype(np.int32)
    best, (cut, axis) = min(
        (
            (max(np.count_nonzero(column <= cut), np.count_nonzero(column >= cut)), (cut, axis))
            for axis, column in enumerate(values.T)
            for cut in (middle[axis] - 1, middle[axis], middle[axis] + 1)
        ),
        key=lambda option: option[0],
    )
    if best > 0.8 * len(rows):
        return None
    return [rows[values[:, axis] <= cut], rows[values[:, axis] >= cut]]


def _close_pairs(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return i * len(points) + j for all neighbours i < j of distinct points."""
    found = []
    rows = np.sort(rows)
    few = points[rows, :FIRST]
    step = max(1, VALUES // points.shape[1])
    for begin in range(0, len(rows), LEAF):
        close = _within_one(few[begin : begin + LEAF, None], few[None, begin:])
        one, other = np.nonzero(np.triu(close, 1))
        one, other = rows[begin + one], rows[begin + other]
        for i in range(0, len(one), step):
            a, b = one[i : i + step], other[i : i + step]
            both = _within_one(points[a], points[b])
            found.append(a[both] * len(points) + b[both])
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def _within_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether no coordinate differs by more than one; differences may wrap, but none by chance to one."""
    return (((a - b) + np.int16(1)).view(np.uint16) <= 2).all(-1)


def components(count: int, pairs: Tensor) -> Tensor:
    """Number the connected components of a graph.

    Args:
        count: how many nodes there are.
        pairs: int64 ``[P, 2]``, the edges.

    Returns:
        int64 ``[count]``: the smallest node of the component that each is in.
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
