"""The torch engine: eager autograd on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bhfast.engines.base import HIDDEN, TrainingRun
from bhfast.model import window_loss
from bhfast.ops import kernels
from bhfast.optim import FusedAdam


def corpus_windows(run: TrainingRun) -> Tensor:
    """Return a view of all windows of the corpus: ``[starts, context + 1]``, on the model's device."""
    return run.corpus.to(run.model.wte.weight.device).unfold(0, run.model.config.context + 1, 1)


def gradients(run: TrainingRun, windows: Tensor) -> dict[str, Tensor]:
    """Set each parameter's gradient to that of the mean loss over all windows.

    Args:
        run: the run.
        windows: ``[grad_accum, batch, context + 1]``. Forward and backward run one micro-batch at a time.

    Returns:
        What to log: ``losses``, the mean loss, a float32 scalar; ``logits``, those of the first sequence's last
        position, ``[V]``; and what ``run.hidden`` asks for.
    """
    model = run.model
    for param in model.parameters():
        param.grad = None
    share = torch.full((), 1 / len(windows), device=windows.device)
    losses, last_logits, hidden = [], [], []
    for batch in windows.long():
        states = model.hidden(batch[:, :-1])  # [B * T, D]
        logits = model.logits(states, len(batch))
        loss = window_loss(logits, batch, run.target_offset)
        loss.backward(share)
        losses.append(loss.detach())
        last_logits.append(logits[0, -1].detach())
        hidden.append(states.detach())
    if run.frozen is not None:
        assert model.wte.weight.grad is not None
        model.wte.weight.grad.masked_fill_(run.frozen[:, None], 0)
    return {"losses": torch.stack(losses).mean(), "logits": last_logits[0], **_hidden_statistics(hidden, run.hidden)}


def _hidden_statistics(states: Sequence[Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    if not wanted:
        return {}
    var, mean = torch.var_mean(torch.cat(list(states)).float(), dim=0, correction=0)
    found = {"mean": mean, "var": var}
    return {HIDDEN[name]: found[name] for name in wanted}


class TorchEngine:
    """See :class:`bhfast.engines.base.Engine`."""

    def __init__(self, run: TrainingRun) -> None:
        self.training_run = run
        self.windows = corpus_windows(run)
        self.offsets = run.offsets.to(self.windows.device)
        self.lrs = torch.tensor(run.lrs, dtype=torch.float64)
        self.losses, self.grad_norms = torch.empty(2, len(run.lrs), device=self.windows.device).unbind()
        self.done = run.start

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """Run and record one training step."""
        run, lr = self.training_run, self.training_run.lrs[self.done]
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        logged = gradients(run, self.windows[self.offsets[self.done]])
        norm, clip_coef = self._update()
        run.recorder.log(**logged, learning_rates=self.lrs[self.done], clip_coefs=clip_coef, grad_norms=norm)
        self.losses[self.done] = logged["losses"]
        self.grad_norms[self.done] = norm
        self.done += 1
        if run.thermal is not None:
            run.thermal.apply(self.done)

    def _update(self) -> tuple[Tensor, Tensor]:
        """Clip and step; return the gradients' norm before clipping, and the coefficient applied: float32 scalars."""
        run = self.training_run
        if isinstance(run.optimizer, FusedAdam):
            run.optimizer.step()
            return run.optimizer.grad_norm, run.optimizer.clip_coef
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norm, clip_coef = kernels.clip_coefficient(grads, torch.inf if run.max_grad_norm is None else run.max_grad_norm)
        torch._foreach_mul_(grads, clip_coef.to(grads[0].dtype))
        run.optimizer.step()
        return norm, clip_coef
