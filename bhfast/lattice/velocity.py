"""Velocities of tokens: temperatures, parts along and across a direction, and turns."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bhfast.lattice.cloud import Histogram, centered, empty_histogram
from bhfast.lattice.motion import chunks


def velocities(records: Tensor) -> Tensor:
    """Return the differences of consecutive records, in units of the vectors per record.

    Each is one subtraction in float64: exact for bfloat16 and float16, but for values more than 2^44 times apart. If
    only every n-th step was recorded, the n-th part is the mean velocity per step, and speeds are those of the chords.

    Args:
        records: ``[n, V, D]``.

    Returns:
        float64 ``[n - 1, V, D]``.
    """
    return records.double().diff(dim=0)


class Temperatures(NamedTuple):
    """Mean squared velocities, in the square of the velocities' units; float64 ``[...]`` each.

    As in the kinetic theory of gases, with unit mass and without Boltzmann's constant (Chapman and Cowling, The
    Mathematical Theory of Non-Uniform Gases, 3rd ed. 1970, chapter 2): ``total`` is ``bulk`` + ``thermal``.

    Attributes:
        total: the mean over tokens of ``|v|²``.
        bulk: ``|mean over tokens of v|²``, of the motion of all tokens together.
        thermal: the mean over tokens of ``|v - mean v|²``, summed over dimensions. :func:`bhfast.lattice.temperature`
            is its mean over the D dimensions: thermal / D.
    """

    total: Tensor
    bulk: Tensor
    thermal: Tensor

    @property
    def bulk_share(self) -> Tensor:
        """The share ``bulk / total``, from 0 to 1, NaN where nothing moves; float64 ``[...]``."""
        return self.bulk / self.total


def temperatures(velocities: Tensor) -> Temperatures:
    """Return the temperatures of all motion, of the motion of all tokens together, and of the rest.

    Args:
        velocities: ``[..., V, D]``; see :func:`velocities`.
    """
    v = velocities.double()
    return Temperatures(
        total=v.square().sum(-1).mean(-1),
        bulk=v.mean(-2).square().sum(-1),
        thermal=centered(v).square().sum(-1).mean(-1),
    )


class Parts(NamedTuple):
    """Velocities along and across a direction; float64 ``[..., V]`` each.

    Attributes:
        radial: the component along it: positive away from the point, negative towards it.
        tangential: the length of the rest, at least 0.
    """

    radial: Tensor
    tangential: Tensor


def radial_and_tangential(velocities: Tensor, offsets: Tensor) -> Parts:
    """Split velocities into their parts along and across the direction from a point: ``|v|² = radial² + tangential²``.

    For the motion relative to the centroid, from one record to the next:
    ``per_record(lambda w: radial_and_tangential(centered(velocities(w)), centered(w[:-1])), records, overlap=1)``.

    Args:
        velocities: ``[..., V, D]``.
        offsets: where the tokens are, as seen from the point: ``[..., V, D]``.

    Returns:
        NaN for a token at the point itself, from where there is no direction.
    """
    v, offset = velocities.double(), offsets.double()
    direction = offset / torch.linalg.vector_norm(offset, dim=-1, keepdim=True)
    radial = (v * direction).sum(-1)
    return Parts(radial, torch.linalg.vector_norm(v - radial[..., None] * direction, dim=-1))


def turning_angles(velocities: Tensor) -> Tensor:
    """Return the angles between successive velocities of each token, in radians from 0 to π.

    By the formula of Kahan, "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?", 2006,
    "Mangled Angles", which is accurate for all angles.

    Args:
        velocities: ``[n, V, D]``.

    Returns:
        float64 ``[n - 1, V]``; NaN if a token does not move in one of the two.
    """
    v = velocities.double()
    units = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    apart, together = (torch.linalg.vector_norm(x, dim=-1) for x in (units[1:] - units[:-1], units[1:] + units[:-1]))
    return 2 * torch.atan2(apart, together)


def turning_histogram(records: Tensor, bins: int = 36) -> Histogram:
    """Count the angles between successive velocities of all tokens, in constant memory; see :func:`turning_angles`.

    Args:
        records: ``[R, V, D]``.
        bins: how many, from 0 to π. A token that does not move has no angle, and is not counted.
    """
    histogram = empty_histogram(0, math.pi, bins)
    for _, chunk in chunks(records, overlap=2):
        histogram.add(turning_angles(velocities(chunk)))
    return histogram
