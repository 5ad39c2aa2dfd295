"""verify on several files, and on the index of several."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from traces import flip, record, rewrite, shard

from bhfast import verify as module
from bhfast.trace import open_trace
from bhfast.verify import main, verify

DOCUMENT = Path(__file__).parents[1] / "docs" / "recorder.md"


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (["good", "good"], 0),
        (["good", "unknown"], 2),
        (["unknown", "damaged", "gone"], 1),
        (["gone", "good"], 2),
        (["truncated", "unknown"], 1),
    ],
)
def test_the_worst_of_several_files_wins(names: list[str], status: int, tmp_path: Path, capsys) -> None:
    for name in ("good", "damaged", "truncated"):
        record(tmp_path / name)
    record(tmp_path / "unknown", torch.optim.NAdam)
    flip(tmp_path / "damaged", "w", 2, 1, 1, bit=3)
    (tmp_path / "truncated").write_bytes((tmp_path / "good").read_bytes()[:-1])
    assert main([str(tmp_path / name) for name in names]) == status
    output = capsys.readouterr()
    lines = [*output.out.splitlines(), *output.err.splitlines()]
    assert len(lines) == len(names)
    assert all(any(str(tmp_path / name) in line for line in lines) for name in names)


def test_json_says_it_of_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "damaged", "sums", "truncated"):
        record(tmp_path / name)
    record(tmp_path / "unknown", torch.optim.NAdam)
    flip(tmp_path / "damaged", "w.exp_avg", 2, 1, 3, bit=3)
    flip(tmp_path / "sums", "w.grad", 0, 1, 3, bit=3)  # which no replay uses
    (tmp_path / "truncated").write_bytes((tmp_path / "good").read_bytes()[:-1])
    names = ["good", "unknown", "damaged", "sums", "truncated", "gone\n"]
    assert main(["--json", *(str(tmp_path / name) for name in names)]) == 1
    output = capsys.readouterr()
    assert output.err == ""
    good, unknown, damaged, sums, truncated, gone = found = [json.loads(line) for line in output.out.splitlines()]
    assert [x["file"] for x in found] == [str(tmp_path / name) for name in names]
    assert [x["status"] for x in found] == [0, 2, 1, 1, 1, 2]
    assert good == {
        "schema": 1,
        "file": str(tmp_path / "good"),
        "status": 0,
        "error": None,
        "replayed": 6,
        "reason": None,
        "difference": None,
        "checksums": "all",
        "compared": [],
        "remarks": [],
    }
    assert all(x.keys() == good.keys() for x in found)
    assert (unknown["replayed"], unknown["checksums"]) == (0, "all")
    assert "NAdam" in unknown["reason"]
    text = damaged["difference"].pop("text")
    assert text.startswith("step 2, w.exp_avg[1, 3]: recorded")
    assert damaged["difference"] == {"tensor": "w.exp_avg", "record": 2, "step": 2, "index": [1, 3]}
    assert sums["difference"]["tensor"] == "w.grad"
    assert sums["difference"]["index"] is None
    assert all((x["replayed"], x["checksums"]) == (None, None) for x in (damaged, sums, truncated, gone))
    assert "is truncated" in truncated["error"]
    assert "cannot open the trace" in gone["error"]


@pytest.mark.skipif(not DOCUMENT.exists(), reason="this copy of the tree has no docs/")
def test_the_keys_of_json_are_documented(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json", str(recorded)])
    table = DOCUMENT.read_text().partition("raises `schema`.")[2].partition("A replay needs")[0]
    cells = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    assert json.loads(capsys.readouterr().out).keys() == set(re.findall("`(.+?)`", cells))


@pytest.fixture
def index(recorded: Path) -> Path:
    return shard(recorded)


def test_all_files_of_an_index_are_verified(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(index) == module.Verification(replayed=6, reason=None, difference=None)
    second = index.with_name("run-00002-of-00002.safetensors")
    found = verify(second)
    assert found.reason.startswith("it is one of several files; verify their .index.json instead")
    flip(second, "w.exp_avg", 4, 1, 3, bit=0)
    difference = verify(index).difference
    assert (difference.tensor, difference.step, difference.index) == ("w.exp_avg", 4, (1, 3))
    capsys.readouterr()
    assert main([str(index)]) == 1
    assert f"{index}: DIFFERENT: {second.name}: step 4, w.exp_avg[1, 3]: recorded" in capsys.readouterr().out
    second.write_bytes(second.read_bytes()[:-1])
    assert main([str(index)]) == 1
    assert f"{second} is truncated" in capsys.readouterr().err


def in_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(index: Path) -> None:
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    return apply


def in_second(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(index: Path) -> None:
        path = index.with_name("run-00002-of-00002.safetensors")
        trace = open_trace(path)
        tensors, metadata = {name: x.clone() for name, x in trace.items()}, dict(trace.metadata)
        change(tensors, metadata)
        rewrite(path, tensors, metadata)

    return apply


def swap_parts(content: dict[str, Any]) -> None:
    """So that the parts still cover the whole, in the wrong order."""
    first, second = content["shards"]["w"]["parts"]
    first["offset"], second["offset"] = [0, 2, 0], [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (in_index(swap_parts), "run-00001-of-00002.safetensors and the index disagree on the shapes or offsets"),
        (in_index(lambda x: x["weight_map"].pop("loss")), "has a tensor loss that the index does not name"),
        (in_index(lambda x: x["shards"]["w"].update(shape=[8, 5, 8])), "the index gives w [7, 8] records"),
        (in_second(lambda x, m: m.update(shard="{}")), "belongs to the index None, not to run.safetensors.index.json"),
        (in_second(lambda x, m: x.update(more=torch.ones(2))), "-00002-of-00002.safetensors has a tensor more that"),
        (in_second(lambda x, m: x["recorded_steps"].add_(1)), "have different recorded_steps"),
        (in_second(lambda x, m: x.update(loss=torch.ones(7))), "have different loss"),
    ],
)
def test_an_index_must_agree_with_its_files(change, text: str, index: Path, capsys) -> None:
    assert main([str(index)]) == 0
    change(index)
    capsys.readouterr()
    assert main([str(index)]) == 1
    assert text in capsys.readouterr().out


def test_a_file_that_an_index_lacks_is_named(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index.with_name("run-00002-of-00002.safetensors").unlink()
    assert main([str(index)]) == 2
    assert "run-00002-of-00002.safetensors: No such file" in capsys.readouterr().err
