"""How two traces differ, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bhfast.diff.compare import Diff, Place, TensorDiff
from bhfast.trace import Trace

MAX_TABLES = 8  # tensors whose distances are printed
MAX_NAMES = 8  # of tensors that only one trace has


def text_lines(found: Diff) -> Iterator[str]:
    """Yield what differs, in lines: what was compared, the first difference, and the distances at some steps."""
    yield from what_was_compared(found)
    if found.settings:
        yield ""
        yield from _table([("settings that differ", "A", "B"), *_setting_rows(found)])
    yield ""
    yield headline(found)
    for tensor in found.first():
        assert tensor.first is not None
        yield f"  {_element(tensor.name, tensor.first)}"
    for tensor in found.tensors:
        if tensor.pair is None and tensor.first:
            yield f"  {_element(tensor.name, tensor.first)}, {tensor.elements:,} of its values differ"
    apart = [x for x in found.tensors if x.pair and x.first]
    if apart:
        yield ""
        yield from _table(
            [("tensor", "first in step", "steps that differ", "values", "of them equal in value")]
            + [
                (x.name, f"{x.first.step:,}", _count(x.differs), f"{x.elements:,}", f"{x.same_value:,}")
                for x in apart
                if x.first
            ]
        )
    for tensor in apart[:MAX_TABLES]:
        yield ""
        yield from _distance_table(found, tensor)
    if len(apart) > MAX_TABLES:
        yield f"\nand {len(apart) - MAX_TABLES} more tensors; --json or --csv has the distances of all"


def what_was_compared(found: Diff) -> Iterator[str]:
    """Yield what the traces are, and what only one of them has."""
    pairs = found.pairs
    for side, trace in (("A", found.a), ("B", found.b)):
        yield f"{side}  {trace.path}: {_extent(trace)}"
    yield f"compared: {_steps(pairs.steps)}, {len(found.tensors)} tensors"
    for side, steps in zip("AB", pairs.only_steps, strict=True):
        if len(steps):
            yield f"only {side} has {_steps(steps)}"
    for side, names in zip("AB", pairs.only, strict=True):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            yield f"only {side} has {', '.join(names[:MAX_NAMES])}{more}"
    for name, (a, b, both) in pairs.rows.items():
        yield f"rows of {name}: A has {a:,}, B has {b:,}; {both:,} of them are the same and were compared"
    for name, reason in pairs.unlike.items():
        yield f"{name} was not compared: {reason}"


def headline(found: Diff) -> str:
    """Return the first difference in one line."""
    first = [x.first for x in found.first()]
    if not first or first[0] is None or first[0].step is None:
        if found.is_equal:
            return "equal: all bits agree"
        if found.has_same_bits:
            return "not equal, as only one has some of it; all bits that both have agree"
        return "different, but not in what was recorded at each step"
    tensor = found.first()[0]
    row = f", row {first[0].index[0]:,}" if len(first[0].index) > 1 else ""
    before = int((found.pairs.steps < first[0].step).sum())
    return (
        f"first difference: step {first[0].step:,}, {tensor.name}{row} (all {before:,} common steps before are equal)"
    )


def some_steps(found: Diff, tensor: TensorDiff) -> Tensor:
    """Return which of the common steps to print: the first difference, powers of ten, and the last step."""
    steps = found.pairs.steps
    wanted = {0, len(steps) - 1, int(tensor.differs.nonzero()[0])}
    for power in range(len(str(int(steps[-1])))):
        wanted.add(min(int(torch.searchsorted(steps, 10**power)), len(steps) - 1))
    return torch.tensor(sorted(wanted))


def _distance_table(found: Diff, tensor: TensorDiff) -> Iterator[str]:
    which = some_steps(found, tensor)
    values = tensor.distances(which)
    unit = "values that differ" if tensor.pair and len(tensor.pair.shape) < 2 else "rows that differ"
    yield from _table(
        [
            (tensor.name, "L2 of the difference", "largest, in ulp", unit),
            *(
                (f"  step {step:,}", f"{l2:.6g}", "–" if math.isnan(ulp) else f"{ulp:,.0f}", f"{rows:.2%}")
                for step, l2, ulp, rows in zip(
                    found.pairs.steps[which].tolist(), *(x.tolist() for x in values), strict=True
                )
            ),
        ]
    )


def _setting_rows(found: Diff) -> list[tuple[str, str, str]]:
    return [(f"  {name}", _short(a), _short(b)) for name, (a, b) in found.settings.items()]


def _short(text: str | None) -> str:
    return "–" if text is None else text if len(text) <= 40 else f"{text[:37]}..."


def _element(name: str, place: Place) -> str:
    index = ", ".join(map(str, place.index))
    return f"{name}{f'[{index}]' if index else ''}: A {place.a}, B {place.b}"


def _extent(trace: Trace) -> str:
    steps = trace.steps
    return f"{len(steps):,} records, steps {int(steps[0]):,} to {int(steps[-1]):,}"


def _steps(steps: Tensor) -> str:
    count = len(steps)
    return f"{count:,} step{'s' * (count > 1)}, {int(steps[0]):,} to {int(steps[-1]):,}"


def _count(differs: Tensor) -> str:
    return f"{int(differs.sum()):,} of {len(differs):,}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(x.rjust(width) for x, width in zip(rest, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
