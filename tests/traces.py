"""Comparing trace files."""

from __future__ import annotations

from pathlib import Path

import torch

from bhfast.trace import open_trace


def assert_same_data(one: Path, other: Path) -> None:
    """The same tensors in both files, byte for byte."""
    a, b = open_trace(one), open_trace(other)
    assert a.keys() == b.keys()
    for name in a:
        x, y = (trace[name].contiguous().reshape(-1).view(torch.uint8) for trace in (a, b))
        assert torch.equal(x, y), name
