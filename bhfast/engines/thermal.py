"""Thermal noise: random changes of token vectors between steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ThermalNoise:
    """Noise from N(0, ``sigma``), added to rows of a parameter after each step.

    The noise of a step depends only on the seed and the step, so a run that goes on elsewhere has the same. It comes
    from the Philox generator (Salmon et al., SC 2011), whose counter is the step.

    Attributes:
        param: the token vectors, ``[V, D]``.
        rows: int64 ``[n]``.
        sigma: standard deviation of each coordinate.
        seed: 0 to 2^63 - 1.
    """

    param: Tensor
    rows: Tensor
    sigma: float
    seed: int

    @torch.no_grad()
    def apply(self, step: int) -> None:
        """Add the noise of ``step``, in float32, and round the sum once."""
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        noise = generator.standard_normal((len(self.rows), self.param.size(1)), np.float32)
        moved = self.param[self.rows].float() + self.sigma * torch.from_numpy(noise).to(self.param.device)
        self.param.index_copy_(0, self.rows, moved.to(self.param.dtype))
