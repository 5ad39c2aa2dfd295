"""Parquet: ``steps.parquet`` has a row for each step, ``tokens.parquet`` one for each token at each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bhfast.export.values import Source

GROUP_ROWS = 1 << 16  # that are compressed together
Columns = dict[str, Tensor]  # [n] each


def write(source: Source, folder: Path) -> list[str]:
    """Write the folder; return what was left out, a line each."""
    folder.mkdir()
    _write(folder / "steps.parquet", ({"step": steps, **values} for steps, values in source.step_blocks()), None)
    if source.found is not None:
        _write(folder / "tokens.parquet", _tokens(source, source.found.rows), pa.array(source.names))
    return []


def _tokens(source: Source, rows: Tensor) -> Iterator[Columns]:
    """Yield rows of tokens; ``name`` is the index of its name."""
    for steps, values in source.token_blocks():
        yield {
            "step": steps.repeat_interleave(len(rows)),
            "row": rows.repeat(len(steps)),
            "name": torch.arange(len(rows)).repeat(len(steps)),
            **{name: (x.bool() if name == "frozen" else x).flatten() for name, x in values.items()},
        }


def _write(path: Path, blocks: Iterable[Columns], names: pa.Array | None) -> None:
    writer: pq.ParquetWriter | None = None
    try:
        for group in _groups(blocks):
            columns = {name: pa.array(x.numpy()) for name, x in group.items()}
            if names is not None:
                columns["name"] = names.take(columns["name"])
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _groups(blocks: Iterable[Columns]) -> Iterator[Columns]:
    """Yield the rows of all blocks, ``GROUP_ROWS`` at a time, always in the same memory.

    Small tensors that wait to be written would lie between large temporaries, and keep the heap from shrinking.
    """
    group: Columns = {}
    filled = 0
    for block in blocks:
        group = group or {name: x.new_empty(GROUP_ROWS) for name, x in block.items()}
        done, length = 0, len(block["step"])
        while done < length:
            count = min(length - done, GROUP_ROWS - filled)
            for name, x in block.items():
                group[name][filled : filled + count] = x[done : done + count]
            done, filled = done + count, filled + count
            if filled == GROUP_ROWS:
                yield group
                filled = 0
    if filled:
        yield {name: x[:filled] for name, x in group.items()}
