"""The steps of an optimizer as a trace describes them: all that a replay of Adam needs besides tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bhfast.ops import arithmetic, kernels, torch_adam
from bhfast.trace.format import AFTER_STEP, CHANGED
from bhfast.trace.reader import Trace

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("param", *MOMENTS)  # what a step of Adam changes
TABLE = 256  # steps whose coefficients are computed together, and kept


def why_unknown(trace: Trace, logged: Mapping[str, Tensor]) -> str | None:
    """Return why the arithmetic of a trace's steps is not known to the bit; None if it is.

    Args:
        trace: one file.
        logged: has the values that were recorded once per step (``learning_rates``, ``clip_coefs``, ``grad_norms``,
            ``skipped``): the trace itself, or, for one of several files, the trace that joins them.
    """
    optimizer, steps = trace.optimizer, trace.steps
    if steps.dim() != 1 or not torch.equal(steps - steps[:1], torch.arange(len(steps))):
        return "a replay needs every step, but this run recorded only some (--record-every)"
    return str(optimizer["reason"]) if optimizer["arithmetic"] is None else why_none_known(trace, logged)


def why_none_known(trace: Trace, logged: Mapping[str, Tensor]) -> str | None:
    """Return why not even a trace's first steps are known to the bit; None if they are. See :func:`why_unknown`."""
    optimizer = trace.optimizer
    rounding = optimizer["arithmetic"] or optimizer.get("known", {}).get("arithmetic")
    if rounding is None:
        return str(optimizer["reason"])
    if reason := _why_not_arithmetic(rounding, optimizer["groups"]):
        return reason
    return None if "learning_rates" in logged else "learning_rates are not in the file"


def _why_not_arithmetic(rounding: str, groups: Sequence[Mapping[str, Any]]) -> str | None:
    if rounding not in (*arithmetic.ROUNDINGS, torch_adam.FUSED):
        return f"this bhfast does not know the arithmetic {rounding!r}"
    for kernel in {group["kernel"] for group in groups} if rounding == torch_adam.FUSED else ():
        if kernel != (here := torch_adam.fused_kernel()):
            return f"it was recorded with the fused AdamW of {kernel}, whose bits may differ from those of {here} here"
    return None


def bits(values: Tensor) -> Tensor:
    """Return the bits of floating-point values as integers."""
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def differing(one: Tensor, other: Tensor) -> Tensor:
    """Return where the bits of two tensors differ, bool ``[...]``.

    Two NaN are equal, as the payload of a NaN depends on the instruction that made it.
    """
    return (bits(one) != bits(other)) & ~(one.isnan() & other.isnan())


def left_by_steps(trace: Trace, name: str, now: slice) -> Tensor:
    """Return what steps left in a tensor, before the loop itself changed it.

    Args:
        trace: one file.
        name: of the tensor, ``[R, ...]``.
        now: the records of the steps.

    Returns:
        ``[n, ...]``.
    """
    recorded = trace[name][now].as_subclass(Tensor)
    if name + CHANGED not in trace:
        return recorded
    changed = trace[name + CHANGED].as_subclass(Tensor)[now]
    return torch.where(changed.view(-1, *[1] * (recorded.dim() - 1)), trace[name + AFTER_STEP][now], recorded)


class Updates:
    """What the steps of an optimizer did to one parameter; all of length R, the number of records.

    Args:
        trace: one file.
        logged: see :func:`why_unknown`.
        name: of the parameter.

    Attributes:
        name: see above.
        described: what the trace says of the parameter.
        keys: of each field, the name of its tensor.
        flags: the tensors that say in which steps the parameter was not updated, by name.
        rounding: the arithmetic of the steps: one of ``bhfast.ops.arithmetic.ROUNDINGS``, or torch's fused kernel.
    """

    def __init__(self, trace: Trace, logged: Mapping[str, Tensor], name: str) -> None:
        optimizer = trace.optimizer
        self.name = name
        self.described: dict[str, Any] = optimizer["params"][name]
        self.keys: dict[str, str] = self.described["keys"]
        self.records = min(len(trace.steps), len(logged["learning_rates"]))
        self.flags = {
            key: self._of_optimizer(source[key]) if key == "skipped" else source[key]
            for source in (logged, trace)
            for key in ("skipped", f"{name}.has_grad")
            if key in source
        }
        self._tables: dict[int, Tensor] = {}  # of coefficients
        self._logged = logged
        self._optimizer = optimizer
        known = optimizer.get("known", {"arithmetic": None, "records": 0})
        self.rounding: str = optimizer["arithmetic"] or known["arithmetic"]
        self._known_records = self.records if optimizer["arithmetic"] else int(known["records"])

    def _of_optimizer(self, values: Tensor) -> Tensor:
        """Return the logged values of the parameter's optimizer, ``[R]``: its column, if each optimizer has one."""
        return values[:, self.described["optimizer"]] if values.dim() > 1 and "optimizer" in self.described else values

    @cached_property
    def updated(self) -> Tensor:
        """In which records the parameter was updated: it had a gradient, and the step was not skipped; bool."""
        updated = torch.arange(self.records) > 0
        for key, values in self.flags.items():
            updated &= (values[: self.records] == 0) == (key == "skipped")
        return updated

    @cached_property
    def clip_coefs(self) -> Tensor | None:
        """The factors of the gradients, float32; None if they were not clipped."""
        coefs = self._logged.get("clip_coefs")
        return None if coefs is None else self._of_optimizer(coefs)[: self.records].as_subclass(Tensor)

    @cached_property
    def has_one_factor(self) -> Tensor:
        """In which records the gradient was changed by one factor or none before the update, or by a NaN; bool."""
        if self.clip_coefs is None:
            return torch.ones(self.records, dtype=torch.bool)
        known = ~self.clip_coefs.isnan()
        if "grad_norms" in self._logged:  # NaN in the gradients makes NaN of the coefficient
            known |= self._of_optimizer(self._logged["grad_norms"])[: self.records].isnan()
        return known | ~self.updated

    @cached_property
    def is_known(self) -> Tensor:
        """Which records follow from those before them; bool."""
        return self.has_one_factor & (torch.arange(self.records) < self._known_records)

    @cached_property
    def _steps(self) -> Tensor:
        """The optimizer's own count of each step, int64."""
        return (self.described["steps_done"] + self.updated.cumsum(0)).clamp(min=1)

    @cached_property
    def _lrs(self) -> Tensor:
        rates = self._logged["learning_rates"]
        return (rates[:, self.described["group"]] if rates.dim() > 1 else rates)[: self.records]

    @property
    def _settings(self) -> dict[str, Any]:
        group = self._optimizer["groups"][self.described["group"]]
        return {"betas": tuple(group["betas"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}

    def coefficients(self, now: slice) -> Tensor:
        """Return the coefficients of some steps: float32 ``[n, 7]``; see :func:`bhfast.ops.arithmetic.adam`."""
        first, last = now.start // TABLE, (now.stop - 1) // TABLE
        tables = [self._coefficient_table(number) for number in range(first, last + 1)]
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        return table[now.start - first * TABLE : now.stop - first * TABLE]

    def _coefficient_table(self, number: int) -> Tensor:
        if number not in self._tables:
            now = slice(number * TABLE, (number + 1) * TABLE)
            steps, lrs = self._steps[now].tolist(), self._lrs[now].tolist()
            self._tables[number] = arithmetic.adam_coefficients(steps, lrs, **self._settings)
        return self._tables[number]

    def next_states(self, states: Sequence[Tensor], grads: Tensor, now: slice) -> list[Tensor]:
        """Advance many states by a step each, all at once.

        Args:
            states: param, exp_avg and exp_avg_sq as before the steps: ``[n, *shape]`` each.
            grads: ``[n, *shape]``, as recorded.
            now: which records the steps make.

        Returns:
            param, exp_avg and exp_avg_sq after them.
        """
        ones = [1] * (grads.dim() - 1)
        if self.clip_coefs is not None:
            grads = grads * self.clip_coefs[now].to(grads.dtype).view(-1, *ones)
        found: Sequence[Tensor]
        param, exp_avg, exp_avg_sq = states
        if self.rounding == torch_adam.FUSED:
            found = torch_adam.fused_adamw(
                *(param, grads, exp_avg, exp_avg_sq),
                steps=self._steps[now].tolist(),
                lrs=self._lrs[now].tolist(),
                is_whole=param[0].numel() == self.described["numel"],
                **self._settings,
            )
        else:
            coefficients = self.coefficients(now).view(-1, *ones, len(arithmetic.AdamCoefficients._fields))
            found = arithmetic.adam(param, grads, exp_avg, exp_avg_sq, coefficients, self.rounding)
        updated = self.updated[now].view(-1, *ones)
        return list(found) if updated.all() else [torch.where(updated, *x) for x in zip(found, states, strict=True)]

    def advance(
        self, state: Sequence[Tensor], grads: Tensor, now: slice, records: Sequence[Tensor | None], first: int
    ) -> None:
        """Advance one state in place by all steps of ``now``; keep those after its last steps.

        Args:
            state: param, exp_avg and exp_avg_sq as before the steps: ``[*shape]`` each, contiguous.
            grads: ``[n, *shape]``, as recorded.
            now: which records the steps make.
            records: get param, exp_avg and exp_avg_sq after the steps from ``first`` on: ``[n - first, *shape]`` each,
                contiguous; None: not wanted.
            first: counted from the start of ``now``.
        """
        if self.rounding != torch_adam.FUSED:
            coefs = torch.ones(now.stop - now.start) if self.clip_coefs is None else self.clip_coefs[now]
            kernels.adam_steps_(
                state[0],
                state[1],
                state[2],
                grads,
                self.coefficients(now),
                coefs.to(grads.dtype).float().contiguous(),
                self.updated[now],
                self.rounding,
                records[0],
                records[1],
                records[2],
                first,
            )
            return
        for i in range(now.stop - now.start):
            at = slice(now.start + i, now.start + i + 1)
            for value, found in zip(
                state, self.next_states([x[None] for x in state], grads[i : i + 1], at), strict=True
            ):
                value.copy_(found[0])
            for value, own in zip(state, records, strict=True):
                if own is not None and i >= first:
                    own[i - first] = value
