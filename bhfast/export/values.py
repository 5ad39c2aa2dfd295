"""What is exported of a trace: values of each step, and of each token at each step, a few records at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bhfast import lattice
from bhfast.errors import TraceError
from bhfast.report.names import token_names
from bhfast.summary import Vectors, find_vectors
from bhfast.trace import Trace
from bhfast.trace.format import CHANGED, KEYFRAME_STEPS

MAX_COLUMNS = 16  # of a value that a step has several of, such as a learning rate for each group
TOKEN_VALUES = ("norm", "displacement_l2", "displacement_linf", "frozen")  # see token_blocks
Block = tuple[Tensor, dict[str, Tensor]]  # steps, int64 [n], and values by name


@dataclass(frozen=True)
class Source:
    """A trace to export, of R records and perhaps V tokens.

    Attributes:
        trace: the trace.
        steps: int64 ``[R]``.
        found: its vectors; None if it has none.
        names: of the V tokens; empty if there are none.
        note: why no tokens are exported; None if they are.
    """

    trace: Trace
    steps: Tensor
    found: Vectors | None
    names: list[str]
    note: str | None

    def step_blocks(self) -> Iterator[Block]:
        """Yield, for some records at a time, float64 ``[n]`` of each value that a step has; NaN where it has none.

        These are the tensors with one value per record, or a few (``NAME.0``, ``NAME.1``), and ``norm/NAME``, the
        Frobenius norms of the vectors, their gradients and the optimizer's state.
        """
        logged = [*self._logged()]
        matrices: dict[str, Any] = {}
        if self.found is not None:
            fields = {"param": self.found.vectors, **self.found.fields}
            matrices = {f"norm/{self.found.names[field]}": x for field, x in fields.items()}
        size = max([1, *(math.prod(x.shape[1:]) for x in matrices.values())])
        for begin in range(0, len(self.steps), each := max(1, lattice.motion.CHUNK // size)):
            part = slice(begin, begin + each)
            values: dict[str, Tensor] = {}
            for name in logged:
                own = self.trace[name][part].as_subclass(Tensor).double()
                columns = {name: own} if own.dim() == 1 else {f"{name}.{i}": x for i, x in enumerate(own.unbind(1))}
                values |= columns
            values |= {
                name: x[part].as_subclass(Tensor).double().flatten(1).norm(dim=1) for name, x in matrices.items()
            }
            yield self.steps[part], values

    def _logged(self) -> Iterator[str]:
        for name, x in self.trace.items():
            is_value = x.dim() == 1 or (x.dim() == 2 and 0 < x.shape[1] <= MAX_COLUMNS)
            is_other = name in ("recorded_steps", KEYFRAME_STEPS) or name.endswith((CHANGED, ".rows"))
            is_vectors = self.found is not None and name in self.found.names.values()
            is_param = any(name in own["keys"].values() for own in self.trace.optimizer.get("params", {}).values())
            if (
                is_value
                and len(x) == len(self.steps)
                and not (is_other or is_vectors or is_param or x.dtype.is_complex)
            ):
                yield name

    def token_blocks(self) -> Iterator[Block]:
        """Yield, for some records at a time, float64 ``[n, V]`` of each of ``TOKEN_VALUES``.

        ``norm`` is the L2 norm of the vector; ``displacement_l2`` and ``displacement_linf`` are the norms of its
        displacement from the record before, in ulp, and NaN in the first record; ``frozen`` is 1 where the vector moves
        neither in this record nor in a later one, else 0.
        """
        if self.found is None:
            return
        vectors = self.found.vectors
        last_move = lattice.life(vectors, self.steps).last_late_step
        before: Tensor | None = None
        for begin, chunk in lattice.chunks(vectors):
            steps = self.steps[begin : begin + len(chunk)]
            moved = lattice.norms(lattice.displacement(*_pairs(before, chunk)))
            l2, linf = (x.double().clone() for x in (moved.l2, moved.linf))
            if before is None:
                l2[0] = linf[0] = math.nan
            before = chunk[-1:].clone()
            yield (
                steps,
                {
                    "norm": chunk.double().norm(dim=2),
                    "displacement_l2": l2,
                    "displacement_linf": linf,
                    "frozen": ((steps[:, None] > last_move) & (steps[:, None] > self.steps[0])).double(),
                },
            )


def _pairs(before: Tensor | None, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the records before those of a chunk, and the chunk; the first record stands before itself."""
    return torch.cat([chunk[:1] if before is None else before, chunk[:-1]]), chunk


def source_of(trace: Trace, param: str | None) -> Source:
    """Return what there is to export of a trace.

    Args:
        trace: of any form.
        param: the parameter whose rows are the tokens; see :func:`bhfast.summary.find_vectors`.

    Raises:
        TraceError: it has no steps; or no such parameter.
    """
    try:
        found = find_vectors(trace, param)
    except TraceError as error:
        steps = trace.get("recorded_steps")
        if param is not None or steps is None or steps.dim() != 1 or steps.dtype != torch.int64 or not len(steps):
            raise
        return Source(trace, trace.steps.as_subclass(Tensor), None, [], str(error))
    return Source(trace, found.steps, found, token_names(found), None)
