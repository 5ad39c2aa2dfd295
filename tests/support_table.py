"""What is refused, and what a replay knows, of the matrix of optimizers and frameworks; as a table for the documents.

python tests/support_table.py
"""

from __future__ import annotations

from matrix_run import FRAMEWORKS, OPTIMIZERS

DTENSOR = ("FSDP2", "FSDP2, accumulation, clipping", "tensor parallel")
MIXED = "got mixed torch.Tensor and DTensor"  # torch's own messages
IN_PLACE = "in-place operations that require placement changes"
REFUSED = {
    **{(optimizer, "FSDP1"): "FullyShardedDataParallel keeps flat shards in place of par" for optimizer in OPTIMIZERS},
    **{("FusedAdam", framework): "FusedAdam does not take DTensor parameters" for framework in DTENSOR},
}
REFUSED_BY_TORCH = {
    **{("Adafactor", framework): IN_PLACE for framework in DTENSOR},
    ("AdamW foreach", "tensor parallel"): MIXED,
    ("AdamW fused", "tensor parallel"): MIXED,
}
REPLAYED = ("FusedAdam", "AdamW", "AdamW foreach", "AdamW fused")
# Elsewhere parameters are float32, whose square root is not torch's to the bit; or the compiler made the arithmetic.
REPLAYED_IN = (
    *("plain", "accumulation", "clipping", "accelerate", "DDP", "DDP, accumulation, clipping"),
    *("FSDP2", "FSDP2, accumulation, clipping", "tensor parallel"),
)


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
    return "replayed" if optimizer in REPLAYED and framework in REPLAYED_IN else "recorded"


if __name__ == "__main__":
    print(support_table(), end="")
