"""A grid of experiments: what its runs are, who runs them, and how they went."""

from bhfast.sweep.program import SweepResult as SweepResult
from bhfast.sweep.program import main as main
from bhfast.sweep.program import sweep as sweep
