"""bhfast diff: the first difference of two traces, their distances, and what only one of them has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streaming_run
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import fuzzed
from traces import flip, record, rewrite, shard

from bhfast.diff import Diff, diff, main
from bhfast.errors import TraceError
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The same recording twice."""
    for name in ("a", "b"):
        record(tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def tensor(found: Diff, name: str) -> Any:
    (own,) = [x for x in found.tensors if x.name == name]
    return own


def distances(found: Diff, name: str) -> list[list[float]]:
    return [x.tolist() for x in tensor(found, name).distances(torch.arange(len(found.pairs.steps)))]


def test_equal_traces(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*map(str, two)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "equal: all bits agree"
    assert "compared: 7 steps, 0 to 6" in said
    assert "first difference" not in said


@pytest.mark.parametrize("more", [{"keyframes": 2}, {"storage": "stream"}, {"storage": "stream", "announced": 60}])
def test_a_trace_that_is_stored_otherwise_is_equal(more: dict[str, Any], two: tuple[Path, Path]) -> None:
    two[1].unlink()
    record(two[1], **more)
    found = diff(*two)
    assert found.is_equal
    assert {"w", "w.grad", "w.exp_avg", "b", "loss", "learning_rates"} <= {x.name for x in found.tensors}


def test_a_sharded_trace_is_equal_and_its_rows_are_numbered(two: tuple[Path, Path]) -> None:
    index = shard(two[1])
    assert diff(two[0], index).is_equal
    flip(index.with_name("run-00002-of-00002.safetensors"), "w", 4, 1, 3, bit=0)
    assert tensor(diff(two[0], index), "w").first.index == (4, 3)


def test_one_bit_is_found(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flip(two[1], "w.exp_avg", 4, 2, 7, bit=3)
    flip(two[1], "w.grad", 4, 3, 1, bit=0)
    flip(two[1], "loss", 5, bit=0)
    assert main([*map(str, two)]) == 1
    said = capsys.readouterr().out
    assert "first difference: step 4, w.grad, row 3 (all 4 common steps before are equal)" in said
    found = diff(*two)
    a, b = (open_trace(path)["w.exp_avg"][4, 2, 7].item() for path in two)
    (grad, average) = found.first()
    assert (grad.name, average.name) == ("w.grad", "w.exp_avg")
    assert average.first.index == (2, 7)
    assert average.first.a.startswith(f"{a:.8g} (0x")
    assert average.first.b.startswith(f"{b:.8g} (0x")
    assert distances(found, "w.exp_avg") == [
        [0.0] * 4 + [abs(a - b)] + [0.0] * 2,
        [0.0] * 4 + [8.0] + [0.0] * 2,
        [0.0] * 4 + [0.2] + [0.0] * 2,
    ]
    assert tensor(found, "loss").differs.tolist() == [False] * 5 + [True, False]


def reference(a: np.ndarray, b: np.ndarray) -> list[tuple[float, float, float]]:
    """Distances of float32 ``[R, rows, n]``, one value at a time."""
    found = []
    for x, y in zip(a, b, strict=True):
        square, ulp, rows = 0.0, 0.0, 0
        for one, other in zip(x, y, strict=True):
            rows += one.tobytes() != other.tobytes()
            for p, q in zip(one, other, strict=True):
                square += (float(p) - float(q)) ** 2 if p.tobytes() != q.tobytes() else 0
                ends = [int.from_bytes(v.tobytes(), "little") for v in (p, q)]
                places = [v if v < 1 << 31 else (1 << 31) - v for v in ends]
                is_nan = [math.isnan(p), math.isnan(q)]
                distance = 0 if all(is_nan) else math.inf if any(is_nan) else abs(places[0] - places[1])
                ulp = max(ulp, distance)
        found.append((math.sqrt(square), ulp, rows / len(x)))
    return found


VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 1e-40, -1e-40, 3e38, math.inf, math.nan])


@fuzzed(60)
@given(a=st.lists(VALUES, min_size=12, max_size=12), b=st.lists(VALUES, min_size=12, max_size=12))
def test_distances_are_those_of_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory, a: list[float], b: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    values = [torch.tensor(x).view(3, 2, 2) for x in (a, b)]
    for name, x in zip("ab", values, strict=True):
        rewrite(folder / name, {"recorded_steps": torch.arange(3), "x": x, "y": x.bfloat16()}, {})
    found = diff(folder / "a", folder / "b")
    wanted = reference(*(x.numpy() for x in values))
    got = [*zip(*distances(found, "x"), strict=True)]
    assert np.allclose(got, wanted, rtol=1e-12, atol=0, equal_nan=True)
    own = tensor(found, "x")
    bits = [x.view(torch.int32) for x in values]
    assert own.elements == int((bits[0] != bits[1]).sum())
    same = (values[0] == values[1]) | (values[0].isnan() & values[1].isnan())
    assert own.same_value == int((same & (bits[0] != bits[1])).sum())
    shorter = distances(found, "y")[1]
    limits = [x.bfloat16().view(torch.int16).int() for x in values]
    limits = [torch.where(x < 0, -(x & 0x7FFF), x) for x in limits]
    if not any(x.isnan().any() for x in values):
        assert shorter == (limits[0] - limits[1]).abs().flatten(1).amax(1).tolist()


def test_zeros_and_nan_count_by_their_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nan = torch.tensor([0x7FC0, 0x7FC1], dtype=torch.int16).view(torch.bfloat16)
    steps = torch.arange(3)
    a = torch.tensor([[0.0, 1.0], [2.0, 3.0], [nan[0], 1.0]]).bfloat16()
    a[2, 0] = nan[0]
    for name, changes in {"a": {}, "b": {}, "zero": {(0, 0): -0.0}, "nan": {(2, 0): nan[1]}}.items():
        x = a.clone()
        for index, value in changes.items():
            x[index] = value
        rewrite(tmp_path / name, {"recorded_steps": steps, "x": x}, {})
    paths = {name: str(tmp_path / name) for name in ("a", "b", "zero", "nan")}
    assert main([paths["a"], paths["b"]]) == 0
    for name in ("zero", "nan"):
        own = tensor(diff(paths["a"], paths[name]), "x")
        assert (own.elements, own.same_value) == (1, 1)
        assert main([paths["a"], paths[name]]) == 1
    assert "0 (0x0000), B -0 (0x8000)" in capsys.readouterr().out
    assert distances(diff(paths["a"], paths["zero"]), "x") == [[0.0] * 3, [0.0] * 3, [0.5, 0.0, 0.0]]


def test_records_are_matched_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "a", steps=9)
    record(tmp_path / "b", steps=6, every=2)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found.pairs.steps.tolist() == [0, 2, 4, 6]
    assert found.has_same_bits
    assert not found.is_equal
    assert main([str(tmp_path / "b"), str(tmp_path / "a")]) == 1
    said = capsys.readouterr().out
    assert "only B has 6 steps, 1 to 9\n" in said
    assert "not equal, as only one has some of it; all bits that both have agree" in said
    flip(tmp_path / "b", "w", 2, 1, 1, bit=0)
    assert tensor(diff(tmp_path / "a", tmp_path / "b"), "w").first.step == 4


def test_rows_are_matched_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "all")
    record(tmp_path / "some", rows={"w": [4, 1, 2]})
    record(tmp_path / "others", rows={"w": [0, 2, 4]})
    record(tmp_path / "apart", rows={"w": [3]})
    found = diff(tmp_path / "all", tmp_path / "some")
    assert (found.has_same_bits, found.is_equal) == (True, False)
    assert found.pairs.rows["w.grad"] == (5, 3, 3)
    assert diff(tmp_path / "some", tmp_path / "some").is_equal
    flip(tmp_path / "others", "w.grad", 3, 1, 5, bit=2)  # row 2 of w
    found = diff(tmp_path / "some", tmp_path / "others")
    assert tensor(found, "w.grad").first.index == (2, 5)
    assert tensor(found, "w.grad").pair.shape == (2, 8)
    assert main([str(tmp_path / "some"), str(tmp_path / "others")]) == 1
    assert "rows of w.grad: A has 3, B has 3; 2 of them are the same and were compared" in capsys.readouterr().out
    assert "w" not in {x.name for x in diff(tmp_path / "some", tmp_path / "apart").tensors}


def test_what_only_one_has_and_what_is_of_another_kind_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.zeros(3, 2)
    steps = torch.arange(3)
    rewrite(tmp_path / "a", {"recorded_steps": steps, "x": x, "y": x, "z": x, "only": x}, {"seed": "1", "of": "both"})
    rewrite(tmp_path / "b", {"recorded_steps": steps, "x": x, "y": x.half(), "z": x[:, :1]}, {"of": "both"})
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert "only A has only" in said
    assert "y was not compared: it is float32 in A, float16 in B" in said
    assert "z was not compared: its shape is [2] in A, [1] in B" in said
    assert [line.split() for line in said[said.index("") :][:4]] == [
        [],
        ["settings", "that", "differ", "A", "B"],
        ["seed", "1", "–"],
        [],
    ]
    rewrite(tmp_path / "c", {"recorded_steps": steps, "x": x, "y": x, "z": x, "only": x}, {"seed": "2"})
    assert main([str(tmp_path / "a"), str(tmp_path / "c")]) == 0  # settings alone are no difference


def test_a_constant_differs_at_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sigma in (("a", 0.0), ("b", 1e-3)):
        counts = torch.tensor([3, int(sigma > 0)])  # as many as there are records
        tensors = {"recorded_steps": torch.arange(2), "sigma": torch.tensor(sigma), "token_counts": counts}
        rewrite(tmp_path / name, tensors, {})
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert "different, but not in what was recorded at each step" in said
    assert "  sigma: A 0 (0x00000000), B 0.001 (0x3a83126f), 1 of its values differ" in said
    assert "  token_counts[1]: A 0 (0x0000000000000000), B 1 (0x0000000000000001), 1 of its values differ" in said


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """Is compared as far as it is committed, with a whole one."""
    whole, path = streaming_run.reference(tmp_path, 40), tmp_path / "t"
    found: list[Diff] = []

    def look(step: int, recorder: Recorder) -> None:
        if step == 30:
            found.append(diff(whole, f"{path}.partial"))

    streaming_run.record(path, 40, announced=40, buffer_bytes=1 << 16, after_step=look)
    assert 4 < len(found[0].pairs.steps) <= 31
    assert {"first", "second.grad", "second.exp_avg"} <= {x.name for x in found[0].tensors}
    assert found[0].has_same_bits
    assert not found[0].is_equal


def test_json_and_csv_have_every_step(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flip(two[1], "w", 4, 2, 7, bit=1)
    assert main([*map(str, two), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [*range(7)]
    assert found["first"] == [{"tensor": "w", **found["tensors"]["w"]["first"]}]
    assert found["first"][0]["index"] == [2, 7]
    assert found["tensors"]["w"]["ulp"] == [0, 0, 0, 0, 2, 0, 0]
    assert (found["equal"], found["same_bits"], found["only_in"]["a"]["steps"]) == (False, False, [])
    assert main([*map(str, two), "--csv"]) == 1
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "tensor,step,l2,ulp,rows"
    l2 = found["tensors"]["w"]["l2"][4]
    assert [line for line in lines if line.startswith("w,")][4] == f"w,4,{l2!r},2.0,0.2"
    assert len(lines) == 7 * sum("l2" in own for own in found["tensors"].values())


def test_page(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    flip(two[1], "w", 4, 2, 7, bit=1)
    assert main([*map(str, two), "--out", str(tmp_path / "out")]) == 1
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"index.html", "l2.png", "ulp.png", "rows.png"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "first difference: step 4, w, row 2" in page
    assert capsys.readouterr().out.endswith("index.html\n")


def test_many_tensors_are_not_all_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value, name in enumerate(("a", "b")):
        tensors = {f"x{i}": torch.full((2, 3), float(value)) for i in range(12)}
        rewrite(tmp_path / name, {"recorded_steps": torch.arange(2), **tensors}, {})
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert said.count("L2 of the difference") == 8
    assert "and 4 more tensors; --json or --csv has the distances of all" in said


def test_errors(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(tmp_path / "later", {"recorded_steps": torch.arange(10, 12), "x": torch.zeros(2)}, {})
    rewrite(tmp_path / "none", {"x": torch.zeros(2)}, {})
    rewrite(tmp_path / "back", {"recorded_steps": torch.tensor([1, 0]), "x": torch.zeros(2)}, {})
    for name, text in (
        ("later", "have no step in common, so there is nothing to compare"),
        ("none", "it has no recorded_steps, so it is not a trace"),
        ("back", "its recorded_steps must be increasing int64"),
        ("gone", "cannot open the trace"),
    ):
        with pytest.raises(TraceError, match=text):
            diff(two[0], tmp_path / name)
        assert main([str(two[0]), str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("bhfast diff: error: ")
        assert error.count("\n") == 1
