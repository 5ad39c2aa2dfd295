"""Modules and a trainer of Lightning, which takes seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from bhfast.lightning import RecorderCallback as RecorderCallback


class Regression(lightning.LightningModule):
    """A linear model; keeps the losses it has returned, and what became of its weight."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, lr: float = 1e-2, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.optimizer, self.lr, self.fails_at = optimizer, lr, fails_at
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.weights: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        if batch_idx == self.fails_at:
            raise RuntimeError("the module's own")
        loss = (self.net(batch[:, :4]) - batch[:, 4:]).square().sum(1).mean()
        self.losses.append(loss.detach().clone())
        return {"loss": loss}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # before clipping
        self.gradients.append(self.net.weight.grad.clone())

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.weights.append(self.net.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=self.lr)


class Adversaries(lightning.LightningModule):
    """Two optimizers under manual optimization; the second one completes a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(4, 3), nn.Linear(3, 1)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        critic, generator = self.optimizers()
        made = self.generator(batch[:, :4])
        critic.zero_grad()
        self.manual_backward((self.critic(made.detach()) - self.critic(batch[:, 4:])).mean())
        critic.step()
        generator.zero_grad()
        loss = -self.critic(made).mean()
        self.manual_backward(loss)
        generator.step()
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.critic.parameters(), lr=0.1), torch.optim.AdamW(self.generator.parameters())]


def batches(size: int = 2, count: int = 24, rank: int = 0, world: int = 1) -> Any:
    """Of small integers: few steps of a linear model by them are exact in float32, in any order of summation."""
    data = torch.randint(-1, 2, (count, 7), generator=torch.Generator().manual_seed(1)).float()[rank::world]
    return torch.utils.data.DataLoader(data, batch_size=size)


def make_trainer(folder: Path, *callbacks: Any, **arguments: Any) -> Any:
    settings = {
        "max_steps": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**settings, **arguments})
