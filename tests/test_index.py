"""Reading across files: the index, and tensors that span them."""

from __future__ import annotations

import copy
import io
import json
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bhfast.errors import TraceError
from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
from bhfast.trace import ShardedTensor, Trace, TraceTensor, open_trace
from bhfast.trace.sharded import INDEX_FORMAT, open_index

FILES = ["run-00001-of-00002.safetensors", "run-00002-of-00002.safetensors"]


def tensors() -> dict[str, torch.Tensor]:
    """Of 21 records; what several files share is ``wte.weight``, by rows, and ``grid``, by columns."""
    generator = torch.Generator().manual_seed(0)
    return {
        "wte.weight": torch.randn(21, 11, 6, generator=generator).bfloat16(),
        "grid": torch.randn(21, 3, 4, generator=generator),
        "loss": torch.rand(21, generator=generator),
        "recorded_steps": torch.arange(21),
    }


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    with OutputFile(path, overwrite=True) as output:
        write_trace(output, {name: x.contiguous() for name, x in tensors.items()}, metadata, path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The same in one file."""
    path = tmp_path_factory.mktemp("whole") / "run.safetensors"
    write(path, tensors())
    return open_trace(path)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of two files, of which the first has what is not shared. Do not write to their folder."""
    folder, all_ = tmp_path_factory.mktemp("sharded"), tensors()
    common = {name: all_[name] for name in ("loss", "recorded_steps")}
    rows, columns = all_["wte.weight"].split([6, 5], 1), all_["grid"].split([1, 3], 2)
    write(folder / FILES[0], {"wte.weight": rows[0], "grid": columns[0], **common}, config='{"steps": 20}')
    write(folder / FILES[1], {"wte.weight": rows[1], "grid": columns[1], "recorded_steps": all_["recorded_steps"]})
    offsets = {"wte.weight": ([0, 0, 0], [0, 6, 0]), "grid": ([0, 0, 0], [0, 0, 1])}
    shards = {
        name: {
            "shape": list(all_[name].shape),
            "parts": [
                {"file": file, "offset": offset, "shape": list(part.shape)}
                for file, offset, part in zip(FILES, offsets[name], parts, strict=True)
            ],
        }
        for name, parts in (("wte.weight", rows), ("grid", columns))
    }
    index = {"metadata": {"format": INDEX_FORMAT}, "weight_map": dict.fromkeys(all_, FILES[0]), "shards": shards}
    path = folder / "run.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def test_an_index_opens_as_a_trace(sharded: Path, whole: Trace) -> None:
    trace = open_index(sharded)
    assert trace.keys() == whole.keys()
    assert trace.config == {"steps": 20}
    assert "crc32" not in trace.metadata  # of one file, and no checksum of the whole
    for name in whole:
        assert torch.equal(trace[name][:], whole[name]), name


def test_the_first_records_alone(sharded: Path, whole: Trace) -> None:
    first = open_index(sharded)["grid"].first(5)
    assert (len(first), first.shape) == (5, (5, 3, 4))
    assert torch.equal(first[:], whole["grid"][:5])
    assert torch.equal(first[-1], whole["grid"][4])
    with pytest.raises(IndexError, match="index 5 is out of bounds for 5 records"):
        first[5]


INDICES = [
    3, -1, slice(2, 9), slice(None, None, 4), (5, 7), (5, -2), (slice(1, 3), slice(4, 9)),
    (0, slice(7, 11), slice(2, 5)), (slice(None), slice(8, 3)),
    (slice(None), slice(None, None, 2)), (slice(2), [0, 10, 6]), [0, 20, 7],
    torch.tensor([4, 4]), (..., 3), (2, ..., 1), (slice(None), 10, 5), (), None,
    np.int64(4), (np.int32(-2), np.int64(3)), torch.tensor(5), (torch.tensor(-1), torch.tensor(2)),
    ([0, 20, 7], 3), ([0, 20, 7], slice(2, 9)), ([0, 1, 2], [3, 9, 10]), ([1, 2], slice(None), [0, 5]), (4, [0, 10]),
    torch.arange(21) % 2 == 0, np.arange(3), [], torch.tensor([[1, 2], [3, 4]]), True, False, (True, 3), range(3, 7),
    torch.ones(21, 11, dtype=torch.bool), torch.zeros(21, 11, 6, dtype=torch.bool),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_like_the_whole(index: Any, sharded: Path, whole: Trace) -> None:
    got = open_trace(sharded)["wte.weight"][index]
    assert isinstance(got, TraceTensor)
    assert torch.equal(got, whole["wte.weight"][index])


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


REFUSED = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.matmul, operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
]  # fmt: skip


@pytest.mark.parametrize("operation", REFUSED, ids=lambda x: x.__name__)
def test_refuses_to_compute(operation: Callable[..., Any], sharded: Path) -> None:
    tensor = open_trace(sharded)["grid"]
    for other in (1, 2.5, torch.ones(4), np.ones(4), tensor, tensor[:]):
        for one, another in ((tensor, other), (other, tensor)):
            with pytest.raises(TypeError) as error:
                operation(one, another)
            assert "sharded tensor" in str(error.value)
            assert "index it first" in str(error.value)


@pytest.mark.parametrize("function", [torch.equal, torch.add, torch.allclose, torch.mul])
def test_torch_functions_refuse_it(function: Callable[..., Any], sharded: Path) -> None:
    tensor = open_trace(sharded)["grid"]
    for arguments in ((tensor, tensor[:]), (tensor[:], tensor), (tensor, tensor)):
        with pytest.raises(TypeError, match=f"{function.__name__} does not take a sharded tensor: index it first"):
            function(*arguments)


@pytest.mark.parametrize("operation", [operator.iadd, operator.isub, operator.imul, operator.ior, operator.imatmul])
def test_refuses_to_compute_in_place(operation: Callable[..., Any], sharded: Path) -> None:
    with pytest.raises(TypeError, match=r"a sharded tensor has no __i.*__: index it first"):
        operation(open_trace(sharded)["grid"], 1)


@pytest.mark.parametrize(
    "operation",
    [operator.neg, abs, operator.invert, bool, int, float, torch.sum, torch.isnan, lambda x: 1 in x],
)
def test_refuses_to_compute_alone(operation: Callable[[Any], Any], sharded: Path) -> None:
    with pytest.raises(TypeError, match=r"sharded tensor.*index it first"):
        operation(open_trace(sharded)["grid"])


def test_cannot_be_written_to(sharded: Path) -> None:
    tensor = open_trace(sharded)["grid"]
    with pytest.raises(TypeError, match="a sharded tensor has no __setitem__: index it first"):
        tensor[0] = 1
    with pytest.raises(AttributeError, match=r"a sharded tensor has no clamp: index it first, tensor\[...\]\.clamp"):
        tensor.clamp(min=0)
    assert not hasattr(tensor, "sum")


def test_reading_it_as_a_whole(sharded: Path, whole: Trace) -> None:
    tensor, wanted = open_trace(sharded)["grid"], whole["grid"]
    assert torch.equal(torch.stack(list(tensor)), wanted)
    assert (np.asarray(tensor) == wanted.numpy()).all()
    assert np.asarray(tensor, dtype=np.float64).dtype == np.float64
    assert np.allclose(tensor, wanted.numpy())
    assert torch.equal(tensor.float(), wanted)
    assert torch.equal(open_trace(sharded)["wte.weight"].float(), whole["wte.weight"].float())
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    for copied in (
        copy.deepcopy(tensor),
        pickle.loads(pickle.dumps(tensor)),
        torch.load(io.BytesIO(buffer.getvalue())),
    ):
        assert torch.equal(copied, wanted)
    assert {tensor: 1}[tensor] == 1


def test_looks_like_a_tensor(sharded: Path) -> None:
    trace = open_trace(sharded)
    tensor = trace["wte.weight"]
    assert (len(tensor), tensor.dim(), tensor.shape, tensor.dtype) == (21, 3, (21, 11, 6), torch.bfloat16)
    assert (tensor.ndim, tensor.size(), tensor.size(1), tensor.numel()) == (3, (21, 11, 6), 11, 21 * 11 * 6)
    assert repr(tensor) == "ShardedTensor([21, 11, 6], torch.bfloat16, 2 parts)"
    assert tensor.numpy().shape == (21, 11, 6)
    assert "wte.weight       BF16  [21, 11, 6]" in repr(trace)
    assert "21 records, steps 0 to 20" in repr(trace)
    with pytest.raises(IndexError, match="index 21 is out of bounds for 21 records"):
        tensor[21]
    with pytest.raises(IndexError, match="index 11 is out of bounds for axis 1, which has 11"):
        tensor[0, 11]
    with pytest.raises(IndexError):
        tensor[[0, 21]]


def test_files_of_different_lengths_are_read_up_to_the_shortest(sharded: Path, tmp_path: Path) -> None:
    for path in sharded.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "run-00002-of-00002.safetensors"
    shorter = {name: x[:9] for name, x in open_trace(file).items()}
    with OutputFile(file, overwrite=True) as output:
        write_trace(output, shorter, {}, file)
    trace, longer = open_trace(tmp_path / sharded.name), open_trace(sharded)
    assert trace.steps.tolist() == list(range(9))
    assert torch.equal(trace["wte.weight"][:], longer["wte.weight"][:9])
    assert torch.equal(trace["loss"][1:], longer["loss"][1:9])


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
        (lambda text: "no json", "is not an index: it is not valid JSON"),
        (lambda text: "[]", "is corrupted, or is not the index of a trace"),
        (lambda text: "{}", "is corrupted, or is not the index of a trace: 'weight_map'"),
        (damaged(lambda x: x["weight_map"].update(loss="../run")), "'../run' is not the name of a file"),
        (damaged(lambda x: x["weight_map"].update(loss=7)), "is corrupted, or is not the index of a trace"),
        (damaged(lambda x: x["weight_map"].update(loss="gone")), "cannot open the trace .*gone: No such file"),
        (damaged(lambda x: x["shards"].update(other=7)), "is corrupted, or is not the index of a trace"),
        (damaged(lambda x: x["shards"]["wte.weight"]["parts"].pop()), "the parts of wte.weight have 36 elements, want"),
        (damaged(lambda x: x["shards"]["wte.weight"]["parts"][0].update(offset=[0, 9, 0])), "lies outside of it"),
        (
            damaged(lambda x: x["shards"]["wte.weight"]["parts"][0].update(offset=[0, "a", 0])),
            "is corrupted, or is not",
        ),
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


def test_parts_have_one_dtype(sharded: Path, tmp_path: Path) -> None:
    for path in sharded.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    second = open_trace(tmp_path / FILES[1])
    write(tmp_path / FILES[1], {**second, "grid": second["grid"].double()})
    with pytest.raises(TraceError, match="the parts of grid have different dtypes"):
        open_trace(tmp_path / sharded.name)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot open the index .*gone\.index\.json: No such file"):
        open_trace(tmp_path / "gone.index.json")
