"""The page of two traces: what differs, and pictures of how far apart they go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bhfast.diff.compare import Diff, Distances
from bhfast.diff.text import headline, what_was_compared
from bhfast.report.page import Page
from bhfast.report.pictures import Picture, new_axes
from bhfast.report.survey import log_spaced

MAX_LINES = 10  # tensors in a picture
MAX_POINTS = 2000  # steps in a picture
MEASURES = {
    "l2": ("Distance", "L2 norm of the difference", "xy"),
    "ulp": ("Largest distance of two values", "ulp", "xy"),
    "rows": ("Share of rows that differ in bits", "share", "x"),
}  # title, unit and logarithmic axes of each of the Distances


def write_page(found: Diff, folder: Path) -> None:
    """Write ``index.html`` and its pictures.

    Raises:
        BhfastError: the folder cannot be written to, or matplotlib is missing.
    """
    settings = [(name, a or "–", b or "–") for name, (a, b) in found.settings.items()]
    table = [("", "A", "B"), ("trace", str(found.a.path), str(found.b.path)), *settings]
    _, _, *compared = what_was_compared(found)
    title = f"bhfast: {found.a.path.name} and {found.b.path.name}"
    Page(title, ". ".join([headline(found), *compared]) + ".", None, table, _pictures(found)).write(folder)


def _pictures(found: Diff) -> Iterator[Picture]:
    apart = [x for x in found.tensors if x.pair and x.first]
    apart = [x for x in apart if x.pair and len(x.pair.shape) > 1] or apart  # rather than one value per step
    if not apart:
        return
    which = log_spaced(len(found.pairs.steps), MAX_POINTS)
    steps = found.pairs.steps[which]
    lines = {x.name: x.distances(which) for x in apart[:MAX_LINES]}
    left_out = f" The first {MAX_LINES} of {len(apart)} tensors that differ." if len(apart) > MAX_LINES else ""
    for name, (title, unit, log) in MEASURES.items():
        figure, ax = new_axes(title, "step", unit, log=log)
        for tensor, distances in lines.items():
            values = _drawn(name, distances)
            if values.isfinite().any():
                ax.plot(steps, values, lw=1, label=tensor)
        if ax.lines:
            ax.legend()
        text = (
            f"Between the two traces, at each step that both recorded; nothing is drawn where they are equal.{left_out}"
        )
        yield Picture(name, title, text, figure)


def _drawn(name: str, distances: Distances) -> Tensor:
    values: Tensor = getattr(distances, name)
    return torch.where(values > 0, values, torch.nan)
