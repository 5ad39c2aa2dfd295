"""Compares two traces: where their bits differ first, and how far apart their values go over the steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bhfast.diff.pairs import Pair, Pairs, pair
from bhfast.errors import MALFORMED, TraceError
from bhfast.replay import describe
from bhfast.trace import Trace, open_trace
from bhfast.trace.checksums import without_checksums
from bhfast.trace.updates import STATE, bits

PARSED = ("config", "optimizer")  # metadata that are JSON, with settings
OF_FILES = ("series", "shard", "tied")  # metadata that say how a trace is stored
SPACED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # dtypes whose values are counted in ulp


@dataclass(frozen=True)
class Place:
    """An element that differs.

    Attributes:
        step: None for a tensor that a trace has once.
        index: of the element within the record; the first number is the row of the parameter.
        a: the value with its bits, as text.
        b: the same of the other trace.
    """

    step: int | None
    index: tuple[int, ...]
    a: str
    b: str


class Distances(NamedTuple):
    """How far apart a tensor is at some steps; float64 ``[n]`` each.

    Attributes:
        l2: the L2 norm of the difference. NaN or infinite if a value that differs is.
        ulp: the largest distance of two values, as the number of steps from one value of the dtype to the next. It is
            infinite where only one of them is NaN, and NaN for integers and dtypes of 8 bits.
        rows: the share of rows that differ in bits; for records of one axis, of elements.
    """

    l2: Tensor
    ulp: Tensor
    rows: Tensor


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that both traces have.

    Attributes:
        name: of the tensor.
        pair: the tensor itself; None if a trace has it once.
        differs: at which of the common steps it differs in bits: bool ``[N]``; ``[1]`` if a trace has it once.
        elements: how many elements differ in bits.
        same_value: how many of those are equal in value: zeros of other sign, and NaN of other bits.
        first: the first element that differs; None if none does.
    """

    name: str
    pair: Pair | None
    differs: Tensor
    elements: int
    same_value: int
    first: Place | None

    def distances(self, which: Tensor) -> Distances:
        """Return how far apart the tensor is at some of the common steps, int64 ``[n]``."""
        assert self.pair is not None
        found = torch.zeros(3, len(which), dtype=torch.float64)
        unequal = self.differs[which]
        at = unequal.nonzero()[:, 0]
        values = [_distances(a, b) for _, a, b in self.pair.blocks(which[at])]
        if values:
            found[:, at] = torch.cat(values, dim=1)
        return Distances(*found)


@dataclass(frozen=True)
class Diff:
    """How two traces differ.

    Attributes:
        a: one trace.
        b: the other one.
        pairs: what they have in common.
        tensors: those that both have.
        settings: metadata that differ: the text in A and in B, None where there is none.
    """

    a: Trace
    b: Trace
    pairs: Pairs
    tensors: list[TensorDiff]
    settings: dict[str, tuple[str | None, str | None]]

    @property
    def has_same_bits(self) -> bool:
        """Whether all that both traces have is equal, bit for bit."""
        return all(x.first is None for x in self.tensors) and not self.pairs.unlike

    @property
    def is_equal(self) -> bool:
        """Whether, besides, they have the same steps, tensors and rows. Metadata are not compared."""
        pairs = self.pairs
        has_all = not any((*map(len, pairs.only_steps), *pairs.only, pairs.rows))
        return self.has_same_bits and has_all

    def first(self) -> list[TensorDiff]:
        """Return the tensors that differ in the first step in which one does: parameters and moments last."""
        found = [(x.first.step, x) for x in self.tensors if x.first and x.first.step is not None]
        states = {x["keys"].get(field) for x in self.a.optimizer.get("params", {}).values() for field in STATE}
        earliest = min((step for step, _ in found), default=None)
        return sorted((x for step, x in found if step == earliest), key=lambda x: x.name in states)


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Diff:
    """Compare two traces, bit for bit. Takes little memory, whatever their size.

    A trace may be compact, sharded, in parts, or of a run that goes on. Records are matched by step, rows by number.

    Raises:
        TraceError: one of them cannot be read or rebuilt, or they have no step in common.
    """
    one, other = open_trace(a), open_trace(b)
    try:
        pairs = pair(one, other)
        tensors = [_compare(x, pairs.steps) for x in pairs.by_step]
        tensors += [_compare_once(name, one[name], other[name]) for name in pairs.once]
        return Diff(one, other, pairs, tensors, _changed(_settings(one), _settings(other)))
    except TraceError:
        raise
    except MALFORMED as error:
        raise TraceError(f"{one.path} and {other.path} cannot be compared: one is malformed ({error})") from None


def _compare(shared: Pair, steps: Tensor) -> TensorDiff:
    count = len(steps)
    differs = torch.zeros(count, dtype=torch.bool)
    elements = same_value = 0
    first = None
    for which, a, b in shared.blocks(torch.arange(count)):
        if torch.equal(bits(a), bits(b)):
            continue
        unequal = bits(a) != bits(b)
        differs[which] = unequal.flatten(1).any(1) if unequal.dim() > 1 else unequal
        elements += int(unequal.sum())
        same_value += int((unequal & _same_value(a, b)).sum())
        if first is None:
            record, *index = unequal.nonzero()[0].tolist()
            at = (record, *index)
            first = Place(int(steps[which[record]]), shared.numbered(index), describe(a[at]), describe(b[at]))
    return TensorDiff(shared.name, shared, differs, elements, same_value, first)


def _compare_once(name: str, a: Any, b: Any) -> TensorDiff:
    a, b = (x[:].as_subclass(Tensor) if x.dim() else x.as_subclass(Tensor) for x in (a, b))
    unequal = bits(a) != bits(b)
    first = None
    if unequal.any():
        index = tuple(unequal.nonzero()[0].tolist())
        first = Place(None, index, describe(a[index]), describe(b[index]))
    same_value = int((unequal & _same_value(a, b)).sum())
    return TensorDiff(name, None, unequal.any()[None], int(unequal.sum()), same_value, first)


def _same_value(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors are equal in value, or both NaN."""
    if not a.is_floating_point():
        return torch.zeros(a.shape, dtype=torch.bool)
    a, b = (x.float() if x.itemsize == 1 else x for x in (a, b))
    nan = a.isnan()
    return (a == b) | (nan & b.isnan()) if nan.any() else a == b


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return L2, ulp and the share of rows for some records, ``[n, ...]`` each: float64 ``[3, n]``."""
    n = len(a)
    unequal = bits(a) != bits(b)
    difference = a.double().sub_(b).masked_fill_(~unequal, 0)  # of equal infinities it would be NaN
    l2 = difference.reshape(n, -1).square_().sum(1).sqrt()
    rows = unequal.reshape(n, a.shape[1] if a.dim() > 1 else 1, -1).any(2).double().mean(1)
    ulp = _ulp(a, b).reshape(n, -1).amax(1) if a.dtype in SPACED else torch.full((n,), torch.nan)
    return torch.stack([l2, ulp.double(), rows])


def _ulp(a: Tensor, b: Tensor) -> Tensor:
    """Return how many steps from one value of the dtype to the next lie between values; infinite if one is NaN."""
    ulp = (_coordinate(a) - _coordinate(b)).abs()
    nan = a.isnan(), b.isnan()
    if not (nan[0].any() or nan[1].any()):
        return ulp
    return torch.where(nan[0] | nan[1], torch.where(nan[0] & nan[1], 0.0, torch.inf), ulp.double())


def _coordinate(x: Tensor) -> Tensor:
    """Number the values of a dtype in ascending order, both zeros as 0: int32, or float64, exact up to 2^53."""
    own = bits(x)
    magnitude = own & torch.iinfo(own.dtype).max
    return torch.where(own < 0, -magnitude, magnitude).to(torch.int32 if x.itemsize == 2 else torch.float64)


def _settings(trace: Trace) -> dict[str, str]:
    """Return the metadata of a trace, with those that are JSON taken apart."""
    own = {key: text for key, text in without_checksums(trace.metadata).items() if key not in (*PARSED, *OF_FILES)}
    optimizer = {key: x for key, x in trace.optimizer.items() if key != "params"}
    return own | dict(_flat("", trace.config)) | dict(_flat("optimizer", optimizer))


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, x in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), x)
    elif isinstance(value, list) and len(value) == 1:
        yield from _flat(name, value[0])
    else:
        yield name, str(value)


def _changed(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    names = dict.fromkeys((*a, *b))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
