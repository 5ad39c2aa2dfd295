"""All numbers that a report of one trace shows, from one walk through its records in flat memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast import lattice
from bhfast.errors import TraceError
from bhfast.summary import ROWS, require_reference
from bhfast.trace import Trace

SNAPSHOTS = (0, 1, 2, 10, 100, 1000)  # steps, and the last one
LINES = 400  # tokens whose radius is shown
MOMENTS = 1000  # records, at most, of a curve that need not show each
DISTANCES = 1e10  # products that pairwise distances may take
SHOWN = {
    "σ": "sigma",
    "seed": "seed",
    "learning rate": "lr",
    "batch": "batch_size",
}  # settings, by what they are called


class Snapshot(NamedTuple):
    """The cloud at a step, on the first two principal axes of the last one; float64 ``[V, 2]``, about its centroid."""

    step: int
    view: Tensor


@dataclass(frozen=True)
class Survey:
    """What happened in a run of R records, V tokens and D dimensions.

    Attributes:
        trace: the trace.
        groups: bool ``[V]`` each: ``trained`` tokens, which occur in the corpus, and ``dead`` ones; or ``all``, where
            the trace does not say. No group is empty.
        steps: int64 ``[R]``.
        losses: float32 ``[R]``, the first is NaN.
        distinct: for each group, and for ``all``, how many different vectors it has: int64 ``[R]``.
        moves: for each group, the medians over its tokens of the L1, L2 and L∞ of displacements, in ulp: float64
            ``[R - 1, 3]``.
        life, escape: see :mod:`bhfast.lattice`.
        norms: Frobenius norms of ``grads``, ``momentum``, ``variance``: float64 ``[R]``.
        gradient_temperature, update_temperature: float64 ``[R]`` and ``[R - 1]``.
        moments: records at which radii and distances were taken: int64 ``[M]``, and ``[N]``, roughly equidistant in
            the logarithm of the step.
        radii: distance from the centroid: float64 ``[M, V]``.
        centroid: its distance from the origin: float64 ``[M]``.
        largest, mean: of pairwise distances: float64 ``[N]``.
        snapshots: the cloud at some steps.
    """

    trace: Trace
    groups: dict[str, Tensor]
    steps: Tensor
    losses: Tensor
    distinct: dict[str, Tensor]
    moves: dict[str, Tensor]
    life: lattice.Life
    escape: Tensor
    norms: dict[str, Tensor]
    gradient_temperature: Tensor
    update_temperature: Tensor
    moments: Tensor
    radii: Tensor
    centroid: Tensor
    distance_moments: Tensor
    largest: Tensor
    mean: Tensor
    snapshots: list[Snapshot]

    @property
    def last(self) -> int:
        """The last step recorded."""
        return int(self.steps[-1])

    def freeze_step(self, group: str) -> int | None:
        """Return the last step in which a token of the group moved; None if one still moved in the last step."""
        late = int(self.life.late[self.groups[group]].max())
        return late if late < self.last else None

    def results(self) -> dict[str, float | int | None]:
        """Return the answers of this run, one number each; None where there is none."""
        answers: dict[str, float | int | None] = {
            "mean loss of the last 1,000 steps": self.losses[1:][self.steps[1:] > self.last - 1000].mean().item(),
            "largest pairwise distance": self.largest[-1].item(),
            "mean radius": self.radii[-1].mean().item(),
            "distinct vectors": int(self.distinct["all"][-1]),
            "tokens in the black hole": int((self.escape < 0).sum()),
        }
        for name, group in self.groups.items():
            answers[f"{name} tokens"] = int(group.sum())
            answers[f"{name} tokens, distinct vectors"] = int(self.distinct[name][-1])
            answers[f"{name} tokens, frozen"] = int(self.life.frozen(self.last)[group].sum())
            answers[f"{name} tokens, all frozen since step"] = self.freeze_step(name)
        return answers

    def table(self) -> list[tuple[str, str]]:
        """Return the answers as rows of text, below a heading."""
        return [
            (f"at step {self.last:,}", ""),
            *((name, format_result(value)) for name, value in self.results().items()),
        ]

    def summary(self) -> str:
        """Return what was run, in one sentence."""
        config = self.trace.config
        corpus = Path(self.trace.metadata.get("corpus", "an unknown corpus")).name
        settings = ", ".join(
            f"{name} {config[key]:g}" for name, key in SHOWN.items() if isinstance(config.get(key), int | float)
        )
        engine = self.trace.metadata.get("engine", "unknown")
        return (
            f"{self.last:,} steps on {corpus}, {len(self.steps):,} records of {len(self.life.late):,} tokens in "
            f"{self.trace['embeddings'].shape[2]} dimensions; {settings}; engine {engine}."
        )


def format_result(value: float | int | None) -> str:
    """Return a number for people."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def survey(trace: Trace) -> Survey:
    """Walk through a trace of the reference run.

    Raises:
        TraceError: it is no such trace.
    """
    require_reference(trace)
    if len(trace.steps) < 2:
        raise TraceError(f"{trace.path} has one record, the start of a run: there is nothing to draw")
    embeddings, steps = trace["embeddings"], trace.steps.as_subclass(Tensor)
    groups = _groups(trace)
    masks = groups if "all" in groups else {"all": torch.ones(embeddings.shape[1], dtype=torch.bool), **groups}

    def counts(part: Tensor) -> Tensor:
        own = lattice.keys(part)
        return torch.stack([_distinct(own[:, mask]) for mask in masks.values()], dim=1)

    def sizes(part: Tensor) -> Tensor:
        moved = torch.stack(lattice.norms(lattice.displacement(part[:-1], part[1:])), dim=-1)
        return torch.stack([moved[:, mask].median(dim=1).values for mask in groups.values()], dim=1)

    distinct = lattice.per_record(counts, embeddings)
    moves = lattice.per_record(sizes, embeddings, overlap=1)
    norms = {
        name: lattice.per_record(lambda part: part.double().flatten(1).norm(dim=1), trace[name])
        for name in ("grads", "momentum", "variance")
    }
    moments = _moments(len(steps), MOMENTS)
    radii = torch.empty(len(moments), embeddings.shape[1], dtype=torch.float64)
    centroid = torch.empty(len(moments), dtype=torch.float64)
    for i, record in enumerate(moments.tolist()):
        vectors = embeddings[record].as_subclass(Tensor)
        middle = lattice.centroid(vectors)
        radii[i], centroid[i] = lattice.radii(vectors, middle), middle.norm()
    size = embeddings.shape[1] ** 2 * embeddings.shape[2]
    some = _moments(len(steps), int(min(MOMENTS / 2, max(8, DISTANCES / size))))
    pairs = torch.tensor([_distances(embeddings[i].as_subclass(Tensor)) for i in some.tolist()], dtype=torch.float64)
    return Survey(
        trace=trace,
        groups=groups,
        steps=steps,
        losses=trace["losses"].float(),
        distinct=dict(zip(masks, distinct.unbind(1), strict=True)),
        moves=dict(zip(groups, moves.unbind(1), strict=True)),
        life=lattice.life(embeddings, steps),
        escape=lattice.escape_steps(embeddings, steps),
        norms=norms,
        gradient_temperature=lattice.per_record(lattice.temperature, trace["grads"]),
        update_temperature=lattice.per_record(
            lambda part: lattice.temperature(part[1:].double() - part[:-1].double()), embeddings, overlap=1
        ),
        moments=moments,
        radii=radii,
        centroid=centroid,
        distance_moments=some,
        largest=pairs[:, 0],
        mean=pairs[:, 1],
        snapshots=_snapshots(embeddings, steps),
    )


def _distinct(own: Tensor) -> Tensor:
    """Count different keys in each row of ``[R, V]``."""
    order = own.sort(1).values
    return (order[:, 1:] != order[:, :-1]).sum(1) + 1


def _groups(trace: Trace) -> dict[str, Tensor]:
    if "token_counts" not in trace:
        return {"all": torch.ones(trace["embeddings"].shape[1], dtype=torch.bool)}
    occurs = trace["token_counts"].as_subclass(Tensor) > 0
    return {name: mask for name, mask in (("trained", occurs), ("dead", ~occurs)) if mask.any()}


def _moments(records: int, most: int) -> Tensor:
    """Return records, both ends among them: all if they are few, else denser at the start."""
    if records <= most:
        return torch.arange(records)
    return torch.logspace(0, math.log10(records), most, dtype=torch.float64).round().long().unique() - 1


def _distances(vectors: Tensor) -> tuple[float, float]:
    """Return the largest and the mean distance of two tokens, from differences, not from products."""
    x = vectors.float()
    largest, total = 0.0, 0.0
    for rows in x.split(ROWS):
        apart = torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")
        largest, total = max(largest, apart.max().item()), total + apart.sum(dtype=torch.float64).item()
    return largest, total / max(1, len(x) * (len(x) - 1))


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
