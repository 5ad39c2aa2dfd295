"""Optimizers of other packages, where they are installed: what is recorded is what a plain copy holds, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.verify import verify

STEPS = 4


def lion(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return pytest.importorskip("lion_pytorch").Lion(params, lr=1e-2, weight_decay=0.1)


def schedule_free(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=1e-2, warmup_steps=2)
    optimizer.train()
    return optimizer


def eight_bit(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=1e-2, min_8bit_size=1)


def galore(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    package = pytest.importorskip("galore_torch")
    return package.GaLoreAdamW([{"params": params, "rank": 2, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}])


@pytest.mark.parametrize("make", [lion, schedule_free, eight_bit, galore], ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")  # of these packages
def test_the_record_is_what_the_loop_has(make: Callable[..., torch.optim.Optimizer], tmp_path: Path) -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(64, 64))
    optimizer = make([param])
    wanted = []
    with Recorder(optimizer, {"w": param}, steps=STEPS, path=tmp_path / "t") as recorder:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (param @ torch.randn(64, 8)).square().mean().backward()
            grad = param.grad.clone()
            optimizer.step()
            state = {
                k: v.clone() for k, v in optimizer.state[param].items() if isinstance(v, torch.Tensor) and k != "step"
            }
            wanted.append({"w": param.detach().clone(), "w.grad": grad} | {f"w.{k}": v for k, v in state.items()})
            recorder.log(loss=grad.sum())
    trace = open_trace(tmp_path / "t")
    assert wanted[0].keys() - {"w", "w.grad"}, "it has state"
    for step, values in enumerate(wanted, start=1):
        for name, value in values.items():
            assert torch.equal(trace[name][step].view(torch.uint8), value.view(torch.uint8)), (name, step)
    assert verify(tmp_path / "t").status == 2
