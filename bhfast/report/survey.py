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
from bhfast.summary import final_loss, require_reference_trace
from bhfast.trace import Trace

SNAPSHOTS = (0, 1, 2, 10, 100, 1000)  # steps; the last step is added
MAX_SAMPLES = 1000  # records at which radii are taken; distances at half as many
MIN_DISTANCE_SAMPLES = 8
DISTANCE_BUDGET = 1e10  # coordinate differences to compute for all pairwise distances, at most
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
        trace: the trace.
        groups: masks, bool ``[V]``: ``trained`` tokens, which occur in the corpus, and ``dead`` ones; or only ``all``,
            if the trace has no ``token_counts``. No group is empty.
        steps: int64 ``[R]``.
        losses: float32 ``[R]``; the first is NaN.
        distinct: for each group, and for ``all``, the number of distinct vectors: int64 ``[R]``.
        median_displacements: for each group, the medians over its tokens of the L1, L2 and L∞ norms of displacements,
            in ulp: float64 ``[R - 1, 3]``.
        life, escape_steps: see :mod:`bhfast.lattice`.
        norms: Frobenius norms of ``grads``, ``momentum`` and ``variance``: float64 ``[R]`` each.
        gradient_temperature, update_temperature: float64 ``[R]`` and ``[R - 1]``.
        radius_records: indices of the records at which radii were taken: int64 ``[M]``. If these are not all records,
            they are evenly spaced in the logarithm of the step.
        radii: distances from the centroid: float64 ``[M, V]``.
        centroid_norms: distance of the centroid from the origin: float64 ``[M]``.
        distance_records: as ``radius_records``, for pairwise distances: int64 ``[N]``.
        largest_distances, mean_distances: over all pairs of tokens: float64 ``[N]``.
        snapshots: projections of all vectors at some steps.
    """

    trace: Trace
    groups: dict[str, Tensor]
    steps: Tensor
    losses: Tensor
    distinct: dict[str, Tensor]
    median_displacements: dict[str, Tensor]
    life: lattice.Life
    escape_steps: Tensor
    norms: dict[str, Tensor]
    gradient_temperature: Tensor
    update_temperature: Tensor
    radius_records: Tensor
    radii: Tensor
    centroid_norms: Tensor
    distance_records: Tensor
    largest_distances: Tensor
    mean_distances: Tensor
    snapshots: list[Snapshot]

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
            "mean loss of the last 1,000 steps": final_loss(self.steps[1:], self.losses[1:]),
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

    def table(self) -> list[tuple[str, str]]:
        """Return the results as rows of text, below a heading."""
        return [
            (f"at step {self.last_step:,}", ""),
            *((name, format_result(value)) for name, value in self.results().items()),
        ]

    def summary(self) -> str:
        """Return what was run, in one sentence."""
        config = self.trace.config
        corpus = Path(self.trace.metadata.get("corpus", "an unknown corpus")).name
        settings = ", ".join(
            f"{name} {config[key]:g}"
            for name, key in SETTINGS_IN_SUMMARY.items()
            if isinstance(config.get(key), int | float)
        )
        engine = self.trace.metadata.get("engine", "unknown")
        tokens, dim = self.trace["embeddings"].shape[1:]
        return (
            f"{self.last_step:,} steps on {corpus}, {len(self.steps):,} records of {tokens:,} tokens in {dim} "
            f"dimensions; {settings}; engine {engine}."
        )


def format_result(value: float | int | None) -> str:
    """Format one of :meth:`Survey.results`; a dash for None."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def survey_trace(trace: Trace) -> Survey:
    """Walk through a trace of the reference run.

    Raises:
        TraceError: ``trace`` is not of the reference run.
    """
    require_reference_trace(trace)
    if len(trace.steps) < 2:
        raise TraceError(f"{trace.path} has only one record, the start of a run: there is nothing to draw")
    embeddings, steps = trace["embeddings"], trace.steps.as_subclass(Tensor)
    groups = _groups(trace)
    radius_records = _log_spaced(len(steps), MAX_SAMPLES)
    radii, centroid_norms = _radii(embeddings, radius_records)
    differences = embeddings.shape[1] ** 2 * embeddings.shape[2]  # for the distances of one record
    samples = max(MIN_DISTANCE_SAMPLES, DISTANCE_BUDGET / differences)
    distance_records = _log_spaced(len(steps), int(min(MAX_SAMPLES / 2, samples)))
    largest_distances, mean_distances = _distances(embeddings, distance_records)
    return Survey(
        trace=trace,
        groups=groups,
        steps=steps,
        losses=trace["losses"].float(),
        distinct=_distinct(embeddings, groups),
        median_displacements=_median_displacements(embeddings, groups),
        life=lattice.life(embeddings, steps),
        escape_steps=lattice.escape_steps(embeddings, steps),
        norms={
            name: lattice.per_record(lambda chunk: chunk.double().flatten(1).norm(dim=1), trace[name])
            for name in ("grads", "momentum", "variance")
        },
        gradient_temperature=lattice.per_record(lattice.temperature, trace["grads"]),
        update_temperature=lattice.per_record(
            lambda chunk: lattice.temperature(chunk[1:].double() - chunk[:-1].double()), embeddings, overlap=1
        ),
        radius_records=radius_records,
        radii=radii,
        centroid_norms=centroid_norms,
        distance_records=distance_records,
        largest_distances=largest_distances,
        mean_distances=mean_distances,
        snapshots=_snapshots(embeddings, steps),
    )


def _groups(trace: Trace) -> dict[str, Tensor]:
    if "token_counts" not in trace:
        return {"all": torch.ones(trace["embeddings"].shape[1], dtype=torch.bool)}
    occurs = trace["token_counts"].as_subclass(Tensor) > 0
    return {name: mask for name, mask in (("trained", occurs), ("dead", ~occurs)) if mask.any()}


def _distinct(embeddings: Tensor, groups: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {"all": torch.ones(embeddings.shape[1], dtype=torch.bool), **groups}

    def counts(chunk: Tensor) -> Tensor:
        fingerprints = lattice.fingerprints(chunk)
        return torch.stack([lattice.count_distinct_values(fingerprints[:, mask]) for mask in masks.values()], dim=1)

    return dict(zip(masks, lattice.per_record(counts, embeddings).unbind(1), strict=True))


def _median_displacements(embeddings: Tensor, groups: dict[str, Tensor]) -> dict[str, Tensor]:
    def medians(chunk: Tensor) -> Tensor:
        norms = torch.stack(lattice.norms(lattice.displacement(chunk[:-1], chunk[1:])), dim=-1)
        return torch.stack([norms[:, mask].median(dim=1).values for mask in groups.values()], dim=1)

    found = lattice.per_record(medians, embeddings, overlap=1)
    return dict(zip(groups, found.unbind(1), strict=True))


def _log_spaced(records: int, most: int) -> Tensor:
    """Return indices of at most ``most`` records, both ends included: all of them, or denser at the start."""
    if records <= most:
        return torch.arange(records)
    return torch.logspace(0, math.log10(records), most, dtype=torch.float64).round().long().unique() - 1


def _radii(embeddings: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances of tokens from the centroid, ``[M, V]``, and of the centroid from the origin, ``[M]``."""
    radii = torch.empty(len(records), embeddings.shape[1], dtype=torch.float64)
    centroid_norms = torch.empty(len(records), dtype=torch.float64)
    for i, record in enumerate(records.tolist()):
        vectors = embeddings[record].as_subclass(Tensor)
        centroid = lattice.centroid(vectors)
        radii[i], centroid_norms[i] = lattice.radii(vectors, centroid), centroid.norm()
    return radii, centroid_norms


def _distances(embeddings: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the mean pairwise distance in each of these records, ``[N]`` each."""
    found = [lattice.pairwise_distances(embeddings[record].as_subclass(Tensor)) for record in records.tolist()]
    largest, mean = torch.tensor(found, dtype=torch.float64).unbind(1)
    return largest, mean


def _snapshots(embeddings: Tensor, steps: Tensor) -> list[Snapshot]:
    def centered(record: int) -> Tensor:
        vectors = embeddings[record].double()
        return vectors - vectors.mean(0)

    axes = _principal_axes(centered(-1))
    axes = torch.where(axes.sum(1, keepdim=True) < 0, -axes, axes)  # their sign is arbitrary
    at = {int(step): record for record, step in enumerate(steps)}
    shown = dict.fromkeys((*(step for step in SNAPSHOTS if step in at), int(steps[-1])))
    return [Snapshot(step, centered(at[step]) @ axes.T) for step in shown]


def _principal_axes(vectors: Tensor) -> Tensor:
    """Return the first two principal axes of ``[V, D]`` about the origin: ``[2, D]``. Zeros where there are none."""
    axes = torch.zeros(2, vectors.shape[1], dtype=vectors.dtype)
    if vectors.isfinite().all():
        found = torch.linalg.svd(vectors, full_matrices=False).Vh[:2]
        axes[: len(found)] = found
    return axes
