"""Reports what happened in a run or a sweep: the figures as text, and pictures on a page.

python -m bhfast.report FILE [--param NAME] [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bhfast.cli import run_program
from bhfast.summary import find_vectors, verification_figures
from bhfast.trace import open_trace


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast report",
        description="Print the figures of a trace or a sweep; with --out, also draw what happened.",
    )
    parser.add_argument("file", metavar="FILE", help="a trace, or the sweep.json of a sweep")
    parser.add_argument("--param", metavar="NAME", help="the parameter whose vectors to report, if there are several")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for index.html and its pictures (PNG)")
    return run_program(parser, _report, argv)


def _report(args: argparse.Namespace) -> int:
    if Path(args.file).suffix == ".json" and not args.file.endswith(".index.json"):
        _report_sweep(Path(args.file), args.out)
    else:
        _report_trace(args.file, args.param, args.out)
    return 0


def _report_trace(file: str, param: str | None, out: Path | None) -> None:
    from bhfast.report.survey import left_out, survey_trace

    trace = open_trace(file)
    notes = left_out(find_vectors(trace, param))
    text = verification_figures(trace, param)
    print("\n".join([text, *notes]))
    if out:
        from bhfast.report.page import Page  # these imports take a second
        from bhfast.report.pictures import run_pictures

        survey = survey_trace(trace, param)
        title = f"bhfast: {trace.path.name}"
        Page(title, survey.summary(), text, survey.table(), run_pictures(survey)).write(out)
        print(f"{out / 'index.html'}")


def _report_sweep(file: Path, out: Path | None) -> None:
    from bhfast.report.sweep import survey_sweep

    survey = survey_sweep(file)
    print(survey.text())
    if out:
        from bhfast.report.page import Page
        from bhfast.report.pictures import sweep_pictures

        title = f"bhfast: {file.parent.name}"
        Page(title, survey.summary(), None, survey.table(), sweep_pictures(survey)).write(out)
        print(f"{out / 'index.html'}")
