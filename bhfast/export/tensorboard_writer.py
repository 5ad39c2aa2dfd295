"""TensorBoard: a log folder with the values of each step, and of some tokens at each step.

A trace does not say at what time a step was taken, so all have the time 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from bhfast.export.values import Block, Source

MAX_TOKENS = 32  # TensorBoard draws a diagram for each value of each


def write(source: Source, folder: Path) -> list[str]:
    """Write the folder; return what was left out, a line each."""
    folder.mkdir()
    writer = EventFileWriter(str(folder))
    try:
        for block in source.step_blocks():
            _add(writer, block)
        tokens = len(source.names)
        shown = torch.linspace(0, max(0, tokens - 1), min(tokens, MAX_TOKENS), dtype=torch.float64).round().long()
        rows = [] if source.found is None else source.found.rows[shown].tolist()
        names = [f"{row} {source.names[i]}" for row, i in zip(rows, shown.tolist(), strict=True)]
        for steps, values in source.token_blocks():
            columns = {
                f"{value}/{name}": x[:, i]
                for value, x in values.items()
                for name, i in zip(names, shown.tolist(), strict=True)
            }
            _add(writer, (steps, columns))
    finally:
        writer.close()
    return [f"all but {len(shown)} of {tokens:,} tokens, evenly spaced"] if len(shown) < tokens else []


def _add(writer: EventFileWriter, block: Block) -> None:
    steps, values = block
    for i, step in enumerate(steps.tolist()):
        own = [Summary.Value(tag=name, simple_value=float(x[i])) for name, x in values.items()]
        writer.add_event(Event(step=step, summary=Summary(value=own)))
