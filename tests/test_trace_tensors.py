"""The tensors of a trace: views, copies, numpy."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from traces import raw

from bhfast.storage.output import OutputFile
from bhfast.storage.whole import write_trace
from bhfast.trace import Trace, TraceTensor, open_trace
from bhfast.trace.format import bytes_of, place

VALUES = {
    "bfloat16": torch.tensor([[1.5, -2.0], [float("inf"), 1e-3], [0.0, 7.0]]).bfloat16(),
    "float8_e4m3fn": torch.tensor([[1.5, -2.0], [448.0, 0.5]]).to(torch.float8_e4m3fn),
    "float8_e5m2": torch.tensor([[1.5, -2.0], [float("inf"), 0.5]]).to(torch.float8_e5m2),
    "float16": torch.tensor([[1.5, -2.0], [3.0, 4.0]]).half(),
    "float64": torch.tensor([[1.5, -2.0], [3.0, 4.0]]).double(),
    "int64": torch.tensor([[1, 2], [3, -(1 << 62)]]),
    "uint8": torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8),
    "bool": torch.tensor([[True, False], [False, True]]),
    "complex64": torch.tensor([[1j, 2.0], [3.0, 4 - 1j]]),
}


@pytest.fixture
def values(tmp_path: Path) -> Trace:
    """A file with tensors of many dtypes."""
    path = tmp_path / "values.safetensors"
    with OutputFile(path) as output:
        write_trace(output, VALUES, {"tied": '{"half": "float16", "bool": "int64", "lost": "gone"}'}, path)
    return open_trace(path)


@pytest.mark.parametrize("name", VALUES)
def test_numpy_has_the_same_memory(name: str, values: Trace) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensor = values[name]
    for part in (tensor, tensor[1:], tensor[1], tensor[:, 1], tensor[1, 1]):
        array = part.numpy()
        assert array.ctypes.data == part.data_ptr()
        assert array.dtype == (getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else np.dtype(name))
        assert array.shape == part.shape
        assert array.tobytes() == bytes(bytes_of(part.contiguous()))
    if not name.startswith(("bool", "int", "uint", "complex")):
        assert tensor.numpy().astype(np.float64).tolist() == VALUES[name].double().tolist()
    tensor.numpy()[0, 0] = 0
    assert tensor[0, 0] == 0


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", np.uint16), ("float8_e4m3fn", np.uint8), ("int64", np.int64)])
def test_numpy_without_ml_dtypes_has_the_bits(name: str, dtype: type, values: Trace, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for part in (values[name], values[name][1:, 0]):
        assert part.numpy().dtype == dtype
        assert part.numpy().ctypes.data == part.data_ptr()
        assert part.numpy().tobytes() == bytes(bytes_of(part.contiguous()))


def test_what_is_computed_is_a_plain_tensor(values: Trace) -> None:
    x = values["float64"]
    assert f"{x[0, 0]:.2f}" == f"{float(x[0, 0]):.2f}"
    assert type(x) is type(x[0]) is type(x[0, 1:]) is type(x[x > 2]) is type(x[torch.tensor([1, 0])]) is TraceTensor
    for result in (x + 1, 2 * x, x.clone(), x.float(), x.view(-1), x.sum(), torch.stack([x, x]), x @ x, x == x):
        assert type(result) is torch.Tensor
    assert torch.equal(x, VALUES["float64"])
    assert torch.equal(x[x > 2], torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert x[torch.tensor([1, 0])].tolist() == [[3.0, 4.0], [1.5, -2.0]]
    assert x[None, ..., -1:].shape == (1, 2, 1)
    assert x[x > 2].numpy().tolist() == [3.0, 4.0]


@pytest.mark.parametrize("name", VALUES)
def test_a_copy_has_the_bytes_of_its_slice_only(name: str, values: Trace) -> None:
    tensor = values[name]
    for part in (tensor[1:], tensor[:, 1], tensor[1, 1]):
        deep, pickled = copy.deepcopy(part), part.clone()
        if "float8" not in name:  # torch pickles none of these
            pickled = pickle.loads(pickle.dumps(part))
        buffer = io.BytesIO()
        torch.save({"part": part, "again": part}, buffer)
        saved = torch.load(io.BytesIO(buffer.getvalue()))["part"]
        assert (type(deep), type(pickled), type(saved)) == (TraceTensor, torch.Tensor, torch.Tensor)
        for copied in (deep, pickled, saved):
            assert copied.dtype == part.dtype
            assert copied.shape == part.shape
            assert raw(copied) == raw(part)
            assert copied.untyped_storage().nbytes() == part.nbytes
        deep.zero_()
    assert raw(tensor) == raw(VALUES[name])
    assert tensor.ndim == 2
    assert tensor.is_complex() or tensor.float().dtype == torch.float32


def test_saving_a_slice_of_a_large_tensor_writes_little(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"x": torch.zeros(100, 1 << 16, dtype=torch.uint8)}, path)
    part = open_trace(path)["x"][3, :100]
    assert len(pickle.dumps(part)) < 2000
    torch.save(part, tmp_path / "part")
    assert (tmp_path / "part").stat().st_size < 5000
    both = copy.deepcopy({"one": part, "other": part})
    assert both["one"] is both["other"]


def test_writes_stay_in_memory(values: Trace) -> None:
    before = values.path.read_bytes()
    x = values["bfloat16"]
    x[1:] = 9
    x[0].mul_(2)
    x[x > 8.5] -= 1
    x.numpy()[2, 1] = 5
    assert x.tolist() == [[3.0, -4.0], [8.0, 8.0], [8.0, 5.0]]
    assert values.path.read_bytes() == before
    assert torch.equal(open_trace(values.path)["bfloat16"], VALUES["bfloat16"])


def test_tied_names_are_found_but_not_listed(values: Trace) -> None:
    assert torch.equal(values["half"], VALUES["float16"])
    assert "half" in values
    assert list(values) == list(place(VALUES))
    assert len(values) == len(VALUES)
    assert values["bool"].dtype == torch.bool  # its own, whatever else may have that name
    with pytest.raises(KeyError, match="has no tensor 'lost'"):
        values["lost"]
