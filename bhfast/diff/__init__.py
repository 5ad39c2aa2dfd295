"""Where two traces differ: the first step, tensor and row, and how far apart they go."""

from bhfast.diff.compare import Diff as Diff
from bhfast.diff.compare import diff as diff
from bhfast.diff.program import main as main
