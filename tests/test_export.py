"""Traces for other programs, read back with those programs' own libraries."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from memory import peak_memory, reset_peak_memory
from traces import record, rewrite

from bhfast import export, lattice
from bhfast.errors import BhfastError, StorageError, TraceError
from bhfast.export import program, values
from bhfast.trace import open_trace
from bhfast.train import TrainResult

run_export = program.export


@pytest.fixture(scope="module")
def expected(run: TrainResult) -> dict[str, torch.Tensor]:
    """What the run is to be exported as, from all of its vectors at once."""
    trace = open_trace(run.path)
    vectors = trace["embeddings"].as_subclass(torch.Tensor)
    moved = lattice.norms(lattice.displacement(vectors[:-1], vectors[1:]))
    start = torch.full((1, 128), math.nan, dtype=torch.float64)
    rests = torch.stack([(vectors[i:] == vectors[i - 1]).all(-1).all(0) for i in range(1, 131)])
    return {
        "norm": vectors.double().norm(dim=2),
        "displacement_l2": torch.cat([start, moved.l2.double()]),
        "displacement_linf": torch.cat([start, moved.linf.double()]),
        "frozen": torch.cat([torch.zeros(1, 128, dtype=torch.bool), rests]).double(),
        "losses": trace["losses"].double(),
        "norm/grads": trace["grads"].double().flatten(1).norm(dim=1),
    }


def same(found: list[float], wanted: torch.Tensor) -> bool:
    return torch.equal(
        torch.tensor(found, dtype=torch.float64).nan_to_num(-1), wanted.flatten().double().nan_to_num(-1)
    )


def test_csv(run: TrainResult, expected: dict[str, torch.Tensor], tmp_path: Path, capsys) -> None:
    assert export.main([str(run.path), "--to", "csv", "--out", str(tmp_path / "x" / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x' / 'out'}\n"
    with open(tmp_path / "x" / "out" / "steps.csv", newline="") as file:
        steps = list(csv.DictReader(file))
    assert [int(line["step"]) for line in steps] == list(range(131))
    assert same([float(line["losses"]) for line in steps], expected["losses"])
    assert torch.allclose(torch.tensor([float(line["norm/grads"]) for line in steps]).double(), expected["norm/grads"])
    assert set(steps[0]) == {
        *("step", "learning_rates", "clip_coefs", "grad_norms", "losses"),
        *(f"norm/{name}" for name in ("embeddings", "grads", "momentum", "variance")),
    }
    with open(tmp_path / "x" / "out" / "tokens.csv", newline="") as file:
        tokens = list(csv.DictReader(file))
    for name in values.TOKEN_VALUES:
        assert same([float(line[name]) for line in tokens], expected[name]), name
    assert [int(line["step"]) for line in tokens[::128]] == list(range(131))
    assert [int(line["row"]) for line in tokens[:128]] == list(range(128))
    assert tokens[97]["name"] == "a"
    assert {line["frozen"] for line in tokens} <= {"0", "1"}
    assert sorted(x.name for x in (tmp_path / "x").iterdir()) == ["out"]


def test_frozen_means_for_good(tmp_path: Path) -> None:
    """A token that rests and moves again is not frozen before, and one that moves in the last record never is."""
    path = tmp_path / "t"
    vectors = torch.ones(6, 4, 2).bfloat16()
    vectors[3:, 1] = 2  # moves once, from record 2 to 3
    vectors[5:, 2] = 2  # in the last record
    vectors[1:, 3] = math.nan
    rewrite(path, {"recorded_steps": torch.arange(6) * 10 + 5, "embeddings": vectors}, {})
    run_export(path, "csv", tmp_path / "out")
    with open(tmp_path / "out" / "tokens.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines[::4]] == [5, 15, 25, 35, 45, 55]
    frozen = ["".join(line["frozen"] for line in lines[row::4]) for row in range(4)]
    assert frozen == ["011111", "000011", "000000", "000000"]


def test_parquet(run: TrainResult, expected: dict[str, torch.Tensor], tmp_path: Path, monkeypatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed; it comes with bhfast[parquet]")
    from bhfast.export import parquet_writer

    monkeypatch.setattr(parquet_writer, "GROUP_ROWS", 5000)
    run_export(run.path, "parquet", tmp_path / "out")
    steps, tokens = (
        parquet.read_table(tmp_path / "out" / f"{name}.parquet").to_pydict() for name in ("steps", "tokens")
    )
    assert steps["step"] == list(range(131))
    assert same(steps["losses"], expected["losses"])
    assert tokens["step"] == [step for step in range(131) for _ in range(128)]
    assert tokens["row"] == [*range(128)] * 131
    assert tokens["name"][97] == "a"
    for name in values.TOKEN_VALUES:
        assert same(tokens[name], expected[name]), name
    assert type(tokens["frozen"][0]) is bool
    assert 1 < parquet.ParquetFile(tmp_path / "out" / "tokens.parquet").num_row_groups < 5


def test_tensorboard(run: TrainResult, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; it comes with bhfast[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    notes = run_export(run.path, "tensorboard", tmp_path / "out")
    assert notes == ["all but 32 of 128 tokens, evenly spaced"]
    found = EventAccumulator(str(tmp_path / "out"), size_guidance={"scalars": 0}).Reload()
    tags = found.Tags()["scalars"]
    assert len([tag for tag in tags if tag.startswith("norm/")]) == 32 + 4
    losses = found.Scalars("losses")
    assert [event.step for event in losses] == list(range(131))
    assert same([event.value for event in losses], expected["losses"])
    (tag,) = [tag for tag in tags if tag.startswith("displacement_l2/98 ")]
    assert same([event.value for event in found.Scalars(tag)], expected["displacement_l2"][:, 98].float())


def test_rerun(run: TrainResult, tmp_path: Path, capfd) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk is not installed; it comes with bhfast[rerun]")
    import subprocess

    run_export(run.path, "rerun", tmp_path / "out.rrd")
    command = [sys.executable, "-m", "rerun", "rrd", "print", "-vvv", str(tmp_path / "out.rrd")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for entity in ("/cloud", "/vectors", "/values/losses"):
        assert entity in said
    assert "step" in said


# ---------------------------------------------------------------------------------------------------------------------
# Other traces


def test_a_trace_without_tokens_has_its_steps(tmp_path: Path) -> None:
    from bhfast.optim import FusedAdam
    from bhfast.recording.recorder import Recorder

    param = torch.nn.Parameter(torch.ones(3).bfloat16())
    two = FusedAdam([{"params": [param], "lr": 0.5}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.25}])
    path = tmp_path / "t"
    with Recorder(two, {"b": param}, path=path, steps=2, start_step=7) as recorder:
        param.grad = torch.ones(3).bfloat16()
        two.step()
        recorder.log(loss=1.5, flag=True, wide=torch.zeros(40))
    trace = open_trace(path)
    kept = {name: x for name, x in trace.items() if name not in ("b", "b.grad", "b.exp_avg", "b.exp_avg_sq")}
    rewrite(path, kept, {key: x for key, x in trace.metadata.items() if key != "optimizer"})
    notes = run_export(path, "csv", tmp_path / "out")
    assert "cannot be reported" in notes[0]
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["steps.csv"]
    with open(tmp_path / "out" / "steps.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == ["7", "8"]
    assert [(line["learning_rates.0"], line["learning_rates.1"]) for line in lines][1] == ("0.5", "0.25")
    assert [float(line["loss"]) for line in lines][1] == 1.5
    assert [float(line["flag"]) for line in lines] == [0, 1]
    assert not any(name.startswith("wide") for name in lines[0])


def test_what_can_go_wrong_is_one_line(run: TrainResult, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(StorageError, match="there exists: remove it, or choose another --out"):
        run_export(run.path, "csv", tmp_path / "there")
    with pytest.raises(StorageError, match=r"cannot write .*(Not a directory|File exists)"):
        run_export(run.path, "csv", tmp_path / "there" / "out")
    with pytest.raises(TraceError, match="has no parameter nothing"):
        run_export(run.path, "csv", tmp_path / "out", "nothing")
    record(tmp_path / "t")
    rewrite(tmp_path / "t", {"x": torch.zeros(2)}, {})
    with pytest.raises(TraceError, match="has no recorded_steps"):
        run_export(tmp_path / "t", "csv", tmp_path / "out")
    for to, needed in program.NEEDS.items():
        if needed:
            monkeypatch.setitem(sys.modules, needed[0], None)
            with pytest.raises(BhfastError, match=rf"--to {to} needs {needed[1]}: pip install 'bhfast\[{needed[2]}\]'"):
                run_export(run.path, to, tmp_path / "out")
    monkeypatch.setattr(values.Source, "token_blocks", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_export(run.path, "csv", tmp_path / "out")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["t", "there"]


@pytest.mark.parametrize("to", ["csv", "parquet"])
def test_memory_stays_flat(to: str, tmp_path: Path) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed; it comes with bhfast[parquet]")
    vectors = torch.zeros(700, 20, 1024).bfloat16()  # 29 MB
    rewrite(tmp_path / "t", {"recorded_steps": torch.arange(700), "embeddings": vectors}, {})
    rewrite(tmp_path / "small", {"recorded_steps": torch.arange(3), "embeddings": vectors[:3]}, {})
    del vectors
    run_export(tmp_path / "small", to, tmp_path / "first")  # imports
    reset_peak_memory()
    before = peak_memory()
    run_export(tmp_path / "t", to, tmp_path / "out")
    mapped = (tmp_path / "t").stat().st_size  # pages of the file count, though they can be dropped
    assert peak_memory() - before < mapped + 30e6
