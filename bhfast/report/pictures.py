"""The pictures in the report of a run, and of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import Any, Literal, NamedTuple

import torch

from bhfast import lattice
from bhfast.errors import BhfastError
from bhfast.report.survey import Survey
from bhfast.report.sweep import SweepSurvey

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
except ImportError:
    raise BhfastError("pictures need matplotlib: pip install matplotlib") from None

DPI = 200
INFERNO = colormaps["inferno"]
BLUE, ORANGE, PURPLE = "steelblue", INFERNO(0.65), INFERNO(0.35)
PHASE_COLORS = [INFERNO(0.85), INFERNO(0.65), INFERNO(0.35), "lightsteelblue"]  # of lattice.PHASES
GROUP_COLORS = {"trained": BLUE, "dead": ORANGE, "all": "0.25"}
SMOOTHING = 100  # records whose losses are averaged
MAX_LINES = 400  # tokens drawn in the space-time diagram
WIDE_RANGE = 20  # an axis is logarithmic if its largest value is more than this many times the smallest


class Picture(NamedTuple):
    """A picture and its words.

    Attributes:
        name: of its file, without the suffix.
        title: its heading.
        caption: what it shows.
        figure: the picture itself.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def new_axes(title: str, x: str, y: str, *, log: str = "x") -> tuple[Figure, Axes]:
    """Return an empty diagram; ``log`` names its logarithmic axes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    if "x" in log:
        ax.set_xscale("symlog", linthresh=1, linscale=0.3)  # leaves room for step 0
    if "y" in log:
        ax.set_yscale("log")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


Place = Literal["outside lower left", "outside lower center", "outside lower right"]


def legend_below(figure: Figure, ax: Axes, place: Place = "outside lower center") -> None:
    """Put the legend of a diagram below it, where it hides nothing."""
    figure.legend(*ax.get_legend_handles_labels(), loc=place, ncols=3, frameon=False, fontsize=8)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of a run


def run_pictures(survey: Survey) -> Iterator[Picture]:
    """Draw all pictures of a run that its trace allows, one at a time."""
    drawn = {
        loss: survey.losses is not None,
        **dict.fromkeys((distinct, distance, displacement, phases, freezing, spacetime, cloud, shape, motion), True),
        norms: bool(survey.norms),
        temperatures: survey.gradient_temperature is not None,
    }
    for draw, is_possible in drawn.items():
        if is_possible:
            yield draw(survey)


def loss(survey: Survey) -> Picture:
    """Draw the loss of each step and its moving average."""
    figure, ax = new_axes("Loss", "step", "cross-entropy (nats per token)", log="")
    assert survey.losses is not None
    steps, values = survey.steps[1:], survey.losses[1:]
    ax.plot(steps, values, color=BLUE, alpha=0.4, lw=0.7, label="each step")
    width = min(SMOOTHING, len(values))
    if width:
        smooth = values.double().unfold(0, width, 1).mean(1)
        ax.plot(steps[width - 1 :], smooth, color=BLUE, lw=1.5, label=f"mean of the last {width} records")
        legend_below(figure, ax)
    return Picture("loss", "Loss", "Training loss of each step, on that step's windows.", figure)


def distinct(survey: Survey) -> Picture:
    """Draw the number of distinct vectors."""
    figure, ax = new_axes("How many different vectors there are", "step", "distinct vectors")
    for name, counts in survey.distinct.items():
        total = len(survey.life.last_late_step) if name == "all" else int(survey.groups[name].sum())
        label = f"{name}: of {total} tokens"
        ax.plot(survey.steps, counts, color=GROUP_COLORS[name], lw=1.5, drawstyle="steps-post", label=label)
    ax.set_ylim(bottom=0)
    legend_below(figure, ax)
    text = "Tokens with identical vectors count once: if all tokens are in the black hole, there is one vector."
    return Picture("distinct", "Distinct vectors", text, figure)


def distance(survey: Survey) -> Picture:
    """Draw the largest and the mean distance between tokens."""
    figure, ax = new_axes("How far apart the tokens are", "step", "L2 distance of two tokens")
    steps = survey.steps[survey.distance_records]
    ax.plot(steps, survey.largest_distances, color=ORANGE, lw=1.5, label="largest")
    ax.plot(steps, survey.mean_distances, color=BLUE, lw=1.5, label="mean")
    ax.set_ylim(bottom=0)
    legend_below(figure, ax)
    return Picture("distance", "Pairwise distance", "Over all pairs of tokens.", figure)


def displacement(survey: Survey) -> Picture:
    """Draw how far tokens move from record to record, and when they leave each phase."""
    limit = math.sqrt(survey.dim)
    figure, ax = new_axes("How far a token moves at once", "step", "median displacement (ulp)", log="x")
    ax.set_yscale("symlog", linthresh=0.1)
    for name, moves in survey.median_displacements.items():
        for i, (norm, style) in enumerate((("L1", ":"), ("L2", "--"), ("L∞", "-"))):
            label = f"{norm}, {name}"
            ax.plot(survey.steps[1:], moves[:, i], color=GROUP_COLORS[name], ls=style, lw=0.8, label=label)
        _mark_phase_ends(ax, survey, name, top=0.97 - 0.2 * (name == "dead"))
    for level, text in ((1, "1 ulp"), (limit, f"√D = {limit:g} ulp")):
        ax.axhline(level, color="0.6", lw=0.8)
        ax.annotate(text, (0.005, level), xycoords=("axes fraction", "data"), fontsize=7, va="bottom", color="0.4")
    ax.set_ylim(bottom=0)
    legend_below(figure, ax)
    text = (
        "Displacements from record to record, in ulp at the starting position. A token is early until its last "
        "displacement with L2 above √D ulp, in midlife until its last with L∞ above 1 ulp, late until its last of all, "
        "and then frozen. At a vertical line the median token leaves the phase." + _one_vector(survey)
    )
    return Picture("displacement", "Displacement", text, figure)


def _mark_phase_ends(ax: Axes, survey: Survey, group: str, top: float) -> None:
    """Mark the steps at which the median token of a group leaves each phase; the first label is at height ``top``."""
    color = GROUP_COLORS[group]
    for i, (last_steps, phase) in enumerate(zip(survey.life, ("early", "midlife", "late"), strict=True)):
        end = last_steps[survey.groups[group]].double().quantile(0.5).item()
        ax.axvline(end, color=color, lw=1, alpha=0.6)
        ax.annotate(
            f"{phase} ends: {end:,.0f} ",
            (end, top - 0.05 * i),
            xycoords=("data", "axes fraction"),
            ha="right",
            fontsize=7,
            color=color,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def phases(survey: Survey) -> Picture:
    """Draw the share of tokens in each momentary phase."""
    groups = survey.phases
    figure = Figure(figsize=(8, 1.7 + 1.7 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, shares) in zip(axes, groups.items(), strict=True):
        ax.stackplot(survey.steps[1:], shares.T, colors=PHASE_COLORS, lw=0, step="post")
        ax.set(xscale="log", ylim=(0, 1), ylabel=f"share of {name} tokens")
        ax.margins(x=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("What tokens do from record to record")
    axes[-1].set_xlabel("step")
    figure.legend(
        [Rectangle((0, 0), 1, 1, color=color) for color in PHASE_COLORS],
        lattice.PHASES,
        loc="outside lower center",
        ncols=len(lattice.PHASES),
        frameon=False,
    )
    text = (
        "Superluminal: a displacement with L2 above 1,000 ulp, from one record to the next. L1 ≤ 1: at most one ulp in "
        "all. Frozen: no coordinate moves. A frozen token may move again." + _one_vector(survey)
    )
    return Picture("phases", "Momentary phases", text, figure)


def freezing(survey: Survey) -> Picture:
    """Draw the last step in which each token moved."""
    figure, ax = new_axes("When tokens freeze", "last step in which a token moved", "tokens", log="")
    bins = torch.linspace(0, survey.last_step, 51).tolist()
    values = [survey.life.last_late_step[mask].numpy() for mask in survey.groups.values()]
    labels = [
        f"{name}: {int(survey.life.frozen(survey.last_step)[mask].sum())} of {int(mask.sum())} frozen"
        for name, mask in survey.groups.items()
    ]
    colors: list[Any] = [GROUP_COLORS[name] for name in survey.groups]
    ax.hist(values, bins, stacked=True, color=colors, label=labels)
    legend_below(figure, ax)
    text = f"A token that moved in the last step, {survey.last_step:,}, is not counted as frozen: it may move later."
    text += _one_vector(survey)
    return Picture("freezing", "Freezing", text, figure)


def spacetime(survey: Survey) -> Picture:
    """Draw the distance of tokens from their centroid."""
    figure, ax = new_axes("Space-time diagram", "step", "L2 distance from the centroid")
    tokens = torch.linspace(0, survey.radii.shape[1] - 1, min(MAX_LINES, survey.radii.shape[1])).round().long()
    steps = survey.steps[survey.radius_records].double()
    tokens = tokens[survey.radii[-1, tokens].argsort()]
    escape = survey.escape_steps[tokens]
    curves = [torch.stack([steps, survey.radii[:, token]], 1).numpy() for token in tokens]
    inside = [curve for curve, step in zip(curves, escape, strict=True) if step < 0]
    outside = [curve for curve, step in zip(curves, escape, strict=True) if step >= 0]
    if inside:
        ax.add_collection(LineCollection(inside, colors="0.6", lw=0.9, label="in the black hole at the end"))
    lines = LineCollection(outside, cmap=INFERNO, lw=0.9, alpha=0.85)
    lines.set_array(escape[escape >= 0].double().log1p().numpy())
    ax.add_collection(lines)
    outline = [withStroke(linewidth=3.5, foreground="white")]
    ax.plot(steps, survey.centroid_norms, color=BLUE, lw=1.8, path_effects=outline, label="centroid, from the origin")
    dead = survey.groups.get("dead")
    if dead is not None:
        mean = survey.radii[:, dead].mean(1)
        ax.plot(steps, mean, color="seagreen", ls="--", lw=1.8, path_effects=outline, label="dead tokens, mean")
    ax.autoscale_view()
    ax.set_ylim(bottom=0)
    legend_below(figure, ax)
    latest = int(escape.max())
    if latest > 0:
        bar = figure.colorbar(lines, ax=ax, label="step of escape from the black hole")
        ticks = escape_ticks(max(0, int(escape[escape >= 0].min())), latest)
        bar.set_ticks([math.log1p(t) for t in ticks], labels=[f"{t:,}" for t in ticks])
        bar.minorticks_off()
        text = "One line per token, colored by the step at which it left the black hole for good."
        text += " 0: it was never inside." if (escape == survey.steps[0]).any() else ""
    elif latest == 0:
        text = "One line per token. None of them left a black hole."
    else:
        text = "One line per token. All of them are one vector, a black hole, at the end."
    if len(tokens) < survey.radii.shape[1]:
        text += f" {len(tokens)} of {survey.radii.shape[1]:,} tokens are shown."
    return Picture("spacetime", "Space-time diagram", text + _one_vector(survey), figure)


def escape_ticks(first: int, last: int) -> list[int]:
    """Return steps for a logarithmic scale from one step to another: both ends, and round ones between them."""
    factors = (1,) if last >= 100 * max(1, first) else (1, 2, 5)
    between = [n * 10**i for i in range(len(str(last))) for n in factors if first * 1.5 < n * 10**i < last / 1.5]
    return [first, *between, last] if last > first else [last]


def _one_vector(survey: Survey) -> str:
    """Return a sentence for each group of several tokens that all have the same vector in every record."""
    return "".join(
        f" All {int(mask.sum()):,} {name + ' ' if name != 'all' else ''}tokens are one vector in every record, "
        "so they do the same."
        for name, mask in survey.groups.items()
        if mask.sum() > 1 and bool((survey.distinct[name] == 1).all())
    )


def cloud(survey: Survey) -> Picture:
    """Draw the cloud of tokens at some steps."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    figure.suptitle("The cloud on the first two principal axes of its last record")
    grid = list(figure.subplots(2, 4).flat)
    for ax, (step, projection) in zip(grid, survey.snapshots, strict=False):
        for name, mask in survey.groups.items():
            ax.scatter(*projection[mask].T, s=6, color=GROUP_COLORS[name], alpha=0.7, lw=0, label=name)
        reach = max(projection.nan_to_num(0, 0, 0).abs().max().item() * 1.1, 1e-6)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.set_title(f"step {step:,}", fontsize=9)
        ax.tick_params(labelsize=6)
        ax.ticklabel_format(scilimits=(-2, 3))
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_offset_text().set_fontsize(6)
    for ax in grid[len(survey.snapshots) :]:
        ax.axis("off")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="lower right", bbox_to_anchor=(0.98, 0.2), markerscale=2
    )
    text = "Each panel is centered on its centroid and has its own scale; all use the principal axes of the last one."
    return Picture("cloud", "The cloud", text, figure)


def shape(survey: Survey) -> Picture:
    """Draw how many dimensions the cloud fills, and how evenly it fills the lattice."""
    figure, ax = new_axes("The shape of the cloud", "step", f"effective dimension (of {survey.dim})")
    steps = survey.steps[survey.shape_records]
    (dimension,) = ax.plot(steps, survey.effective_dimensions, color=BLUE, lw=1.5, label="effective dimension")
    ax.set_ylim(bottom=0)
    bits = ax.twinx()
    (entropy,) = bits.plot(steps, survey.entropies, color=ORANGE, lw=1.5, ls="--", label="entropy")
    most = math.log2(survey.radii.shape[1])
    bits.set(ylabel="entropy of the occupied lattice points (bits)", ylim=(0, max(most * 1.08, 0.1)))
    bits.axhline(most, color=ORANGE, lw=0.8, alpha=0.5)
    bits.spines["top"].set_visible(False)
    figure.legend(handles=[dimension, entropy], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    text = (
        "Effective dimension: the participation ratio of the cloud's principal spectrum; there is none while all "
        f"tokens are at one point. Entropy: 0 if all tokens are in one black hole, {most:.3g} bits if all differ."
    )
    return Picture("shape", "The shape of the cloud", text, figure)


def motion(survey: Survey) -> Picture:
    """Draw the temperatures of the tokens' motion, and how long they keep their velocities."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    warm, keep = figure.subplots(1, 2, width_ratios=(3, 2))
    found, steps = survey.temperatures, survey.steps[1:]
    for values, name, color in (
        (found.total, "total", "0.6"),
        (found.thermal, "thermal", ORANGE),
        (found.bulk, "bulk", BLUE),
    ):
        warm.plot(steps, values.where(values > 0, math.nan), color=color, lw=0.8, label=name)
    if (found.total > 0).any():
        warm.set_yscale("log")
    else:
        warm.text(0.5, 0.5, "no velocity above 0", transform=warm.transAxes, ha="center")
    warm.set(xscale="log", xlim=(1, survey.last_step + 1), xlabel="step", ylabel="mean squared displacement per record")
    warm.set_title("All tokens: together and apart", fontsize=10)
    for name, rho in survey.correlation.items():
        time = lattice.correlation_time(rho)
        label = name if math.isnan(time) else f"{name}: τ = {time:.1f}"
        keep.plot(rho, color=GROUP_COLORS[name], lw=1.5, label=label)
    keep.axhline(0, color="0.6", lw=0.8)
    keep.set(
        xlabel="lag (records)",
        xlim=(0, len(next(iter(survey.correlation.values()), "1"))),
        ylim=(min(-0.1, keep.get_ylim()[0]), 1.05),
    )
    keep.set_title("Autocorrelation of the velocity", fontsize=10)
    for ax in (warm, keep):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    legend_below(figure, warm, "outside lower left")
    if survey.correlation:
        legend_below(figure, keep, "outside lower right")
    text = (
        "A velocity is a displacement from record to record. Bulk: the square of the mean velocity of all tokens. "
        "Thermal: the mean square of what is left. They add up to the total. τ is the integrated autocorrelation time, "
        "in records; it is left out if it is too long to tell."
    )
    return Picture("motion", "Bulk and thermal motion", text, figure)


def norms(survey: Survey) -> Picture:
    """Draw the norms of gradient and moments."""
    figure, ax = new_axes("Gradient and moments of the embeddings", "step", "Frobenius norm", log="xy")
    for i, (name, values) in enumerate(survey.norms.items()):
        color = (BLUE, ORANGE, PURPLE)[i] if i < 3 else f"C{i}"
        ax.plot(survey.steps[1:], values[1:], color=color, lw=0.8, label=name)
    legend_below(figure, ax)
    return Picture("norms", "Norms", "The gradient, and the state of the optimizer.", figure)


def temperatures(survey: Survey) -> Picture:
    """Draw the temperatures of gradient and update."""
    figure, ax = new_axes("Temperature", "step", "variance about the mean over tokens", log="xy")
    assert survey.gradient_temperature is not None
    ax.plot(survey.steps[1:], survey.gradient_temperature[1:], color=BLUE, lw=0.8, label="gradient")
    ax.plot(survey.steps[1:], survey.temperatures.thermal / survey.dim, color=ORANGE, lw=0.8, label="update")
    legend_below(figure, ax)
    text = "How much tokens differ in their gradients and in their displacements: the mean of (x - mean over tokens)²."
    return Picture("temperature", "Temperature", text, figure)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of a sweep


def sweep_pictures(sweep: SweepSurvey) -> Iterator[Picture]:
    """Draw each result that is not the same in all runs, one at a time."""
    for name in dict.fromkeys(name for run in sweep.runs for name in run.results):
        if len({run.results.get(name) for run in sweep.runs}) > 1:
            yield _result(sweep, name)


def _result(sweep: SweepSurvey, name: str) -> Picture:
    """Draw one result: a line for each series, through the medians over seeds."""
    title = name[0].upper() + name[1:]
    figure, ax = new_axes(title, "σ" if sweep.axis == "sigma" else sweep.axis, name, log="")
    positive = [run.settings[sweep.axis] for run in sweep.runs if run.settings[sweep.axis]]
    if positive and max(positive) / min(positive) > WIDE_RANGE:
        ax.set_xscale("symlog", linthresh=min(positive), linscale=0.5)
    series = sweep.series()
    for i, (text, runs) in enumerate(series.items()):
        color = BLUE if len(series) == 1 else INFERNO(0.15 + 0.65 * i / (len(series) - 1))
        values = [(run.settings[sweep.axis], run.results.get(name)) for run in runs]
        points = [(x, y) for x, y in values if y is not None]
        xs = sorted({x for x, _ in points})
        medians = [median(y for other, y in points if other == x) for x in xs]
        ax.scatter([x for x, _ in points], [y for _, y in points], 14, [color], alpha=0.6, lw=0)
        ax.plot(xs, medians, color=color, lw=1.2, label=text or None)
    if len(series) > 1:
        ax.legend(fontsize=7)
    caption = "Each point is a run; the lines join the medians over seeds."
    if missing := sum(run.results.get(name) is None for run in sweep.runs):
        caption += f" {missing} runs are missing because some of these tokens still moved in the last step."
    return Picture("-".join(name.replace(",", "").split()), title, caption, figure)
