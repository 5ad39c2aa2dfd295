"""The verification figures of a trace, as text."""

from __future__ import annotations

import torch
from torch import Tensor

from bhfast.errors import TraceError
from bhfast.trace import Trace

WINDOW = 1000  # steps whose losses are averaged
ROWS = 256  # vectors whose distances are computed at once


def max_pairwise_distance(vectors: Tensor) -> float:
    """Return the largest L2 distance between two rows of ``[V, D]``, in float32.

    It is computed from differences, not from products, so that identical vectors are at distance 0 exactly.
    """
    x = vectors.float()
    mode = "donot_use_mm_for_euclid_dist"
    return max(torch.cdist(rows, x, compute_mode=mode).max().item() for rows in x.split(ROWS))


def window_means(steps: Tensor, losses: Tensor) -> list[float]:
    """Return the mean loss of each 1000 steps; the last may be of fewer.

    Args:
        steps: int64 ``[R]``, from 1.
        losses: ``[R]``, the loss of each.
    """
    windows = (steps - 1) // WINDOW
    return [losses[windows == window].double().mean().item() for window in windows.unique()]


def require_reference(trace: Trace) -> None:
    """Raise TraceError if it is not a trace of the reference run."""
    wanted = ("recorded_steps", "embeddings", "grads", "momentum", "variance", "losses")
    if missing := [name for name in wanted if name not in trace]:
        raise TraceError(f"{trace.path} is no trace of the reference run: it has no {', '.join(missing)}")


def figures(trace: Trace) -> str:
    """Return the verification figures of a reference run's trace: one line for each that its records hold.

    Raises:
        TraceError: it is not a trace of the reference run.
    """
    require_reference(trace)
    at = {int(step): record for record, step in enumerate(trace.steps)}
    last = max(at)
    lines = []
    for step in dict.fromkeys((0, last)):
        vectors = trace["embeddings"][at[step]]
        centroid = vectors.float().mean(dim=0).norm().item()
        distance = max_pairwise_distance(vectors)
        lines.append(f"step {step:,}: centroid norm {centroid:.6f}, largest pairwise distance {distance:.6f}")
    if 1 in at:
        norms = trace["grads"][at[1]].float().norm(dim=1)
        lines.append(
            f"step 1: row norm of the gradient, mean {norms.mean().item():.6e}, largest {norms.max().item():.6e}"
        )
    if 100 in at:
        momentum, variance = (trace[name][at[100]].float().abs().mean().item() for name in ("momentum", "variance"))
        lines.append(f"step 100: mean |momentum| {momentum:.6e}, mean variance {variance:.6e}")
    if last:
        losses, steps = trace["losses"][1:], trace.steps[1:]
        first = int(steps[0])
        lines.append(f"loss: {losses[0].item():.4f} at step {first:,}, {losses[-1].item():.4f} at step {last:,}")
        means = " ".join(f"{mean:.3f}" for mean in window_means(steps, losses))
        lines.append(f"mean loss of each {WINDOW:,} steps: {means}")
    return "\n".join(lines)
