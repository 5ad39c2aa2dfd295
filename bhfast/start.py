"""Where the token vectors start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bhfast.errors import ConfigError

STARTS = ("black-hole", "gaussian", "sphere")
ROUNDINGS = ("per-op", "once")


@dataclass(frozen=True)
class Start:
    """The start of a run's token vectors.

    - ``black-hole``: all at one center, whose coordinates are drawn from N(0, ``init_scale``), plus noise from
      N(0, ``sigma``) in each coordinate.
    - ``gaussian``: noise from N(0, ``sigma``) around 0.
    - ``sphere``: around the center of a black hole, all at the distance ``sigma``, in directions drawn uniformly.
    - ``FILE.safetensors`` or ``FILE.safetensors:NAME``: the vectors of a file, bfloat16 or float32 ``[V, D]``, plus
      noise from N(0, ``sigma``).

    Attributes:
        kind: one of ``STARTS``, or a file.
        sigma: the spread around the center.
        init_scale: the spread of the center's coordinates.
        center_norm: if not 0, the center is scaled to this L2 norm, in float32.
        rounding: with ``per-op``, center and noise are rounded to the parameters' dtype before they are added in it;
            with ``once``, the float32 noise is added to the rounded center in float32, and the sum is rounded.

    Raises:
        ConfigError: the kind is unknown.
    """

    kind: str = "black-hole"
    sigma: float = 0.0
    init_scale: float = 0.02
    center_norm: float = 0.0
    rounding: str = "per-op"

    def __post_init__(self) -> None:
        if self.kind not in STARTS and ".safetensors" not in self.kind:
            raise ConfigError(
                f"start must be one of {', '.join(STARTS)}, or a FILE.safetensors with a tensor [V, D], "
                f"got {self.kind!r}"
            )
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"start_rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.center_norm and self.kind not in ("black-hole", "sphere"):
            raise ConfigError(f"center_norm is for the starts black-hole and sphere, not for {self.kind}")

    def tokens(
        self, vocab_size: int, hidden_dim: int, generator: torch.Generator, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the vectors.

        The center is drawn first, then the noise, also where they are not used: runs with the same seed differ only in
        what their settings say.

        Args:
            vocab_size: V, how many.
            hidden_dim: D, their dimension.
            generator: on the CPU.
            dtype: of the result.

        Returns:
            The vectors ``[V, D]``, and the center ``[D]``; None if they come from a file.

        Raises:
            ConfigError: the file cannot be read, or has no such tensor.
        """
        center = torch.randn(hidden_dim, generator=generator) * self.init_scale
        noise = torch.randn(vocab_size, hidden_dim, generator=generator)
        if self.kind == "sphere":
            noise = noise / noise.norm(dim=1, keepdim=True)
        noise = noise * self.sigma
        if self.kind == "gaussian":
            center.zero_()
        if self.center_norm:
            center *= self.center_norm / center.norm()
        given = None if self.kind in STARTS else _read(self.kind, vocab_size, hidden_dim)
        origin = (center if given is None else given).to(dtype)
        if self.rounding == "once":
            result = (origin.float() + noise).to(dtype)
        else:
            result = (origin + noise.to(dtype)).expand(vocab_size, hidden_dim)
        return result, origin if given is None else None


def _read(kind: str, vocab_size: int, hidden_dim: int) -> Tensor:
    """Return the tensor ``[V, D]`` that ``FILE.safetensors`` or ``FILE.safetensors:NAME`` names."""
    path, name = kind, ""
    if not Path(kind).is_file():
        path, _, name = kind.rpartition(":")
    try:
        with safe_open(path or kind, "pt") as file:
            names = [name] if name else list(file.keys())
            shapes = {own: file.get_slice(own).get_shape() for own in names}
            fitting = [own for own, shape in shapes.items() if shape == [vocab_size, hidden_dim]]
            if len(fitting) == 1:
                tensor = file.get_tensor(fitting[0])
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read the start {kind}: {error}") from None
    if len(fitting) != 1:
        found = ", ".join(f"{own} {shape}" for own, shape in list(shapes.items())[:8])
        raise ConfigError(
            f"the start {kind} must have one tensor [{vocab_size}, {hidden_dim}]; it has {found}; "
            "FILE.safetensors:NAME names one of several"
        )
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"the start {kind} must be bfloat16 or float32, got {tensor.dtype}")
    return tensor
