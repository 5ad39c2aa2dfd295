"""Trace files: a small one to write, and comparing two."""

from __future__ import annotations

from pathlib import Path

import torch

from bhfast.storage.memory import write_trace
from bhfast.storage.output import OutputFile
from bhfast.trace import open_trace


def tensors() -> dict[str, torch.Tensor]:
    return {
        "losses": torch.tensor([1.0, 2.0, 3.0]).bfloat16(),
        "steps": torch.arange(3),
        "cube": torch.arange(3 * 32, dtype=torch.float32).view(3, 4, 8),
        "half": torch.ones(3, 5).half(),
        "scalar": torch.tensor(1e-8, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
    }


def write(path: Path, **options: bool) -> None:
    with OutputFile(path, **options) as claim:
        claim.reserve(1000)
        write_trace(claim, tensors(), {"config": '{"steps": 2}'}, path)


def assert_same_data(one: Path, other: Path) -> None:
    """The same tensors in both files, byte for byte."""
    a, b = open_trace(one), open_trace(other)
    assert a.keys() == b.keys()
    for name in a:
        x, y = (trace[name].contiguous().reshape(-1).view(torch.uint8) for trace in (a, b))
        assert torch.equal(x, y), name
