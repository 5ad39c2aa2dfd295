"""A grid of experiments: its runs, the workers that run them, and their results."""

from bhfast.sweep.program import SweepSummary as SweepSummary
from bhfast.sweep.program import main as main
from bhfast.sweep.program import sweep as sweep
