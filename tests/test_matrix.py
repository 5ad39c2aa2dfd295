"""The truth in any loop: what is recorded of every optimizer in every framework is what a plain copy holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matrix_run import FRAMEWORKS, OPTIMIZERS, OVERFLOW, STEPS, Shard, joined, record, record_distributed
from support_table import REFUSED, REFUSED_BY_TORCH, is_replayed, support_table
from torch import Tensor

from bhfast.ops import kernels
from bhfast.trace import open_trace
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES
from bhfast.verify import verify

CELLS = [(optimizer, framework) for framework in FRAMEWORKS for optimizer in OPTIMIZERS]
COMPILED = ("FusedAdam", "AdamW foreach", "SGD", "Lion", "Muon + AdamW")  # the recorder's part is one for all steps
DISTRIBUTED = [cell for cell in CELLS if FRAMEWORKS[cell[1]].processes > 1]
SUPPORT = Path(__file__).parent.parent / "docs" / "support.md"


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def compare(path: Path, wanted: list[dict[str, Tensor]]) -> None:
    """Records 1 and following hold the wanted values, bit for bit; two NaN are equal."""
    trace = open_trace(path)
    names = {name for values in wanted for name in values}
    own = {"recorded_steps", "learning_rates", "more.step", "clip_coefs", "skipped"}
    if path.name.endswith(".index.json"):  # of what is sharded, only values of its shape are recorded
        names -= {name for name in names if name.endswith(".mu_product")}
    if "keyframes" in trace.metadata:
        own |= {KEYFRAME_STEPS, *(f"{name}{KEYFRAMES}" for name in names)}
        assert trace[KEYFRAME_STEPS].tolist() == [0, 2, 4, 5]
    assert set(trace) - own == names
    assert trace.steps.tolist() == list(range(STEPS + 1))
    for name in names:
        recorded = trace[name][:]
        for number, values in enumerate(wanted, start=1):
            value = values.get(name, torch.zeros_like(recorded[number]))
            assert recorded[number].dtype == value.dtype, name
            same = torch.equal(bits(recorded[number]), bits(value))
            assert same or torch.equal(recorded[number].nan_to_num(), value.nan_to_num()), (name, number)


@pytest.fixture(scope="module")
def distributed(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("distributed", lambda folder: record_distributed(DISTRIBUTED, folder))


def parameters(optimizer: str, framework: str) -> object:
    is_slow = FRAMEWORKS[framework].compiles and optimizer not in COMPILED
    name = f"{optimizer}-{framework}".replace(" ", "_")
    return pytest.param(optimizer, framework, marks=[pytest.mark.slow] * is_slow, id=name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about fused and compiled optimizers
@pytest.mark.parametrize(("optimizer", "framework"), [parameters(*cell) for cell in CELLS])
def test_cell(optimizer: str, framework: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if FRAMEWORKS[framework].wrap == "accelerate":
        pytest.importorskip("accelerate", reason="accelerate is not installed; it comes with bhfast[hf]")
    if FRAMEWORKS[framework].processes == 1:
        path = tmp_path / "t.safetensors"
        wanted = record(optimizer, framework, path)
    else:
        where = request.getfixturevalue("distributed") / str(DISTRIBUTED.index((optimizer, framework)))
        path = where / "t.safetensors"
        wanted, others = (torch.load(where / f"wanted-{rank}", weights_only=False) for rank in range(2))
        if isinstance(wanted, list):
            reduced = [values[1]["up.weight.grad"] for values in (wanted, others)]
            assert isinstance(reduced[0], Shard) or torch.equal(*reduced), "reduced on every rank"
            assert not torch.equal(wanted[1]["loss"], others[1]["loss"]) or "tensor" in framework, "different data"
            wanted = joined([wanted, others])
    if refusal := REFUSED.get((optimizer, framework)) or REFUSED_BY_TORCH.get((optimizer, framework)):
        assert isinstance(wanted, str)
        assert refusal in wanted
        return
    assert isinstance(wanted, list), wanted
    index = path.with_name(path.name + ".index.json")
    path = index if index.exists() else path
    compare(path, wanted)
    trace = open_trace(path)
    if FRAMEWORKS[framework].scales:
        skipped = trace["skipped"].view(STEPS + 1, -1)  # of each optimizer
        assert all(of_one.tolist() == [step == OVERFLOW for step in range(STEPS + 1)] for of_one in skipped.T)
    if FRAMEWORKS[framework].clips:
        coefs = trace["clip_coefs"][1:]
        assert ((coefs > 0) & (coefs < 1)).any()
    result = verify(path)
    assert result.difference is None
    has_exact_roots = kernels.torch_rounds_per_op(torch.float32)
    assert (result.replayed > 0) == is_replayed(optimizer, framework, has_exact_roots=has_exact_roots), result


@pytest.mark.skipif(not SUPPORT.exists(), reason="this copy of the tree has no docs/")
def test_the_table_in_the_documents_is_this_matrix() -> None:
    assert support_table() in SUPPORT.read_text(), f"python tests/support_table.py prints it for {SUPPORT}"
