"""The console script ``bhfast``: ``bhfast PROGRAM ...`` is ``python -m bhfast.PROGRAM ...``."""

from __future__ import annotations

import sys
from importlib import import_module

from bhfast.cli import lasting_streams

PROGRAMS = {
    "train": "run the experiment and record it",
    "sweep": "run a grid of experiments",
    "corpus": "make a corpus to train on",
    "info": "say what is in a trace, and of which run",
    "verify": "prove a trace by replaying it",
    "export": "write a trace for Rerun, TensorBoard, or tables",
    "diff": "say where two traces differ",
    "import": "make a trace of another program's recording",
    "compact": "make a full trace compact, and prove that nothing is lost",
    "expand": "make a compact trace full",
    "recover": "make a trace from a run that was killed",
    "report": "show what happened in a run or a sweep",
    "watch": "serve a page that follows a run while it goes on",
    "doctor": "report the hardware, and what bhfast will use of it",
}


def main() -> int:
    """Run the program that the first argument names; return its exit status."""
    with lasting_streams():
        return _main()


def _main() -> int:
    program, *rest = sys.argv[1:] or ["--help"]
    if program in PROGRAMS:
        return import_module(f"bhfast.{program}").main(rest)
    usage = "\n".join(f"  {name:<8} {text}" for name, text in PROGRAMS.items())
    if program in ("-h", "--help"):
        print(f"usage: bhfast PROGRAM ...\n\n{usage}\n\nFor more: bhfast PROGRAM --help")
        return 0
    if program == "--version":
        print(f"bhfast {import_module('bhfast').__version__}")
        return 0
    if program == "--print-completion":
        return import_module("bhfast.completion").main(rest, PROGRAMS)
    print(f"bhfast: error: there is no program {program!r}; choose from\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
