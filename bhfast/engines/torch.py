"""The torch engine: eager autograd, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from bhfast.engines.job import Job
from bhfast.model import TiedGPT, window_loss


def corpus_windows(job: Job) -> Tensor:
    """Return a view of all windows of the corpus: int64 ``[starts, context + 1]``, on the model's device."""
    device = job.model.wte.weight.device
    return job.corpus.to(device, torch.int64).unfold(0, job.model.config.context + 1, 1)


def gradients(model: TiedGPT, windows: Tensor, target_offset: int) -> tuple[Tensor, Tensor]:
    """Set each parameter's gradient to that of the mean loss over all windows.

    Args:
        windows: ``[grad_accum, batch, context + 1]``; a micro-batch at a time is run forward and backward.

    Returns:
        The mean loss, a float32 scalar, and the logits of the first sequence's last position, ``[V]`` bfloat16; both
        before the update.
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
    """See :class:`bhfast.engines.job.Engine`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.windows = corpus_windows(job)
        self.offsets = job.offsets.to(self.windows.device)
        self.lrs = torch.tensor(job.lrs, dtype=torch.float64)
        self.losses, self.grad_norms = torch.empty(2, len(job.lrs), device=self.windows.device).unbind()
        self.done = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """Run and record one training step."""
        job, lr = self.job, self.job.lrs[self.done]
        for group in job.optimizer.param_groups:
            group["lr"] = lr
        loss, logits = gradients(job.model, self.windows[self.offsets[self.done]], job.target_offset)
        job.optimizer.step()
        norm = job.optimizer.grad_norm
        job.recorder.log(
            losses=loss,
            logits=logits,
            learning_rates=self.lrs[self.done],
            clip_coefs=job.optimizer.clip_coef,
            grad_norms=norm,
        )
        self.losses[self.done] = loss
        self.grad_norms[self.done] = norm
        self.done += 1
