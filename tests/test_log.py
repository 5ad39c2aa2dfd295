"""What users log: to which step it belongs, and in which forms it may come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bhfast.errors import ConfigError
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace

STEPS = 6


class Loop:
    """A model, its optimizer, and a recorder that is open."""

    def __init__(self, path: Path, *, with_model: bool = True) -> None:
        torch.manual_seed(0)
        self.path = path
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        model = self.model if with_model else None
        self.recorder = Recorder(self.optimizer, {"w": self.model[0].weight}, model=model, steps=STEPS, path=path)
        self.recorder.start()

    def loss(self) -> Tensor:
        return self.model(torch.randn(5, 3)).square().mean()

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def recorded(self, name: str) -> Tensor:
        self.recorder.close()
        return open_trace(self.path)[name]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    loop = Loop(tmp_path / "t.safetensors")
    yield loop
    loop.recorder.close()


def test_after_a_step_it_is_of_that_step(loop: Loop) -> None:
    wanted = []
    loop.recorder.log(loss=-1.0)
    for _ in range(STEPS):
        loss = loop.loss()
        loop.step(loss)
        loop.recorder.log(loss=loss.item())
        wanted.append(loss.item())
    assert loop.recorded("loss").tolist() == [-1.0, *wanted]


def test_between_backward_and_step_it_is_of_the_step_to_come(loop: Loop) -> None:
    wanted = []
    for _ in range(STEPS):
        loss = loop.loss()
        loop.optimizer.zero_grad()
        loss.backward()
        loop.recorder.log(loss=loss)
        wanted.append(loss.item())
        loop.optimizer.step()
    recorded = loop.recorded("loss")
    assert recorded[0].isnan()
    assert recorded[1:].tolist() == wanted


def test_the_last_micro_batch_counts(loop: Loop) -> None:
    wanted = []
    for _ in range(STEPS):
        loop.optimizer.zero_grad()
        for micro_batch in range(3):
            loss = loop.loss()
            loss.backward()
            if micro_batch == 2:
                loop.optimizer.step()
            loop.recorder.log(loss=loss)
        wanted.append(loss.item())
    assert loop.recorded("loss")[1:].tolist() == wanted


def test_what_a_forward_hook_logs_is_of_the_step_it_leads_to(loop: Loop) -> None:
    activations, wanted = [], []

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        loop.recorder.log(hidden=output)
        activations.append(output.detach().clone())

    loop.model[1].register_forward_hook(keep)
    for _ in range(STEPS):
        loss = loop.loss()
        loop.step(loss)
        wanted.append(activations[-1])
        loop.model.eval()
        loop.recorder.log(validation=loss + 1)  # of the step that was done
        loop.model.train()
    assert torch.equal(loop.recorded("hidden")[1:], torch.stack(wanted))
    assert torch.equal(open_trace(loop.path)["validation"][1:].isnan(), torch.zeros(STEPS, dtype=torch.bool))


def test_without_the_model_a_step_can_be_begun(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "t", with_model=False)
    wanted = []
    for step in range(STEPS):
        loop.recorder.begin_step()
        loop.recorder.log(index=step + 1)
        loop.step(loop.loss())
        wanted.append(step + 1)
    assert loop.recorded("index").tolist() == [0, *wanted]


def test_a_skipped_step_overwrites_nothing(loop: Loop) -> None:
    """As a GradScaler skips one: backward() is not followed by a step."""
    wanted = []
    for step in range(STEPS + 2):
        loss = loop.loss()
        if step in (2, 4):
            loss.backward()
        else:
            loop.step(loss)
            wanted.append(loss.item())
        loop.recorder.log(loss=loss)
    assert loop.recorded("loss")[1:].tolist() == wanted


def test_numbers_arrays_and_mappings(loop: Loop) -> None:
    for step in range(1, STEPS + 1):
        loop.step(loop.loss())
        loop.recorder.log(
            {"a": {"b": step, "c": {"d": step / 3}}, "array": np.arange(3, dtype=np.float32) * step},
            flag=step % 2 == 0,
            whole=torch.tensor([step]),
            numpy=np.float16(step / 7),
        )
    assert loop.recorded("a.b").tolist() == list(range(STEPS + 1))
    trace = open_trace(loop.path)
    assert trace["a.c.d"].dtype == torch.float64
    assert trace["a.c.d"][1:].tolist() == [step / 3 for step in range(1, STEPS + 1)]
    assert trace["array"].dtype == torch.float32
    assert trace["array"][2].tolist() == [0, 2, 4]
    assert trace["flag"].tolist() == [step % 2 == 0 and step > 0 for step in range(STEPS + 1)]
    assert trace["whole"].shape == (STEPS + 1, 1)
    assert trace["numpy"].dtype == torch.float16


def test_a_number_takes_the_dtype_of_its_name(loop: Loop) -> None:
    loop.recorder.log(x=torch.tensor(0.5))
    loop.step(loop.loss())
    loop.recorder.log(x=2)
    loop.step(loop.loss())
    loop.recorder.log(x=0.25)
    assert loop.recorded("x").tolist() == [0.5, 2, 0.25]


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"log\(x=...\) must have one shape throughout: wanted \[2\], got \[3\]"),
        (torch.zeros(2), torch.zeros(2).half(), "one dtype throughout: wanted torch.float32, got torch.float16"),
        (1, 0.5, "must have one dtype throughout: wanted torch.int64, got torch.float64"),
        (1.0, [1.0, 2.0], r"must have one shape throughout: wanted \[\], got \[2\]"),
        (1.0, "high", r"log\(x=...\) takes tensors, numpy arrays, numbers and mappings of these, got str"),
        (1.0, None, r"log\(x=...\) takes tensors, numpy arrays, numbers and mappings of these, got NoneType"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_pending", [False, True])
def test_what_does_not_fit_is_an_error_at_that_call(first, then, message, is_pending, loop: Loop) -> None:
    loop.recorder.log(x=first)
    if is_pending:
        loop.loss().backward()
        loop.recorder.log(x=first)
    with pytest.raises(ConfigError, match=message):
        loop.recorder.log(x=then)
    with pytest.raises(ConfigError, match="must have a name of its own, but w is recorded already"):
        loop.recorder.log(w=0.0)
    loop.step(loop.loss())
    assert len(loop.recorded("x")) == 2


def test_steps_are_numbered_as_the_training_numbers_them(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for storage in ("memory", "stream"):
        path = tmp_path / storage
        with Recorder(
            optimizer, {"w": weight}, steps=8, every=2, start_step=100, storage=storage, path=path
        ) as recorder:
            for _ in range(5):
                weight.sum().backward()
                optimizer.step()
        assert open_trace(path).steps.tolist() == [100, 102, 104]
        assert recorder.saved_steps == 4
    with pytest.raises(ConfigError, match="start_step must be at least 0, got -1"):
        Recorder(optimizer, {"w": weight}, steps=8, start_step=-1, path=tmp_path / "bad")
