"""Compact traces: what is rebuilt between key frames is what a full recording of the same run holds, bit for bit."""

from __future__ import annotations

import copy
import pickle
import random
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keyframe_runs import KEYFRAME, RUNS, SHAPES, STEPS, assert_same, assert_same_bits
from strategies import fuzzed
from torch import nn

from bhfast import lattice
from bhfast.config import TrainConfig
from bhfast.errors import ConfigError
from bhfast.ops import arithmetic, kernels
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.report.survey import survey_trace
from bhfast.summary import verification_figures
from bhfast.trace import open_trace, rebuilt
from bhfast.trace.format import KEYFRAMES
from bhfast.trace.updates import STATE, differing
from bhfast.train import train
from bhfast.verify import verify

STREAMED = ["FusedAdam", "without gradients", "two optimizers", "resumed", "fails", "shorter", "shorter, on the grid"]
CASES = [(name, "memory") for name in RUNS] + [(name, "stream") for name in STREAMED]


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_rebuilds_what_a_full_recording_holds(name: str, storage: str, tmp_path: Path) -> None:
    run = RUNS[name]
    compact = run.record(tmp_path / "compact", keyframes=KEYFRAME, storage=storage)
    assert_same(run.record(tmp_path / "full", storage="memory"), compact)
    found = verify(compact)
    if run.done == 0:
        assert (found.status, found.reason) == (2, "learning_rates are not in the file")
    else:
        assert (found.status, found.replayed) == (0, len(open_trace(compact).steps) - 1), found


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RUNS["FusedAdam"].record(tmp_path_factory.mktemp("full") / "full")


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RUNS["FusedAdam"].record(tmp_path_factory.mktemp("compact") / "compact", keyframes=KEYFRAME)


@pytest.mark.parametrize(
    ("keyframes", "steps"),
    [(2, None), (3, STEPS), (STEPS, None), (STEPS, 1000), (STEPS + 1, STEPS), (1000, 1000)],
)
def test_any_distance_between_key_frames(keyframes: int, steps: int | None, full: Path, tmp_path: Path) -> None:
    path = RUNS["FusedAdam"].record(tmp_path / "compact", keyframes=keyframes, steps=steps)
    assert_same(full, path)
    trace = open_trace(path)
    frames = sorted({*range(0, STEPS + 1, keyframes), STEPS})
    assert trace["keyframe_steps"].tolist() == frames
    assert trace.metadata["keyframes"] == str(keyframes)
    for name in SHAPES:
        for key in (trace.optimizer["params"][name]["keys"][field] for field in STATE):
            assert_same_bits(trace[f"{key}{KEYFRAMES}"], trace[key][torch.tensor(frames)])
    assert verify(path).status == 0


# ---------------------------------------------------------------------------------------------------------------------
# Indexing


def axes(size: int, *, is_first: bool = False) -> st.SearchStrategy[Any]:
    """Return indices of an axis."""
    ends = st.none() | st.integers(-size - 2, size + 2)
    found = st.integers(-size, size - 1) | st.builds(slice, ends, ends, st.none() | st.integers(1, 5))
    if is_first:
        several = st.lists(st.integers(-size, size - 1), max_size=6)
        masks = st.lists(st.booleans(), min_size=size, max_size=size)
        found |= several | several.map(lambda x: torch.tensor(x, dtype=torch.int64)) | masks.map(torch.tensor)
    return found


@st.composite
def indices(draw: st.DrawFn) -> tuple[str, Any]:
    """Return the name of a tensor, and an index that fits it."""
    name = draw(st.sampled_from([name for name in SHAPES if name != "empty"]))
    shape = (STEPS + 1, *SHAPES[name])
    count = draw(st.integers(1, len(shape)))
    index = tuple(draw(axes(size, is_first=axis == 0)) for axis, size in enumerate(shape[:count]))
    field = draw(st.sampled_from(["", ".exp_avg", ".exp_avg_sq"]))
    return f"{name}{field}", index[0] if count == 1 else index


@pytest.fixture(scope="module", params=[4 << 20, 300], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest) -> Any:
    """How many bytes of states are rebuilt together; only few of the small blocks are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilt, "BLOCK_BYTES", request.param)
        patch.setattr(rebuilt, "CACHE_BYTES", 8 * request.param)
        patch.setattr(rebuilt, "SHARED_BYTES", 4 * request.param)
        yield


@fuzzed(50)
@given(st.lists(indices(), min_size=1, max_size=4))
def test_any_index_gives_the_bits_of_the_full_tensor(
    blocks: None, full: Path, compact: Path, asked: list[tuple[str, Any]]
) -> None:
    wanted, found = open_trace(full), open_trace(compact)
    for name, index in asked:
        assert_same_bits(found[name][index], wanted[name][index])


@pytest.mark.parametrize("index", [STEPS + 1, -STEPS - 2, [0, STEPS + 1], (0, 5), (0, -6)], ids=str)
def test_an_index_out_of_range_is_an_index_error(index: Any, compact: Path) -> None:
    with pytest.raises(IndexError):
        open_trace(compact)["matrix"][index]


# ---------------------------------------------------------------------------------------------------------------------
# What readers do with it


def test_a_rebuilt_tensor_is_copied_as_it_is_read(full: Path, compact: Path) -> None:
    trace, wanted = open_trace(compact), open_trace(full)["matrix"][:]
    tensor = trace["matrix"]
    assert_same_bits(copy.deepcopy(tensor), wanted)
    assert_same_bits(pickle.loads(pickle.dumps(tensor)), wanted)
    assert_same_bits(torch.stack(list(tensor)), wanted)
    assert_same_bits(tensor.first(3)[:], wanted[:3])
    tensor[3].zero_()  # a copy
    assert_same_bits(tensor[3], wanted[3])
    assert repr(tensor) == "RebuiltTensor([22, 5, 7], torch.bfloat16)"
    assert "matrix           BF16  [22, 5, 7] rebuilt" in repr(trace)
    assert "matrix.keyframes BF16  [4, 5, 7]" in repr(trace)


def test_a_copy_of_a_trace_reads_the_same(full: Path, compact: Path) -> None:
    trace, wanted = open_trace(compact), open_trace(full)
    assert_same_bits(trace["matrix"][5], wanted["matrix"][5])
    for copied in (copy.copy(trace), copy.deepcopy(trace), pickle.loads(pickle.dumps(trace))):
        assert_same_bits(copied["matrix"][5], wanted["matrix"][5])


def test_threads_read_side_by_side(full: Path, compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilt, "CACHE_BYTES", 3000)
    monkeypatch.setattr(rebuilt, "SHARED_BYTES", 1500)
    monkeypatch.setattr(rebuilt, "BLOCK_BYTES", 500)
    trace = open_trace(compact)
    wanted = {name: open_trace(full)[name][:] for name in ("matrix", "cube", "vector", "tiny")}

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            name, record = chance.choice(list(wanted)), chance.randrange(STEPS + 1)
            assert_same_bits(trace[name][record : record + 4], wanted[name][record : record + 4])
            assert_same_bits(trace[name][record], wanted[name][record])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))


def test_a_rebuilt_tensor_refuses_to_be_computed_with(compact: Path) -> None:
    tensor = open_trace(compact)["matrix"]
    for compute in (lambda: tensor + 1, lambda: 1 * tensor, lambda: tensor != tensor, lambda: bool(tensor)):
        with pytest.raises(TypeError, match=r"a rebuilt tensor has no __\w+__: index it first, tensor\[...\]"):
            compute()
    with pytest.raises(TypeError, match=r"sum does not take a rebuilt tensor: index it first, tensor\[...\]"):
        torch.sum(tensor)
    with pytest.raises(AttributeError, match="a rebuilt tensor has no mean: index it first"):
        tensor.mean()


@pytest.mark.parametrize("name", ["learning_rates", "clip_coefs", "skipped"])
def test_what_states_are_rebuilt_with_cannot_be_logged(name: str, tmp_path: Path) -> None:
    params = {"w": nn.Parameter(torch.ones(3))}
    said = rf"log\({name}=...\) must have a name of its own: states are rebuilt with {name}"
    with Recorder(FusedAdam(params.values()), params, steps=5, path=tmp_path / "t", keyframes=3) as recorder:
        with pytest.raises(ConfigError, match=said):
            recorder.log({name: 1.0})


def test_a_tied_parameter_is_found_under_each_of_its_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)}).bfloat16()
    model["head"].weight = model["wte"].weight
    optimizer = FusedAdam(model.parameters(), lr=0.1)
    with Recorder(optimizer, ["head.*", "wte.*"], model=model, steps=5, path=tmp_path / "t", keyframes=3):
        for _ in range(5):
            model["head"](model["wte"](torch.arange(3))).square().sum().backward()
            optimizer.step()
    trace = open_trace(tmp_path / "t")
    assert_same_bits(trace["wte.weight"][5], model["wte"].weight.detach())
    assert_same_bits(trace["wte.weight"][:], trace["head.weight"][:])
    assert_same_bits(trace["wte.weight.exp_avg"][4], trace["head.weight.exp_avg"][4])


def test_one_of_its_parameters_may_have_the_name_of_anothers_key_frames(tmp_path: Path) -> None:
    params = {name: nn.Parameter(torch.ones(3)) for name in ("w", f"w{KEYFRAMES}")}
    with pytest.raises(ConfigError, match=r"keys must give every tensor a name of its own, got w.keyframes twice"):
        Recorder(FusedAdam(params.values()), params, steps=5, path=tmp_path / "t", keyframes=3)


# ---------------------------------------------------------------------------------------------------------------------
# The reference run


@pytest.fixture(scope="module")
def settings(text: str) -> dict[str, Any]:
    return {"steps": 21, "hidden_dim": 32, "context": 16, "corpus": text, "device": "cpu", "quiet": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "torch", "weight_decay": 0.1},
        {"engine": "native"},
        {"engine": "native", "storage": "stream", "keyframes": 7, "adam_rounding": "opmath", "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_an_engine_records_what_it_does_without_key_frames(changes, settings, extension, tmp_path: Path) -> None:
    changes = {"keyframes": KEYFRAME, **changes}
    compact = train(TrainConfig(**settings, **changes, out=str(tmp_path / "compact"))).path
    full = train(TrainConfig(**settings, **{**changes, "keyframes": 0}, out=str(tmp_path / "full"))).path
    assert_same(full, compact)
    assert verify(compact).status == 0


def test_what_reads_a_full_trace_reads_a_compact_one(settings, tmp_path: Path) -> None:
    found = []
    for keyframes in (0, KEYFRAME):
        path = train(TrainConfig(**settings, keyframes=keyframes, out=str(tmp_path / f"{keyframes}"))).path
        trace = open_trace(path)
        survey = survey_trace(trace)
        late = lattice.life(trace["embeddings"][:, trace["token_counts"] == 0], trace.steps).last_late_step
        found.append((survey.summary(), survey.table(), verification_figures(trace), late.tolist()))
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [0, 1, 3, 1000, 40_000])
def test_both_kernels_of_many_steps_agree(size: int, dtype: torch.dtype, rounding: str, extension, generator) -> None:
    steps, first = 5, 2
    grads = torch.randn(steps, 2, size, generator=generator).to(dtype)[:, 1]  # rows of a parameter
    grads[:, size // 2 :] *= 1e-9
    grads[1:2, :1], grads[3:4, 1:3] = torch.inf, torch.nan
    settings = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    coefficients = arithmetic.adam_coefficients(range(3, 3 + steps), [0.1, 0.2, 0.0, 0.1, 0.3], **settings)
    clip_coefs = torch.tensor([1.0, 0.3, 0.5, torch.nan, 1.0]).bfloat16().float()
    updated = torch.tensor([True, True, False, size < 1000, True])
    found = []
    for kernel in (kernels.adam_steps_, kernels.adam_steps_.__wrapped__):
        state = [torch.linspace(-1, 1, size).to(dtype), torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)]
        records = [torch.empty(steps - first, size, dtype=dtype) for _ in range(2)]
        kernel(*state, grads, coefficients, clip_coefs, updated, rounding, records[0], None, records[1], first)
        found.append([*state, *records])
    for one, other in zip(*found, strict=True):
        assert not differing(one, other).any()


REBUILD = Path(__file__).parent.parent / "docs" / "rebuild.py"


needs_docs = pytest.mark.skipif(not REBUILD.exists(), reason="this copy of the tree has no docs/")


@needs_docs
@pytest.mark.parametrize("changes", [{}, {"beta1": 0.4, "weight_decay": 0.1, "max_grad_norm": 0.1}], ids=str)
def test_the_documents_rebuild_with_numpy_alone(changes, settings, tmp_path: Path) -> None:
    rebuild = runpy.run_path(str(REBUILD))["rebuild"]
    path = train(TrainConfig(**settings, **changes, keyframes=12, out=str(tmp_path / "t"))).path
    trace = open_trace(path)
    for step in (0, 1, 11, 12, 20, 21):
        for found, key in zip(rebuild(path, "wte", step), ("embeddings", "momentum", "variance"), strict=True):
            assert_same_bits(torch.from_numpy(found), trace[key][step].float())


@needs_docs
def test_its_multiply_add_rounds_once() -> None:
    fma = runpy.run_path(str(REBUILD))["fma"]
    generator = torch.Generator().manual_seed(0)
    a, b, c = ((torch.randn(100_000, generator=generator) * 2.0**scale) for scale in (0, 3, -9))
    c[::3] = -(a * b)[::3]
    assert_same_bits(torch.from_numpy(fma(a.numpy(), b.numpy(), c.numpy())), arithmetic.fma(a, b, c))
    a, b, c = torch.tensor([1 + 2.0**-12]), torch.tensor([1 + 2.0**-12]), torch.tensor([2.0**-80])
    assert fma(a.numpy(), b.numpy(), c.numpy()) == arithmetic.fma(a, b, c) == 1 + 2.0**-11 + 2.0**-23
