"""Several optimizers in one recorder, and several recorders of one optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bhfast.errors import RecordingWarning
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.verify import verify


def test_unclipped_gradients_of_an_optimizer_whose_backward_pass_comes_after_the_step_of_another(
    tmp_path: Path,
) -> None:
    """At every other step."""
    torch.manual_seed(0)
    nets = nn.ModuleDict({"critic": nn.Linear(4, 1), "generator": nn.Linear(4, 4)})
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets.values()]
    raw: dict[str, list[Tensor]] = {"critic": [], "generator": []}
    with Recorder(optimizers, "*.weight", model=nets, unclipped=True, every=2, steps=6, path=tmp_path / "t"):
        for _ in range(6):
            made = nets["generator"](torch.randn(3, 4))
            for (name, net), optimizer, source in zip(nets.items(), optimizers, (made.detach(), made), strict=True):
                optimizer.zero_grad()
                nets["critic"](source).square().sum().backward()
                raw[name].append(net.weight.grad.clone())
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                optimizer.step()
    trace = open_trace(tmp_path / "t")
    for name, gradients in raw.items():
        assert f"{name}.weight.has_grad" not in trace
        assert torch.equal(trace[f"{name}.weight.grad"][1:], torch.stack(gradients[1::2])), name


def test_a_step_that_a_scaler_skips_is_seen_by_every_recorder_of_the_optimizer(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with (
        Recorder(optimizer, {"w": model.weight}, steps=3, path=tmp_path / "1"),
        Recorder(optimizer, {"w": model.weight}, steps=3, path=tmp_path / "2"),
    ):
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((2, 4), torch.inf if step == 1 else 1.0)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    for name in ("1", "2"):
        trace = open_trace(tmp_path / name)
        assert trace.steps.tolist() == [0, 1, 2, 3]
        assert trace["skipped"][1:].tolist() == [False, True, False]


def two_layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3)]).bfloat16()


def backward(layers: nn.ModuleList, scale: float = 1.0) -> None:
    (layers[1](layers[0](torch.randn(5, 4).bfloat16())).float().square().sum() * scale).backward()


def test_each_optimizer_has_its_own_clipping(tmp_path: Path) -> None:
    layers = two_layers()
    optimizers = [
        FusedAdam(layers[0].parameters(), lr=0.01, max_grad_norm=0.5),
        FusedAdam(layers[1].parameters(), lr=0.02, max_grad_norm=3.0),
    ]
    coefs, norms = [], []
    with Recorder(optimizers, "*", model=layers, steps=4, path=tmp_path / "t"):
        for _ in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            backward(layers)
            for optimizer in optimizers:
                optimizer.step()
            coefs.append(torch.stack([optimizer.clip_coef for optimizer in optimizers]))
            norms.append(torch.stack([optimizer.grad_norm for optimizer in optimizers]))
    trace = open_trace(tmp_path / "t")
    assert torch.equal(trace["clip_coefs"][1:], torch.stack(coefs))
    assert torch.equal(trace["grad_norms"][1:], torch.stack(norms))
    assert not torch.equal(trace["clip_coefs"][1:, 0], trace["clip_coefs"][1:, 1])
    assert (verify(tmp_path / "t").replayed, verify(tmp_path / "t").difference) == (4, None)


def test_only_one_of_two_is_clipped_or_steps(tmp_path: Path) -> None:
    layers = two_layers()
    clipped = FusedAdam(layers[0].parameters(), lr=0.01, max_grad_norm=0.5)
    plain = FusedAdam(layers[1].parameters(), lr=0.01)
    path = tmp_path / "both"
    with Recorder([clipped, plain], "*", model=layers, steps=3, path=path):
        for _ in range(3):
            backward(layers)
            clipped.step()
            plain.step()
    trace = open_trace(path)
    assert trace["clip_coefs"][1:, 1].tolist() == [1.0] * 3
    assert trace["grad_norms"][1:, 1].isnan().all()
    assert verify(path).replayed == 3
    path = tmp_path / "one"
    with pytest.warns(RecordingWarning, match="FusedAdam did no step at step 2"):
        with Recorder([clipped, plain], "*", model=layers, steps=3, path=path):
            for step in range(1, 4):
                backward(layers)
                if step != 2:
                    clipped.step()
                plain.step()
    trace = open_trace(path)
    assert trace["clip_coefs"][:, 0].isnan().tolist() == [True, False, True, False]
    assert trace["0.weight.has_grad"].tolist() == [False, True, False, True]
    assert torch.equal(trace["0.weight"][2], trace["0.weight"][1])


def test_only_one_of_two_is_skipped(tmp_path: Path) -> None:
    nets = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with Recorder(optimizers, "*.weight", model=nets, steps=3, path=tmp_path / "t"):
        for step in range(1, 4):
            for i, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                optimizer.zero_grad()
                value = torch.inf if step == 2 and i == 0 else 1.0
                scaler.scale(net(torch.full((2, 4), value)).sum()).backward()
                scaler.step(optimizer)
            scaler.update()
    trace = open_trace(tmp_path / "t")
    assert trace["skipped"].tolist() == [[False, False], [False, False], [True, False], [False, False]]
    assert torch.equal(trace["0.weight"][2], trace["0.weight"][1])
    assert not torch.equal(trace["1.weight"][2], trace["1.weight"][1])
