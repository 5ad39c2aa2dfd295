"""The torch engine: eager autograd on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from bhfast.engines.base import TrainingRun
from bhfast.model import TiedGPT, window_loss


def corpus_windows(run: TrainingRun) -> Tensor:
    """Return a view of all windows of the corpus: int64 ``[starts, context + 1]``, on the model's device."""
    device = run.model.wte.weight.device
    return run.corpus.to(device, torch.int64).unfold(0, run.model.config.context + 1, 1)


def gradients(model: TiedGPT, windows: Tensor, target_offset: int) -> tuple[Tensor, Tensor]:
    """Set each parameter's gradient to that of the mean loss over all windows.

    Args:
        model: the network.
        windows: int64 ``[grad_accum, batch, context + 1]``. Forward and backward run one micro-batch at a time.
        target_offset: see :func:`bhfast.model.window_loss`.

    Returns:
        The mean loss, a float32 scalar, and the logits of the first sequence's last position, ``[V]`` bfloat16.
    """
    for param in model.parameters():
        param.grad = None
    share = torch.full((), 1 / len(windows), device=windows.device)
    losses, last_logits = [], []
    for batch in windows:
        logits = model(batch[:, :-1])  # [B, T, V]
        loss = window_loss(logits, batch, target_offset)
        loss.backward(share)
        losses.append(loss.detach())
        last_logits.append(logits[0, -1].detach())
    return torch.stack(losses).mean(), last_logits[0]


class TorchEngine:
    """See :class:`bhfast.engines.base.Engine`."""

    def __init__(self, run: TrainingRun) -> None:
        self.training_run = run
        self.windows = corpus_windows(run)
        self.offsets = run.offsets.to(self.windows.device)
        self.lrs = torch.tensor(run.lrs, dtype=torch.float64)
        self.losses, self.grad_norms = torch.empty(2, len(run.lrs), device=self.windows.device).unbind()
        self.done = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """Run and record one training step."""
        run, lr = self.training_run, self.training_run.lrs[self.done]
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss, logits = gradients(run.model, self.windows[self.offsets[self.done]], run.target_offset)
        run.optimizer.step()
        norm = run.optimizer.grad_norm
        run.recorder.log(
            losses=loss,
            logits=logits,
            learning_rates=self.lrs[self.done],
            clip_coefs=run.optimizer.clip_coef,
            grad_norms=norm,
        )
        self.losses[self.done] = loss
        self.grad_norms[self.done] = norm
        self.done += 1
