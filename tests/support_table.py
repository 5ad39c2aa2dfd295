"""What is refused, and what a replay knows, of the matrix of optimizers and frameworks; as a table for the documents.

python tests/support_table.py
"""

from __future__ import annotations

import torch
from matrix_run import FRAMEWORKS, OPTIMIZERS

DTENSOR = [name for name, how in FRAMEWORKS.items() if how.wrap in ("fsdp2", "tp")]
TENSOR_PARALLEL = [name for name, how in FRAMEWORKS.items() if how.wrap == "tp"]
KNOWN = ("FusedAdam", "AdamW", "AdamW foreach", "AdamW fused")
MIXED = "got mixed torch.Tensor and DTensor"  # torch's own messages
IN_PLACE = "in-place operations that require placement changes"
REFUSED = {
    **{
        (optimizer, framework): "keyframes need steps that can be rebuilt to the bit: "
        for optimizer in OPTIMIZERS
        for framework, how in FRAMEWORKS.items()
        if how.keyframes and optimizer not in KNOWN
    },
    **{(optimizer, "FSDP1"): "FullyShardedDataParallel keeps flat shards in place of par" for optimizer in OPTIMIZERS},
    **{("FusedAdam", framework): "FusedAdam does not take DTensor parameters" for framework in DTENSOR},
}
REFUSED_BY_TORCH = {
    **{("Adafactor", framework): IN_PLACE for framework in DTENSOR},
    **{
        (optimizer, framework): MIXED for optimizer in ("AdamW foreach", "AdamW fused") for framework in TENSOR_PARALLEL
    },
}
UNSCALED_INSIDE = ("AdamW fused", "AMP float16 + GradScaler")  # by the step itself
NEEDS_EXACT_ROOTS = ("AdamW", "AdamW foreach")  # which torch's square root of float32 is not on every CPU


def is_replayed(optimizer: str, framework: str, *, has_exact_roots: bool = False) -> bool:
    """Return whether ``verify`` replays a cell, where torch's square roots of float32 are exact, or not."""
    how = FRAMEWORKS[framework]
    if optimizer not in KNOWN or how.compiles:
        return False
    needs_roots = optimizer in NEEDS_EXACT_ROOTS and how.dtype == torch.float32
    return (optimizer, framework) != UNSCALED_INSIDE and (has_exact_roots or not needs_roots)


def support_table() -> str:
    """Return the table, in Markdown."""
    lines = [f"| | {' | '.join(FRAMEWORKS)} |", "|---" * (len(FRAMEWORKS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(name, framework) for framework in FRAMEWORKS)} |" for name in OPTIMIZERS]
    return "\n".join(lines) + "\n"


def _cell(optimizer: str, framework: str) -> str:
    if (optimizer, framework) in REFUSED:
        return "refused"
    if (optimizer, framework) in REFUSED_BY_TORCH:
        return "torch refuses"
    return "replayed" if is_replayed(optimizer, framework) else "recorded"


if __name__ == "__main__":
    print(support_table(), end="")
