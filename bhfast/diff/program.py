"""Says where two traces differ first, and how far apart they go.

    python -m bhfast.diff A B [--json | --csv] [--out DIR]

Records are compared by step: a trace may be longer, recorded every 10 steps, compact, sharded, or of a run that goes
on. Bits decide, so zeros of other sign differ, and NaN of the same bits are equal. The exit status:

    0   the traces have the same steps, tensors and rows, and all bits agree
    1   a bit differs, or one trace has more than the other; it says which
    2   they could not be compared

Settings and other metadata that differ are printed, too, as they may explain a difference; alone they are none.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bhfast.cli import run_program
from bhfast.diff.compare import diff
from bhfast.diff.exports import as_json, write_csv
from bhfast.diff.text import text_lines


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast diff",
        description="Say where two traces differ first, and how far apart they go. Exit status: 0 equal bit for bit, "
        "1 different, 2 could not be compared.",
    )
    parser.add_argument("a", metavar="A", help="a trace, the .index.json of several files, or a .partial")
    parser.add_argument("b", metavar="B", help="another one")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON, with the distances at all steps")
    form.add_argument("--csv", action="store_true", help="print the distances at all steps as CSV")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for index.html and its pictures (PNG)")
    return run_program(parser, _diff_and_say, argv)


def _diff_and_say(args: argparse.Namespace) -> int:
    found = diff(args.a, args.b)
    if args.json:
        print(json.dumps(as_json(found)))
    elif args.csv:
        write_csv(found, sys.stdout)
    else:
        print(*text_lines(found), sep="\n")
    if args.out:
        from bhfast.diff.page import write_page  # its imports take a second

        write_page(found, args.out)
        print(f"{args.out / 'index.html'}", file=sys.stderr if args.json or args.csv else sys.stdout)
    return 0 if found.is_equal else 1
