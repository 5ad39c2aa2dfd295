"""bhfast import: traces of HDF5 and safetensors files of other programs, with their values unchanged."""

from __future__ import annotations

import errno
import hashlib
import importlib
import itertools
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from children import fork, status_of
from hypothesis import event, given
from hypothesis import strategies as st
from memory import peak_memory, reset_peak_memory
from safetensors.torch import save_file
from strategies import CHANGES, fuzzed, mutated
from traces import raw, record

from bhfast import compact
from bhfast.errors import BhfastError, ConfigError, StorageError, TraceError
from bhfast.foreign import importing
from bhfast.foreign.conversion import converted
from bhfast.foreign.importing import import_recording
from bhfast.recover import recover
from bhfast.report import program as report
from bhfast.trace import open_trace
from bhfast.verify import verify

R, V, D = 7, 5, 4


def recording(records: int = R) -> dict[str, torch.Tensor]:
    """What the specification's notebook writes, with its names, shapes and dtypes."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(records, *shape, generator=generator).bfloat16()

    return {
        "recorded_steps": torch.arange(records),
        **{name: some(V, D) for name in ("embeddings", "grads", "momentum", "variance")},
        "logits": some(V),
        "losses": some().index_fill(0, torch.tensor(0), float("nan")),
        "bh_center": some(D)[0].clone(),
        **{name: torch.tensor(0.5) for name in ("init_scale", "sigma", "learning_rate", "weight_decay")},
        **{name: torch.tensor(0.9) for name in ("adam_beta1", "adam_beta2")},
    }


def write_hdf5(path: Path, tensors: dict[str, Any], **options: Any) -> None:
    """Write tensors, bfloat16 as uint16; ``options`` are for those with records."""
    with h5py.File(path, "w") as file:
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor):
                x = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
            file.create_dataset(name, data=x, **(options if np.ndim(x) > 2 else {}))


def assert_has(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    trace = open_trace(path)
    assert set(trace) == set(wanted)
    for name, x in wanted.items():
        assert (trace[name].dtype, trace[name].shape, raw(trace[name])) == (x.dtype, x.shape, raw(x)), name
    assert trace.header_is_intact()
    assert not [*trace.damage()]


def test_the_notebooks_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(recording(), tmp_path / "old", metadata={"format": "pt"})
    assert importing.main([str(tmp_path / "old"), "--out", str(tmp_path / "new")]) == 0
    assert_has(tmp_path / "new", recording())
    said = capsys.readouterr().out
    assert f"{tmp_path / 'new'}: 0.0 MB, 7 records, steps 0 to 6\n" in said
    assert "left out" not in said
    imported = json.loads(open_trace(tmp_path / "new").metadata["imported"])
    content = (tmp_path / "old").read_bytes()
    assert imported == {
        "file": "old",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "keys": {},
        "left_out": {},
        "attributes": {"format": "pt"},
    }


OTHER_NAMES = {"embeddings": "W", "grads": "run/Gradients", "momentum": "exp_avg", "variance": "v", "losses": "loss"}


@pytest.mark.parametrize(
    "options", [{}, {"chunks": (3, 2, 4), "compression": "gzip"}, {"chunks": (1, 5, 4), "shuffle": True}]
)
def test_hdf5_with_other_names(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is read and written in blocks of other lengths."""
    monkeypatch.setattr("bhfast.storage.whole.CHUNK", 100)
    monkeypatch.setattr("bhfast.foreign.sources.BLOCK", 200)
    own = recording()
    logits = own.pop("logits")
    write_hdf5(tmp_path / "old", {OTHER_NAMES.get(name, name): x for name, x in own.items()}, **options)
    with h5py.File(tmp_path / "old", "a") as file:
        file["logits"] = logits.view(torch.int16).numpy()
        file.attrs["sigma"] = np.float32(0.5)
        file["W"].attrs["unit"] = b"none"
        file["strings"] = ["a", "b"]
        file["tokens"] = np.arange(V, dtype=">u2")
    done = import_recording(tmp_path / "old", tmp_path / "new")
    wanted = {**own, "logits": logits, "tokens": torch.arange(V).to(torch.uint16)}
    assert_has(tmp_path / "new", wanted)
    assert done.left_out == {"strings": "a trace has no object"}
    assert done.names["embeddings"] == ("W", "bfloat16 [7, 5, 4], from uint16")
    imported = json.loads(open_trace(tmp_path / "new").metadata["imported"])
    assert imported["attributes"] == {"sigma": 0.5, "W@unit": "none"}
    assert imported["keys"] == OTHER_NAMES


def test_keys_decide(tmp_path: Path) -> None:
    own = recording()
    tensors = {"E": own["embeddings"], "weights": own["grads"], "W": own["momentum"], "n": own["recorded_steps"]}
    save_file(tensors, tmp_path / "old")
    with pytest.raises(TraceError, match=r"embeddings may be any of (weights, W|W, weights); say which"):
        import_recording(tmp_path / "old", tmp_path / "new")
    keys = {"embeddings": "E", "grads": "weights", "recorded_steps": "n"}
    import_recording(tmp_path / "old", tmp_path / "new", keys=keys)
    assert_has(tmp_path / "new", {"W": own["momentum"], **{name: tensors[key] for name, key in keys.items()}})
    save_file({"embeddings": own["logits"], **tensors}, tmp_path / "old")
    done = import_recording(tmp_path / "old", tmp_path / "other", keys=keys)
    assert done.left_out == {"embeddings": "E takes its name"}


def test_steps_may_be_said(tmp_path: Path) -> None:
    own = {"embeddings": recording()["embeddings"]}
    save_file(own, tmp_path / "old")
    with pytest.raises(TraceError, match="does not say of which steps its records are: pass --every 1 if"):
        import_recording(tmp_path / "old", tmp_path / "new")
    import_recording(tmp_path / "old", tmp_path / "new", every=10)
    assert_has(tmp_path / "new", {**own, "recorded_steps": torch.arange(R) * 10})
    save_file({**own, "steps": torch.arange(R, dtype=torch.int32)}, tmp_path / "old")
    import_recording(tmp_path / "old", tmp_path / "more")
    assert_has(tmp_path / "more", {**own, "recorded_steps": torch.arange(R)})
    with pytest.raises(ConfigError, match="says of which steps its records are, so it needs no --every"):
        import_recording(tmp_path / "old", tmp_path / "no", every=1)


@given(st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 16) - 1))
def test_float32_becomes_bfloat16_only_if_it_is(high: int, low: int) -> None:
    bits = torch.tensor([[0x3F800000, (high << 16) + low]], dtype=torch.int64).to(torch.int32)
    one = bits[0, 0].view(torch.float32)
    assert converted("x", one, to_bfloat16=True) == 1
    values = bits.view(torch.float32)
    if low:
        with pytest.raises(TraceError, match=r"x of record 0 has .*, which is not a bfloat16; import it as float32"):
            converted("x", values, to_bfloat16=True)[:]
    else:
        wanted = (bits >> 16).to(torch.int16)
        assert torch.equal(converted("x", values, to_bfloat16=True)[:].view(torch.int16), wanted)
    assert converted("x", values, to_bfloat16=False) is values


def test_further_tensors_become_bfloat16_if_asked_for(tmp_path: Path) -> None:
    own = recording()
    exact = own["grads"].float()
    write_hdf5(tmp_path / "old", {**own, "grads": exact, "hidden": own["momentum"], "odd": exact + 2.0**-20})
    arguments = [str(tmp_path / "old"), "--out", str(tmp_path / "new")]
    assert importing.main([*arguments, "--bfloat16", "grads,hidden"]) == 0
    assert_has(tmp_path / "new", {**own, "hidden": own["momentum"], "odd": exact + 2.0**-20})
    with pytest.raises(TraceError, match=r"odd of record 0 has .*, which is not a bfloat16"):
        import_recording(tmp_path / "old", tmp_path / "no", bfloat16=["odd"])
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no.partial").exists()
    import_recording(tmp_path / "old", tmp_path / "plain")
    assert open_trace(tmp_path / "plain")["grads"].dtype == torch.float32
    assert open_trace(tmp_path / "plain")["hidden"].dtype == torch.uint16


def test_what_reads_traces_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hdf5(tmp_path / "old", recording(), chunks=True, compression="gzip")
    assert importlib.import_module("bhfast.import").main([str(tmp_path / "old"), "--out", str(tmp_path / "new")]) == 0
    assert report.main([str(tmp_path / "new")]) == 0
    assert "step 6: centroid norm" in capsys.readouterr().out
    found = verify(tmp_path / "new")
    assert found.status == 2
    assert str(found).startswith(
        "not replayed, because it was imported from old, which does not describe its optimizer"
    )
    assert str(found).endswith("all checksums match")
    with pytest.raises(TraceError, match="cannot be made compact: it was imported"):
        compact.compact(tmp_path / "new", tmp_path / "c", keyframes=3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grads": lambda x: x[1:]}, r"grads is \[6, 5, 4\], which does not fit recorded_steps, \[7\]"),
        ({"momentum": lambda x: x[:, 1:]}, r"momentum is \[7, 4, 4\], which does not fit embeddings, \[7, 5, 4\]"),
        ({"losses": lambda x: x[:3]}, r"losses is \[3\], which does not fit recorded_steps"),
        ({"logits": lambda x: x[:, :2]}, r"logits is \[7, 2\], which does not fit embeddings"),
        ({"recorded_steps": lambda x: x.flip(0)}, "recorded_steps must increase"),
        ({"recorded_steps": lambda x: x - 1}, "recorded_steps must increase, from 0 or more"),
        ({"recorded_steps": torch.Tensor.float}, "recorded_steps must be integers, got torch.float32"),
        ({"embeddings": lambda x: x[0].clone()}, r"which tensor are the embeddings\? Say it with --keys"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: Any, text: str, tmp_path: Path) -> None:
    own = recording()
    tensors = {name: changes[name](x).contiguous() if name in changes else x for name, x in own.items()}
    for write, name in ((save_file, "safetensors"), (lambda x, path: write_hdf5(path, x), "hdf5")):
        write(tensors, tmp_path / name)
        with pytest.raises(TraceError, match=text) as caught:
            import_recording(tmp_path / name, tmp_path / "new")
        assert str(tmp_path / name) in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(recording(), tmp_path / "old")
    record(tmp_path / "trace")
    (tmp_path / "text").write_text("no tensors at all")
    (tmp_path / "there").write_text("precious")
    for arguments, kind, text in (
        (["old", "--keys", "embeddings"], ConfigError, "--keys must look like embeddings=W,grads=G, got 'embeddings'"),
        (["old", "--keys", "a=W,a=G"], ConfigError, "--keys has 'a' twice"),
        (["old", "--keys", "a=W,b=W"], ConfigError, "--keys has 'W' twice"),
        (["old", "--keys", "embeddings=X"], TraceError, "has no X; it has "),
        (["old", "--bfloat16", "Y"], TraceError, "has no Y; it has "),
        (
            ["old", "--bfloat16", "recorded_steps"],
            TraceError,
            "recorded_steps cannot become bfloat16: it is torch",
        ),
        (["old", "--every", "0"], ConfigError, "every must be at least 1, got 0"),
        (["trace"], TraceError, "trace is a trace of bhfast already"),
        (["text"], TraceError, "text is not a safetensors file"),
        (["gone"], TraceError, "gone: No such file"),
        (["old", "--out", str(tmp_path / "there")], StorageError, "there exists; pass --overwrite"),
    ):
        command = [str(tmp_path / arguments[0]), "--out", str(tmp_path / "new"), *arguments[1:]]
        assert importing.main(command) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("bhfast import: error: ")
        assert text in error
        assert error.count("\n") == 1
        assert issubclass(kind, BhfastError)
    assert (tmp_path / "there").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hdf5(tmp_path / "old", recording())
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(TraceError, match="old is HDF5, which needs h5py: pip install h5py"):
        import_recording(tmp_path / "old", tmp_path / "new")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    write_hdf5(tmp_path / "small", recording())
    with h5py.File(tmp_path / "old", "w") as file:
        file["steps"] = np.arange(4000)
        file.create_dataset("W", (4000, 400, 50), "u2", chunks=(50, 400, 50), compression="gzip", fillvalue=1)
        file["W"][300] = 2  # the other chunks are not in the file

    def work() -> None:
        import_recording(tmp_path / "small", tmp_path / "first")  # touches all code that is needed
        reset_peak_memory()
        before = peak_memory()
        import_recording(tmp_path / "old", tmp_path / "new")
        assert peak_memory() - before < 70e6 < (tmp_path / "new").stat().st_size / 2

    assert status_of(fork(work)) == 0
    assert open_trace(tmp_path / "new")["embeddings"][299:302, 0, 0].view(torch.int16).tolist() == [1, 2, 1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("foreign")
    save_file(recording(), folder / "safetensors")
    write_hdf5(folder / "hdf5", recording(), chunks=True, compression="gzip")
    return [folder / "safetensors", folder / "hdf5"]


@fuzzed(150)
@given(which=st.integers(0, 1), changes=CHANGES)
def test_damaged_files_give_a_trace_or_a_line(
    files: list[Path], which: int, changes: list[tuple[str, int, bytes]]
) -> None:
    path, out = files[which].with_name("damaged"), files[which].with_name("out")
    path.unlink(missing_ok=True)
    path.write_bytes(mutated(files[which].read_bytes(), changes))
    out.unlink(missing_ok=True)
    try:
        import_recording(path, out)
    except BhfastError as error:
        event(type(error).__name__)
        assert not out.exists()
    else:
        event("a trace")
        assert not [*open_trace(out).damage()]


# ---------------------------------------------------------------------------------------------------------------------
# Bad luck: the trace of before stays, and nothing else is left


def trouble_at(number: int, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """From its call ``number`` on, let each call that writes the trace, syncs or renames it do ``work`` instead."""
    calls = itertools.count()

    def troubled(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(calls) >= number:
                work()
            return real(*arguments)

        return call

    for name in ("pwrite", "fsync", "ftruncate", "replace"):
        monkeypatch.setattr(os, name, troubled(getattr(os, name)))


@pytest.fixture
def old_and_new(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """A recording, the trace of another one, and that trace's bytes."""
    save_file(recording(3), tmp_path / "other")
    import_recording(tmp_path / "other", tmp_path / "trace")
    (tmp_path / "other").unlink()
    save_file(recording(), tmp_path / "old")
    return tmp_path / "old", tmp_path / "trace", (tmp_path / "trace").read_bytes()


def test_a_disk_that_fails_leaves_the_earlier_trace(old_and_new, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, before = old_and_new

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in itertools.count():
        with monkeypatch.context() as patch, suppress(StorageError):
            trouble_at(number, fail, patch)
            import_recording(old, new, overwrite=True)
            break
        assert new.read_bytes() == before
        left = {path.name for path in new.parent.iterdir()} - {"old", "trace"}
        assert left <= {"trace.partial"}
        if left:  # it was complete, but for its name
            recover(new.with_name("trace.partial"), replace=True)
            break
    assert number > len(recording())
    assert_has(new, recording())


def test_an_import_that_is_killed_leaves_the_earlier_trace(old_and_new, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, before = old_and_new
    for number in range(0, 2 * len(recording()), 5):

        def killed(number: int = number) -> None:
            trouble_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
            import_recording(old, new, overwrite=True)

        if status_of(fork(killed)) == 0:
            break
        assert new.read_bytes() == before
    assert number > len(recording())
    import_recording(old, new, overwrite=True)
    assert_has(new, recording())
    assert {path.name for path in new.parent.iterdir()} == {"old", "trace"}
