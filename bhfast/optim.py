"""FusedAdam: a drop-in for ``torch.optim.AdamW`` with built-in clipping, specified to the bit."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from operator import is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bhfast.errors import BhfastError, ConfigError
from bhfast.ops import arithmetic, checks, extension, kernels

DTYPES = (torch.bfloat16, torch.float32)
ALIGNMENT = 16  # bytes; kAccessBytes in csrc/cuda/launch.h


class FusedAdam(torch.optim.Optimizer):
    """AdamW specified to the bit, see :func:`bhfast.ops.arithmetic.adam`; updates all parameters in one pass.

    ``state_dict`` is interchangeable with ``torch.optim.AdamW``'s in both directions, with ``exp_avg`` and
    ``exp_avg_sq`` in the parameter's dtype. (Loading float32 moments for bfloat16 parameters rounds them:
    ``torch.optim.Optimizer.load_state_dict`` casts.) Learning-rate schedulers and parameter groups work as in torch.
    bfloat16 needs no loss scaling, so ``torch.amp.GradScaler`` is not supported.

    Gradients are never modified: Adam clips each value as it reads it. After ``step()``, ``grad_norm`` and
    ``clip_coef`` hold the global gradient norm before clipping and the coefficient applied, as float32 scalars; NaN if
    ``max_grad_norm`` is None.

    Args:
        params: parameters or parameter groups; bfloat16 or float32, dense.
        lr: learning rate.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled, as in AdamW.
        rounding: ``"per-op"`` (every operation rounds, as torch's unfused AdamW does) or ``"opmath"`` (float32 inside).
        max_grad_norm: clip the global gradient norm, over all groups, to this. None: no clipping, and no norm.

    Raises:
        ConfigError: a hyperparameter is out of range, or a loaded state asks for ``amsgrad`` or ``maximize``.
        TypeError: a parameter is neither bfloat16 nor float32, or a DTensor, or a gradient is sparse.
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
        if rounding not in arithmetic.ROUNDINGS:
            raise ConfigError(f"rounding must be one of {', '.join(arithmetic.ROUNDINGS)}, got {rounding!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be above 0, or None for no clipping, got {max_grad_norm!r}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        extension.warn_if_missing()
        self.rounding = rounding
        self.max_grad_norm = max_grad_norm
        self.grad_norm = torch.tensor(math.nan)
        self.clip_coef = torch.tensor(math.nan)
        self._recording: _Recording | None = None
        self._cached: dict[int, list[_Batch]] = {}  # of each group, from the last step

    def __getstate__(self) -> dict[str, Any]:
        own = ("rounding", "max_grad_norm", "grad_norm", "clip_coef")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._cached = {}
        self.__dict__.setdefault("_recording", None)  # a copy is not recorded; load_state_dict also calls this
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # torch wraps this method to disable torch.compile. The wrapper imports torch.compile, which takes a second.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in DTYPES:
                raise TypeError(f"FusedAdam takes bfloat16 and float32 parameters, got {param.dtype}")
            if hasattr(param, "to_local"):
                raise TypeError("FusedAdam does not take DTensor parameters (fully_shard, tensor parallel): use AdamW")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, group in enumerate(state_dict["param_groups"]):
            for flag in ("amsgrad", "maximize"):
                if group.get(flag):
                    raise ConfigError(f"FusedAdam has no {flag}, but param_groups[{i}] of the loaded state sets it")
        super().load_state_dict(state_dict)
        loaded = {p: dict(own) for p, own in self.state.items() if own}
        for group in self.param_groups:
            self._allocate([p for p in group["params"] if p in loaded])
        for p, own in loaded.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.state[p][key].copy_(own[key])

    def record_into(self, rings: Mapping[Tensor, Mapping[str, Tensor]], step: Tensor, every: int) -> Callable[[], None]:
        """Record every step from now on, in the same pass over the tensors that updates them.

        Args:
            rings: for each parameter, the ring of each field to record (``param``, ``grad``, ``exp_avg``,
                ``exp_avg_sq``): ``[slots, *shape]``, contiguous, on the parameter's device. A parameter without a
                gradient is neither updated nor recorded.
            step: int64 scalar, on the CPU or on that device; the caller increments it before each step.
            every: record the steps that are a multiple of this, to slot ``step / every % slots``.

        Returns:
            A function that ends the recording.

        Raises:
            BhfastError: the optimizer is already being recorded.
        """
        if self._recording is not None:
            raise BhfastError("this optimizer is being recorded already; close the other recorder first")
        self._recording = _Recording(dict(rings), step, every)
        self._cached.clear()

        def end() -> None:
            self._recording = None
            self._cached.clear()

        return end

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step; return the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._batches()
        coefficients = [_schedule(batch, [batch.steps_done() + 1], [batch.group["lr"]])[0] for batch in batches]
        for batch in batches:
            batch.count(1)
        self._update(batches, coefficients)
        return loss

    @torch.no_grad()
    def schedule(self, lrs: Sequence[float], done: int = 0) -> list[Schedule]:
        """Return what is needed to perform steps elsewhere, or with :meth:`scheduled_step`.

        Args:
            lrs: the learning rate of each step.
            done: how many of these steps are done already.

        Returns:
            One entry for each set of parameters that is updated together. Parameters without a gradient are left out.
        """
        schedules = []
        for batch in self._batches():
            first = batch.steps_done() + 1 - done
            table = _schedule(batch, range(first, first + len(lrs)), lrs).to(batch.params[0].device)
            exp_avgs, exp_avg_sqs = ([state[key] for state in batch.states] for key in ("exp_avg", "exp_avg_sq"))
            schedules.append(Schedule(batch.params, exp_avgs, exp_avg_sqs, table, *batch.recording[:2]))
        return schedules

    @torch.no_grad()
    def scheduled_step(self, schedules: Sequence[Schedule], index: Tensor) -> None:
        """Perform a step without reading values on the host, so that a CUDA graph can capture it.

        Parameters and moments are updated, but not ``state["step"]``: see :meth:`count`.

        Args:
            schedules: from :meth:`schedule`.
            index: int64 scalar on the device: which row of the coefficients to use.
        """
        self._update(self._batches(), [own.coefficients.index_select(0, index.view(1))[0] for own in schedules])

    @torch.no_grad()
    def count(self, steps: int) -> None:
        """Add ``steps``, which were performed elsewhere, to ``state["step"]``."""
        for batch in self._batches():
            batch.count(steps)

    def _update(self, batches: Sequence[_Batch], coefficients: Sequence[Tensor]) -> None:
        """Clip and update all ``batches``, each with its own coefficients."""
        clip_coef = None
        if self.max_grad_norm is not None and batches:
            grads = [grad for batch in batches for grad in batch.grads]
            self.grad_norm, self.clip_coef = kernels.clip_coefficient(grads, self.max_grad_norm)
            clip_coef = self.clip_coef
        for batch, c in zip(batches, coefficients, strict=True):
            kernels.adam_(
                batch.params,
                batch.grads,
                [state["exp_avg"] for state in batch.states],
                [state["exp_avg_sq"] for state in batch.states],
                c,
                clip_coef,
                self.rounding,
                *batch.recording,
            )

    def _batches(self) -> list[_Batch]:
        """Return the parameters that have a gradient, grouped by what can be updated together."""
        batches = []
        for i, group in enumerate(self.param_groups):
            grads = [p.grad for p in group["params"]]
            cached = self._cached.get(i, [])
            if len(cached) != 1 or not cached[0].reuse(group, grads, self.state):
                cached = self._cached[i] = self._make_batches(group)
            batches += cached
        return batches

    def _make_batches(self, group: dict[str, Any]) -> list[_Batch]:
        params = [p for p in group["params"] if p.grad is not None]
        self._allocate([p for p in params if not self.state[p]])
        kinds: dict[Any, list[Tensor]] = defaultdict(list)
        for p in params:
            kinds[p.dtype, p.device, self.state[p]["step"].item()].append(p)
        return [_Batch(group, alike, self.state, self._recording) for alike in kinds.values()]

    def _allocate(self, params: list[Tensor]) -> None:
        """Allocate the state of new parameters in one block of memory, each tensor aligned for the CUDA kernels.

        If all sizes are multiples of the alignment, the tensors are adjacent, which makes pure torch faster.
        """
        kinds = defaultdict(list)
        for p in params:
            kinds[p.dtype, p.device].append(p)
        for (dtype, device), alike in kinds.items():
            unit = ALIGNMENT // dtype.itemsize
            sizes = [-(-p.numel() // unit) * unit for p in alike]
            rows = torch.zeros(2, sum(sizes), dtype=dtype, device=device)
            exp_avgs, exp_avg_sqs = (
                [x[: p.numel()].view(p.shape) for x, p in zip(row.split(sizes), alike, strict=True)] for row in rows
            )
            steps = torch.zeros(len(alike)).unbind()
            for p, step, exp_avg, exp_avg_sq in zip(alike, steps, exp_avgs, exp_avg_sqs, strict=True):
                self.state[p].update(step=step, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


class Schedule(NamedTuple):
    """Parameters that are updated together in some future steps; see :func:`bhfast.ops.kernels.adam_`.

    Attributes:
        params, exp_avgs, exp_avg_sqs: of one length.
        coefficients: float32 ``[steps, 7]``, on the parameters' device.
        rings, ring_of: where the steps are recorded.
    """

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    coefficients: Tensor
    rings: Sequence[Tensor]
    ring_of: Sequence[int]


class _Recording(NamedTuple):
    """See :meth:`FusedAdam.record_into`."""

    rings: Mapping[Tensor, Mapping[str, Tensor]]
    step: Tensor
    every: int


class _Batch:
    """Parameters that are updated together: of one group, dtype and device, after the same number of steps."""

    def __init__(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        state: Mapping[Tensor, dict[str, Tensor]],
        recording: _Recording | None,
    ) -> None:
        self.group = group
        self.params = params
        self.grads: list[Any] = [p.grad for p in params]  # all are tensors: params without a gradient are left out
        self.states = [state[p] for p in params]
        self.recording: tuple[Any, ...] = ((), (), None, 1)  # rings, ring_of, step and every of kernels.adam_
        self._all_states = list(state.values())
        self._steps = [own["step"] for own in self.states]
        self._row = arithmetic.row_view(self._steps)
        if recording is not None:
            rings = [
                (ring, i * len(checks.FIELDS) + checks.FIELDS.index(field))
                for i, p in enumerate(params)
                for field, ring in recording.rings.get(p, {}).items()
            ]
            if rings:
                self.recording = (*zip(*rings, strict=True), recording.step, recording.every)

    def reuse(
        self, group: dict[str, Any], grads: list[Tensor | None], state: Mapping[Tensor, dict[str, Tensor]]
    ) -> bool:
        """Take new gradients and return True, unless anything else about the group has changed since the last step."""
        steps = [own["step"] for own in self.states]
        if (
            group is self.group
            and self._row is not None
            and _are_same(group["params"], self.params)
            and _are_same(list(state.values()), self._all_states)
            and _are_same(steps, self._steps)
            and len(set(self._row.tolist())) == 1  # all step counts are still equal
            and all(map(is_not, grads, repeat(None)))
        ):
            self.grads = grads
            return True
        return False

    def steps_done(self) -> int:
        return int(self._steps[0].item())

    def count(self, steps: int) -> None:
        """Add to the number of steps done, of each parameter."""
        if self._row is None:
            torch._foreach_add_(self._steps, steps)
        else:
            self._row += steps


def _schedule(batch: _Batch, steps: Iterable[int], lrs: Iterable[float]) -> Tensor:
    group = batch.group
    return arithmetic.adam_coefficients(
        steps, lrs, betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"]
    )


def _are_same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))
