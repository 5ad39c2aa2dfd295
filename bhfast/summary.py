"""What a trace holds of its vectors, whatever it calls them, and its verification figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import MALFORMED, TraceError
from bhfast.lattice import centroid, pairwise_distances, radii
from bhfast.trace import Trace
from bhfast.trace.format import REFERENCE_NAMES

MAX_VECTORS_IN_PAIRS = 20_000  # all distances between so many take 8 s of CPU
WINDOW = 1000  # steps whose losses are averaged
LOSSES = ("losses", "loss")  # names of the tensor with the loss of each step
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of vectors: those that have a lattice


@dataclass(frozen=True)
class Vectors:
    """What a trace holds of one parameter: R records of V vectors, the tokens, in D dimensions.

    Attributes:
        trace: the trace.
        param: the name of the parameter.
        steps: int64 ``[R]``, increasing.
        vectors: bfloat16, float16 or float32 ``[R, V, D]``, V and D at least 1.
        rows: which row of the parameter each vector is: int64 ``[V]``.
        fields: its gradients (``grad``) and the tensors of the optimizer's state, by field, if they are of this shape.
        names: the name in the file of the vectors (``param``) and of each field.
        losses: ``[R]``; None if there are none.
        counts: how often each token occurs in the corpus: int64 ``[V]``; None if that is not known.
        missing: why losses, gradients (``grad``), token counts or some of the state are missing, by name.
    """

    trace: Trace
    param: str
    steps: Tensor
    vectors: Any
    rows: Tensor
    fields: dict[str, Any]
    names: dict[str, str]
    losses: Tensor | None
    counts: Tensor | None
    missing: dict[str, str]


def find_vectors(trace: Trace, param: str | None = None) -> Vectors:
    """Find the vectors of a trace, and what belongs to them.

    Args:
        trace: of the reference run, of a Recorder, or any other with ``recorded_steps`` and a tensor ``[R, V, D]``.
        param: the name of the parameter, or of its tensor. The vectors of a parameter with more axes are its rows
            ``[R, V, ...]``, those of a parameter with fewer its values. None for ``embeddings``, or else for the only
            parameter recorded as ``[R, V, D]``, or the only one.

    Raises:
        TraceError: there are no such vectors, or several; or they are not of one of ``DTYPES``.
    """
    try:
        steps = _steps(trace)
        params = _params(trace)
        chosen = _choose(trace, params, param)
        keys = params[chosen]
        recorded = trace[keys["param"]]
        vectors = _matrices(recorded)
        if reason := _misfit(vectors, DTYPES, (len(steps), None, None)):
            raise TraceError(f"{trace.path} cannot be reported: {keys['param']} {reason}")
        missing: dict[str, str] = {}
        fields, names = {}, {"param": keys["param"]}
        for field, key in keys.items():
            if field == "param":
                continue
            if reason := _misfit(trace.get(key), None, tuple(recorded.shape)):
                missing[field] = f"{key} {reason}"
            else:
                fields[field], names[field] = _matrices(trace[key]), key
        if "grad" not in keys:
            missing["grad"] = "gradients were not recorded"
        losses = next((trace[name] for name in LOSSES if name in trace), None)
        if reason := _misfit(losses, None, (len(steps),)):
            missing["losses"], losses = f"{' or '.join(LOSSES)} {reason}", None
        rows = _rows(trace, chosen, keys["param"], vectors.shape[1])
        counts = _counts(trace, rows, missing)
        return Vectors(trace, chosen, steps, vectors, rows, fields, names, losses, counts, missing)
    except TraceError:
        raise
    except MALFORMED as error:
        raise TraceError(f"{trace.path} cannot be reported: its metadata do not fit its tensors ({error})") from None


def _steps(trace: Trace) -> Tensor:
    if "recorded_steps" not in trace:
        raise TraceError(f"{trace.path} cannot be reported: it has no recorded_steps")
    steps = trace["recorded_steps"]
    if reason := _misfit(steps, (torch.int64,), (None,)):
        raise TraceError(f"{trace.path} cannot be reported: recorded_steps {reason}")
    steps = trace.steps.as_subclass(Tensor)
    if bool((steps[1:] <= steps[:-1]).any()) or int(steps[0]) < 0:
        raise TraceError(f"{trace.path} cannot be reported: recorded_steps must increase, from 0 or later")
    return steps


def _params(trace: Trace) -> dict[str, dict[str, str]]:
    """Return the names of the tensors of each parameter, by field."""
    described = trace.optimizer.get("params")
    if described:
        return {name: dict(param["keys"]) for name, param in described.items() if param["keys"].get("param") in trace}
    if REFERENCE_NAMES["param"] in trace:
        return {REFERENCE_NAMES["param"]: {field: key for field, key in REFERENCE_NAMES.items() if key in trace}}
    cubes = [name for name in trace if _misfit(trace[name], DTYPES, (None, None, None)) is None]
    own = [name for name in cubes if not any(name.startswith(f"{other}.") for other in cubes)]
    return {
        name: {"param": name} | {key.removeprefix(f"{name}."): key for key in cubes if key.startswith(f"{name}.")}
        for name in own
    }


def _choose(trace: Trace, params: Mapping[str, Mapping[str, str]], wanted: str | None) -> str:
    """Return the name of the parameter to report."""
    if wanted is not None:
        found = [name for name, keys in params.items() if wanted in (name, keys["param"])]
    else:
        found = [name for name, keys in params.items() if keys["param"] == REFERENCE_NAMES["param"]]
        found = found or [name for name, keys in params.items() if len(trace[keys["param"]].shape) == 3]
        found = found or list(params)
    if len(found) == 1:
        return found[0]
    if found:
        raise TraceError(f"{trace.path} has vectors of {', '.join(found)}: choose with --params")
    what = "no vectors: no tensor of records x vectors x dimensions" if wanted is None else f"no parameter {wanted}"
    raise TraceError(f"{trace.path} cannot be reported: it has {what}; it has {', '.join(params) or 'no parameters'}")


def _matrices(x: Any) -> Any:
    """Return records as matrices: rows with more than one axis flattened, values as rows of one."""
    if len(x.shape) in (1, 3) or 0 in x.shape:
        return x
    return x.reshape(*x.shape[:2], -1) if isinstance(x, Tensor) else x.matrices()


def _misfit(x: Any, dtypes: tuple[torch.dtype, ...] | None, shape: tuple[int | None, ...]) -> str | None:
    """Return how a tensor differs from what is wanted; None if it does not.

    Args:
        x: the tensor; None if there is none.
        dtypes: those wanted; None for any floating-point dtype.
        shape: the size of each axis; None for any that is at least 1.
    """
    if x is None:
        return "is not in the file"
    fits = x.dtype in dtypes if dtypes else x.dtype.is_floating_point
    fits = fits and len(x.shape) == len(shape)
    if fits and all(size == wanted if wanted else size > 0 for size, wanted in zip(x.shape, shape, strict=True)):
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes or ()]
    sizes = ", ".join(str(size or "at least 1") for size in shape)
    return f"must be {' or '.join(names) or 'of floating-point numbers'} [{sizes}], got {x.dtype} {list(x.shape)}"


def _rows(trace: Trace, param: str, key: str, vectors: int) -> Tensor:
    """Return which rows of the parameter were recorded: all, unless the trace says otherwise."""
    rows: Any = trace.get(f"{param}.rows", trace.get(f"{key}.rows"))
    if _misfit(rows, (torch.int64,), (vectors,)) is None and int(rows.min()) >= 0:
        return rows.as_subclass(Tensor)
    return torch.arange(vectors)


def _counts(trace: Trace, rows: Tensor, missing: dict[str, str]) -> Tensor | None:
    """Return how often each recorded token occurs in the corpus; None, and why, if that is not known."""
    counts: Any = trace.get("token_counts")
    if reason := _misfit(counts, (torch.int64,), (None,)):
        missing["token_counts"] = f"token_counts {reason}"
        return None
    counts = counts.as_subclass(Tensor)
    if len(counts) == len(rows):
        return counts
    if int(rows.max()) < len(counts) and not torch.equal(rows, torch.arange(len(rows))):
        return counts[rows]
    missing["token_counts"] = f"token_counts has {len(counts)} values for {len(rows)} vectors"
    return None


def window_means(steps: Tensor, losses: Tensor) -> list[float]:
    """Return the mean loss of each 1,000 steps; the last window may be shorter.

    Args:
        steps: int64 ``[R]``, from 1.
        losses: ``[R]``, the loss of each.
    """
    windows = (steps - 1) // WINDOW
    return [losses[windows == window].double().mean().item() for window in windows.unique()]


def final_loss(steps: Tensor, losses: Tensor) -> float:
    """Return the mean loss of the last 1,000 steps, or of all if there are fewer. See :func:`window_means`."""
    return losses[steps > steps[-1:] - WINDOW].double().mean().item()


def verification_figures(trace: Trace, param: str | None = None) -> str:
    """Return the verification figures of a run, one per line: those that its tensors and records allow."""
    try:
        found = find_vectors(trace, param)
    except TraceError:  # a run may record other parameters only
        return "\n".join(_loss_figures(trace.steps, next((trace[name] for name in LOSSES if name in trace), None)))
    return "\n".join(_vector_figures(found) + _loss_figures(found.steps, found.losses))


def _vector_figures(found: Vectors) -> list[str]:
    at = {int(step): record for record, step in enumerate(found.steps)}
    lines = []
    for step in dict.fromkeys((min(at), max(at))):
        vectors = found.vectors[at[step]]
        if len(vectors) > MAX_VECTORS_IN_PAIRS:
            kind, distance = "distance from it", radii(vectors, centroid(vectors)).max().item()
        else:
            kind, distance = "pairwise distance", pairwise_distances(vectors).largest
        norm = vectors.float().mean(dim=0).norm().item()
        lines.append(f"step {step:,}: centroid norm {norm:.6f}, largest {kind} {distance:.6f}")
    fields = found.fields
    if 1 in at and "grad" in fields:
        norms = fields["grad"][at[1]].float().norm(dim=1)
        lines.append(
            f"step 1: row norm of the gradient, mean {norms.mean().item():.6e}, largest {norms.max().item():.6e}"
        )
    if 100 in at and {"exp_avg", "exp_avg_sq"} <= fields.keys():
        momentum, variance = (fields[name][at[100]].float().abs().mean().item() for name in ("exp_avg", "exp_avg_sq"))
        lines.append(f"step 100: mean |momentum| {momentum:.6e}, mean variance {variance:.6e}")
    return lines


def _loss_figures(steps: Tensor, losses: Tensor | None) -> list[str]:
    if losses is None or len(steps) < 2:
        return []
    steps, losses = steps[1:], losses[1:]
    first, last = int(steps[0]), int(steps[-1])
    means = " ".join(f"{mean:.3f}" for mean in window_means(steps, losses))
    return [
        f"loss: {losses[0].item():.4f} at step {first:,}, {losses[-1].item():.4f} at step {last:,}",
        f"mean loss of each {WINDOW:,} steps: {means}",
    ]
