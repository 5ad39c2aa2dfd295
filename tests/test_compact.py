"""bhfast compact and bhfast expand: from a full trace to a compact one and back, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bhfast import compact, expand
from bhfast.config import TrainConfig
from bhfast.errors import BhfastError, ConfigError, StorageError, TraceError
from bhfast.ops import extension
from bhfast.trace import open_trace
from bhfast.train import train
from bhfast.verify import verify

STEPS = 40
ENGINES = ["torch", "native"]


@pytest.fixture(scope="module", params=[(engine, how) for engine in ENGINES for how in ("per-op", "opmath")])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, text: str) -> tuple[Path, Path]:
    """The same run recorded in full, and with key frames at every 16th step and the last."""
    engine, rounding = request.param
    if engine == "native" and (reason := extension.native_unsupported(64, 2, 256)):
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("compact")
    own = {"steps": STEPS, "engine": engine, "adam_rounding": rounding, "weight_decay": 0.1, "corpus": text}
    for name, keyframes in (("full", 0), ("compact", 16)):
        train(TrainConfig(**own, keyframes=keyframes, out=str(folder / name), device="cpu", quiet=True))
    return folder / "full", folder / "compact"


def test_expanding_gives_the_bytes_of_the_full_recording(both: tuple[Path, Path], tmp_path: Path) -> None:
    full, small = both
    assert open_trace(small)["keyframe_steps"].tolist() == [0, 16, 32, 40]
    assert small.stat().st_size < full.stat().st_size / 2
    assert expand.expand(small, tmp_path / "t") == tmp_path / "t"
    assert (tmp_path / "t").read_bytes() == full.read_bytes()


def test_compacting_gives_the_bytes_of_the_compact_recording(both: tuple[Path, Path], tmp_path: Path) -> None:
    full, small = both
    assert compact.compact(full, tmp_path / "t", keyframes=16) == tmp_path / "t"
    assert (tmp_path / "t").read_bytes() == small.read_bytes()


def test_a_streamed_trace_becomes_the_same(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its tensors are written and compared a few records at a time."""
    for name, own in {"memory": {"keyframes": 0}, "stream": {"keyframes": 9, "storage": "stream"}}.items():
        train(TrainConfig(steps=STEPS, corpus=text, out=str(tmp_path / name), device="cpu", quiet=True, **own))
    for room in ("storage.whole", "compact"):
        monkeypatch.setattr(f"bhfast.{room}.CHUNK", 100_000)
    expand.expand(tmp_path / "stream", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "memory").read_bytes()
    compact.compact(tmp_path / "x", tmp_path / "c", keyframes=9)
    expand.expand(tmp_path / "c", tmp_path / "x2")
    assert (tmp_path / "x2").read_bytes() == (tmp_path / "memory").read_bytes()


@pytest.fixture
def full(both: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "full"
    path.write_bytes(both[0].read_bytes())
    return path


def test_the_full_trace_may_be_replaced(full: Path) -> None:
    states = {name: open_trace(full)[name].clone() for name in ("embeddings", "momentum", "variance")}
    assert compact.main([str(full), "--keyframes", "30", "--out", str(full), "--overwrite"]) == 0
    trace = open_trace(full)
    assert trace["keyframe_steps"].tolist() == [0, 30, 40]
    assert all(torch.equal(trace[name][:], value) for name, value in states.items())
    assert verify(full).status == 0


def flip(path: Path, name: str, record: int) -> None:
    """Change a bit of the file in a record of a tensor, of more than one axis."""
    trace = open_trace(path)
    raw = bytes(trace[name][record].contiguous().flatten().view(torch.uint8).numpy())
    data = bytearray(path.read_bytes())
    at = data.find(raw)
    assert at > 0
    assert data.find(raw, at + 1) < 0
    data[at + 9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["embeddings", "grads", "variance"])
def test_what_does_not_follow_is_not_made_compact(name: str, full: Path, tmp_path: Path) -> None:
    flip(full, name, 17)
    with pytest.raises(TraceError, match=r"cannot be made compact: from step \d+ on, .* does not follow from the grad"):
        compact.compact(full, tmp_path / "c", keyframes=16)
    assert [x.name for x in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("name", ["embeddings.keyframes", "grads"])
def test_what_is_damaged_is_not_expanded(name: str, both: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(both[1].read_bytes())
    flip(path, name, 3)
    with pytest.raises(TraceError, match="cannot be expanded: DIFFERENT: step"):
        expand.expand(path, tmp_path / "x")
    assert [x.name for x in tmp_path.iterdir()] == ["small"]


def test_errors(both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, small = both
    (tmp_path / "there").write_text("precious")
    for work, kind, text in (
        (
            lambda: compact.compact(full, tmp_path / "c", keyframes=1),
            ConfigError,
            "keyframes must be at least 2, got 1",
        ),
        (lambda: compact.compact(small, tmp_path / "c", keyframes=9), TraceError, "it is compact already"),
        (
            lambda: compact.compact(full, tmp_path / "there", keyframes=9),
            StorageError,
            "there exists; pass overwrite=True",
        ),
        (
            lambda: compact.compact(full, tmp_path / "c.index.json", keyframes=9),
            TraceError,
            "full is no index of several files: --out must not end with .index.json, got ",
        ),
        (lambda: expand.expand(full, tmp_path / "c"), TraceError, "it is not a recording with key frames"),
        (lambda: expand.expand(small, tmp_path / "there"), StorageError, "there exists; pass overwrite=True"),
        (lambda: expand.expand(tmp_path / "none", tmp_path / "c"), BhfastError, "cannot open the trace"),
    ):
        with pytest.raises(kind, match=text):
            work()
    assert [x.name for x in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "precious"
    assert expand.main([str(full), "--out", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.startswith("bhfast expand: error: ")
