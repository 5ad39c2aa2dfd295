"""All numbers in the report of one trace, from one walk through its records in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast import lattice
from bhfast.errors import TraceError
from bhfast.summary import Vectors, final_loss, find_vectors
from bhfast.trace import Trace

SNAPSHOTS = (0, 1, 2, 10, 100, 1000)  # steps; the last step is added
MAX_SAMPLES = 1000  # records at which radii are taken; distances at half as many
MIN_SAMPLES = 8  # where a budget allows fewer
DISTANCE_BUDGET = 1e10  # coordinate differences to compute for all pairwise distances, at most
SPECTRUM_BUDGET = 1e10  # multiplications for all principal spectra, at most
MAX_LAG = 100  # records over which velocities are correlated
SETTINGS_IN_SUMMARY = {"σ": "sigma", "seed": "seed", "learning rate": "lr", "batch": "batch_size"}


class Snapshot(NamedTuple):
    """The vectors at a step, relative to their centroid, on the first two principal axes of the last record.

    Attributes:
        step: the step.
        projection: float64 ``[V, 2]``.
    """

    step: int
    projection: Tensor


@dataclass(frozen=True)
class Survey:
    """What happened in a run of R records, V tokens and D dimensions.

    Attributes:
        found: what the trace holds of the vectors.
        groups: masks, bool ``[V]``: ``trained`` tokens, which occur in the corpus, and ``dead`` ones; or only ``all``,
            if it is not known how often they occur. No group is empty.
        losses: float32 ``[R]``; None if there are none.
        distinct: for each group, and for ``all``, the number of distinct vectors: int64 ``[R]``.
        median_displacements: for each group, the medians over its tokens of the L1, L2 and L∞ norms of displacements,
            in ulp: float64 ``[R - 1, 3]``.
        phases: for each group, the share of its tokens in each momentary phase: float64 ``[R - 1, 4]``, in the order of
            ``bhfast.lattice.PHASES``.
        life, escape_steps: see :mod:`bhfast.lattice`.
        norms: Frobenius norms of the gradient and the optimizer's state, by name: float64 ``[R]`` each.
        gradient_temperature: float64 ``[R]``; None if there are no gradients.
        temperatures: of the velocities of all tokens; float64 ``[R - 1]`` each.
        correlation: for each group, and for ``all``, the autocorrelation of velocities: float64 ``[K + 1]``; empty if
            there are fewer than three records.
        radius_records: indices of the records at which radii were taken: int64 ``[M]``. If these are not all records,
            they are evenly spaced in the logarithm of the step.
        radii: distances from the centroid: float64 ``[M, V]``.
        centroid_norms: distance of the centroid from the origin: float64 ``[M]``.
        distance_records: as ``radius_records``, for pairwise distances: int64 ``[N]``.
        largest_distances, mean_distances: over all pairs of tokens: float64 ``[N]``.
        shape_records: as ``radius_records``, for the shape of the cloud: int64 ``[S]``.
        effective_dimensions, entropies: of the cloud, and of its points on the lattice, in bits: float64 ``[S]``.
        snapshots: projections of all vectors at some steps.
    """

    found: Vectors
    groups: dict[str, Tensor]
    losses: Tensor | None
    distinct: dict[str, Tensor]
    median_displacements: dict[str, Tensor]
    phases: dict[str, Tensor]
    life: lattice.Life
    escape_steps: Tensor
    norms: dict[str, Tensor]
    gradient_temperature: Tensor | None
    temperatures: lattice.Temperatures
    correlation: dict[str, Tensor]
    radius_records: Tensor
    radii: Tensor
    centroid_norms: Tensor
    distance_records: Tensor
    largest_distances: Tensor
    mean_distances: Tensor
    shape_records: Tensor
    effective_dimensions: Tensor
    entropies: Tensor
    snapshots: list[Snapshot]

    @property
    def trace(self) -> Trace:
        """The trace."""
        return self.found.trace

    @property
    def steps(self) -> Tensor:
        """The recorded steps: int64 ``[R]``."""
        return self.found.steps

    @property
    def dim(self) -> int:
        """How many dimensions there are."""
        return int(self.found.vectors.shape[2])

    @property
    def last_step(self) -> int:
        """The last step recorded."""
        return int(self.steps[-1])

    def freeze_step(self, group: str) -> int | None:
        """Return the last step in which a token of the group moved; None if one still moved in the last step."""
        last_move = int(self.life.last_late_step[self.groups[group]].max())
        return last_move if last_move < self.last_step else None

    def results(self) -> dict[str, float | int | None]:
        """Return the results of this run, one number each; None for a step that was not reached."""
        results: dict[str, float | int | None] = {
            "mean loss of the last 1,000 steps": (
                None if self.losses is None else final_loss(self.steps[1:], self.losses[1:])
            ),
            "largest pairwise distance": self.largest_distances[-1].item(),
            "mean radius": self.radii[-1].mean().item(),
            "distinct vectors": int(self.distinct["all"][-1]),
            "tokens in the black hole": int((self.escape_steps < 0).sum()),
        }
        for name, group in self.groups.items():
            results[f"{name} tokens"] = int(group.sum())
            results[f"{name} tokens, distinct vectors"] = int(self.distinct[name][-1])
            results[f"{name} tokens, frozen"] = int(self.life.frozen(self.last_step)[group].sum())
            results[f"{name} tokens, all frozen since step"] = self.freeze_step(name)
        return results

    def headline(self) -> str:
        """Return when the tokens of each group froze, dead ones first."""
        frozen = self.life.frozen(self.last_step)
        last_moves = self.life.last_late_step
        parts = []
        for name, group in sorted(self.groups.items()):
            count, still = int(group.sum()), int((group & frozen).sum())
            kind = "" if name == "all" else f"{name} "
            tokens = f"{count:,} {kind}token{'s' if count > 1 else ''}"
            step = int(last_moves[group].max())
            if still == count:
                parts.append(f"{tokens} froze by step {step:,}" if step else f"{tokens} never moved")
            elif still:
                parts.append(f"{still:,} of {tokens} froze before the last step, {step:,}")
            else:
                parts.append(f"{tokens} still moved in the last step, {step:,}")
        return "; ".join(parts)

    def table(self) -> list[tuple[str, str]]:
        """Return the results as rows of text, below a heading."""
        return [
            (f"at step {self.last_step:,}", ""),
            *((name, format_result(value)) for name, value in self.results().items()),
        ]

    def summary(self) -> str:
        """Return what was run, in one sentence."""
        config = self.trace.config
        settings = [
            f"{name} {config[key]:g}"
            for name, key in SETTINGS_IN_SUMMARY.items()
            if isinstance(config.get(key), int | float)
        ]
        if "engine" in self.trace.metadata:
            settings.append(f"engine {self.trace.metadata['engine']}")
        corpus = f" on {Path(self.trace.metadata['corpus']).name}" if "corpus" in self.trace.metadata else ""
        tokens = self.found.vectors.shape[1]
        return (
            f"{self.last_step:,} steps{corpus}, {len(self.steps):,} records of {tokens:,} tokens in {self.dim} "
            f"dimensions{'; ' if settings else ''}{', '.join(settings)}."
        )


def format_result(value: float | int | None) -> str:
    """Format one of :meth:`Survey.results`; a dash for None."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def survey_trace(trace: Trace, param: str | None = None) -> Survey:
    """Walk through a trace.

    Args:
        trace: with vectors; see :func:`bhfast.summary.find_vectors`.
        param: the name of the parameter whose vectors they are; None if there is but one.

    Raises:
        TraceError: the trace has no such vectors, or only one record.
    """
    found = find_vectors(trace, param)
    if len(found.steps) < 2:
        raise TraceError(f"{trace.path} has only one record, the start of a run: there is nothing to draw")
    vectors, steps = found.vectors, found.steps
    groups = groups_of(found)
    tokens, dim = vectors.shape[1:]
    radius_records = log_spaced(len(steps), MAX_SAMPLES)
    radii, centroid_norms = _radii(vectors, radius_records)
    distance_records = log_spaced(len(steps), _affordable(DISTANCE_BUDGET / (tokens**2 * dim), MAX_SAMPLES // 2))
    largest_distances, mean_distances = _distances(vectors, distance_records)
    shape_records = log_spaced(len(steps), _affordable(SPECTRUM_BUDGET / (dim**2 * (tokens + 10 * dim)), MAX_SAMPLES))
    effective_dimensions, entropies = _shapes(vectors, shape_records)
    median_displacements, phases = _moves(vectors, groups)
    grads = found.fields.get("grad")
    return Survey(
        found=found,
        groups=groups,
        losses=None if found.losses is None else found.losses.float(),
        distinct=_distinct(vectors, groups),
        median_displacements=median_displacements,
        phases=phases,
        life=lattice.life(vectors, steps),
        escape_steps=lattice.escape_steps(vectors, steps),
        norms={
            found.names[field]: lattice.per_record(lambda chunk: chunk.double().flatten(1).norm(dim=1), values)
            for field, values in found.fields.items()
        },
        gradient_temperature=None if grads is None else lattice.per_record(lattice.temperature, grads),
        temperatures=lattice.per_record(
            lambda chunk: lattice.temperatures(lattice.velocities(chunk)), vectors, overlap=1
        ),
        correlation=_correlation(vectors, groups),
        radius_records=radius_records,
        radii=radii,
        centroid_norms=centroid_norms,
        distance_records=distance_records,
        largest_distances=largest_distances,
        mean_distances=mean_distances,
        shape_records=shape_records,
        effective_dimensions=effective_dimensions,
        entropies=entropies,
        snapshots=_snapshots(vectors, steps),
    )


def left_out(found: Vectors) -> list[str]:
    """Return, for each picture or part of one that a trace does not allow, a line with the reason."""
    reasons = dict(found.missing)
    lines = {"loss": reasons.pop("losses", None)}
    if not found.fields:
        lines["norms"] = "neither gradients nor moments were recorded"
    lines["temperature of the gradient"] = reasons.pop("grad", None)
    lines["trained and dead tokens apart"] = reasons.pop("token_counts", None)
    lines |= {f"norm of {field}": reason for field, reason in reasons.items()}
    return [f"left out: {what}: {reason}" for what, reason in lines.items() if reason]


def _affordable(samples: float, most: int) -> int:
    return int(min(most, max(MIN_SAMPLES, samples)))


def groups_of(found: Vectors) -> dict[str, Tensor]:
    """Return the masks of :attr:`Survey.groups`."""
    if found.counts is None:
        return {"all": torch.ones(found.vectors.shape[1], dtype=torch.bool)}
    occurs = found.counts > 0
    return {name: mask for name, mask in (("trained", occurs), ("dead", ~occurs)) if mask.any()}


def _distinct(vectors: Tensor, groups: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {"all": torch.ones(vectors.shape[1], dtype=torch.bool), **groups}

    def counts(chunk: Tensor) -> Tensor:
        fingerprints = lattice.fingerprints(chunk)
        return torch.stack([lattice.count_distinct_values(fingerprints[:, mask]) for mask in masks.values()], dim=1)

    return dict(zip(masks, lattice.per_record(counts, vectors).unbind(1), strict=True))


class _Moves(NamedTuple):
    """Of each group of G: the medians of three norms, float64 ``[n, G, 3]``, and shares of phases, ``[n, G, 4]``."""

    medians: Tensor
    shares: Tensor


def _moves(vectors: Tensor, groups: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return, for each group, the medians over its tokens of the norms of displacements, and shares of phases."""

    def moves(chunk: Tensor) -> _Moves:
        sizes = lattice.norms(lattice.displacement(chunk[:-1], chunk[1:]))
        phase = lattice.momentary_phases(sizes)
        norms = torch.stack(sizes, dim=-1)
        return _Moves(
            torch.stack([norms[:, mask].median(dim=1).values for mask in groups.values()], dim=1),
            torch.stack([_shares(phase[:, mask]) for mask in groups.values()], dim=1),
        )

    found = lattice.per_record(moves, vectors, overlap=1)
    medians, shares = (dict(zip(groups, field.unbind(1), strict=True)) for field in found)
    return medians, shares


def _shares(phase: Tensor) -> Tensor:
    """Return the share of each phase in each row of ``[n, V]``: float64 ``[n, 4]``."""
    return torch.stack([(phase == number).double().mean(1) for number in range(len(lattice.PHASES))], dim=1)


def _correlation(vectors: Tensor, groups: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(vectors) < 3:
        return {}
    found = lattice.autocorrelation(vectors, min(MAX_LAG, len(vectors) - 2))
    return {"all": found.pooled(), **{name: found.pooled(mask) for name, mask in groups.items()}}


def _shapes(vectors: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
    """Return the effective dimension and the entropy of the cloud in each of these records, ``[S]`` each."""
    dimensions, entropies = torch.empty(2, len(records), dtype=torch.float64)
    for i, record in enumerate(records.tolist()):
        cloud = vectors[record].as_subclass(Tensor)
        dimensions[i] = lattice.effective_dimension(lattice.principal_spectrum(cloud))
        entropies[i] = lattice.cell_entropy(cloud)
    return dimensions, entropies


def log_spaced(records: int, most: int) -> Tensor:
    """Return indices of at most ``most`` records, both ends included: all of them, or denser at the start."""
    if records <= most:
        return torch.arange(records)
    return torch.logspace(0, math.log10(records), most, dtype=torch.float64).round().long().unique() - 1


def _radii(vectors: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of tokens from the centroid, ``[M, V]``, and of the centroid from the origin, ``[M]``."""
    radii = torch.empty(len(records), vectors.shape[1], dtype=torch.float64)
    centroid_norms = torch.empty(len(records), dtype=torch.float64)
    for i, record in enumerate(records.tolist()):
        cloud = vectors[record].as_subclass(Tensor)
        centroid = lattice.centroid(cloud)
        radii[i], centroid_norms[i] = lattice.radii(cloud, centroid), centroid.norm()
    return radii, centroid_norms


def _distances(vectors: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the mean pairwise distance in each of these records, ``[N]`` each."""
    found = [lattice.pairwise_distances(vectors[record].as_subclass(Tensor)) for record in records.tolist()]
    largest, mean = torch.tensor(found, dtype=torch.float64).unbind(1)
    return largest, mean


def _snapshots(vectors: Tensor, steps: Tensor) -> list[Snapshot]:
    axes = _principal_axes(lattice.centered(vectors[-1].as_subclass(Tensor)))
    axes = torch.where(axes.sum(1, keepdim=True) < 0, -axes, axes)  # their sign is arbitrary
    at = {int(step): record for record, step in enumerate(steps)}
    shown = dict.fromkeys((*(step for step in SNAPSHOTS if step in at), int(steps[-1])))
    return [Snapshot(step, lattice.centered(vectors[at[step]].as_subclass(Tensor)) @ axes.T) for step in shown]


def _principal_axes(vectors: Tensor) -> Tensor:
    """Return the first two principal axes of ``[V, D]`` about the origin: ``[2, D]``. Zeros where there are none."""
    axes = torch.zeros(2, vectors.shape[1], dtype=vectors.dtype)
    if vectors.isfinite().all():
        found = torch.linalg.svd(vectors, full_matrices=False).Vh[:2]
        axes[: len(found)] = found
    return axes
