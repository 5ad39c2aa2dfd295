"""What changes from record to record: when tokens move, freeze, and leave the black hole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.lattice.adjacency import fingerprints
from bhfast.lattice.coordinates import displacement, norms

CHUNK = 1 << 20  # values processed at once


def chunks(records: Tensor, overlap: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Go through records in constant memory.

    Args:
        records: ``[R, V, D]``, as in a trace.
        overlap: how many records of the previous chunk each chunk repeats.

    Yields:
        The index of the chunk's first record, and the chunk: ``[n, V, D]`` with n > ``overlap``.
    """
    advance = max(1, CHUNK // max(1, math.prod(records.shape[1:])))
    for begin in range(0, len(records) - overlap, advance):
        yield begin, records[begin : begin + advance + overlap].as_subclass(Tensor)


def per_record(function: Callable[[Tensor], Tensor], records: Tensor, overlap: int = 0) -> Tensor:
    """Apply a function to all records, chunk by chunk; only the results are kept in memory.

    Args:
        function: takes a chunk ``[n, V, D]``, returns ``[n - overlap, ...]``.
        records, overlap: see :func:`chunks`.

    Returns:
        ``[R - overlap, ...]``.
    """
    results = torch.empty(0)
    for begin, chunk in chunks(records, overlap):
        result = function(chunk)
        if not begin:  # one tensor from the start: small results between large temporaries would fragment the heap
            results = result.new_empty(len(records) - overlap, *result.shape[1:])
        results[begin : begin + len(result)] = result
    return results


class Life(NamedTuple):
    """The last step of each phase in the life of each token; int64 ``[V]``, 0 if it skipped the phase.

    A token is early while some displacement still to come is longer than √D ulp (L2). It is in midlife while one of its
    coordinates will still move by more than 1 ulp in one step, late while it will still move at all, and then frozen
    for good. A displacement from or to NaN counts as longer than any.
    """

    last_early_step: Tensor
    last_midlife_step: Tensor
    last_late_step: Tensor

    def phase(self, steps: Tensor) -> Tensor:
        """Return the phase of each token at ``steps``: 0 early, 1 midlife, 2 late, 3 frozen.

        Args:
            steps: int64 ``[S]``.

        Returns:
            int64 ``[S, V]``.
        """
        early = torch.zeros(len(steps), len(self.last_late_step), dtype=torch.int64)
        return sum((steps[:, None] > last for last in self), early)

    def frozen(self, last_step: int) -> Tensor:
        """Return which tokens were frozen before ``last_step``; bool ``[V]``.

        A token that moved in the last recorded step may have moved after it, so it does not count as frozen.
        """
        return self.last_late_step < last_step


def life(embeddings: Tensor, steps: Tensor) -> Life:
    """Find when each token leaves each phase of its life, from its displacements between records.

    Args:
        embeddings: bfloat16 ``[R, V, D]``.
        steps: int64 ``[R]``, the step of each record.
    """
    limit = math.sqrt(embeddings.shape[2])
    last_steps = [torch.zeros(embeddings.shape[1], dtype=torch.int64) for _ in range(3)]
    for begin, chunk in chunks(embeddings, overlap=1):
        size = norms(displacement(chunk[:-1], chunk[1:]))
        step = steps[begin + 1 : begin + len(chunk), None]
        rests = size.l2 <= limit, size.linf <= 1, size.l1 <= 0
        for last, goes_on in zip(last_steps, (~rest for rest in rests), strict=True):  # NaN is no rest
            torch.maximum(last, (step * goes_on).amax(0), out=last)
    return Life(*last_steps)


def escape_steps(embeddings: Tensor, steps: Tensor) -> Tensor:
    """Return the step from which each token has been outside the black hole for good.

    The black hole of a record is its largest set of identical vectors, if any two are identical.

    Args:
        embeddings: bfloat16 ``[R, V, D]``.
        steps: int64 ``[R]``, the step of each record.

    Returns:
        int64 ``[V]``: the first recorded step for a token that was never inside, -1 for a token inside at the end.
    """
    last_inside = torch.full((embeddings.shape[1],), -1)  # index of a record
    for begin, chunk in chunks(embeddings):
        inside = _in_black_hole(fingerprints(chunk))
        record = begin + torch.arange(len(chunk))[:, None]
        torch.maximum(last_inside, torch.where(inside, record, -1).amax(0), out=last_inside)
    stays = last_inside == len(embeddings) - 1
    return torch.where(stays, -1, steps[(last_inside + 1).clamp(max=len(embeddings) - 1)])


def _in_black_hole(fingerprint: Tensor) -> Tensor:
    """Return which values of ``[n, V]`` are the most frequent of their row, if that occurs at least twice: bool.

    Of several values that are equally frequent, the smallest counts.
    """
    ordered, position = fingerprint.sort(1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = starts.cumsum(1) - 1
    counts = torch.zeros_like(ordered).scatter_add_(1, run, torch.ones_like(run))
    most, largest = counts.max(1, keepdim=True)
    return torch.zeros_like(starts).scatter_(1, position, (run == largest) & (most > 1))
