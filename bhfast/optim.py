"""FusedAdam: AdamW with clipping inside, bit-exact by specification, a drop-in for ``torch.optim.AdamW``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bhfast import _ops
from bhfast.errors import ConfigError

DTYPES = (torch.bfloat16, torch.float32)

_Kind = tuple[torch.dtype, torch.device, int]  # parameters of one dtype, device and step are updated as one


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose arithmetic is specified to the bit (see :mod:`bhfast._ops`), all parameters in one pass.

    ``state_dict`` is interchangeable with ``torch.optim.AdamW``'s in both directions, with ``exp_avg`` and
    ``exp_avg_sq`` in the parameter's dtype. (Loading float32 moments for bfloat16 parameters rounds them:
    ``torch.optim.Optimizer.load_state_dict`` casts.) Learning-rate schedulers and parameter groups work as in torch.
    bfloat16 needs no loss scaling, so ``torch.amp.GradScaler`` is not supported.

    Gradients are never written to: clipping happens on each value on its way into Adam. After ``step()``,
    ``grad_norm`` and ``clip_coef`` hold the global gradient norm before clipping and the coefficient applied, as
    float32 scalars; NaN if ``max_grad_norm`` is None.

    Args:
        params: parameters or parameter groups; bfloat16 or float32, dense.
        lr: learning rate.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled, as in AdamW.
        rounding: ``"per-op"`` (every operation rounds, as torch's unfused AdamW does) or ``"opmath"`` (float32 inside).
        max_grad_norm: clip the global gradient norm, over all groups, to this. None: no clipping, no norm.

    Raises:
        ConfigError: a hyperparameter is out of range, or a loaded state asks for ``amsgrad`` or ``maximize``.
        TypeError: a parameter is neither bfloat16 nor float32, or a gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: str = "per-op",
        max_grad_norm: float | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be finite and at least 0, got {value!r}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ConfigError(f"betas[{i}] must be in [0, 1), got {beta!r}")
        if rounding not in _ops.ROUNDINGS:
            raise ConfigError(f"rounding must be one of {', '.join(_ops.ROUNDINGS)}, got {rounding!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be above 0, or None for no clipping, got {max_grad_norm!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rounding = rounding
        self.max_grad_norm = max_grad_norm
        self.grad_norm = torch.tensor(math.nan)
        self.clip_coef = torch.tensor(math.nan)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in DTYPES:
                raise TypeError(f"FusedAdam takes bfloat16 and float32 parameters, got {param.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, group in enumerate(state_dict["param_groups"]):
            for flag in ("amsgrad", "maximize"):
                if group.get(flag):
                    raise ConfigError(f"FusedAdam has no {flag}, but param_groups[{i}] of the loaded state sets it")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step; return the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grads = _gradients(p for group in self.param_groups for p in group["params"])
        if not grads:
            return loss
        if any(grad.is_sparse for grad in grads):
            raise TypeError("FusedAdam takes dense gradients, got a sparse one: build the embedding with sparse=False")
        if self.max_grad_norm is not None:
            # One coefficient for all: rounded to bfloat16 as soon as one gradient is.
            dtype = torch.bfloat16 if any(g.dtype == torch.bfloat16 for g in grads) else torch.float32
            self.grad_norm = _ops.grad_norm(grads)
            self.clip_coef = _ops.clip_coefficient(self.grad_norm, self.max_grad_norm, dtype).float()

        for group in self.param_groups:
            for (dtype, device, step), (params, states) in self._advance(group).items():
                coefficients = _ops.adam_coefficients(
                    [step],
                    [group["lr"]],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    device=_ops.exact_device(device),
                )
                _ops.adam_(
                    params,
                    _gradients(params),
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    coefficients,
                    None if self.max_grad_norm is None else self.clip_coef.to(dtype),
                    self.rounding,
                )
        return loss

    def _advance(self, group: dict[str, Any]) -> dict[_Kind, tuple[list[Tensor], list[dict[str, Tensor]]]]:
        """Add 1 to the step of each parameter with a gradient; return those that are updated as one, with states."""
        params = [p for p in group["params"] if p.grad is not None]
        self._allocate([p for p in params if not self.state[p]])
        states = [self.state[p] for p in params]
        steps = [state["step"] for state in states]
        row = _ops.row_view(steps) if steps else None
        if row is None:
            torch._foreach_add_(steps, 1)
        else:
            row += 1
        buckets: dict[_Kind, tuple[list[Tensor], list[dict[str, Tensor]]]] = defaultdict(lambda: ([], []))
        for p, state, step in zip(params, states, steps, strict=True):
            alike = buckets[p.dtype, p.device, int(step.item())]
            alike[0].append(p)
            alike[1].append(state)
        return buckets

    def _allocate(self, params: list[Tensor]) -> None:
        """Set up the state of new parameters, side by side in memory, which saves copies and calls at every step."""
        kinds = defaultdict(list)
        for p in params:
            kinds[p.dtype, p.device].append(p)
        for (dtype, device), alike in kinds.items():
            moments = torch.zeros(2, sum(p.numel() for p in alike), dtype=dtype, device=device)
            exp_avgs, exp_avg_sqs = (torch._utils._unflatten_dense_tensors(row, alike) for row in moments)
            steps = torch.zeros(len(alike)).unbind()
            for p, step, exp_avg, exp_avg_sq in zip(alike, steps, exp_avgs, exp_avg_sqs, strict=True):
                self.state[p].update(step=step, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of those parameters that have one."""
    return [grad for grad in (p.grad for p in params) if grad is not None]
