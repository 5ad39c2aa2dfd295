"""How two traces differ, for other programs: JSON and CSV."""

from __future__ import annotations

import csv
import math
from typing import Any, TextIO

import torch
from torch import Tensor

from bhfast.diff.compare import Diff, Distances, Place, TensorDiff


def write_csv(found: Diff, stream: TextIO) -> None:
    """Write a line for each tensor and step: ``tensor,step,l2,ulp,rows``; a field is empty where there is no value."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["tensor", "step", *Distances._fields])
    steps = found.pairs.steps
    for tensor in found.tensors:
        if tensor.pair:
            columns = [x.tolist() for x in tensor.distances(torch.arange(len(steps)))]
            for step, *values in zip(steps.tolist(), *columns, strict=True):
                writer.writerow([tensor.name, step, *("" if math.isnan(x) else x for x in values)])


def as_json(found: Diff) -> dict[str, Any]:
    """Return everything as JSON; numbers that are not finite are null."""
    pairs = found.pairs
    every = torch.arange(len(pairs.steps))
    sides = {side: {"path": str(x.path), "records": len(x.steps)} for side, x in (("a", found.a), ("b", found.b))}
    only = {
        side: {"steps": pairs.only_steps[i].tolist(), "tensors": pairs.only[i]} for i, side in enumerate(("a", "b"))
    }
    return {
        **sides,
        "equal": found.is_equal,
        "same_bits": found.has_same_bits,
        "first": [{"tensor": x.name, **_place(x.first)} for x in found.first()],
        "settings": {name: list(values) for name, values in found.settings.items()},
        "only_in": only,
        "not_compared": pairs.unlike,
        "rows": {name: dict(zip(("a", "b", "both"), x, strict=True)) for name, x in pairs.rows.items()},
        "steps": pairs.steps.tolist(),
        "tensors": {x.name: _tensor_json(x, every) for x in found.tensors},
    }


def _tensor_json(tensor: TensorDiff, every: Tensor) -> dict[str, Any]:
    own = {
        "steps_that_differ": int(tensor.differs.sum()),
        "values_that_differ": tensor.elements,
        "of_them_equal_in_value": tensor.same_value,
        "first": tensor.first and _place(tensor.first),
    }
    if tensor.pair is None:
        return own
    values = zip(Distances._fields, (x.tolist() for x in tensor.distances(every)), strict=True)
    return {**own, **{name: [x if math.isfinite(x) else None for x in column] for name, column in values}}


def _place(place: Place | None) -> dict[str, Any]:
    assert place is not None
    return {"step": place.step, "index": list(place.index), "a": place.a, "b": place.b}
