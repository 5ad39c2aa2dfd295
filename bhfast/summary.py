"""The verification figures of a trace, as text."""

from __future__ import annotations

import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.lattice import pairwise_distances
from bhfast.trace import Trace

WINDOW = 1000  # steps whose losses are averaged
REFERENCE = {
    "recorded_steps": (torch.int64, "R"),
    "embeddings": (torch.bfloat16, "RVD"),
    "grads": (torch.bfloat16, "RVD"),
    "momentum": (torch.bfloat16, "RVD"),
    "variance": (torch.bfloat16, "RVD"),
    "losses": (torch.bfloat16, "R"),
    "token_counts": (torch.int64, "V"),
}  # dtype and axes: records, tokens, dimensions


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


def require_reference_trace(trace: Trace) -> None:
    """Raise TraceError if ``trace`` is not of the reference run."""
    optional = "token_counts"
    if missing := [name for name in REFERENCE if name not in trace and name != optional]:
        raise TraceError(f"{trace.path} is not a trace of the reference run: it has no {', '.join(missing)}")
    if odd := _odd(trace):
        raise TraceError(f"{trace.path} is not a trace of the reference run: {odd}")


def _odd(trace: Trace) -> str | None:
    """Return how a tensor of a trace differs from that of the reference run; None if none does."""
    sizes: dict[str, int] = {}  # by axis, from the first tensor that has it
    for name, (dtype, axes) in REFERENCE.items():
        if name not in trace:
            continue
        x = trace[name]
        fits = x.dtype == dtype and len(x.shape) == len(axes)
        if not fits or not all(
            size == sizes.setdefault(axis, size) > 0 for axis, size in zip(axes, x.shape, strict=True)
        ):
            wanted = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            return f"{name} must be {dtype} [{wanted}], got {x.dtype} {list(x.shape)}"
    if bool((trace.steps[1:] <= trace.steps[:-1]).any()) or int(trace.steps[0]) < 0:
        return "recorded_steps must increase"
    return None


def verification_figures(trace: Trace) -> str:
    """Return the verification figures of a run, one per line: those that its tensors and records allow."""
    at = {int(step): record for record, step in enumerate(trace.steps)}
    last = max(at)
    lines = []
    if "embeddings" in trace:
        for step in dict.fromkeys((min(at), last)):
            vectors = trace["embeddings"][at[step]]
            centroid = vectors.float().mean(dim=0).norm().item()
            distance = pairwise_distances(vectors).largest
            lines.append(f"step {step:,}: centroid norm {centroid:.6f}, largest pairwise distance {distance:.6f}")
    if 1 in at and "grads" in trace:
        norms = trace["grads"][at[1]].float().norm(dim=1)
        lines.append(
            f"step 1: row norm of the gradient, mean {norms.mean().item():.6e}, largest {norms.max().item():.6e}"
        )
    if 100 in at and "momentum" in trace and "variance" in trace:
        momentum, variance = (trace[name][at[100]].float().abs().mean().item() for name in ("momentum", "variance"))
        lines.append(f"step 100: mean |momentum| {momentum:.6e}, mean variance {variance:.6e}")
    if len(at) > 1 and "losses" in trace:
        losses, steps = trace["losses"][1:], trace.steps[1:]
        first = int(steps[0])
        lines.append(f"loss: {losses[0].item():.4f} at step {first:,}, {losses[-1].item():.4f} at step {last:,}")
        means = " ".join(f"{mean:.3f}" for mean in window_means(steps, losses))
        lines.append(f"mean loss of each {WINDOW:,} steps: {means}")
    return "\n".join(lines)
