"""Which tokens move from record to record, and when they freeze, move again, and leave the black hole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bhfast.lattice.adjacency import fingerprints, run_lengths
from bhfast.lattice.coordinates import Norms, displacement, norms

CHUNK = 1 << 17  # values processed at once: as float64 they fit into the cache of a core
PHASES = ("superluminal", "moving", "L1 ≤ 1", "frozen")  # of a token in one record; see momentary_phases

Result = TypeVar("Result", bound="Tensor | tuple[Tensor, ...]")


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


def per_record(function: Callable[[Tensor], Result], records: Tensor, overlap: int = 0) -> Result:
    """Apply a function to all records, chunk by chunk; only the results are kept in memory.

    Args:
        function: takes a chunk ``[n, V, D]``, returns ``[n - overlap, ...]``, or a named tuple of such tensors.
        records, overlap: see :func:`chunks`.

    Returns:
        ``[R - overlap, ...]``, or a named tuple of such tensors.
    """
    count = max(0, len(records) - overlap)
    if not count:
        return function(records[:overlap].as_subclass(Tensor))
    whole: Any = None
    for begin, chunk in chunks(records, overlap):
        result: Any = function(chunk)
        if whole is None:  # one tensor from the start: small results between large temporaries would fragment the heap
            whole = _map(lambda x: x.new_empty(count, *x.shape[1:]), result)
        _map(lambda all_, part, at=begin: all_[at : at + len(part)].copy_(part), whole, result)
    return whole


def _map(function: Callable[..., Tensor], *results: Any) -> Any:
    """Apply a function to tensors, or to those in named tuples, field by field."""
    if isinstance(results[0], Tensor):
        return function(*results)
    return type(results[0])(*map(function, *results))


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
        embeddings: bfloat16, float16 or float32 ``[R, V, D]``.
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
        embeddings: bfloat16, float16 or float32 ``[R, V, D]``.
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
    run, length = run_lengths(fingerprint)
    most, largest = length.max(1, keepdim=True)
    return (run == largest) & (most > 1)


def momentary_phases(sizes: Norms, limit: float = 1000.0, norm: str = "l2") -> Tensor:
    """Return what each token does from one record to the next, whatever it does later.

    For all records: ``per_record(lambda w: momentary_phases(norms(displacement(w[:-1], w[1:]))), records, overlap=1)``.

    Args:
        sizes: of the displacements, in ulp at the starting value; float64 ``[...]`` each.
        limit: a longer displacement is superluminal.
        norm: which norm says how long it is: ``"l1"``, ``"l2"`` or ``"linf"``.

    Returns:
        int8 ``[...]``, an index into ``PHASES``: 0 superluminal, 1 moving, 2 if the L1 norm of the displacement is at
        most 1 ulp, 3 frozen: no coordinate moves. -1 where the displacement is NaN.

    Raises:
        ValueError: there is no such norm.
    """
    if norm not in Norms._fields:
        raise ValueError(f"norm must be one of {', '.join(Norms._fields)}, got {norm!r}")
    phase = (getattr(sizes, norm) <= limit) * (1 + (sizes.l1 <= 1).to(torch.int8) + (sizes.l1 <= 0))
    return torch.where(sizes.l1.isnan(), -1, phase).to(torch.int8)


class Reheatings(NamedTuple):
    """How often tokens moved again after they had stood still.

    Attributes:
        times: how often each token did: int64 ``[V]``.
        tokens: how many tokens did from each record to the next: int64 ``[R - 1]``.
    """

    times: Tensor
    tokens: Tensor


def reheatings(records: Tensor, rest: int) -> Reheatings:
    """Find where a token that moved before, and then stood still, moves again. NaN never stands still.

    Args:
        records: ``[R, V, D]``.
        rest: from how many records to the next, without interruption, it must have stood still.

    Raises:
        ValueError: ``rest`` is not positive.
    """
    if rest < 1:
        raise ValueError(f"rest must be at least 1 record, got {rest}")
    last_move = torch.full((1, records.shape[1]), -1)  # -1: none yet
    times = torch.zeros(records.shape[1], dtype=torch.int64)
    tokens = torch.zeros(max(0, len(records) - 1), dtype=torch.int64)
    for begin, chunk in chunks(records, overlap=1):
        moves = (chunk[1:] != chunk[:-1]).any(-1)
        at = begin + torch.arange(len(moves))[:, None]
        moved = torch.cat([last_move, torch.where(moves, at, -1)]).cummax(0).values
        again = moves & (moved[:-1] >= 0) & (at - moved[:-1] > rest)
        last_move = moved[-1:]
        times += again.sum(0)
        tokens[begin : begin + len(again)] = again.sum(1)
    return Reheatings(times, tokens)
