"""Completions of programs, flags, choices and files for a shell.

bhfast --print-completion bash > ~/.local/share/bash-completion/completions/bhfast
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from bhfast.cli import ParserWanted, run_program
from bhfast.errors import BhfastError

SHELLS = ("bash", "zsh", "tcsh")


def main(argv: list[str], programs: Mapping[str, str]) -> int:
    """Print a script for a shell; return the exit status.

    Args:
        argv: the name of the shell.
        programs: the names of all programs, and what each does.
    """
    parser = argparse.ArgumentParser(
        prog="bhfast --print-completion", description="Print the completions of bhfast for a shell (needs shtab)."
    )
    parser.add_argument("shell", choices=SHELLS)
    return run_program(parser, lambda args: _print(args.shell, programs), argv)


def _print(shell: str, programs: Mapping[str, str]) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        raise BhfastError("this needs shtab: pip install 'bhfast[completion]'") from None
    print(shtab.complete(_whole_parser(programs), shell))
    return 0


def _whole_parser(programs: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return one parser for all programs."""
    whole = argparse.ArgumentParser(prog="bhfast")
    whole.add_argument("--version", action="store_true", help="print the version")
    whole.add_argument("--print-completion", choices=SHELLS, help="print completions for a shell")
    parts = whole.add_subparsers(metavar="PROGRAM")
    for name, text in programs.items():
        wanted = ParserWanted()
        import_module(f"bhfast.{name}").main(wanted)
        _complete_files(parts.add_parser(name, help=text, parents=[wanted.parser], add_help=False))
    return whole


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Let arguments that are text or paths be completed as files."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                _complete_files(part)
        elif action.type in (None, str, Path) and action.choices is None and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
