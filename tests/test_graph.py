"""The graph engine, on a GPU; and on a CPU with the graph replaced by the function that it would capture."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from copy_streams import SlowCopyStream
from keyframe_runs import assert_same
from traces import assert_same_data

from bhfast import doctor
from bhfast.config import TrainConfig
from bhfast.engines import graph
from bhfast.engines.base import StorageGuard, TrainingRun
from bhfast.engines.choose import Demands, select_engine
from bhfast.engines.graph import GraphEngine
from bhfast.errors import BhfastError, ConfigError
from bhfast.model import GPTConfig
from bhfast.ops import extension
from bhfast.recording.slots import RecordSlots
from bhfast.train import train
from bhfast.verify import verify

SETTINGS = {"steps": 23, "hidden_dim": 32, "context": 16, "batch_size": 2, "quiet": True}


class EagerGraphEngine(GraphEngine):
    """Replays by running the step again, with records counted as in a capture. Needs no CUDA."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._replay = self._again

    def _again(self) -> None:
        with self.training_run.recorder.counted_by(self.step):
            self._step()
        self._guard = StorageGuard(self.training_run, "")  # an eager backward allocates new gradients


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[SlowCopyStream]:
    return emulate(monkeypatch)


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[SlowCopyStream]:
    """Make ``--engine graph`` run on the CPU and record through a ring with a slow copy stream; return the streams."""
    streams: list[SlowCopyStream] = []

    def make_copy_stream(device: torch.device) -> SlowCopyStream:
        streams.append(SlowCopyStream(delay=0.002))
        return streams[-1]

    monkeypatch.setattr(graph, "GraphEngine", EagerGraphEngine)
    monkeypatch.setattr(graph, "capture", lambda work, device: work)
    monkeypatch.setattr(graph, "side_stream", lambda device: nullcontext())
    monkeypatch.setattr("bhfast.train.select_engine", lambda name, device, demands: (name, "as asked"))
    monkeypatch.setattr(RecordSlots, "_make_copy_stream", staticmethod(make_copy_stream))
    monkeypatch.setattr(RecordSlots, "_half_size", staticmethod(lambda *_: 4))
    return streams


def settings(tmp_path: Path, text: str, **changes) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, "corpus": text, "out": str(tmp_path / "t.safetensors"), **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"record_every": 3}, {"grad_accum": 3, "weight_decay": 0.1}, {"max_grad_norm": 0.1}], ids=str
)
def test_its_records_are_those_of_the_torch_engine(changes, emulated, tmp_path: Path, text: str) -> None:
    config = settings(tmp_path, text, device="cpu", **changes)
    reference = train(replace(config, engine="torch", out=str(tmp_path / "reference.safetensors")))
    result = train(replace(config, engine="graph"))
    assert_same_data(result.path, reference.path)
    assert torch.equal(result.losses, reference.losses)
    for p, q in zip(result.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(emulated) == 2  # one for each run
    assert all(stream.closed for stream in emulated)


@pytest.mark.parametrize("keyframes", [4, 7])
def test_its_compact_records_are_rebuilt(keyframes: int, emulated, tmp_path: Path, text: str) -> None:
    config = settings(tmp_path, text, device="cpu", max_grad_norm=0.1)
    full = train(replace(config, engine="torch", out=str(tmp_path / "full.safetensors")))
    compact = train(replace(config, engine="graph", keyframes=keyframes))
    assert_same(full.path, compact.path)
    assert verify(compact.path).status == 0


def test_it_counts_the_optimizers_steps(emulated, tmp_path: Path, text: str, monkeypatch) -> None:
    engines = []
    monkeypatch.setattr(
        EagerGraphEngine, "run", lambda self, n, run=GraphEngine.run: (engines.append(self), run(self, n))
    )
    train(settings(tmp_path, text, device="cpu", engine="graph"))
    steps = {state["step"].item() for state in engines[0].training_run.optimizer.state.values()}
    assert steps == {23.0}


def test_a_moved_parameter_is_an_error(emulated, tmp_path: Path, text: str, monkeypatch) -> None:
    def moving(self, steps):
        param = next(iter(self.training_run.model.parameters()))
        param.data = param.data.clone()
        GraphEngine.run(self, steps)

    monkeypatch.setattr(EagerGraphEngine, "run", moving)
    with pytest.raises(
        BhfastError,
        match="moved or replaced during the run, but the CUDA graph still uses the old one; use --engine torch",
    ):
        train(settings(tmp_path, text, device="cpu", engine="graph"))


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="engine graph cannot run here: a CUDA graph needs a CUDA device, not cpu; use"
    ):
        select_engine("graph", torch.device("cpu"))
    monkeypatch.setattr(extension, "backend", lambda device: ("torch", "the extension is not built"))
    with pytest.raises(
        ConfigError, match="a CUDA graph needs the CUDA kernels: the extension is not built; use --engine"
    ):
        select_engine("graph", torch.device("cuda"))
    assert select_engine("auto", torch.device("cuda")) == (
        "torch",
        "a CUDA graph needs the CUDA kernels: the extension is not built",
    )


def test_auto_takes_it_and_says_that_its_speed_is_not_measured(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """This goes when ``benchmarks/results`` has the figures of a GPU."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(extension, "backend", lambda device: ("CUDA", "compiled"))
    monkeypatch.setattr(
        extension, "native_unsupported", lambda hidden_dim, heads, mlp_dim: "odd" if hidden_dim % 32 else None
    )
    reason = "its speed is not measured yet; --device cpu --engine native may be faster"
    assert select_engine("auto", cuda) == ("graph", reason)
    assert select_engine("graph", cuda) == ("graph", "as asked")
    unfit = Demands(GPTConfig(hidden_dim=24, heads=2))
    assert select_engine("auto", cuda, unfit) == ("graph", "its speed is not measured yet")

    monkeypatch.setattr(doctor, "select_device", lambda name: (cuda, ""))
    assert doctor.main([]) == 0
    assert f"graph ({reason})" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("changes", [{}, {"steps": 400, "record_every": 3}, {"grad_accum": 3}], ids=str)
def test_on_a_gpu_it_records_what_the_torch_engine_does(changes, device, tmp_path, text, monkeypatch) -> None:
    """The same kernels in the same order give the same bits, and all of them replay on the CPU."""
    monkeypatch.setattr(RecordSlots, "_half_size", staticmethod(lambda *_: 4))  # the ring goes round many times
    config = settings(tmp_path, text, device="cuda", **changes)
    eager = train(replace(config, engine="torch", out=str(tmp_path / "eager.safetensors")))
    captured = train(replace(config, engine="graph"))
    assert_same_data(captured.path, eager.path)
    assert verify(captured.path).difference is None


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_on_a_gpu_recording_does_not_change_the_run(device, tmp_path: Path, text: str) -> None:
    config = settings(tmp_path, text, device="cuda", engine="graph", steps=300)
    on, off = train(config), train(replace(config, record_every=0))
    for p, q in zip(on.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(p, q)
