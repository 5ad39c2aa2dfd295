"""The resident engine on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import require
from test_native import make_run, state_of
from test_ops import same_bits

from bhfast.config import TrainConfig
from bhfast.engines.base import TrainingRun
from bhfast.engines.resident import BLOCKS, ResidentEngine, default_blocks
from bhfast.optim import FusedAdam
from bhfast.train import train
from bhfast.verify import verify


@pytest.fixture(autouse=True)
def gpu() -> torch.device:
    return require("cuda")


def on(device: torch.device, run: TrainingRun) -> TrainingRun:
    model = run.model.to(device)
    optimizer = FusedAdam(model.parameters(), lr=1e-3, weight_decay=0.0, max_grad_norm=1.0)
    return TrainingRun(**{**vars(run), "model": model, "optimizer": optimizer})


@pytest.mark.parametrize("shape", [{}, {"context": 7, "batch": 3, "heads": 1, "vocab_size": 97}], ids=str)
def test_blocks_and_memory_change_no_bits(shape: dict[str, int], gpu: torch.device) -> None:
    most = default_blocks(on(gpu, make_run()))  # 1 on GPUs without clusters
    engines = [
        ResidentEngine(on(gpu, make_run(steps=20, **shape)), blocks=blocks, shared_bytes=shared_bytes)
        for blocks in BLOCKS
        if blocks <= most
        for shared_bytes in (None, 48 << 10)
    ]
    for engine in engines:
        engine.run(15)
        engine.run(5)
    first, *others = map(state_of, engines)
    assert first[-2].isfinite().all()
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def test_its_trace_proves_itself_and_its_loss_is_that_of_torch(text: str, tmp_path: Path) -> None:
    config = {"steps": 300, "sigma": 0.02, "lr": 3e-4, "corpus": text, "device": "cuda", "quiet": True}
    result = train(TrainConfig(engine="resident", out=str(tmp_path / "t.safetensors"), **config))
    verification = verify(result.path)
    assert verification.difference is None, verification
    eager = train(TrainConfig(engine="torch", record_every=0, **config))
    assert result.losses.mean().item() == pytest.approx(eager.losses.mean().item(), abs=1e-3)
