"""The answers in traces: as text, as pictures, and on a page."""

from bhfast.report.program import main as main
