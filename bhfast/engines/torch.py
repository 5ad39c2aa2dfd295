"""The torch engine: eager autograd, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from bhfast.model import TiedGPT, window_loss


class TorchEngine:
    """See :class:`bhfast.engines.Engine`. With gradient accumulation the first micro-batch's logits are returned."""

    name = "torch"

    def __init__(self, model: TiedGPT, optimizer: torch.optim.Optimizer, corpus: Tensor, *, target_offset: int) -> None:
        device = model.wte.weight.device
        self.model = model
        self.params = list(model.parameters())
        self.optimizer = optimizer
        self.windows = corpus.to(device, torch.int64).unfold(0, model.config.context + 1, 1)  # [starts, T + 1], a view
        self.target_offset = target_offset

    def step(self, offsets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for param in self.params:
            param.grad = None
        share = torch.full((), 1 / len(offsets), device=self.windows.device)
        losses, logits = zip(*(self._backward(batch, share) for batch in offsets), strict=True)
        self.optimizer.step()
        return torch.stack(losses).mean(), logits[0]

    def _backward(self, offsets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.windows[offsets.to(self.windows.device)]  # [B, T + 1]
        logits = self.model(windows[:, :-1])  # [B, T, V]
        loss = window_loss(logits, windows, self.target_offset)
        loss.backward(share)
        return loss.detach(), logits[0, -1].detach()
