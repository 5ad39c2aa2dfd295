"""The answers in a trace, or in those of a sweep: as text, and as pictures on a page.

python -m bhfast.report FILE [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bhfast.errors import BhfastError
from bhfast.summary import figures
from bhfast.trace import open_trace


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast report", description="Print the figures of a trace or a sweep; draw them, too, with --out."
    )
    parser.add_argument("file", metavar="FILE", help="a trace of the reference run, or the sweep.json of several")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for index.html and its pictures (PNG)")
    args = parser.parse_args(argv)
    try:
        if Path(args.file).suffix == ".json" and not args.file.endswith(".index.json"):
            _report_sweep(Path(args.file), args.out)
        else:
            _report_trace(args.file, args.out)
    except BhfastError as error:
        print(f"bhfast report: error: {error}", file=sys.stderr)
        return 2
    return 0


def _report_trace(file: str, out: Path | None) -> None:
    trace = open_trace(file)
    text = figures(trace)
    print(text)
    if out:
        from bhfast.report.page import Page  # these take a second to import
        from bhfast.report.pictures import run_pictures
        from bhfast.report.survey import survey

        found = survey(trace)
        Page(f"bhfast: {trace.path.name}", found.summary(), text, found.table(), run_pictures(found)).write(out)
        print(f"{out / 'index.html'}")


def _report_sweep(file: Path, out: Path | None) -> None:
    from bhfast.report.sweep import survey_sweep

    found = survey_sweep(file)
    print(found.text())
    if out:
        from bhfast.report.page import Page
        from bhfast.report.pictures import sweep_pictures

        Page(f"bhfast: {file.parent.name}", found.summary(), None, found.table(), sweep_pictures(found)).write(out)
        print(f"{out / 'index.html'}")
