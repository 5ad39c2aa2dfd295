"""The pictures of a run, and of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import torch

from bhfast.errors import BhfastError
from bhfast.report.survey import LINES, Survey
from bhfast.report.sweep import SweepSurvey

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
except ImportError:
    raise BhfastError("pictures need matplotlib: pip install matplotlib") from None

DPI = 200
INFERNO = colormaps["inferno"]
COLORS = {"trained": "steelblue", "dead": INFERNO(0.65), "all": "0.25"}
SMOOTHED = 100  # steps


class Picture(NamedTuple):
    """A picture and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


def axes(title: str, x: str, y: str, *, log: str = "x") -> tuple[Figure, Axes]:
    """Return an empty diagram; ``log`` names its logarithmic axes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    if "x" in log:
        ax.set_xscale("symlog", linthresh=1, linscale=0.3)  # with a place for step 0
    if "y" in log:
        ax.set_yscale("log")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


# ---------------------------------------------------------------------------------------------------------------------
# Of a run


def run_pictures(survey: Survey) -> Iterator[Picture]:
    """Draw all pictures, one by one."""
    for draw in (loss, distinct, distance, displacement, freezing, spacetime, cloud, norms, temperatures):
        yield draw(survey)


def loss(s: Survey) -> Picture:
    """Draw the loss of each step and its mean over some of them."""
    figure, ax = axes("Loss", "step", "cross-entropy (nats per token)", log="")
    steps, values = s.steps[1:], s.losses[1:]
    ax.plot(steps, values, color="steelblue", alpha=0.3, lw=0.5, label="each step")
    width = min(SMOOTHED, len(values))
    if width:
        smooth = values.double().unfold(0, width, 1).mean(1)
        ax.plot(steps[width - 1 :], smooth, color="steelblue", lw=1.5, label=f"mean of the last {width} records")
        ax.legend()
    return Picture("loss", "Loss", "Training loss on the step's own windows.", figure)


def distinct(s: Survey) -> Picture:
    """Draw the number of different vectors."""
    figure, ax = axes("How many different vectors there are", "step", "distinct vectors")
    for name, counts in s.distinct.items():
        total = len(s.life.late) if name == "all" else int(s.groups[name].sum())
        ax.plot(s.steps, counts, color=COLORS[name], lw=1.5, drawstyle="steps-post", label=f"{name}: of {total} tokens")
    ax.set_ylim(bottom=0)
    ax.legend()
    text = "Tokens with identical vectors count once: a black hole of all tokens is one vector."
    return Picture("distinct", "Distinct vectors", text, figure)


def distance(s: Survey) -> Picture:
    """Draw the largest and the mean distance between tokens."""
    figure, ax = axes("How far apart the tokens are", "step", "L2 distance of two tokens")
    steps = s.steps[s.distance_moments]
    ax.plot(steps, s.largest, color=INFERNO(0.65), lw=1.5, label="largest")
    ax.plot(steps, s.mean, color="steelblue", lw=1.5, label="mean")
    ax.set_ylim(bottom=0)
    ax.legend()
    return Picture("distance", "Pairwise distance", "Over all pairs of tokens.", figure)


def displacement(s: Survey) -> Picture:
    """Draw how far tokens move from record to record, and when they leave each phase."""
    limit = math.sqrt(s.trace["embeddings"].shape[2])
    figure, ax = axes("How far a token moves at once", "step", "median displacement (ulp)", log="x")
    ax.set_yscale("symlog", linthresh=0.1)
    for name, moves in s.moves.items():
        for i, (norm, style) in enumerate((("L1", ":"), ("L2", "--"), ("L∞", "-"))):
            label = f"{norm}, {name}"
            ax.plot(s.steps[1:], moves[:, i], color=COLORS[name], ls=style, lw=0.8, label=label)
        top = 0.97 - 0.2 * (name == "dead")
        for i, (last, phase) in enumerate(zip(s.life, ("early", "midlife", "late"), strict=True)):
            end = last[s.groups[name]].double().quantile(0.5).item()
            ax.axvline(end, color=COLORS[name], lw=1, alpha=0.6)
            ax.annotate(
                f"{phase} ends: {end:,.0f} ",
                (end, top - 0.05 * i),
                xycoords=("data", "axes fraction"),
                ha="right",
                fontsize=7,
                color=COLORS[name],
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
    for level, text in ((1, "1 ulp"), (limit, f"√D = {limit:g} ulp")):
        ax.axhline(level, color="0.6", lw=0.8)
        ax.annotate(text, (0.005, level), xycoords=("axes fraction", "data"), fontsize=7, va="bottom", color="0.4")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7, ncols=len(s.moves), loc="lower left")
    text = (
        "In ulp at the starting position, from record to record. A token is early until its last displacement with L2 "
        "above √D ulp, in midlife until its last one with L∞ above 1 ulp, late until its last one of all, and then "
        "frozen. Vertical lines: the median token leaves the phase."
    )
    return Picture("displacement", "Displacement", text, figure)


def freezing(s: Survey) -> Picture:
    """Draw the last step in which each token moved."""
    figure, ax = axes("When tokens freeze", "last step in which a token moved", "tokens", log="")
    bins = torch.linspace(0, s.last, 51).tolist()
    values = [s.life.late[mask].numpy() for mask in s.groups.values()]
    labels = [
        f"{name}: {int(s.life.frozen(s.last)[mask].sum())} of {int(mask.sum())} frozen"
        for name, mask in s.groups.items()
    ]
    colors: list[Any] = [COLORS[name] for name in s.groups]
    ax.hist(values, bins, stacked=True, color=colors, label=labels)
    ax.legend()
    text = f"Who moved in the last step, {s.last:,}, is not frozen, as it might have gone on."
    return Picture("freezing", "Freezing", text, figure)


def spacetime(s: Survey) -> Picture:
    """Draw the distance of tokens from their centroid."""
    figure, ax = axes("Space-time diagram", "step", "L2 distance from the centroid")
    tokens = torch.linspace(0, s.radii.shape[1] - 1, min(LINES, s.radii.shape[1])).round().long()
    steps = s.steps[s.moments].double()
    tokens = tokens[s.radii[-1, tokens].argsort()]
    lines = LineCollection(
        [torch.stack([steps, s.radii[:, token]], 1).numpy() for token in tokens], cmap=INFERNO, lw=0.8, alpha=0.8
    )
    lines.set_array(s.escape[tokens].clamp(min=0).double().log1p().numpy())
    ax.add_collection(lines)
    ax.plot(steps, s.centroid, color="steelblue", lw=1.5, label="centroid, from the origin")
    dead = s.groups.get("dead")
    if dead is not None:
        ax.plot(steps, s.radii[:, dead].mean(1), color="steelblue", ls="--", lw=1.5, label="dead tokens, mean")
    ax.autoscale_view()
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper left")
    bar = figure.colorbar(lines, ax=ax, label="step of escape from the black hole")
    ticks = [0, *(10**i for i in range(5) if 10**i <= int(s.escape.max()))]
    bar.set_ticks([math.log1p(t) for t in ticks], labels=[f"{t:,}" for t in ticks])
    shown = "" if len(tokens) == s.radii.shape[1] else f" {len(tokens)} of {s.radii.shape[1]:,} tokens are shown."
    text = f"One line for each token, colored by the step since when it has been out of the black hole for good.{shown}"
    return Picture("spacetime", "Space-time diagram", text, figure)


def cloud(s: Survey) -> Picture:
    """Draw the cloud at some steps."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    figure.suptitle("The cloud on the first two principal axes of its last record")
    grid = list(figure.subplots(2, 4).flat)
    for ax, (step, view) in zip(grid, s.snapshots, strict=False):
        for name, mask in s.groups.items():
            ax.scatter(*view[mask].T, s=6, color=COLORS[name], alpha=0.7, lw=0, label=name)
        reach = max(view.nan_to_num(0, 0, 0).abs().max().item() * 1.1, 1e-6)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.set_title(f"step {step:,}", fontsize=9)
        ax.tick_params(labelsize=6)
        ax.ticklabel_format(scilimits=(-2, 3))
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_offset_text().set_fontsize(6)
    for ax in grid[len(s.snapshots) :]:
        ax.axis("off")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.98, 0.2), markerscale=2
    )
    text = (
        "Each panel about its own centroid and on its own scale; the axes are those of the last panel in all of them."
    )
    return Picture("cloud", "The cloud", text, figure)


def norms(s: Survey) -> Picture:
    """Draw the norms of gradient and moments."""
    figure, ax = axes("Gradient and moments of the embeddings", "step", "Frobenius norm", log="xy")
    for (name, values), color in zip(s.norms.items(), ("steelblue", INFERNO(0.65), INFERNO(0.35)), strict=True):
        ax.plot(s.steps[1:], values[1:], color=color, lw=0.8, label=name)
    ax.legend()
    return Picture("norms", "Norms", "Unclipped gradient, momentum (exp_avg) and variance (exp_avg_sq).", figure)


def temperatures(s: Survey) -> Picture:
    """Draw the temperatures of gradient and update."""
    figure, ax = axes("Temperature", "step", "variance about the mean over tokens", log="xy")
    ax.plot(s.steps[1:], s.gradient_temperature[1:], color="steelblue", lw=0.8, label="gradient")
    ax.plot(s.steps[1:], s.update_temperature, color=INFERNO(0.65), lw=0.8, label="update")
    ax.legend()
    text = (
        "The part of gradients, and of displacements, in which tokens differ: mean of (x - mean over tokens)² over all."
    )
    return Picture("temperature", "Temperature", text, figure)


# ---------------------------------------------------------------------------------------------------------------------
# Of a sweep


def sweep_pictures(sweep: SweepSurvey) -> Iterator[Picture]:
    """Draw each answer that is not the same number for all runs, one by one."""
    for name in dict.fromkeys(name for run in sweep.runs for name in run.results):
        if len({run.results.get(name) for run in sweep.runs}) > 1:
            yield _answer(sweep, name)


def _answer(sweep: SweepSurvey, name: str) -> Picture:
    """Draw one answer: a line for each series, through the medians over seeds."""
    title = name[0].upper() + name[1:]
    figure, ax = axes(title, "σ" if sweep.axis == "sigma" else sweep.axis, name, log="")
    positive = [run.settings[sweep.axis] for run in sweep.runs if run.settings[sweep.axis]]
    if positive and max(positive) / min(positive) > 20:
        ax.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    series = sweep.series()
    for i, (text, runs) in enumerate(series.items()):
        color = "steelblue" if len(series) == 1 else INFERNO(0.15 + 0.65 * i / (len(series) - 1))
        values = [(run.settings[sweep.axis], run.results.get(name)) for run in runs]
        points = [(at, value) for at, value in values if value is not None]
        places = sorted({at for at, _ in points})
        middle = [median(value for at, value in points if at == place) for place in places]
        ax.scatter([at for at, _ in points], [value for _, value in points], 14, [color], alpha=0.6, lw=0)
        ax.plot(places, middle, color=color, lw=1.2, label=text or None)
    if len(series) > 1:
        ax.legend(fontsize=7)
    caption = "Points: single runs; lines: the medians over seeds."
    if missing := sum(run.results.get(name) is None for run in sweep.runs):
        caption += f" {missing} runs have no such number: some of these tokens still moved in the last step."
    return Picture("-".join(name.replace(",", "").split()), title, caption, figure)
