"""Serves a page that follows a run while it streams its recording: the player, with all that is committed so far.

    python -m bhfast.watch RUN.safetensors [--port N] [--param NAME] [--tokens NAMES]

It may be started before the run. It reads what the journal says is committed, takes no lock that a run would wait for,
and computes at a low priority, only while a browser asks. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

import torch

from bhfast.cli import run_program
from bhfast.errors import printable
from bhfast.watch.follower import Follower
from bhfast.watch.server import WatchServer

PRIORITY = 19  # the lowest


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast watch",
        description="Serve a page on this machine that follows a run while it streams. Ctrl-C ends it.",
    )
    parser.add_argument("file", metavar="RUN.safetensors", type=Path, help="the trace that the run will have made")
    parser.add_argument("--port", type=port_number, default=0, help="(default: one that is free)")
    parser.add_argument("--param", metavar="NAME", help="the parameter whose vectors to show, if there are several")
    parser.add_argument("--tokens", metavar="NAMES", type=Path, help="file with the names of the vectors, one a line")
    return run_program(parser, _watch, argv)


def port_number(text: str) -> int:
    """Return a number that a port can have; 0 stands for any that is free."""
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {port}")
    return port


def _watch(args: argparse.Namespace) -> int:
    path = args.file.with_suffix("") if args.file.suffix == ".partial" else args.file
    with WatchServer(Follower(path, args.param, args.tokens), f"bhfast: {path.name}", args.port) as server:
        os.nice(PRIORITY)
        torch.set_num_threads(1)
        print(f"{printable(path)}: {server.url}", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
