"""Conversions that lose nothing: bits of bfloat16 kept as integers, wider integers, float32 that is bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace.lazy import LazyTensor

AS_BITS = (torch.uint16, torch.int16)
BFLOAT16 = ("embeddings", "grads", "momentum", "variance", "logits", "losses", "bh_center")  # in the reference run
INT64 = ("recorded_steps", "token_counts")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64, torch.int64)


def converted(name: str, tensor: Any, *, to_bfloat16: bool) -> Any:
    """Return a tensor as the trace has it: the same one, or one that converts what is read of it.

    Args:
        name: in the trace.
        tensor: of the file.
        to_bfloat16: whether the user wants it as bfloat16.

    Raises:
        TraceError: it cannot be converted. For float32 that is not bfloat16, when it is read.
    """
    if tensor.dtype in AS_BITS and (to_bfloat16 or name in BFLOAT16):
        return _as(torch.bfloat16, name, tensor)
    if to_bfloat16 and tensor.dtype != torch.bfloat16:
        if tensor.dtype != torch.float32:
            raise TraceError(f"{name} cannot become bfloat16: it is {tensor.dtype}, wanted uint16, int16 or float32")
        return _as(torch.bfloat16, name, tensor)
    if name in INT64 and tensor.dtype != torch.int64:
        if tensor.dtype not in INTEGERS:
            raise TraceError(f"{name} must be integers, got {tensor.dtype}")
        return _as(torch.int64, name, tensor)
    return tensor


def _as(dtype: torch.dtype, name: str, tensor: Any) -> Any:
    lazy = ConvertedTensor(dtype, name, tensor)
    return lazy if tensor.dim() > 1 else lazy.convert(tensor, 0)


class ConvertedTensor(LazyTensor):
    """A tensor of another dtype.

    Args:
        dtype: bfloat16, or int64.
        name: for errors.
        whole: the tensor as it is in the file.
    """

    kind = "converted"

    def __init__(self, dtype: torch.dtype, name: str, whole: Any) -> None:
        super().__init__(whole.shape, dtype)
        self._name = name
        self._whole = whole

    def _read(self, steps: slice | Tensor, low: int, high: int) -> Tensor:
        first = steps.indices(len(self))[0] if isinstance(steps, slice) else 0
        return self.convert(self._whole[steps, low:high], first)

    def convert(self, values: Tensor, first: int) -> Tensor:
        """Return values of the file as the trace has them.

        Raises:
            TraceError: one of them cannot be represented.
        """
        values = values.as_subclass(Tensor)
        if values.dtype in AS_BITS and self.dtype == torch.bfloat16:
            return values.contiguous().view(torch.bfloat16)
        if self.dtype == torch.int64:
            found = values.to(torch.int64)
            if bool((found < 0).any()) and values.dtype == torch.uint64:
                raise TraceError(f"{self._name} has numbers of 2^63 and more")
            return found
        halves = values.contiguous().view(-1).numpy().view("<u2").reshape(*values.shape, 2)
        if halves[..., 0].any():
            index = [int(axis[0]) for axis in halves[..., 0].nonzero()]
            at = f" of record {first + index[0]:,}" if index else ""
            value = values[tuple(index)].item()
            raise TraceError(f"{self._name}{at} has {value!r}, which is not a bfloat16; import it as float32")
        return torch.from_numpy(halves[..., 1].copy()).view(torch.bfloat16)
