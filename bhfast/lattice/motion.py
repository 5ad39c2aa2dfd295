"""What happens from record to record: life and death of tokens, the cloud they make, its temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.lattice.cells import displacement, norms
from bhfast.lattice.crowds import keys

VALUES = 1 << 20  # worked on at once


def chunks(records: Tensor, overlap: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Go through records in flat memory.

    Args:
        records: ``[R, V, D]``, as in a trace.
        overlap: how many records a chunk repeats of the one before.

    Yields:
        The number of the chunk's first record, and the chunk, ``[n, V, D]`` with n above ``overlap``.
    """
    each = max(1, VALUES // max(1, math.prod(records.shape[1:])))
    for begin in range(0, len(records) - overlap, each):
        yield begin, records[begin : begin + each + overlap].as_subclass(Tensor)


def per_record(function: Callable[[Tensor], Tensor], records: Tensor, overlap: int = 0) -> Tensor:
    """Return what a function finds in each record, in flat memory but for that.

    Args:
        function: of a chunk ``[n, V, D]``; returns ``[n - overlap, ...]``.
        records, overlap: see :func:`chunks`.
    """
    found = torch.empty(0)
    for begin, part in chunks(records, overlap):
        result = function(part)
        if not begin:  # written into one tensor: many small ones between large temporary ones would fragment the heap
            found = result.new_empty(len(records) - overlap, *result.shape[1:])
        found[begin : begin + len(result)] = result
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


class Life(NamedTuple):
    """The last step of each phase of each token; int64 ``[V]``, 0 if it never was in it.

    A token is early as long as some displacement still to come is longer than √D ulp; then in midlife, as long as one
    coordinate will still move by more than one ulp at once; then late, as long as it will still move at all; then
    frozen for good.
    """

    early: Tensor
    midlife: Tensor
    late: Tensor

    def phase(self, steps: Tensor) -> Tensor:
        """Return the phase of tokens at steps ``[S]``: 0 early, 1 midlife, 2 late, 3 frozen; int64 ``[S, V]``."""
        return sum((steps[:, None] > last for last in self), torch.zeros(len(steps), len(self.late), dtype=torch.int64))

    def frozen(self, last: int) -> Tensor:
        """Return who was frozen before the ``last`` step; bool ``[V]``. Who moved in it may have moved after it."""
        return self.late < last


def life(embeddings: Tensor, steps: Tensor) -> Life:
    """Tell when tokens leave each phase, from how they move between records.

    Args:
        embeddings: bfloat16 ``[R, V, D]``.
        steps: int64 ``[R]``: when they were recorded.
    """
    limit = math.sqrt(embeddings.shape[2])
    ends = [torch.zeros(embeddings.shape[1], dtype=torch.int64) for _ in range(3)]
    for begin, part in chunks(embeddings, overlap=1):
        size = norms(displacement(part[:-1], part[1:]))
        when = steps[begin + 1 : begin + len(part), None]
        for end, is_still in zip(ends, (size.l2 > limit, size.linf > 1, size.l1 > 0), strict=True):
            torch.maximum(end, (when * is_still).amax(0), out=end)
    return Life(*ends)


def escape_steps(embeddings: Tensor, steps: Tensor) -> Tensor:
    """Return since when each token has been out of the black hole for good.

    The black hole of a record is the largest set of identical vectors, if there are two of one kind.

    Args:
        embeddings: bfloat16 ``[R, V, D]``.
        steps: int64 ``[R]``: when they were recorded.

    Returns:
        int64 ``[V]``: a step; the first if a token never was in it, -1 if it is in it at the end.
    """
    last = torch.full((embeddings.shape[1],), -1)  # record in it
    for begin, part in chunks(embeddings):
        inside = _in_largest(keys(part))
        record = begin + torch.arange(len(part))[:, None]
        torch.maximum(last, torch.where(inside, record, -1).amax(0), out=last)
    stays = last == len(embeddings) - 1
    return torch.where(stays, -1, steps[(last + 1).clamp(max=len(embeddings) - 1)])


def _in_largest(own: Tensor) -> Tensor:
    """Whether each of ``[n, V]`` is one of the most frequent in its row, and not alone; of equals the smallest."""
    order, where = own.sort(1)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[:, 1:] = order[:, 1:] != order[:, :-1]
    run = starts.cumsum(1) - 1
    counts = torch.zeros_like(order).scatter_add_(1, run, torch.ones_like(run))
    most, largest = counts.max(1, keepdim=True)
    return torch.zeros_like(starts).scatter_(1, where, (run == largest) & (most > 1))


# ---------------------------------------------------------------------------------------------------------------------
# The cloud


def distinct(vectors: Tensor) -> Tensor:
    """Count different vectors, by 64-bit :func:`keys`: bfloat16 ``[..., V, D]``; returns int64 ``[...]``."""
    order = keys(vectors).sort(-1).values
    return (order[..., 1:] != order[..., :-1]).sum(-1) + (vectors.shape[-2] > 0)


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


def temperature(vectors: Tensor) -> Tensor:
    """Return the variance of vectors about their mean, per degree of freedom, as of velocities in a gas.

    Of updates or gradients ``[..., V, D]`` that is the part in which tokens differ: the mean over tokens and dimensions
    of (x - mean over tokens of x)²; float64 ``[...]``.
    """
    x = vectors.double()
    return (x - x.mean(-2, keepdim=True)).square().mean((-2, -1))
