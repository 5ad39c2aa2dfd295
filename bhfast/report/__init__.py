"""Reports of a trace or a sweep: the figures as text, and an HTML page with pictures."""

from bhfast.report.program import main as main
