"""Trace files: small ones to write and to change, and comparing two."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
from bhfast.summary import Vectors, find_vectors
from bhfast.trace import Trace, open_trace
from bhfast.trace.format import HEADER_CHECKSUM, bytes_of, header_checksum
from bhfast.trace.sharded import INDEX_FORMAT
from bhfast.train import TrainResult
from bhfast.verify import verify


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
    with OutputFile(path, **options) as output:
        output.reserve(1000)
        write_trace(output, tensors(), {"config": '{"steps": 2}'}, path)


def record(path: Path, make: Any = FusedAdam, *, steps: int = 6, announced: int | None = None, **more: Any) -> None:
    """Record steps of two parameters, ``w`` of 5 x 8 and ``b`` of 3; a replay can verify them."""
    torch.manual_seed(0)
    params = {"w": nn.Parameter(torch.randn(5, 8).bfloat16()), "b": nn.Parameter(torch.randn(3).bfloat16())}
    optimizer = make(params.values())
    with Recorder(optimizer, params, steps=announced or steps, path=path, **more) as recorder:
        for step in range(steps):
            for param in params.values():
                param.grad = torch.randn(param.shape).bfloat16()
            optimizer.step()
            recorder.log(loss=torch.tensor(step / 7))


def assert_proves_itself(result: TrainResult, engine: str) -> Trace:
    """The trace of a run can be replayed, and its last record is what the run has left; return it."""
    assert result.path is not None
    verification = verify(result.path)
    assert verification.difference is None, verification
    assert verification.replayed == result.steps
    trace = open_trace(result.path)
    assert trace.metadata["engine"] == engine
    assert torch.equal(trace["losses"][1:], result.losses.bfloat16())
    assert torch.equal(trace["embeddings"][-1], result.model.wte.weight)
    assert torch.equal(trace["grads"][-1], result.model.wte.weight.grad)
    assert trace["clip_coefs"][1:].max() <= 1 <= trace["grad_norms"].max()
    return trace


def walk(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Records that move."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).cumsum(0).to(dtype)


def saved(path: Path, vectors: torch.Tensor, **more: torch.Tensor) -> Vectors:
    """Write a trace of vectors, and open it."""
    save_file({"recorded_steps": torch.arange(len(vectors)), "W": vectors, **more}, path)
    return find_vectors(open_trace(path))


def rewrite(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file with these tensors and metadata, and checksums that hold."""
    own = {key: text for key, text in metadata.items() if not key.startswith("crc32")}
    with OutputFile(path, overwrite=True) as output:
        write_trace(output, {name: x.contiguous() for name, x in tensors.items()}, own, path)


def shard(recorded: Path) -> Path:
    """Divide what :func:`record` wrote into two files with some rows of ``w`` each; return their index."""
    trace = open_trace(recorded)
    shared = trace.optimizer["params"]["w"]["keys"].values()
    path = recorded.with_name("run.safetensors.index.json")
    files = [f"run-0000{i}-of-00002.safetensors" for i in (1, 2)]
    alone = json.dumps({**trace.optimizer, "params": {"w": trace.optimizer["params"]["w"]}})
    for file, rows, offset in ((files[0], slice(0, 3), 0), (files[1], slice(3, 5), 3)):
        owned = {name: {"shape": [5, 8], "offset": [offset, 0]} for name in shared}
        tensors = {name: x[:, rows] if name in shared else x for name, x in trace.items()}
        own = {name: x for name, x in tensors.items() if name in (*shared, "recorded_steps")}
        metadata = {**trace.metadata, "shard": json.dumps({"index": path.name, "tensors": owned})}
        if offset:
            rewrite(path.with_name(file), own, {**metadata, "optimizer": alone})
        else:
            rewrite(path.with_name(file), tensors, metadata)
    parts = [
        {"file": file, "offset": [0, offset, 0], "shape": [7, rows, 8]}
        for file, offset, rows in ((files[0], 0, 3), (files[1], 3, 2))
    ]
    content = {
        "metadata": {"format": INDEX_FORMAT},
        "weight_map": dict.fromkeys(trace, files[0]),
        "shards": {name: {"shape": [7, 5, 8], "parts": parts} for name in shared},
    }
    path.write_text(json.dumps(content))
    return path


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a file, and its data."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes, *, is_sealed: bool = False) -> bytes:
    """Return a file with this header, as JSON or as it is, and data; ``is_sealed``: with a checksum that holds."""
    if is_sealed:
        assert isinstance(header, dict)
        header["__metadata__"][HEADER_CHECKSUM] = header_checksum(header)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def assert_same_data(one: Path, other: Path) -> None:
    """The same tensors in both files, byte for byte."""
    a, b = open_trace(one), open_trace(other)
    assert a.keys() == b.keys()
    for name in a:
        x, y = (trace[name].contiguous().reshape(-1).view(torch.uint8) for trace in (a, b))
        assert torch.equal(x, y), name


def checksums(path: Path) -> dict[str, int]:
    """Return a CRC-32 of the values of every tensor."""
    trace = open_trace(path)
    return {name: zlib.crc32(bytes_of(torch.as_tensor(trace[name][...]).contiguous())) for name in trace}


def raw(values: torch.Tensor | np.ndarray) -> bytes:
    """Return the bytes of a tensor or an array."""
    return values.tobytes() if isinstance(values, np.ndarray) else bytes(bytes_of(values.contiguous()))


def flip(path: Path, tensor: str, *index: int, bit: int) -> None:
    """Flip one bit of one element in the file."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])[tensor]
    element = 0
    for size, i in zip(entry["shape"], index, strict=True):
        element = element * size + i
    first, last = entry["data_offsets"]
    itemsize = (last - first) // torch.Size(entry["shape"]).numel()
    content[8 + length + first + element * itemsize + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
