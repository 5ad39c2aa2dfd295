"""The resident engine: a kernel that stays on the GPU for many steps; see ``csrc/cuda/resident``.

One launch runs all the steps that the recorder has room for: forward, backward, clipping, Adam and recording. The few
blocks of threads of a cluster divide the rows of a run. Values round to bfloat16 where the native engine's do. Sums
accumulate in float32, in an order that depends only on sizes, so a run has the same bits with any number of blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from bhfast.engines.base import TrainingRun
from bhfast.engines.compiled import CompiledEngine
from bhfast.engines.launches import Place
from bhfast.ops import extension

BLOCKS = (1, 2, 4, 8, 16)  # that a run's cluster may have
PORTABLE = 8  # of them, at most, that every GPU with clusters has room for
ROWS = 16  # that are worked on together


class ResidentEngine(CompiledEngine):
    """See :class:`bhfast.engines.base.Engine`. Needs a CUDA device, the CUDA kernels and a bfloat16 network.

    Args:
        run: what to run; :func:`bhfast.ops.extension.resident_unsupported` must return None for the network's sizes.
        blocks: one of ``BLOCKS``; None for :func:`default_blocks`.
        shared_bytes: the shared memory that a block may use; None for all that it has. What does not fit is in global
            memory.
        place: among runs that share launches, whose ``blocks`` count then; None: the run has launches of its own.

    Raises:
        ValueError, TypeError: the network or a tensor is not as required.
    """

    program: Any

    def __init__(
        self,
        run: TrainingRun,
        *,
        blocks: int | None = None,
        shared_bytes: int | None = None,
        place: Place | None = None,
    ) -> None:
        super().__init__(run, "resident")
        if place is not None:
            self.program = place.join(self.arguments)
            return
        self.program = extension.resident_engine(
            [self.arguments], blocks=blocks or default_blocks(run), shared_bytes=shared_bytes
        )


def default_blocks(run: TrainingRun) -> int:
    """Return how many blocks of threads to use: as many as have rows to work on; 1 where a GPU has no clusters."""
    device = run.model.wte.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return 1
    row_blocks = run.offsets[0].numel() * -(-run.model.config.context // ROWS)
    return max(blocks for blocks in BLOCKS if blocks <= min(row_blocks, PORTABLE))
