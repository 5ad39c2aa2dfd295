"""Which tensor of another program's file is which tensor of a trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bhfast.errors import ConfigError, TraceError
from bhfast.foreign.sources import Source

# For each tensor of a trace of the reference run: its axes, and names that other programs give it, in lower case.
# Records, tokens, dimensions: R, V, D.
USUAL = {
    "recorded_steps": ("R", ("steps", "step", "timesteps", "step_numbers")),
    "embeddings": ("RVD", ("embedding", "w", "wte", "token_embeddings", "embedding_history", "w_history", "weights")),
    "grads": ("RVD", ("grad", "gradients", "gradient", "g", "dw", "w_grad", "grad_w", "grad_history")),
    "momentum": ("RVD", ("exp_avg", "m", "adam_m", "first_moment", "momentum_history")),
    "variance": ("RVD", ("exp_avg_sq", "v", "adam_v", "second_moment", "variance_history")),
    "logits": ("RV", ("logit", "logits_history")),
    "losses": ("R", ("loss", "train_loss", "train_losses", "loss_history")),
    "learning_rates": ("R", ("lrs", "lr", "lr_history")),
    "grad_norms": ("R", ("grad_norm",)),
    "clip_coefs": ("R", ("clip_coef",)),
    "token_counts": ("V", ("counts", "token_frequencies")),
}


def parse_keys(text: str) -> dict[str, str]:
    """Parse ``embeddings=W,grads=G``: for each name in the trace, that in the file.

    Raises:
        ConfigError: it is not of this form, or a name stands twice.
    """
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, key = part.partition("=")
        if not (name and equals and key):
            raise ConfigError(f"--keys must look like embeddings=W,grads=G, got {part!r}")
        if name in found or key in found.values():
            raise ConfigError(f"--keys has {name if name in found else key!r} twice")
        found[name] = key
    return found


def map_names(source: Source, keys: Mapping[str, str]) -> dict[str, str]:
    """Return the name in the file of each tensor of the trace: those given, those with usual names, and all others.

    Tensors that nothing is known of keep their names. One whose name is taken is added to ``source.left_out``.

    Args:
        keys: for names in the trace, those in the file.

    Raises:
        TraceError: the file has no tensor of a given name, no embeddings, or several tensors that may be the same one.
    """
    if missing := [key for key in keys.values() if key not in source.tensors]:
        raise TraceError(f"{source.path} has no {', '.join(missing)}; it has {_listed(source.tensors)}")
    found = dict(keys)
    for name in USUAL:
        if name not in found and (key := _guess(source, name, set(found.values()))):
            found[name] = key
    if "embeddings" not in found:
        raise TraceError(
            f"{source.path}: which tensor are the embeddings? Say it with --keys embeddings=NAME; "
            f"it has {_listed(source.tensors)}"
        )
    for key in source.tensors:
        if key in found.values():
            continue
        if key in found:
            source.left_out[key] = f"{found[key]} takes its name"
        else:
            found[key] = key
    return found


def _guess(source: Source, name: str, taken: set[str]) -> str | None:
    """Return the tensor of the file that is most likely ``name``; None if none is."""
    axes, usual = USUAL[name]
    fitting = [key for key, x in source.tensors.items() if key not in taken and x.dim() == len(axes)]
    exact = [key for key in fitting if key.rpartition("/")[2] == name]
    found = exact or [key for key in fitting if _simplified(key) in usual]
    if len(found) > 1:
        raise TraceError(
            f"{source.path}: {name} may be any of {', '.join(found)}; say which with --keys {name}={found[0]}"
        )
    return found[0] if found else None


def _simplified(key: str) -> str:
    return re.sub(r"\W+", "_", key.rpartition("/")[2].lower()).strip("_")


def _listed(tensors: Mapping[str, Any] | Iterable[str]) -> str:
    return ", ".join(tensors) or "no tensors"
