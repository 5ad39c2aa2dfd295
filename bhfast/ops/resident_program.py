"""The resident engine's program: runs of one shape, prepared for the GPU, and launched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bhfast.ops.checks import _check
from bhfast.ops.compiled_run import CompiledRun


class ResidentProgram:
    """Runs the training steps of several runs at once, on a GPU, each on a cluster of blocks of its own.

    Args:
        module: the extension.
        runs: at least one; of one shape, on one device.
        blocks: that work on each run.
        shared_bytes: the shared memory that a block may use; None for all that it has.

    Attributes:
        shared_bytes: the shared memory that each block uses.
        workspace_bytes: the memory of each run besides.

    Raises:
        ValueError: an argument is not as described.
    """

    def __init__(self, module: Any, runs: Sequence[CompiledRun], *, blocks: int, shared_bytes: int | None) -> None:
        _check(bool(runs), ValueError, "runs must be at least one, got none")
        self._module, self._runs, self._blocks = module, runs, blocks
        self._device, self._done = runs[0].device, 0
        for run in runs:
            message = f"all runs must be on {self._device}, got one on {run.device}"
            _check(run.device == self._device, ValueError, message)
        with self._on_device():
            most, has_clusters = module.resident_limits()
            message = f"this GPU has no clusters: blocks must be 1, got {blocks}"
            _check(blocks == 1 or has_clusters, ValueError, message)
            self._workspaces: list[torch.Tensor] = []
            plans = [self._plan(run, shared_bytes or most) for run in runs]
            kinds = {(len(table), shared) for table, shared in plans}
            _check(len(kinds) == 1, ValueError, "all runs must have the same sizes")
            ((self._run_bytes, self.shared_bytes),) = kinds
            tables = bytearray(b"".join(table for table, _ in plans))
            self._tables = torch.frombuffer(tables, dtype=torch.uint8).to(self._device)
        self.workspace_bytes = self._workspaces[0].numel()

    def _plan(self, run: CompiledRun, shared_bytes: int) -> tuple[bytes, int]:
        plan, settings = self._module.resident_plan, {"blocks": self._blocks, "shared_bytes": shared_bytes}
        size = plan(run.handle, workspace=0, **settings)[2]
        self._workspaces.append(torch.empty(size, dtype=torch.uint8, device=self._device))
        return plan(run.handle, workspace=self._workspaces[-1].data_ptr(), **settings)[:2]

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def run(self, steps: int) -> None:
        """Launch the next ``steps`` steps of each run, recording included.

        Raises:
            ValueError: one has not that many left.
        """
        left = min(run.steps - run.start for run in self._runs) - self._done
        _check(steps <= left, ValueError, f"steps must be at most the {left} that a run has left, got {steps}")
        with self._on_device():
            stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
            self._module.resident_launch(
                runs=self._tables.data_ptr(),
                run_bytes=self._run_bytes,
                count=len(self._runs),
                blocks=self._blocks,
                shared_bytes=self.shared_bytes,
                done=self._done,
                steps=steps,
                stream=stream,
            )
        self._done += steps
