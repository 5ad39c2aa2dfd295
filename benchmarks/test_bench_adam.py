"""One optimizer step with clipping and recording: fused, against torch's AdamW with clipping and copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from conftest import need_cuda, race
from torch import Tensor

from bhfast import FusedAdam
from bhfast.model import GPTConfig, build_model
from bhfast.recording.recorder import FIELDS
from bhfast.start import Start

# name: shapes of the parameters, of which the first is recorded; slots of a record; steps in a row; rounds
CASES = {
    "the reference model's 28 tensors": (None, 500, 200, 31),
    "one of 10,000 x 64": ([(10_000, 64)], 50, 50, 21),
    "one of 4096 x 4096": ([(4096, 4096)], 3, 3, 9),
}
TORCH = {
    "AdamW": {"foreach": False, "fused": False},
    "AdamW(foreach=True)": {"foreach": True},
    "AdamW(fused=True)": {"fused": True},
}


def parameters(shapes: list[tuple[int, ...]] | None, device: str) -> list[Tensor]:
    """Return new parameters in bfloat16, with gradients."""
    generator = torch.Generator().manual_seed(0)
    if shapes is None:
        model, _ = build_model(GPTConfig(), Start(sigma=0.0), seed=42, device=device)
        params = list(model.parameters())
    else:
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(device)) for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 0.01).bfloat16().to(device)
    return params


def repeated(step: Callable[[], None], steps: int, device: str) -> Callable[[], float]:
    """Return a function that runs ``steps`` steps and returns the steps per second."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return steps / (time.perf_counter() - start)

    return run


def fused(shapes: list[tuple[int, ...]] | None, rings: dict[str, Tensor], device: str) -> Callable[[], None]:
    params = parameters(shapes, device)
    optimizer = FusedAdam(params, weight_decay=0.0, max_grad_norm=1.0)
    counter = torch.zeros((), dtype=torch.int64)
    optimizer.record_into({params[0]: rings}, counter, 1)

    def step() -> None:
        counter.add_(1)
        optimizer.step()

    return step


def copying(
    shapes: list[tuple[int, ...]] | None, rings: dict[str, Tensor], device: str, options: dict[str, bool]
) -> Callable[[], None]:
    params = parameters(shapes, device)
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0, **options)
    recorded, count = params[0], 0

    def step() -> None:
        nonlocal count
        count += 1
        slot = count % len(rings["grad"])
        rings["grad"][slot].copy_(recorded.grad)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        state = optimizer.state[recorded]
        rings["param"][slot].copy_(recorded.detach())
        rings["exp_avg"][slot].copy_(state["exp_avg"])
        rings["exp_avg_sq"][slot].copy_(state["exp_avg_sq"])

    return step


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_adam_with_recording(case: str, device: str, benchmark) -> None:
    if device == "cuda":
        need_cuda()
    shapes, slots, steps, rounds = CASES[case]
    shape = parameters(shapes, device)[0].shape
    rings = {field: torch.zeros(slots, *shape, dtype=torch.bfloat16, device=device) for field in FIELDS}
    contestants = {"FusedAdam, recording": repeated(fused(shapes, rings, device), steps, device)}
    for name, options in TORCH.items():
        contestants[f"{name}, copying"] = repeated(copying(shapes, rings, device, options), steps, device)
    race(f"Adam on {device}, {case}", benchmark, rounds, contestants)
