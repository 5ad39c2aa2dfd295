"""The factors by which gradients were clipped, found from the moments that they led to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.ops import arithmetic
from bhfast.replay import CHUNK
from bhfast.trace import Trace
from bhfast.trace.updates import Updates, bits

WITNESSES = 256  # elements of each gradient from which the factor is found
NEIGHBOURS = 3  # bfloat16 values tried on either side of the estimate
ONE = 0x3F80  # the bits of 1 in bfloat16


def inferred_clip_coefs(trace: Trace, updates: Updates) -> Tensor:
    """Return the factor of each step that leads from its gradient to its moments.

    A factor is a bfloat16 of at most 1, so there are few candidates. An estimate from the change of the first moment
    leaves some neighbours of it. The one that gives the recorded bits of the moments at the largest elements of the
    gradient is taken; if several do, all elements decide. Where none does, it is the best one, so that a replay finds
    the difference.

    Args:
        trace: has gradients and first moments in bfloat16.
        updates: of the parameter; their arithmetic is one of ``bhfast.ops.arithmetic.ROUNDINGS``.

    Returns:
        float32 ``[R]``; 1 for record 0 and for steps that were not clipped.
    """
    names = [updates.keys[field] for field in ("grad", "exp_avg", "exp_avg_sq") if field in updates.keys]
    tensors = [trace[name].as_subclass(Tensor).flatten(1) for name in names]
    width = tensors[0].shape[1]
    coefs = torch.ones(updates.records)
    chunk = max(1, CHUNK // max(1, width))
    for start in range(1, updates.records, chunk):
        now = slice(start, min(start + chunk, updates.records))
        at = tensors[0][now].float().abs().topk(min(WITNESSES, width), dim=1).indices
        some = _steps(tensors, now, updates, at)
        candidates = some.candidates()
        misses = some.misses(candidates)
        coefs[now] = candidates.gather(0, misses.argmin(0, keepdim=True))[0].float()
        is_tied = ((misses == misses.amin(0)) & (candidates != coefs[now])).any(0)
        for i in is_tied.nonzero()[:, 0].tolist():
            whole = _steps(tensors, slice(start + i, start + i + 1), updates, torch.arange(width)[None])
            coefs[start + i] = candidates[whole.misses(candidates[:, i : i + 1])[:, 0].argmin(), i].float()
    return coefs


class _Steps(NamedTuple):
    """Some elements of n steps.

    Attributes:
        grads: bfloat16 ``[n, w]``.
        before, after: exp_avg, and exp_avg_sq if it was recorded, before and after the steps: bfloat16 ``[n, w]`` each.
        coefficients: float32 ``[n, 7]``, see :func:`bhfast.ops.arithmetic.adam`.
        rounding: see there.
    """

    grads: Tensor
    before: list[Tensor]
    after: list[Tensor]
    coefficients: Tensor
    rounding: str

    def candidates(self) -> Tensor:
        """Return factors that may be those of the steps: bfloat16 ``[c, n]``, the first of them 1."""
        weight = self.coefficients[:, 3:4].double()  # 1 - beta1
        clipped = (self.after[0].double() - (1 - weight) * self.before[0].double()) / weight
        grads = self.grads.double()
        estimate = (clipped * grads).sum(1) / grads.square().sum(1)
        near = estimate.nan_to_num(1, 1, 1).clamp(2.0**-100, 1).bfloat16().view(torch.int16).int()
        offsets = torch.arange(-NEIGHBOURS, NEIGHBOURS + 1)[:, None]
        found = torch.cat([torch.full((1, len(near)), ONE), near + offsets]).clamp(max=ONE)
        return found.to(torch.int16).view(torch.bfloat16)

    def misses(self, candidates: Tensor) -> Tensor:
        """Return how many elements get other moments than the recorded ones: int64 ``[c, n]``."""
        found = []
        for coefs in candidates:
            own = self.grads * coefs[:, None]
            first, second = self.before[0], self.before[-1]
            moments = arithmetic.adam(own, own, first, second, self.coefficients[:, None], self.rounding)[1:]
            wrong = [bits(x) != bits(y) for x, y in zip(moments, self.after, strict=False)]
            found.append(torch.stack(wrong).any(0).sum(1))
        return torch.stack(found)


def _steps(tensors: list[Tensor], now: slice, updates: Updates, at: Tensor) -> _Steps:
    """Return the elements ``at``, int64 ``[n, w]``, of the steps that the records ``now`` are of."""
    before = slice(now.start - 1, now.stop - 1)
    grads, *moments = tensors
    return _Steps(
        grads[now].gather(1, at),
        [x[before].gather(1, at) for x in moments],
        [x[now].gather(1, at) for x in moments],
        updates.coefficients(now),
        updates.rounding,
    )
