"""Traces for other programs: Rerun, spreadsheets and data frames, TensorBoard."""

from bhfast.export.program import main as main
