"""The native engine: whole training steps in C++ on the CPU; see ``csrc/native``.

A few threads run forward, backward, clipping, Adam and recording together. Python calls them once for many steps and
releases the GIL. Values round to bfloat16 where the torch engine's do, or in fewer places. Sums accumulate in float32,
in an order that depends only on sizes and the instruction set, so a run has the same bits with any number of threads.
"""

from __future__ import annotations

from typing import Any

from bhfast.engines.base import TrainingRun
from bhfast.engines.compiled import CompiledEngine
from bhfast.ops import extension


class NativeEngine(CompiledEngine):
    """See :class:`bhfast.engines.base.Engine`. Needs the extension, and a bfloat16 network on the CPU.

    Args:
        run: what to run; :func:`bhfast.ops.extension.native_unsupported` must return None for the network's sizes.
        threads: how many; None for as many as torch uses, but no more than there is work for.
        instruction_set: one of :func:`bhfast.ops.extension.native_instruction_sets`; None for the fastest.

    Raises:
        ValueError, TypeError: the network or a tensor is not as required.
    """

    program: Any

    def __init__(self, run: TrainingRun, *, threads: int | None = None, instruction_set: str | None = None) -> None:
        super().__init__(run, "native")
        self.program = extension.native_engine(
            threads=threads,
            instruction_set=instruction_set or extension.native_instruction_sets()[0],
            **self.arguments,
        )
