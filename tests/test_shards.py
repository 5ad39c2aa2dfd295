"""Recordings by several processes, and the index that joins their files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import ROWS
from safetensors.torch import load_file

from bhfast.errors import TraceError
from bhfast.index import ShardedTensor
from bhfast.shards import Share
from bhfast.storage import Claim, write_trace
from bhfast.trace import Trace, TraceTensor, open_trace

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(how: str, folder: Path, *, processes: int, storage: str = "memory", rows: str = "spread") -> list[str]:
    """Run the script in so many processes; return what they printed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    command = [sys.executable, *launcher, str(SCRIPT), how, str(folder / "run.safetensors"), storage, rows]
    if how == "alone":
        del command[1 : 1 + len(launcher)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith(("trace", "error")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """What one process records, by the rows it was told."""
    traces = {}
    for rows in ("all", *ROWS):
        folder = tmp_path_factory.mktemp(rows)
        run("alone", folder, processes=1, rows=rows)
        traces[rows] = open_trace(folder / "run.safetensors")
    return traces


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of what two processes record under FSDP2."""
    folder = tmp_path_factory.mktemp("sharded")
    assert run("fsdp", folder, processes=2, rows="all") == ["trace run.safetensors.index.json"] * 2
    return folder / "run.safetensors.index.json"


def bits(tensor: Any) -> torch.Tensor:
    return tensor[:].contiguous().reshape(-1).view(torch.uint8)


def assert_same(one: Trace, other: Trace) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        assert torch.equal(bits(one[name]), bits(other[name])), name


# ---------------------------------------------------------------------------------------------------------------------
# The same bits as from one process


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_ddp_is_recorded_by_rank_0(storage: str, tmp_path: Path, alone: dict[str, Trace]) -> None:
    run("ddp", tmp_path, processes=2, storage=storage)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]
    assert_same(open_trace(tmp_path / "run.safetensors"), alone["spread"])


@pytest.mark.parametrize(
    ("how", "processes", "storage", "rows"),
    [("fsdp", 2, "memory", "spread"), ("fsdp", 2, "stream", "low"), ("hsdp", 4, "memory", "all")],
)
def test_each_rank_records_its_shards(how, processes, storage, rows, tmp_path, alone) -> None:
    """Of parameters of odd sizes, with replicas recorded once."""
    printed = run(how, tmp_path, processes=processes, storage=storage, rows=rows)
    assert printed == ["trace run.safetensors.index.json"] * processes
    files = [f"run-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "run.safetensors.index.json"]
    trace = open_trace(tmp_path / "run.safetensors.index.json")
    assert_same(trace, alone[rows])
    assert trace.optimizer["name"] == "AdamW"
    assert "crc32" not in trace.metadata
    for file in files:
        assert list(open_trace(tmp_path / file).damage()) == []
        assert "head.weight.grad" in load_file(tmp_path / file)


def test_the_index_follows_the_convention(sharded: Path) -> None:
    index = json.loads(sharded.read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(sharded.with_name(file)), name
    shard = index["shards"]["wte.weight"]
    assert shard["shape"] == [21, 11, 6]
    assert [part["offset"] for part in shard["parts"]] == [[0, 0, 0], [0, 6, 0]]
    assert [part["shape"] for part in shard["parts"]] == [[21, 6, 6], [21, 5, 6]]
    described = json.loads(open_trace(sharded.with_name("run-00002-of-00002.safetensors")).metadata["shard"])
    assert described["index"] == "run.safetensors.index.json"
    assert described["tensors"]["wte.weight"] == {"shape": [11, 6], "offset": [6, 0]}


# ---------------------------------------------------------------------------------------------------------------------
# Reading across files

INDICES = [
    3, -1, slice(2, 9), slice(None, None, 4), (5, 7), (5, -2), (slice(1, 3), slice(4, 9)),
    (0, slice(7, 11), slice(2, 5)), (slice(None), slice(8, 3)),
    (slice(None), slice(None, None, 2)), (slice(2), [0, 10, 6]), [0, 20, 7],
    torch.tensor([4, 4]), (..., 3), (2, ..., 1), (slice(None), 10, 5), (), None,
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_like_the_whole(index: Any, sharded: Path, alone: dict[str, Trace]) -> None:
    got = open_trace(sharded)["wte.weight"][index]
    assert isinstance(got, TraceTensor)
    assert torch.equal(got, alone["all"]["wte.weight"][index])


def test_a_row_is_read_from_its_own_file_only(sharded: Path) -> None:
    tensor = open_trace(sharded)["wte.weight"]
    touched: list[int] = []

    class Watched:
        def __init__(self, part: torch.Tensor, number: int) -> None:
            self.part, self.number, self.shape, self.dtype = part, number, part.shape, part.dtype

        def __getitem__(self, index: Any) -> torch.Tensor:
            rows = self.part[index]
            if rows.numel():
                touched.append(self.number)
            return rows

    parts = [(Watched(part, i), offset) for i, (part, offset) in enumerate(tensor._parts)]
    assert torch.equal(ShardedTensor(parts, tensor.shape)[3, 8], tensor[3, 8])
    assert touched == [1]


def test_looks_like_a_tensor(sharded: Path) -> None:
    trace = open_trace(sharded)
    tensor = trace["wte.weight"]
    assert (len(tensor), tensor.dim(), tensor.shape, tensor.dtype) == (21, 3, (21, 11, 6), torch.bfloat16)
    assert tensor.numpy().shape == (21, 11, 6)
    assert "wte.weight       BF16  [21, 11, 6]" in repr(trace)
    assert "21 records, steps 0 to 20" in repr(trace)
    with pytest.raises(IndexError, match="index 21 is out of bounds for 21 records"):
        tensor[21]
    with pytest.raises(IndexError):
        tensor[0, 11]


def test_files_of_different_lengths_are_read_up_to_the_shortest(sharded: Path, tmp_path: Path) -> None:
    for path in sharded.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "run-00002-of-00002.safetensors"
    shorter = {name: x[:9] for name, x in open_trace(file).items()}
    with Claim(file, overwrite=True) as claim:
        write_trace(claim, shorter, {}, file)
    trace, whole = open_trace(tmp_path / sharded.name), open_trace(sharded)
    assert trace.steps.tolist() == list(range(9))
    assert torch.equal(trace["wte.weight"][:], whole["wte.weight"][:9])
    assert torch.equal(trace["loss"][1:], whole["loss"][1:9])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        index = json.loads(text)
        change(index)
        return json.dumps(index)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "no json", "is no index: it is not valid JSON"),
        (lambda text: "[]", "is corrupted, or is no index of a trace"),
        (lambda text: "{}", "is corrupted, or is no index of a trace: 'weight_map'"),
        (damaged(lambda x: x["weight_map"].update(loss="../run")), "'../run' is no name of a file"),
        (damaged(lambda x: x["weight_map"].update(loss=7)), "is corrupted, or is no index of a trace"),
        (damaged(lambda x: x["weight_map"].update(loss="gone")), "cannot open the trace .*gone: No such file"),
        (damaged(lambda x: x["shards"].update(other=7)), "is corrupted, or is no index of a trace"),
        (damaged(lambda x: x["shards"]["wte.weight"]["parts"].pop()), "the parts of wte.weight have 36 elements, want"),
        (damaged(lambda x: x["shards"]["wte.weight"]["parts"][0].update(offset=[0, 9, 0])), "lies outside of it"),
        (damaged(lambda x: x["shards"]["wte.weight"]["parts"][0].update(offset=[0, "a", 0])), "is corrupted, or is no"),
        (damaged(lambda x: x["shards"]["wte.weight"]["parts"][0].update(offset=[0, 1, 0])), "overlap"),
        (damaged(lambda x: x["shards"]["wte.weight"]["parts"][0].update(shape=[21, 6, 7])), "with records of"),
    ],
)
def test_refuses_a_damaged_index(change, message, sharded: Path, tmp_path: Path) -> None:
    for path in sharded.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / sharded.name
    index.write_text(change(index.read_text()))
    with pytest.raises(TraceError, match=message):
        open_trace(index)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot open the index .*gone\.index\.json: No such file"):
        open_trace(tmp_path / "gone.index.json")


def test_what_fails_in_one_process_is_raised_in_all(tmp_path: Path) -> None:
    (tmp_path / "run-00002-of-00002.safetensors").write_text("precious")
    printed = run("fsdp", tmp_path, processes=2)
    assert len(printed) == 2
    assert printed[0].startswith("error rank 1: the trace")
    assert all("run-00002-of-00002.safetensors exists; pass --overwrite" in line for line in printed)
    assert [path.name for path in tmp_path.iterdir()] == ["run-00002-of-00002.safetensors"]


def test_rows_of_a_sharded_parameter_must_be_increasing(tmp_path: Path) -> None:
    printed = run("fsdp", tmp_path, processes=2, rows="unordered")
    assert printed == ["error rows['wte.weight'] must be increasing, as the parameter is sharded"] * 2


def test_alone_there_is_nothing_to_share() -> None:
    share = Share([], Path("run.safetensors"))
    assert (share.rank, share.world, share.is_sharded, share.is_empty) == (0, 1, False, False)
