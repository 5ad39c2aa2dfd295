"""Several optimizers in one recorder, and several recorders of one optimizer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace


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
