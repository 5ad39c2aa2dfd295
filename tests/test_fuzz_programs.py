"""Files that were changed, or are odd: verify passes none that means another thing, and programs end with a line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import CHANGES, HEADER_CHANGES, JUNK, change_header, fuzzed, mutated
from traces import joined, record, rewrite, split

from bhfast import diff, verify
from bhfast.report import program as report
from bhfast.trace import open_trace
from bhfast.trace.format import PADDING


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each example is written anew."""
    return tmp_path_factory.mktemp("fuzz") / "t.safetensors"


@pytest.fixture(scope="module")
def provable(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small traces that verify passes, from memory and streamed; the latter cut short, so that it has padding."""
    folder = tmp_path_factory.mktemp("provable")
    record(folder / "memory", steps=4, metadata={"seed": "42"}, storage="memory")
    record(folder / "stream", steps=4, metadata={"seed": "42"}, storage="stream", announced=40)
    assert any(name.startswith(PADDING) for name in split((folder / "stream").read_bytes())[0])
    assert status_of(folder / "memory") == status_of(folder / "stream") == 0
    return [folder / "memory", folder / "stream"]


def run(main: Any, *arguments: object) -> tuple[int, str, str]:
    """Return the exit status of a program, and what it printed to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def status_of(path: Path) -> int:
    """Return the exit status of ``bhfast verify``, which has said one line."""
    status, out, err = run(verify.main, path)
    assert (out + err).count("\n") == 1
    assert status in (0, 1, 2)
    return status


def meaning(content: bytes) -> tuple[object, ...]:
    """Return what a file says: its header, and the bytes of each tensor, but not those of padding."""
    header, data = split(content)
    kept = {name: x["data_offsets"] for name, x in header.items() if name != "__metadata__"}
    return header, {name: data[low:high] for name, (low, high) in kept.items() if not name.startswith(PADDING)}


def check_proof(path: Path, content: bytes, original: bytes) -> None:
    """Nothing passes as proved that does not mean what was written; and verify ends with one line, whatever it gets.

    But for files that pretend to be of format version 1, which verify says have no checksum of their header.
    """
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    status = status_of(path)
    event(f"exit status {status}")
    if status == 0 and open_trace(path).header_is_intact():
        assert meaning(content) == meaning(original)


@fuzzed(200)
@given(which=st.integers(0, 1), changes=CHANGES)
def test_no_file_with_changed_bytes_passes_verify(
    path: Path, provable: list[Path], which: int, changes: list[tuple[str, int, bytes]]
) -> None:
    original = provable[which].read_bytes()
    check_proof(path, mutated(original, changes), original)


@fuzzed(200)
@given(which=st.integers(0, 1), changes=HEADER_CHANGES)
def test_no_file_with_a_changed_header_passes_verify(
    path: Path, provable: list[Path], which: int, changes: list[Any]
) -> None:
    """Changed as a program would: the file stays safetensors, mostly; but nobody renews the header's checksum."""
    original = provable[which].read_bytes()
    header, data = split(original)
    for change in changes:
        change_header(header, *change)
    check_proof(path, joined(header, data), original)


@fuzzed(100)
@given(
    which=st.integers(0, 1),
    at=st.lists(st.sampled_from(["arithmetic", "groups", "params", "reason", "kernel", "w", "keys", "group", "betas"])),
    junk=JUNK,
    changes=HEADER_CHANGES,
)
@example(which=0, at=["params", "w", "steps_done"], junk=1 << 70, changes=[])
@example(which=0, at=["params", "w", "steps_done"], junk=-3, changes=[])
@example(which=0, at=["groups"], junk=[{"betas": [1.0, 1.0], "eps": 0.0, "weight_decay": 0.0}], changes=[])
def test_verify_survives_whatever_a_header_says_of_its_optimizer(
    path: Path, provable: list[Path], which: int, at: list[str], junk: Any, changes: list[Any]
) -> None:
    """Whose checksum holds: somebody wrote it like this."""
    header, data = split(provable[which].read_bytes())
    optimizer = json.loads(header["__metadata__"]["optimizer"])
    replace_within(optimizer, at, junk)
    header["__metadata__"]["optimizer"] = json.dumps(optimizer)
    for change in changes:
        change_header(header, *change)
    path.unlink(missing_ok=True)
    path.write_bytes(joined(header, data, is_sealed=isinstance(header["__metadata__"], dict)))
    status_of(path)


def replace_within(where: Any, at: list[str], junk: Any) -> None:
    """Put ``junk`` in the place that the keys lead to, as far as they do."""
    for key in at[:-1]:
        where = where.get(key) if isinstance(where, dict) and isinstance(where.get(key), dict) else where
    if at:
        where[at[-1]] = copy.deepcopy(junk)


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def reference(records: int, tokens: int, dimensions: int) -> dict[str, torch.Tensor]:
    """What a trace of the reference run has."""
    generator = torch.Generator().manual_seed(0)
    shape = (records, tokens, dimensions)
    return {
        "recorded_steps": torch.arange(records),
        "losses": torch.rand(records, generator=generator).bfloat16(),
        "token_counts": torch.arange(tokens),
        **{
            name: torch.randn(shape, generator=generator).bfloat16()
            for name in ("embeddings", "grads", "momentum", "variance")
        },
    }


ODD = {
    "gone": lambda x: None,
    "flat": lambda x: x.flatten(),
    "deeper": lambda x: x[None],
    "scalar": lambda x: x.new_zeros(()),
    "shorter": lambda x: x[:-1],
    "zero": torch.zeros_like,
    "negative": lambda x: -x,
    "apart": lambda x: x * 7 + 5,
    "not a number": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x,
    "float32": torch.Tensor.float,
    "int64": torch.Tensor.long,
    "bool": torch.Tensor.bool,
}


@fuzzed(100)
@given(
    records=st.sampled_from([0, 1, 2, 102]),
    tokens=st.integers(0, 3),
    dimensions=st.integers(0, 3),
    changes=st.dictionaries(st.sampled_from([*reference(1, 1, 1)]), st.sampled_from([*ODD]), max_size=2),
)
@example(records=3, tokens=2, dimensions=2, changes={"recorded_steps": "apart"})
def test_report_of_odd_traces_ends_in_a_line(
    path: Path, records: int, tokens: int, dimensions: int, changes: dict[str, str]
) -> None:
    changed = {
        name: ODD[changes[name]](x) if name in changes else x
        for name, x in reference(records, tokens, dimensions).items()
    }
    path.unlink(missing_ok=True)
    rewrite(path, {name: x for name, x in changed.items() if x is not None}, {})
    status, out, err = run(report.main, path)
    if status == 0:
        assert out.startswith("step ")
    else:
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"bhfast report: error: {path} ")


@fuzzed(100)
@given(
    records=st.sampled_from([0, 1, 2, 5]),
    changes=st.dictionaries(st.sampled_from([*reference(1, 1, 1)]), st.sampled_from([*ODD]), max_size=3),
    optimizer=JUNK,
)
@example(records=2, changes={"embeddings": "scalar", "token_counts": "gone"}, optimizer={"params": {"embeddings": 1}})
def test_diff_of_odd_traces_ends_in_a_line(path: Path, records: int, changes: dict[str, str], optimizer: Any) -> None:
    other = path.with_name("other")
    for file, own in ((other, {}), (path, changes)):
        tensors = {name: ODD[own[name]](x) if name in own else x for name, x in reference(records, 3, 2).items()}
        file.unlink(missing_ok=True)
        rewrite(file, {name: x for name, x in tensors.items() if x is not None}, {"optimizer": json.dumps(optimizer)})
    status, out, err = run(diff.main, path, other, "--json")
    event(f"exit status {status}")
    if status == 2:
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("bhfast diff: error: ")
    else:
        assert err == ""
        assert json.loads(out)["equal"] is (status == 0)


@fuzzed(100)
@given(
    records=st.sampled_from([0, 1, 2, 5]),
    changes=st.dictionaries(st.sampled_from([*reference(1, 1, 1)]), st.sampled_from([*ODD]), max_size=3),
    flags=st.lists(st.sampled_from(["--max-grad-norm=1", "--rounding=opmath", "--rounding=torch-fused"]), unique=True),
)
@example(records=5, changes={"embeddings": "deeper"}, flags=["--max-grad-norm=1"])
def test_verify_of_odd_traces_with_given_settings_ends_in_a_line(
    path: Path, records: int, changes: dict[str, str], flags: list[str]
) -> None:
    tensors = {name: ODD[changes[name]](x) if name in changes else x for name, x in reference(records, 3, 2).items()}
    path.unlink(missing_ok=True)
    save_file({name: x.contiguous().clone() for name, x in tensors.items() if x is not None}, path)
    status, out, err = run(verify.main, path, "--optimizer=adamw", "--lr=1e-3", *flags)
    event(f"exit status {status}")
    assert (out + err).count("\n") == 1
    assert status in ((1, 2) if records > 1 else (0, 1, 2))  # they are random, so no settings fit


def test_a_run_that_diverged_is_drawn(tmp_path: Path) -> None:
    """Of one token in one dimension, and with settings that are no numbers."""
    pytest.importorskip("matplotlib")
    tensors = reference(3, 1, 1)
    tensors["embeddings"][1:] = math.nan
    rewrite(tmp_path / "t", tensors, {"config": '{"sigma": "x", "lr": []}'})
    status, out, _ = run(report.main, tmp_path / "t", "--out", tmp_path / "out")
    assert status == 0
    assert out.endswith("index.html\n")


def test_there_is_nothing_to_draw_of_a_start(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rewrite(tmp_path / "t", reference(1, 3, 2), {})
    assert run(report.main, tmp_path / "t")[0] == 0
    status, _, err = run(report.main, tmp_path / "t", "--out", tmp_path / "out")
    assert (status, err) == (
        2,
        f"bhfast report: error: {tmp_path / 't'} has only one record, the start of a run: there is nothing to draw\n",
    )
