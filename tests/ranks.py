"""Processes of one group, as torchrun starts them, but forked: torch is imported once."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import fork, status_of

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

SECONDS = 100  # that a process may take


def run_ranks(work: Callable[[], object], folder: Path, processes: int = 2) -> None:
    """Run ``work`` in each of several processes, with the variables that torchrun sets, until all are done.

    Args:
        work: joins the process group itself, or lets a framework do so.
        folder: where tracebacks go.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def be(rank: int) -> None:
        signal.alarm(SECONDS)  # if the others have died, there is nobody to wait for
        sys.stdout = sys.stderr = (folder / f"output.{rank}").open("w")
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(processes)
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update(group)
        try:
            work()
        finally:
            sys.stdout.flush()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    errors = [folder / f"error.{rank}" for rank in range(processes)]
    ranks = [fork(lambda rank=rank: be(rank), error) for rank, error in enumerate(errors)]
    statuses = [status_of(rank) for rank in ranks]
    said = "\n".join(error.read_text() for error in errors if error.exists())
    assert statuses == [0] * processes, said
