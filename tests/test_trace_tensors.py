"""The tensors of a trace: views, copies, numpy."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from memory import peak_memory, reset_peak_memory
from safetensors.torch import save_file
from streaming_run import record as record_streaming
from traces import joined, raw, record, shard

from bhfast.recording.recorder import Recorder
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


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor, tensor[1:], tensor[1], tensor[:, 1], tensor[1, 1]]


@pytest.mark.parametrize("name", VALUES)
def test_numpy_has_the_values(name: str, values: Trace) -> None:
    """In float32 if numpy lacks the dtype, else in the same memory."""
    is_lacking = name.startswith(("bfloat16", "float8"))
    for part, wanted in zip(parts_of(values[name]), parts_of(VALUES[name]), strict=True):
        for array in (part.numpy(), np.asarray(part), np.array(part), np.asarray(part, np.complex128)):
            assert array.shape == part.shape
            assert array.tolist() == wanted.tolist()
        assert part.numpy().dtype == np.asarray(part).dtype == ("float32" if is_lacking else name)
        assert np.array(part, np.complex128).dtype == np.complex128
        assert (part.numpy().ctypes.data == part.data_ptr()) == (not is_lacking)
        assert (np.asarray(part).ctypes.data == part.data_ptr()) == (not is_lacking)
        assert np.array(part).ctypes.data != part.data_ptr()
    assert type(np.asarray(values[name])) is np.ndarray


@pytest.mark.parametrize("name", VALUES)
def test_bits_have_the_same_memory(name: str, values: Trace) -> None:
    tensor = values[name]
    for part in parts_of(tensor):
        bits = part.bits()
        assert bits.dtype == f"uint{8 * part.itemsize}"
        assert bits.shape == part.shape
        assert bits.ctypes.data == part.data_ptr()
        assert bits.tobytes() == bytes(bytes_of(part.contiguous()))
    tensor.bits()[0, 0] = 0
    assert tensor[0, 0] == 0


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="numpy 1 has no copy=False")
def test_an_array_without_a_copy(values: Trace) -> None:
    assert np.asarray(values["float64"], copy=False).ctypes.data == values["float64"].data_ptr()
    with pytest.raises(ValueError, match=r"a tensor of torch\.bfloat16 cannot .* without a copy; its bits\(\) can"):
        np.asarray(values["bfloat16"], copy=False)


@pytest.mark.parametrize("form", ["file", "rebuilt", "sharded", "joined", "live"])
def test_all_forms_of_tensors_are_read_alike(form: str, tmp_path: Path) -> None:
    """By numpy, in float32, as bits, copied, pickled and saved; each as a whole and in a slice."""
    path = tmp_path / "t.safetensors"
    seen: list[torch.Tensor] = []

    def look(step: int, recorder: Recorder) -> None:
        if form == "live" and step == 30:
            while recorder.stats().committed < 10:
                pass
            check(open_trace(f"{path}.partial")["first"])

    def check(tensor: torch.Tensor) -> None:
        seen.append(tensor)
        whole = tensor[:].clone()
        assert type(whole) is torch.Tensor
        for own, wanted in ((tensor, whole), (tensor[3:5], whole[3:5])):
            assert torch.equal(own.float(), wanted.float())
            for array in (own.numpy(), np.asarray(own)):
                assert array.dtype == np.float32
                assert (array == wanted.float().numpy()).all()
            assert raw(own.bits()) == raw(wanted)
            buffer = io.BytesIO()
            torch.save(own, buffer)
            saved = torch.load(io.BytesIO(buffer.getvalue()))
            for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), saved):
                assert raw(copied) == raw(wanted)
                assert copied.untyped_storage().nbytes() == wanted.nbytes

    if form in ("file", "rebuilt", "live"):
        record_streaming(path, 30, commit_seconds=0.0, keyframes=8 if form == "rebuilt" else None, after_step=look)
    elif form == "sharded":
        record(path)
        path = shard(path)
    else:
        param = torch.nn.Parameter(torch.ones(4, 2).bfloat16())
        optimizer = torch.optim.SGD([param], lr=0.1)
        for is_more in (False, True):
            with Recorder(optimizer, {"w": param}, path=path, append=is_more):
                for _ in range(4):
                    param.grad = param.detach().cos()
                    optimizer.step()
    if form != "live":
        check(open_trace(path)["first" if form in ("file", "rebuilt") else "w"])
    assert [getattr(x, "kind", "file") for x in seen] == [form]


# ---------------------------------------------------------------------------------------------------------------------
# How they are shown


def test_printing_a_large_tensor_reads_none_of_it(tmp_path: Path) -> None:
    header = {"x": {"dtype": "BF16", "shape": [100, 1 << 20], "data_offsets": [0, 200 << 20]}}
    (tmp_path / "t").write_bytes(joined(header, b""))
    os.truncate(tmp_path / "t", (tmp_path / "t").stat().st_size + (200 << 20))
    x = open_trace(tmp_path / "t")["x"]
    reset_peak_memory()
    before = peak_memory()
    assert repr(x) == "TraceTensor([100, 1048576], torch.bfloat16)"
    assert peak_memory() - before < 50e6
    assert repr(x[0, :3]) == "TraceTensor([0., 0., 0.], dtype=torch.bfloat16)"
    assert "...," in repr(x[0])


def test_a_trace_is_a_table_in_a_notebook(tmp_path: Path) -> None:
    nasty = '</td><script>alert("x")</script>\x1b[2J'
    path = tmp_path / f"a<b>{nasty.replace('/', '')}.safetensors"
    with OutputFile(path) as output:
        write_trace(output, {nasty: torch.zeros(2, 3), "recorded_steps": torch.tensor([0, 7])}, {}, path)
    trace = open_trace(path)
    table = trace._repr_html_()
    assert '<td style="text-align: left">[2, 3]</td>' in table
    assert "2 records, steps 0 to 7" in table
    assert "&lt;script&gt;alert(&quot;x&quot;)" in table
    assert ElementTree.fromstring(f"<div>{table}</div>").find("table") is not None
    for text in (table, repr(trace)):
        assert "\x1b" not in text
        assert r"\x1b[2J" in text
    assert "<b>" not in table
    assert trace._ipython_key_completions_() == list(trace)


def test_a_trace_of_very_many_tensors_shows_the_first(tmp_path: Path) -> None:
    save_file({f"x{i}": torch.zeros(1) for i in range(103)}, tmp_path / "t")
    trace = open_trace(tmp_path / "t")
    for shown in (trace._repr_html_(), repr(trace)):
        assert shown.count("[1]") == 100
        assert "... and 3 more" in shown


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
    x.bits()[2, 1] = 0x40A0  # 5
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
