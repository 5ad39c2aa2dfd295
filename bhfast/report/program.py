"""Reports what happened in a run or a sweep: the figures as text, and pictures on a page.

python -m bhfast.report FILE [--params NAME ...] [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import quote

from bhfast.cli import run_program
from bhfast.report.names import token_names
from bhfast.summary import find_vectors, verification_figures
from bhfast.trace import Trace, open_trace


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast report",
        description="Print the figures of a trace or a sweep; with --out, also draw what happened.",
    )
    parser.add_argument("file", metavar="FILE", help="a trace, or the sweep.json of a sweep")
    parser.add_argument(
        "--params", metavar="NAME", nargs="+", help="the parameters whose vectors to report, if there are several"
    )
    parser.add_argument("--tokens", metavar="NAMES", type=Path, help="file with the names of the vectors, one a line")
    parser.add_argument(
        "--axes", metavar="D", type=int, nargs=3, help="three dimensions to look at, in place of the principal axes"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for index.html and its pictures (PNG)")
    return run_program(parser, _report, argv)


def _report(args: argparse.Namespace) -> int:
    if Path(args.file).suffix == ".json" and not args.file.endswith(".index.json"):
        _report_sweep(Path(args.file), args.out)
        return 0
    trace = open_trace(args.file)
    params = args.params or [None]
    for param in params:
        out = args.out and args.out / quote(param, safe=" ") if len(params) > 1 else args.out
        _report_trace(trace, param, out, args)
    return 0


def _report_trace(trace: Trace, param: str | None, out: Path | None, args: argparse.Namespace) -> None:
    from bhfast.report.survey import left_out, survey_trace

    found = find_vectors(trace, param)
    names = token_names(found, args.tokens)
    notes = left_out(found)
    text = verification_figures(trace, param)
    print("\n".join([text, *notes]))
    if out:
        from bhfast.report.page import Page  # these imports take a second
        from bhfast.report.pictures import run_pictures
        from bhfast.report.player import player_data

        survey = survey_trace(trace, param)
        player = player_data(found, names, survey.life, args.axes).pack()
        title = f"bhfast: {trace.path.name}" + (f", {found.param}" if args.params else "")
        page = Page(
            title, survey.summary(), text, survey.table(), run_pictures(survey), survey.headline(), player, notes
        )
        page.write(out)
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
