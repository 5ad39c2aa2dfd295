"""Where vectors are on the bfloat16 lattice, how far they move, who is near whom, and when they stop.

Everything takes plain tensors, so also those of a trace, of which it reads what it needs.

``cells``: values of one tensor as points of a lattice. ``crowds``: vectors at one point, and at neighbouring ones.
``motion``: what happens from record to record.
"""

from bhfast.lattice.cells import Norms, coordinate, displacement, norms, ulp
from bhfast.lattice.crowds import Cells, Neighbours, cells, components, keys, neighbours
from bhfast.lattice.motion import Life, centroid, chunks, distinct, escape_steps, life, per_record, radii, temperature

__all__ = [
    "Cells",
    "Life",
    "Neighbours",
    "Norms",
    "cells",
    "centroid",
    "chunks",
    "components",
    "coordinate",
    "displacement",
    "distinct",
    "escape_steps",
    "keys",
    "life",
    "neighbours",
    "norms",
    "per_record",
    "radii",
    "temperature",
    "ulp",
]
