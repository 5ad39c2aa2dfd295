"""The checks of the operations' arguments. csrc/ops.cpp makes the same ones; these then say what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bhfast.ops.arithmetic import ROUNDINGS, AdamCoefficients

FIELDS = ("param", "grad", "exp_avg", "exp_avg_sq")  # what can be recorded of a parameter, in the order of ``ring_of``


def _check(holds: bool, kind: type[Exception], message: str) -> None:
    if not holds:
        raise kind(message)


def _check_length(name: str, one: Sequence[object], like: str, other: Sequence[object]) -> None:
    _check(len(one) == len(other), ValueError, f"{name} must be as many as {like} ({len(other)}), got {len(one)}")


def _check_dense(name: str, grad: Tensor) -> None:
    message = f"{name} must be dense, got a sparse one: build the embedding with sparse=False"
    _check(grad.layout == torch.strided, TypeError, message)


def _check_dtype(name: str, tensor: Tensor) -> None:
    dtypes = (torch.bfloat16, torch.float32)
    _check(tensor.dtype in dtypes, TypeError, f"{name} must be bfloat16 or float32, got {_name(tensor.dtype)}")


def _check_same(name: str, verb: str, got: object, wanted: object, like: str) -> None:
    kind = TypeError if isinstance(wanted, torch.dtype) else ValueError
    _check(got == wanted, kind, f"{name} must {verb} {_name(wanted)} like {like}, got {_name(got)}")


def _name(thing: object) -> str:
    return str(list(thing)) if isinstance(thing, torch.Size) else str(thing).removeprefix("torch.")


def _check_adam(params, grads, exp_avgs, exp_avg_sqs, coefficients, clip_coef, rounding, rings, ring_of, step, every):  # type: ignore[no-untyped-def]
    if not params:
        return
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_dtype("params[0]", params[0])
    for name, tensors in lists.items():
        _check_length(name, tensors, "params", params)
    _check(rounding in ROUNDINGS, ValueError, f"rounding must be per-op or opmath, got {rounding}")
    _check_length("ring_of", ring_of, "rings", rings)
    for i, param in enumerate(params):
        _check_dense(f"grads[{i}]", grads[i])
        _check_same(f"params[{i}]", "be", param.dtype, params[0].dtype, "params[0]")
        _check_same(f"params[{i}]", "be on", param.device, params[0].device, "params[0]")
        for name, tensors in lists.items():
            _check_same(f"{name}[{i}]", "be", tensors[i].dtype, param.dtype, f"params[{i}]")
            _check_same(f"{name}[{i}]", "have shape", tensors[i].shape, param.shape, f"params[{i}]")
            _check_same(f"{name}[{i}]", "be on", tensors[i].device, param.device, f"params[{i}]")
    device = params[0].device
    _check_number("coefficients", coefficients, torch.float32, len(AdamCoefficients._fields), device)
    if clip_coef is not None:
        _check_number("clip_coef", clip_coef, torch.float32, 1, device)
    if rings:
        _check(step is not None, ValueError, "step must be given with rings, got None")
        most = len(FIELDS) * len(params)
        for j, which in enumerate(ring_of):
            message = f"ring_of[{j}] must be a field of one of the params (below {most}), got {which}"
            _check(0 <= which < most, ValueError, message)
        _check_record([params[which // len(FIELDS)] for which in ring_of], rings, step, every)


def _check_number(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    _check(tensor.dtype == dtype, TypeError, f"{name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    _check(tensor.numel() == numel, ValueError, f"{name} must have {numel} elements, got {tensor.numel()}")
    _check(tensor.is_contiguous(), ValueError, f"{name} must be contiguous")
    message = f"{name} must be on the CPU or on {device}, got {tensor.device}"
    _check(tensor.device in (torch.device("cpu"), device), ValueError, message)


def _check_record(values: Sequence[Tensor], rings: Sequence[Tensor], step: Tensor, every: int) -> None:
    _check_length("rings", rings, "values", values)
    if values:
        _check_number("step", step, torch.int64, 1, values[0].device)
    _check(every > 0, ValueError, f"every must be at least 1, got {every}")
    slots = len(rings[0]) if rings and rings[0].dim() else 0
    for i, (value, ring) in enumerate(zip(values, rings, strict=True)):
        name = f"rings[{i}]"
        _check_same(f"values[{i}]", "be on", value.device, values[0].device, "values[0]")
        _check_same(name, "be", ring.dtype, value.dtype, "what it records")
        _check_same(name, "be on", ring.device, value.device, "what it records")
        message = f"{name} must have shape [slots, *{list(value.shape)}], got {list(ring.shape)}"
        _check(ring.dim() > 0 and ring.shape[1:] == value.shape, ValueError, message)
        message = f"{name} must have as many slots as the first ring ({slots}), at least 1, got {len(ring)}"
        _check(len(ring) == slots > 0, ValueError, message)
        _check(ring.is_contiguous(), ValueError, f"{name} must be contiguous")


def _check_clip(grads: Sequence[Tensor], max_norm: float) -> None:
    _check(bool(grads), ValueError, "grads must be at least one, got none")
    for i, grad in enumerate(grads):
        _check_dense(f"grads[{i}]", grad)
        _check_dtype(f"grads[{i}]", grad)
        _check_same(f"grads[{i}]", "be on", grad.device, grads[0].device, "grads[0]")


def _check_adam_steps(  # type: ignore[no-untyped-def]
    param, exp_avg, exp_avg_sq, grads, coefficients, clip_coefs, updated, rounding, params, exp_avgs, exp_avg_sqs, first
):
    _check_dtype("param", param)
    _check(rounding in ROUNDINGS, ValueError, f"rounding must be per-op or opmath, got {rounding}")
    for name, state in {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        _check_same(name, "be", state.dtype, param.dtype, "param")
        _check_same(name, "have shape", state.shape, param.shape, "param")
        _check_same(name, "be on", state.device, param.device, "param")
    _check_same("grads", "be", grads.dtype, param.dtype, "param")
    message = f"grads must have shape [steps, *{list(param.shape)}], got {list(grads.shape)}"
    _check(grads.dim() > 0 and grads.shape[1:] == param.shape, ValueError, message)
    steps = len(grads)
    _check_number("coefficients", coefficients, torch.float32, steps * len(AdamCoefficients._fields), param.device)
    _check_number("clip_coefs", clip_coefs, torch.float32, steps, param.device)
    _check_number("updated", updated, torch.bool, steps, param.device)
    _check(0 <= first <= steps, ValueError, f"first must be between 0 and {steps}, got {first}")
    for name, records in {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}.items():
        if records is None or first == steps:
            continue
        _check_same(name, "be", records.dtype, param.dtype, "param")
        message = f"{name} must have shape {[steps - first, *param.shape]}, got {list(records.shape)}"
        _check(list(records.shape) == [steps - first, *param.shape], ValueError, message)
        _check(records.is_contiguous(), ValueError, f"{name} must be contiguous")
