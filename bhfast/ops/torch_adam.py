"""torch's own Adam on this CPU: whether it has the bits of our arithmetic, and its fused kernel."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from bhfast.ops import arithmetic

FUSED = "torch-fused"  # the arithmetic of torch's fused kernel, which is not one of arithmetic.ROUNDINGS
FUSED_BLOCK = 64  # elements: a multiple of what the kernel takes at once; only those after the last block are the tail


@cache
def foreach_rounds_per_op(dtype: torch.dtype) -> bool:
    """Return whether ``torch.optim.AdamW(foreach=True)`` on this CPU has the bits of per-op Adam, by trying.

    It runs a few steps on two tensors, each with a vectorized part and a tail, down to values where eps matters.
    """
    generator = torch.Generator().manual_seed(0)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for size in (4099, 37):
        scale = torch.logspace(0, -10, size)
        param, exp_avg, root = ((torch.randn(size, generator=generator) * scale).to(dtype) for _ in range(3))
        state = [param, exp_avg, root.square()]
        stepped = torch.nn.Parameter(param.clone())
        optimizer = torch.optim.AdamW([stepped], lr=1e-3, foreach=True, **settings)  # type: ignore[arg-type]
        own = {"step": torch.tensor(6.0), "exp_avg": state[1].clone(), "exp_avg_sq": state[2].clone()}
        optimizer.state[stepped] = own
        for step in (7, 8):
            stepped.grad = (torch.randn(size, generator=generator) * scale).to(dtype)
            optimizer.step()
            coefficients = arithmetic.adam_coefficients([step], [1e-3], **settings)  # type: ignore[arg-type]
            state = list(arithmetic.adam(state[0], stepped.grad, state[1], state[2], coefficients, "per-op"))
            if not all(map(torch.equal, (stepped.detach(), own["exp_avg"], own["exp_avg_sq"]), state)):
                return False
    return True


def fused_kernel() -> str:
    """Name the fused kernel of this torch on this CPU: its bits may differ from those of any other."""
    return f"torch {torch.__version__} on {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def fused_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    steps: Sequence[int],
    lrs: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    is_whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return param, exp_avg and exp_avg_sq after one step of ``torch.optim.AdamW(fused=True)`` from each of n states.

    Without weight decay these are also the bits of ``Adam(fused=True)``.

    Args:
        param, grad, exp_avg, exp_avg_sq: ``[n, ...]``, one dtype, on the CPU; none is written to.
        steps: for each state, the number of the step, counted from 1.
        lrs: for each state, the learning rate.
        betas, eps, weight_decay: see ``torch.optim.AdamW``.
        is_whole: whether ``[...]`` is the whole parameter. The kernel computes the elements after the last block
            differently. If False, ``[...]`` is part of a parameter without such elements: its size is a multiple of
            ``FUSED_BLOCK``.

    Returns:
        Three new tensors ``[n, ...]``.
    """
    size = math.prod(param.shape[1:])
    rest = 0 if is_whole else -size % FUSED_BLOCK
    state = [torch.nn.functional.pad(x.reshape(len(x), size), (0, rest)) for x in (param, exp_avg, exp_avg_sq)]
    state = [x.clone() for x in state]  # a padding of nothing copies nothing
    for i, (step, lr) in enumerate(zip(steps, lrs, strict=True)):
        torch._fused_adamw_(
            [state[0][i]],
            [torch.nn.functional.pad(grad[i].flatten(), (0, rest))],
            [state[1][i]],
            [state[2][i]],
            [],
            [torch.tensor(float(step))],
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
    p, m, v = (x[:, :size].reshape(param.shape) for x in state)
    return p, m, v
