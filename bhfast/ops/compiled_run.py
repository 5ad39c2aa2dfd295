"""The tensors of a run as the extension's engines take them: checked here, and given as addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bhfast.ops.arithmetic import AdamCoefficients
from bhfast.ops.checks import FIELDS, _check, _name

BLOCK, OTHERS = 12, 4  # parameters of a TiedGPT: of each block, and others: wte, wpe, the weight and bias of ln_f
FIRST_MLP_WEIGHT = 10  # of model.parameters()

_Group = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor, Sequence[Tensor], Sequence[int]]
_Rows = tuple[Tensor, Tensor, Tensor]


class CompiledRun(NamedTuple):
    """A ``TrainingRun`` of the extension, and what Python needs to know of it."""

    handle: Any
    device: torch.device
    start: int
    steps: int


class _Memory:
    """Checks tensors, gives out their addresses, and keeps them alive."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tensors: list[Tensor] = []

    def address(self, name: str, x: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> int:
        _check(x is not None, ValueError, f"{name} must be a tensor, got None")
        assert x is not None
        _check(x.dtype == dtype, TypeError, f"{name} must be {_name(dtype)}, got {_name(x.dtype)}")
        message = f"{name} must have shape {list(shape)}, got {list(x.shape)}"
        _check(tuple(x.shape) == tuple(shape), ValueError, message)
        message = f"{name} must be contiguous and on {self.device}"
        _check(x.device == self.device and x.is_contiguous(), ValueError, message)
        self.tensors.append(x)
        return x.data_ptr()

    def bfloat16(self, name: str, x: Tensor | None, shape: Sequence[int]) -> int:
        return self.address(name, x, torch.bfloat16, shape)


def compiled_run(
    module: Any,
    *,
    parameters: Sequence[Tensor],
    heads: int,
    groups: Sequence[_Group],
    rounding: str,
    max_grad_norm: float,
    target_offset: int,
    corpus: Tensor,
    offsets: Tensor,
    learning_rates: Tensor,
    start: int,
    every: int,
    recorded_rows: Sequence[_Rows],
    frozen: Tensor | None,
    logs: Mapping[str, Tensor],
    losses: Tensor,
    grad_norms: Tensor,
) -> CompiledRun:
    """Return a new ``TrainingRun`` of the extension's ``module``; see ``csrc/training_run.h``.

    All tensors are contiguous and on the device of the parameters; the run keeps them alive.

    Args:
        parameters: of a TiedGPT, bfloat16, with gradients, in the order of ``model.parameters()``.
        groups: params, exp_avgs, exp_avg_sqs, coefficients (float32 ``[steps, 7]``), rings and ring_of of each group of
            the optimizer; see :func:`bhfast.ops.kernels.adam_`.
        corpus: int32 ``[tokens]``.
        offsets: int64 ``[steps, windows]``: where each window starts in the corpus.
        learning_rates: float64 ``[steps]``.
        start: how many of the steps are done already.
        recorded_rows: tensor, rows and ring; see :class:`bhfast.recording.slots.RowSlots`.
        frozen: bool ``[vocab_size]``: tokens whose vectors get no gradient.
        logs: the ring of each logged value, ``[slots, *shape]``.
        losses, grad_norms: float32 ``[steps]``, to be filled.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check(bool(parameters), ValueError, "parameters must be those of a TiedGPT")
    _check(offsets.dim() == 2, ValueError, f"offsets must have shape [steps, windows], got {list(offsets.shape)}")
    _check(every >= 1, ValueError, f"every must be at least 1, got {every}")
    steps, windows = offsets.shape
    _check(0 <= start <= steps, ValueError, f"start must be 0 to {steps}, got {start}")
    shapes, sizes = _shapes(parameters)
    vocab, hidden, context = sizes[0], sizes[1], sizes[4]
    message = f"target_offset must be 1 to {context}, got {target_offset}"
    _check(1 <= target_offset <= context, ValueError, message)
    _check_range(f"corpus must have tokens below {vocab}", corpus, vocab - 1)
    last = corpus.numel() - context - 1
    _check_range(f"offsets must be 0 to {last}", offsets, last)
    memory = _Memory(parameters[0].device)
    slots = next((len(ring) for *_, rings, _ in groups for ring in rings), 0)
    handle = module.TrainingRun(
        shape=[*sizes[:4], heads, context, windows],
        parameters=[
            (memory.bfloat16(f"parameters[{i}]", x, shape), memory.bfloat16(f"parameters[{i}].grad", x.grad, shape))
            for i, (x, shape) in enumerate(zip(parameters, shapes, strict=True))
        ],
        groups=[_group(memory, group, slots, steps) for group in groups],
        rounding=rounding,
        max_grad_norm=max_grad_norm,
        target_offset=target_offset,
        corpus=memory.address("corpus", corpus, torch.int32, [corpus.numel()]),
        offsets=memory.address("offsets", offsets, torch.int64, [steps, windows]),
        frozen=0 if frozen is None else memory.address("frozen", frozen, torch.bool, [vocab]),
        learning_rates=memory.address("learning_rates", learning_rates, torch.float64, [steps]),
        start=start,
        every=every,
        slots=slots,
        recorded_rows=[_rows(memory, rows) for rows in recorded_rows],
        logs=_logs(memory, logs, vocab, hidden),
        losses=memory.address("losses", losses, torch.float32, [steps]),
        grad_norms=memory.address("grad_norms", grad_norms, torch.float32, [steps]),
        tensors=memory.tensors,
    )
    return CompiledRun(handle, memory.device, start, steps)


def _shapes(parameters: Sequence[Tensor]) -> tuple[list[list[int]], tuple[int, int, int, int, int]]:
    """Return the shapes that a TiedGPT's parameters have; and its vocab, hidden, mlp, layers and context."""
    layers, rest = divmod(len(parameters) - OTHERS, BLOCK)
    message = "parameters must be those of a TiedGPT"
    _check(layers >= 1 and rest == 0, ValueError, message)
    matrices = [parameters[i] for i in (0, 1, FIRST_MLP_WEIGHT)]
    _check(all(x.dim() == 2 for x in matrices), ValueError, message)
    vocab, d = parameters[0].shape
    mlp, context = len(parameters[FIRST_MLP_WEIGHT]), len(parameters[1])
    block = [[d], [d], [3 * d, d], [3 * d], [d, d], [d], [d], [d], [mlp, d], [mlp], [d, mlp], [d]]
    return [[vocab, d], [context, d], *block * layers, [d], [d]], (vocab, d, mlp, layers, context)


def _group(memory: _Memory, group: _Group, slots: int, steps: int) -> tuple[list[tuple[Any, ...]], int]:
    params, exp_avgs, exp_avg_sqs, coefficients, rings, ring_of = group
    message = "exp_avgs and exp_avg_sqs must be as many as params"
    _check(len(exp_avgs) == len(params) == len(exp_avg_sqs), ValueError, message)
    _check(len(ring_of) == len(rings), ValueError, "ring_of must be as many as rings")
    ring_addresses = [[0] * len(FIELDS) for _ in params]
    for which, ring in zip(ring_of, rings, strict=True):
        param, field = divmod(which, len(FIELDS))
        _check(0 <= param < len(params), ValueError, "ring_of must be fields of the params")
        ring_addresses[param][field] = memory.bfloat16("rings", ring, [slots, *params[param].shape])
    tensors = [
        (
            memory.bfloat16("params", param, param.shape),
            memory.bfloat16("grads", param.grad, param.shape),
            memory.bfloat16("exp_avgs", exp_avg, param.shape),
            memory.bfloat16("exp_avg_sqs", exp_avg_sq, param.shape),
            own,
            param.numel(),
        )
        for param, exp_avg, exp_avg_sq, own in zip(params, exp_avgs, exp_avg_sqs, ring_addresses, strict=True)
    ]
    shape = [steps, len(AdamCoefficients._fields)]
    return tensors, memory.address("coefficients", coefficients, torch.float32, shape)


def _rows(memory: _Memory, argument: _Rows) -> tuple[int, ...]:
    tensor, rows, ring = argument
    message = "recorded rows and their rings must have rows"
    _check(tensor.dim() >= 1 and ring.dim() >= 1, ValueError, message)
    _check_range(f"recorded rows must be 0 to {len(tensor) - 1}", rows, len(tensor) - 1)
    shape = [len(ring), rows.numel(), *tensor.shape[1:]]
    return (
        memory.bfloat16("the tensor of recorded rows", tensor, tensor.shape),
        tensor[0].nbytes if len(tensor) else 0,
        memory.address("recorded rows", rows, torch.int64, [rows.numel()]),
        rows.numel(),
        memory.bfloat16("the ring of recorded rows", ring, shape),
        len(ring),
    )


def _logs(memory: _Memory, logs: Mapping[str, Tensor], vocab: int, hidden: int) -> dict[str, tuple[int, int]]:
    kinds: dict[str, tuple[torch.dtype, list[int]]] = {
        "losses": (torch.bfloat16, []),
        "logits": (torch.bfloat16, [vocab]),
        "learning_rates": (torch.float64, []),
        "clip_coefs": (torch.float32, []),
        "grad_norms": (torch.float32, []),
        "hidden_means": (torch.float32, [hidden]),
        "hidden_vars": (torch.float32, [hidden]),
    }
    return {
        name: (memory.address(name, ring, kinds[name][0], [len(ring), *kinds[name][1]]), len(ring))
        for name, ring in logs.items()
    }


def _check_range(message: str, values: Tensor, last: int) -> None:
    """Check that all values are 0 to ``last``: any other would make the steps read or write beyond their memory."""
    _check(values.numel() == 0 or bool(values.min() >= 0 and values.max() <= last), ValueError, message)
