"""Print figures of the motion in runs of one experiment, as a table: the median over the runs, and their range.

    python -m bhfast.train --sigma 0 --seed 42 --out 42.safetensors    # and other seeds
    python docs/kinematics.py 42.safetensors 43.safetensors 44.safetensors

The runs have dead tokens that stay one vector, the black hole, as those with ``--sigma 0`` do.
"""

import sys
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

import bhfast
from bhfast import lattice

LAGS = (1, 10)


class Move(NamedTuple):
    """Of each record: cosines of the velocities now and ``LAGS`` later, ``[n, 2]``; shares of tokens, ``[n]``."""

    cosines: Tensor
    superluminal: Tensor
    frozen: Tensor


def move(records: Tensor) -> Move:
    """Measure ``[n, V, D]``, which overlaps with the next records by 11."""
    v = lattice.velocities(records)
    now = v[: len(v) - LAGS[-1]]
    cosines = [torch.cosine_similarity(now, v[lag : lag + len(now)], dim=-1, eps=1e-300) for lag in LAGS]
    moves = now.any(-1)
    cosines = [
        torch.where(moves & v[lag : lag + len(now)].any(-1), x, torch.nan) for lag, x in zip(LAGS, cosines, strict=True)
    ]
    sizes = lattice.norms(lattice.displacement(records[: len(now)], records[1 : len(now) + 1]))
    phase = lattice.momentary_phases(sizes)
    shares = [(phase == lattice.PHASES.index(name)).double().mean(1) for name in ("superluminal", "frozen")]
    return Move(torch.stack([x.nanmean(1) for x in cosines], 1), *shares)


def figures(file: str) -> dict[str, float]:
    """Return the figures of a run by name."""
    trace = bhfast.open_trace(file)
    w, steps = trace["embeddings"], trace.steps
    dead = trace["token_counts"].as_subclass(Tensor) == 0
    hole = w[:, int(dead.int().argmax())][:, None].as_subclass(Tensor)  # one of them stands for all: [R, 1, D]
    middle = lattice.per_record(lattice.centroid, w)
    of_hole, of_middle = lattice.path(hole), lattice.path(middle[:, None])
    heat = lattice.per_record(lambda records: lattice.temperatures(lattice.velocities(records)), w, overlap=1)
    peak = int(heat.total.argmax())
    motion = lattice.autocorrelation(w, 100)
    found = lattice.per_record(move, w, overlap=LAGS[-1] + 1)
    radii = lattice.radii(w[-1].as_subclass(Tensor), middle[-1])
    half_fast = int((found.superluminal >= 0.5).nonzero()[-1])
    half_frozen = int((found.frozen >= 0.5).int().argmax())
    until = lattice.path(hole[: half_frozen + 1])
    return {
        "speed of the black hole in step 1": lattice.velocities(hole[:2]).norm().item(),
        "its displacement over the run": of_hole.displacement.item(),
        "its path efficiency": of_hole.efficiency.item(),
        "its path efficiency, until half of the tokens are frozen": until.efficiency.item(),
        "path efficiency of the centroid": of_middle.efficiency.item(),
        "row norm of the dead tokens' gradient, step 100": trace["grads"][100, dead].double().norm(dim=1).mean().item(),
        "largest T_total": heat.total[peak].item(),
        "bulk share there": heat.bulk_share[peak].item(),
        **{f"ρ({k}) of all tokens": motion.pooled()[k].item() for k in LAGS},
        **{f"ρ({k}) of trained tokens": motion.pooled(~dead)[k].item() for k in LAGS},
        **{f"mean cosine at lag {k}": found.cosines[:, i].nanmean().item() for i, k in enumerate(LAGS)},
        "correlation time, all tokens (records)": lattice.correlation_time(motion.pooled()),
        "last step with half of the tokens superluminal": int(steps[half_fast + 1]),
        "first step with half of the tokens frozen": int(steps[half_frozen + 1]),
        "distance from the centroid, dead / trained tokens": (radii[dead].mean() / radii[~dead].mean()).item(),
    }


runs = [figures(file) for file in sys.argv[1:]]
print(f"| of {len(runs)} runs | median | range |\n|---|---|---|")
for name in runs[0]:
    values = [run[name] for run in runs]
    print(f"| {name} | {median(values):.4g} | {min(values):.4g} to {max(values):.4g} |")
