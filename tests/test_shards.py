"""Recordings by several processes: the same bits as from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import distributed_run
import pytest
import torch
from distributed_run import CASES, Case
from keyframe_runs import assert_same_bits
from ranks import run_ranks
from safetensors.torch import load_file
from traces import flip

from bhfast import compact, expand
from bhfast.errors import StorageError, TraceError
from bhfast.recording.recorder import Recorder
from bhfast.recording.shards import RankPartition
from bhfast.trace import Trace, open_trace
from bhfast.verify import verify

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)


needs_shards = pytest.mark.skipif(
    not distributed_run.SHARDS_ON_CPU, reason="this torch's fully_shard does not run on a CPU"
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Trace]:
    """What one process records, by the rows it was told, and the number of processes whose batches it averages."""
    traces = {}
    for rows, processes in {(case.rows, case.processes) for case in CASES.values() if not case.is_late}:
        path = tmp_path_factory.mktemp(rows) / "run.safetensors"
        assert distributed_run.record(Case("alone", processes, rows=rows), path) == "trace run.safetensors"
        traces[rows, processes] = open_trace(path)
    return traces


@pytest.fixture(scope="module")
def recorded(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of all cases, each recorded by as many processes as it wants."""
    return made_once("recorded", record_all)


def record_all(folder: Path) -> None:
    (folder / "fsdp-precious").mkdir()
    (folder / "fsdp-precious" / "run-00002-of-00002.safetensors").write_text("precious")
    assert distributed_run.main(folder) == 0


def said(recorded: Path, name: str) -> list[str]:
    """Return what each process of a case said."""
    return sorted((recorded / f"{name}.{rank}").read_text() for rank in range(CASES[name].processes))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: Any) -> torch.Tensor:
    return tensor[:].contiguous().reshape(-1).view(torch.uint8)


def assert_same(one: Trace, other: Trace) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        assert torch.equal(bits(one[name]), bits(other[name])), name


def record_with_changes(folder: Path) -> None:
    """Train with other data on each rank; after step 2 rank 1 changes its part of a parameter, after step 5 both do."""
    torch.distributed.init_process_group("gloo")
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 11).bfloat16()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    with Recorder(optimizer, "*", model=model, steps=5, path=folder / "run.safetensors"):
        for step in range(1, 6):
            model(torch.randn(4, 6).bfloat16()).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 5 or (step == 2 and rank == 1):
                with torch.no_grad():
                    model.weight.to_local().mul_(0.5)
            torch.save(model.weight.to_local().clone(), folder / f"weight.{step}.{rank}")


@needs_shards
def test_each_file_says_what_the_loop_changed_in_its_part(tmp_path: Path) -> None:
    run_ranks(partial(record_with_changes, tmp_path), tmp_path)
    index = tmp_path / "run.safetensors.index.json"
    trace = open_trace(index)
    assert not [name for name in trace if "changed" in name or "after_step" in name]  # one part is not the whole
    wanted = [torch.cat([torch.load(tmp_path / f"weight.{step}.{rank}") for rank in (0, 1)]) for step in range(1, 6)]
    assert_same_bits(trace["weight"][1:], torch.stack(wanted))
    parts = [open_trace(tmp_path / f"run-0000{number}-of-00002.safetensors") for number in (1, 2)]
    assert [part["weight.changed"].nonzero().flatten().tolist() for part in parts] == [[5], [2, 5]]
    found = verify(index)
    assert (found.status, found.replayed) == (0, 5), found


@pytest.mark.parametrize("name", ["ddp", "ddp-stream"])
def test_ddp_is_recorded_by_rank_0(name: str, recorded: Path, alone: dict[tuple[str, int], Trace]) -> None:
    assert files(recorded / name) == ["run.safetensors"]
    assert_same(open_trace(recorded / name / "run.safetensors"), alone["spread", 2])


@pytest.mark.parametrize("name", ["fsdp", "fsdp-stream", "hsdp"])
@needs_shards
def test_each_rank_records_its_shards(name: str, recorded: Path, alone: dict[tuple[str, int], Trace]) -> None:
    """Of parameters of odd sizes, with replicas recorded once."""
    assert said(recorded, name) == ["trace run.safetensors.index.json"] * CASES[name].processes
    own = [f"run-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert files(recorded / name) == [*own, "run.safetensors.index.json"]
    trace = open_trace(recorded / name / "run.safetensors.index.json")
    assert_same(trace, alone[CASES[name].rows, CASES[name].processes])
    assert trace.optimizer["name"] == "AdamW"
    assert "crc32" not in trace.metadata
    for file in own:
        assert list(open_trace(recorded / name / file).damage()) == []
        assert "head.weight.grad" in load_file(recorded / name / file)


@pytest.mark.parametrize("name", ["ddp-compact", pytest.param("fsdp-compact", marks=needs_shards)])
def test_a_compact_recording_rebuilds_what_a_full_one_holds(
    name: str, recorded: Path, alone: dict[tuple[str, int], Trace]
) -> None:
    (said_by_all,) = set(said(recorded, name))
    path = recorded / name / said_by_all.removeprefix("trace ")
    trace, full = open_trace(path), alone["spread", 2]
    assert trace["keyframe_steps"].tolist() == [0, 6, 12, 18, 20]
    for key in full:
        for index in (slice(None), 7, slice(3, 15, 4), [19, -1]) if key != "wte.weight.rows" else (slice(None),):
            assert_same_bits(trace[key][index], full[key][index])
    for key in trace.keys() - full.keys() - {"keyframe_steps"}:
        assert_same_bits(trace[key][:], full[key.removesuffix(".keyframes")][[0, 6, 12, 18, 20]])
    result = verify(path)
    assert (result.status, result.replayed) == (0, 20), result


@needs_shards
def test_a_file_without_the_learning_rates_has_key_frames_only(recorded: Path) -> None:
    folder = recorded / "fsdp-compact"
    trace = open_trace(folder / "run-00002-of-00002.safetensors")
    whole = open_trace(folder / "run.safetensors.index.json")
    assert torch.equal(bits(trace["head.weight"][[0, 6, 20]]), bits(whole["head.weight"][[0, 6, 20]][:, 3:]))
    with pytest.raises(TraceError, match=r"steps 1 to 1 of head.weight cannot be rebuilt: learning_rates are not in"):
        trace["head.weight"][1]
    assert verify(trace.path).status == 2


@needs_shards
def test_an_index_is_made_compact_and_expanded(recorded: Path, tmp_path: Path) -> None:
    full, small, expanded = (
        folder / "run.safetensors.index.json" for folder in (recorded / "fsdp", tmp_path, tmp_path / "x")
    )
    assert compact.compact(full, small, keyframes=6) == small
    assert json.loads(small.read_text()) == json.loads((recorded / "fsdp-compact" / small.name).read_text())
    assert verify(small).status == 0
    expand.expand(small, expanded)
    assert files(expanded.parent) == files(full.parent)
    assert json.loads(expanded.read_text()) == json.loads(full.read_text())
    for name in files(full.parent)[:-1]:
        assert (expanded.parent / name).read_bytes() == (full.parent / name).read_bytes()


@needs_shards
def test_what_of_an_index_is_not_made_compact(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "full"
    shutil.copytree(recorded / "fsdp", folder)
    full = folder / "run.safetensors.index.json"
    out = tmp_path / full.name
    for work, said in (
        (lambda: compact.compact(full, full, keyframes=6, overwrite=True), "cannot replace themselves"),
        (lambda: compact.compact(full, tmp_path / "c", keyframes=6), r"--out must end with .index.json, got .*/c"),
        (
            lambda: compact.compact(folder / "run-00001-of-00002.safetensors", tmp_path / "c", keyframes=6),
            "is one of several files: name their .index.json",
        ),
        (lambda: expand.expand(full, out), "00001-of-00002.safetensors cannot be expanded: it is not a recording with"),
    ):
        with pytest.raises(TraceError, match=said):
            work()
    out.write_text("precious")
    with pytest.raises(StorageError, match="exists; pass overwrite=True to replace it"):
        compact.compact(full, out, keyframes=6)
    out.unlink()
    flip(folder / "run-00002-of-00002.safetensors", "wte.weight", 9, 0, 3, bit=3)
    with pytest.raises(TraceError, match=r"from step \d+ on, wte.weight does not follow from the gradients"):
        compact.compact(full, out, keyframes=6)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("run-00001")] == ["full"]


@needs_shards
def test_what_appears_during_the_run_is_in_the_files(recorded: Path) -> None:
    """Also if it appears only in a file that rank 0, which writes the index, knows nothing of."""
    assert said(recorded, "fsdp-late") == ["trace run.safetensors.index.json"] * 2
    path = recorded / "fsdp-late" / "run.safetensors.index.json"
    trace = open_trace(path)
    assert trace["head.bias.has_grad"].tolist() == [record not in (0, 8) for record in range(21)]
    assert trace["head.weight.square_avg"].shape == (21, 5, 6)
    assert "wte.weight.square_avg" not in trace
    assert open_trace(path.with_name("run-00002-of-00002.safetensors"))["wte.weight.square_avg"].shape == (21, 1, 6)
    result = verify(path)
    assert (result.difference, result.reason) == (None, "a replay knows AdamW, not RMSprop")


@needs_shards
def test_the_index_follows_the_convention(recorded: Path) -> None:
    path = recorded / "fsdp-all" / "run.safetensors.index.json"
    assert said(recorded, "fsdp-all") == [f"trace {path.name}"] * 2
    index = json.loads(path.read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(path.with_name(file)), name
    shard = index["shards"]["wte.weight"]
    assert shard["shape"] == [21, 11, 6]
    assert [part["offset"] for part in shard["parts"]] == [[0, 0, 0], [0, 6, 0]]
    assert [part["shape"] for part in shard["parts"]] == [[21, 6, 6], [21, 5, 6]]
    described = json.loads(open_trace(path.with_name("run-00002-of-00002.safetensors")).metadata["shard"])
    assert described["index"] == "run.safetensors.index.json"
    assert described["tensors"]["wte.weight"] == {"shape": [11, 6], "offset": [6, 0]}


@needs_shards
def test_slices_across_the_files_are_those_of_the_whole(recorded: Path, alone: dict[tuple[str, int], Trace]) -> None:
    tensor, whole = (
        x["wte.weight"] for x in (open_trace(recorded / "fsdp-all" / "run.safetensors.index.json"), alone["all", 2])
    )
    for index in (3, (slice(1, 9, 2), slice(4, 9)), (0, slice(7, 11), slice(2, 5)), (..., 3)):
        assert torch.equal(tensor[index], whole[index]), index


@needs_shards
def test_what_fails_in_one_process_is_raised_in_all(recorded: Path) -> None:
    printed = said(recorded, "fsdp-precious")
    assert len(printed) == 2
    assert printed[0].startswith("error rank 1: the trace")
    assert all("run-00002-of-00002.safetensors exists; pass overwrite=True" in line for line in printed)
    assert files(recorded / "fsdp-precious") == ["run-00002-of-00002.safetensors"]


@needs_shards
def test_rows_of_a_sharded_parameter_must_be_increasing(recorded: Path) -> None:
    assert (
        said(recorded, "fsdp-unordered")
        == ["error rows['wte.weight'] must be increasing, as the parameter is sharded"] * 2
    )


def test_alone_there_is_nothing_to_partition() -> None:
    partition = RankPartition([], Path("run.safetensors"))
    assert (partition.rank, partition.world, partition.is_sharded, partition.is_empty) == (0, 1, False, False)
