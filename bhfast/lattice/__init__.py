"""Vectors on the bfloat16 lattice: where they are, how far they move, which are close together, when they stop.

The functions take ordinary tensors and tensors of a trace; of the latter, those that go through all records read a few
records at a time.

``coordinates``: single values as points of the lattice. ``adjacency``: vectors at the same point or at adjacent points.
``cloud``: all vectors of one record together. ``motion``: what changes from record to record.
"""

from bhfast.lattice.adjacency import Cells, Neighbours, cells, components, fingerprints, neighbours
from bhfast.lattice.cloud import (
    PairwiseDistances,
    centroid,
    count_distinct,
    count_distinct_values,
    pairwise_distances,
    radii,
    temperature,
)
from bhfast.lattice.coordinates import Norms, coordinate, displacement, norms, ulp
from bhfast.lattice.motion import Life, chunks, escape_steps, life, per_record

__all__ = [
    "Cells",
    "Life",
    "Neighbours",
    "Norms",
    "PairwiseDistances",
    "cells",
    "centroid",
    "chunks",
    "components",
    "coordinate",
    "count_distinct",
    "count_distinct_values",
    "displacement",
    "escape_steps",
    "fingerprints",
    "life",
    "neighbours",
    "norms",
    "pairwise_distances",
    "per_record",
    "radii",
    "temperature",
    "ulp",
]
