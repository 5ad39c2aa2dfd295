"""Vectors on the lattice of their dtype: where they are, how they move, which are close together, when they stop.

The lattice of bfloat16, float16 or float32 is the set of its values. The functions take ordinary tensors and tensors of
a trace; of the latter, those that go through all records read a few records at a time.

``coordinates``: single values as points of the lattice. ``adjacency``: vectors at the same point, at adjacent points,
or close together. ``cloud``: all vectors of one record together. ``motion``: what changes from record to record.
``velocity``: by how much, and where to. ``path``: what many records say together.
"""

from bhfast.lattice.adjacency import Cells, Neighbours, cells, components, components_within, fingerprints, neighbours
from bhfast.lattice.cloud import (
    Histogram,
    PairwiseDistances,
    cell_entropy,
    centered,
    centroid,
    cosine_histogram,
    count_distinct,
    count_distinct_values,
    effective_dimension,
    pairwise_distances,
    principal_spectrum,
    radii,
    temperature,
)
from bhfast.lattice.coordinates import Norms, coordinate, displacement, norms, ulp
from bhfast.lattice.motion import (
    PHASES,
    Life,
    Reheatings,
    chunks,
    escape_steps,
    life,
    momentary_phases,
    per_record,
    reheatings,
)
from bhfast.lattice.path import (
    Autocorrelation,
    Path,
    autocorrelation,
    correlation_time,
    mean_squared_displacement,
    path,
)
from bhfast.lattice.velocity import (
    Parts,
    Temperatures,
    radial_and_tangential,
    temperatures,
    turning_angles,
    turning_histogram,
    velocities,
)

__all__ = [
    "PHASES",
    "Autocorrelation",
    "Cells",
    "Histogram",
    "Life",
    "Neighbours",
    "Norms",
    "PairwiseDistances",
    "Parts",
    "Path",
    "Reheatings",
    "Temperatures",
    "autocorrelation",
    "cell_entropy",
    "cells",
    "centered",
    "centroid",
    "chunks",
    "components",
    "components_within",
    "coordinate",
    "correlation_time",
    "cosine_histogram",
    "count_distinct",
    "count_distinct_values",
    "displacement",
    "effective_dimension",
    "escape_steps",
    "fingerprints",
    "life",
    "mean_squared_displacement",
    "momentary_phases",
    "neighbours",
    "norms",
    "pairwise_distances",
    "path",
    "per_record",
    "principal_spectrum",
    "radial_and_tangential",
    "radii",
    "reheatings",
    "temperature",
    "temperatures",
    "turning_angles",
    "turning_histogram",
    "ulp",
    "velocities",
]
