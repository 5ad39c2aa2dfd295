"""Steps that a ``torch.amp.GradScaler`` performs: whether it skips them, and the loss scale of the gradients.

A scaler has no hooks. So while a recorder is open, ``GradScaler.step`` is replaced by a function that tells the
optimizer's recorder about the step, and otherwise does the same as the original.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from bhfast.recording.fields import unwrapped
from bhfast.recording.replaced_method import ReplacedMethod

ScaledStep = Callable[[GradScaler, Callable[[], Any]], Any]


@wraps(GradScaler.step)
def _step(self: GradScaler, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
    def proceed() -> Any:
        return _method.original(self, optimizer, *args, **kwargs)

    for own, listener in _method.listeners:
        if own is unwrapped(optimizer):
            proceed = partial(listener, self, proceed)
    return proceed()


_method: ReplacedMethod[tuple[torch.optim.Optimizer, ScaledStep]] = ReplacedMethod(GradScaler, "step", _step)


def scaled_steps(optimizer: torch.optim.Optimizer, listener: ScaledStep) -> AbstractContextManager[None]:
    """Inside the block, call ``listener(scaler, proceed)`` in place of each ``scaler.step(optimizer)``.

    Args:
        optimizer: without wrappers. Several recorders may listen to the same one.
        listener: must call ``proceed()``, and return its result.
    """
    return _method.heard_by((optimizer, listener))


def unscaled(grad: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Return a gradient without its loss scale, as ``GradScaler.unscale_`` computes it.

    Args:
        grad: floating point ``[...]``.
        scale: float32 scalar. Its reciprocal is rounded to float32 once, and the product to the gradient's dtype.

    Returns:
        A tensor of the gradient's shape and dtype.
    """
    inverse = torch.as_tensor(scale, device=grad.device).double().reciprocal().float()
    return (grad.float() * inverse).to(grad.dtype) if grad.dtype != torch.float64 else grad * inverse
