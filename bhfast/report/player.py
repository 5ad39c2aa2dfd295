"""The data of the player: a sample of a trace, projected to three dimensions, in one small safetensors file.

Only the sampled records, and the one before each, are read, so that memory does not grow with the trace. The file is
what ``Player.load`` in ``web/player.js`` takes: within a page, or over HTTP while a run goes on.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from bhfast import lattice
from bhfast.errors import BhfastError
from bhfast.report.survey import groups_of, log_spaced
from bhfast.summary import Vectors

MAX_RECORDS = 512  # shown: half of them evenly spaced, half in the logarithm of their number
MIN_RECORDS = 32  # where TOKEN_RECORDS allows fewer
MAX_TOKENS = 10_000  # shown
TOKEN_RECORDS = 1 << 20  # shown tokens times shown records
LATTICE_VALUES = 1 << 22  # displacements of single coordinates
MAX_DETAILED = 256  # tokens with neighbours and a lattice view
LOSSES = 2000  # shown
SMOOTHING = 100  # records whose losses are averaged
NEIGHBOURS = 3  # nearest ones
LEVELS = 65534  # of a quantised value; the next one, 65535, stands for what is not finite
NONE = 65535  # in place of the number of a token
CHANNELS = 5  # of a token in a record: three coordinates, the distance from the centroid, that from the origin
AXIS_ROWS = 2048  # vectors of which axes are computed in more dimensions than that
VALUES = 1 << 17  # coordinates processed at once: as float64 they fit into the cache of a core


@dataclass(frozen=True)
class PlayerData:
    """What the player shows: S records of N tokens in D dimensions, and T of the tokens in detail.

    Attributes:
        info: JSON: the ``names`` of the tokens, those of the ``groups``, the three ``axes``, ``notes`` on what is
            sampled or missing, the size of the whole trace.
        tensors: by name:

            - ``steps``, ``records``: int32 ``[S]``.
            - ``rows``: of the parameter, int32 ``[N]``. ``group``: an index into ``groups``, uint8 ``[N]``.
            - ``cloud``: uint16 ``[S, 5, N]``: the coordinates on the three axes, relative to the centroid of all
              tokens; the distances from the centroid and from the origin. A value is ``ranges[s, c, 0]`` plus that many
              65,534ths of ``ranges[s, c, 1]``; 65,535 stands for a value that is not finite.
            - ``ranges``: float32 ``[S, 5, 2]``.
            - ``displacement``: from the record before, L2, in ulp: bfloat16 ``[S, N]``; NaN for the first record.
            - ``cell``: the first shown token with the same vector: uint16 ``[S, N]``.
            - ``distinct``: how many vectors are distinct, of all tokens, then of each group: int32 ``[S, G]``.
            - ``detailed``: the T tokens, as indices of shown ones: int32 ``[T]``.
            - ``lattice``: their displacements in ulp from the record before: bfloat16 ``[T, S, D]``.
            - ``neighbours``, ``distances``: the nearest shown tokens that are not at the same point, one of each point:
              uint16 and float32 ``[S, T, 3]``; 65,535 for none.
            - ``life``: the last early, midlife and late step: int32 ``[3, N]``; only if it is known.
            - ``loss_steps``, ``losses``: int32 ``[L]``; float32 ``[2, L]``, the loss of the step and the mean of the
              last 100 records; only if they were recorded.
    """

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def pack(self) -> bytes:
        """Return all of it as a safetensors file, compressed by gzip, the same bytes every time."""
        content = save(self.tensors, {"player": json.dumps(self.info)})
        return gzip.compress(content, 6, mtime=0)


def player_data(
    found: Vectors, names: Sequence[str], life: lattice.Life | None = None, axes: Sequence[int] | None = None
) -> PlayerData:
    """Sample the vectors of a trace.

    Args:
        found: the vectors: of a finished trace, or of a run that goes on.
        names: of all V tokens; see :func:`bhfast.report.names.token_names`.
        life: of all V tokens; it takes a walk through all records. None: the player does without phases.
        axes: three dimensions on which to look at the cloud; None for the principal axes of the last record.

    Raises:
        BhfastError: ``axes`` are not three dimensions of the vectors.
    """
    count, tokens, dim = found.vectors.shape
    shown = _evenly(tokens, MAX_TOKENS)
    records = sampled_records(count, max(MIN_RECORDS, min(MAX_RECORDS, TOKEN_RECORDS // len(shown))))
    detailed = _evenly(len(shown), max(1, min(MAX_DETAILED, LATTICE_VALUES // (len(records) * dim))))
    groups = groups_of(found)
    directions, labels = _directions(found, shown, axes)
    tensors = _frames(found, records, shown, detailed, groups, directions)
    tensors |= {
        "steps": found.steps[records].int(),
        "records": records.int(),
        "rows": found.rows[shown].int(),
        "group": sum((i * mask[shown] for i, mask in enumerate(groups.values())), torch.zeros(len(shown))).byte(),
        "detailed": detailed.int(),
    }
    if life is not None:
        tensors["life"] = torch.stack([last[shown] for last in life]).int()
    if found.losses is not None and count > 1:
        tensors |= _losses(found)
    info = {
        "title": found.trace.path.name,
        "param": found.param,
        "dtype": str(found.vectors.dtype).removeprefix("torch."),
        "names": [names[i] for i in shown.tolist()],
        "groups": list(groups),
        "distinct": ["all", *(name for name in groups if name != "all")],
        "axes": labels,
        "records": count,
        "tokens": tokens,
        "last_step": int(found.steps[-1]),
        "is_live": found.trace.is_live,
        "notes": _notes(found, len(records), len(shown), len(detailed), has_life=life is not None),
    }
    return PlayerData(info, {name: x.contiguous() for name, x in tensors.items()})


def sampled_records(count: int, most: int) -> Tensor:
    """Return indices of at most ``most`` of ``count`` records, the first and the last among them.

    Half of them are evenly spaced, half in the logarithm of their number: densely at the start.
    """
    if count <= most:
        return torch.arange(count)
    return torch.cat([log_spaced(count, most // 2), _evenly(count, most - most // 2)]).unique()


def _evenly(count: int, most: int) -> Tensor:
    """Return at most ``most`` of ``count`` indices, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def _notes(found: Vectors, records: int, shown: int, detailed: int, *, has_life: bool) -> list[str]:
    count, tokens = found.vectors.shape[:2]
    notes = []
    if records < count:
        notes.append(f"{records:,} of {count:,} records are shown: half evenly spaced, half denser at the start.")
    if shown < tokens:
        notes.append(
            f"{shown:,} of {tokens:,} tokens are shown, evenly spaced. Black holes and neighbours are of those; the "
            "number of distinct vectors is of all."
        )
    if detailed < shown:
        notes.append(f"{detailed:,} of the {shown:,} tokens have neighbours and a lattice view, evenly spaced.")
    if not has_life:
        notes.append("Left out: phases of life, which take a walk through all records.")
    reasons = {"losses": "loss", "token_counts": "trained and dead tokens apart"}
    notes += [f"Left out: {what}: {found.missing[key]}." for key, what in reasons.items() if key in found.missing]
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Records


def _frames(
    found: Vectors, records: Tensor, shown: Tensor, detailed: Tensor, groups: dict[str, Tensor], directions: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of :class:`PlayerData` that have a row for each record."""
    frames = [
        _frame(found, record, shown, detailed, [mask for name, mask in groups.items() if name != "all"], directions)
        for record in records.tolist()
    ]
    stacked = {name: torch.stack([frame[name] for frame in frames]) for name in frames[0]}
    return {**stacked, "lattice": stacked["lattice"].transpose(0, 1)}


def _frame(
    found: Vectors, record: int, shown: Tensor, detailed: Tensor, groups: list[Tensor], directions: Tensor
) -> dict[str, Tensor]:
    whole = _record(found, record)
    fingerprints = lattice.fingerprints(whole)
    masks = [torch.ones_like(groups[0]) if groups else slice(None), *groups]
    vectors = whole[shown]
    center = _by_rows(whole, lambda part: part.double().sum(0, keepdim=True)).sum(0) / len(whole)
    channels = _by_rows(vectors, lambda part: _channels(part.double(), center, directions))
    cloud, ranges = _quantised(channels.T)
    cells = lattice.cells(vectors)
    near, distances = _neighbours(vectors, cells, detailed)
    before = _record(found, record - 1)[shown] if record else vectors
    moved = _by_rows(torch.stack([before, vectors], 1), lambda part: _norm(part[:, 0], part[:, 1]))
    moves = lattice.displacement(before[detailed], vectors[detailed])
    if not record:
        moved, moves = moved.fill_(math.nan), moves.fill_(math.nan)
    return {
        "cloud": cloud,
        "ranges": ranges,
        "displacement": moved.bfloat16(),
        "lattice": moves.bfloat16(),
        "cell": cells.first[cells.cell].int().to(torch.uint16),
        "distinct": torch.stack([lattice.count_distinct_values(fingerprints[mask]) for mask in masks]).int(),
        "neighbours": near,
        "distances": distances,
    }


def _record(found: Vectors, record: int) -> Tensor:
    return found.vectors[record].as_subclass(Tensor)


def _by_rows(vectors: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to some rows at a time, so that little is in memory as float64 at once."""
    rows = max(1, VALUES // vectors[0].numel())
    return torch.cat([function(part) for part in vectors.split(rows)])


def _norm(before: Tensor, after: Tensor) -> Tensor:
    return lattice.norms(lattice.displacement(before, after)).l2


def _channels(vectors: Tensor, center: Tensor, directions: Tensor) -> Tensor:
    """Return coordinates, distance from the centroid, and distance from the origin: ``[n, 5]``."""
    offsets = vectors - center
    lengths = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (offsets, vectors)]
    return torch.cat([offsets @ directions.T, *lengths], 1)


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of ``[C, N]`` as ``cloud`` and ``ranges`` of :class:`PlayerData`."""
    is_finite = values.isfinite()
    low = values.where(is_finite, math.inf).amin(1, keepdim=True).nan_to_num(0, 0, 0)
    high = values.where(is_finite, -math.inf).amax(1, keepdim=True).nan_to_num(0, 0, 0)
    low = low.float().double()  # as it is stored
    size = (high - low).clamp(min=0).float().double()
    steps = ((values - low) / size.where(size > 0, 1) * LEVELS).clamp(0, LEVELS).round()
    return steps.where(is_finite, NONE).int().to(torch.uint16), torch.cat([low, size], 1).float()


def _neighbours(vectors: Tensor, cells: lattice.Cells, detailed: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``neighbours`` and ``distances`` of :class:`PlayerData` in one record."""
    points = vectors[cells.first].double()
    origin = points[0].nan_to_num(0, 0, 0)  # not far from the others: fewer digits cancel
    points, own = points - origin, vectors[detailed].double() - origin
    apart = (points.square().sum(1) - 2 * own @ points.T).nan_to_num(
        math.inf, math.inf, math.inf
    )  # for each, up to |own|²
    apart[torch.arange(len(own)), cells.cell[detailed]] = math.inf
    count = min(NEIGHBOURS, len(points))
    nearest = apart.topk(count, largest=False)
    exact = torch.linalg.vector_norm(points[nearest.indices] - own[:, None], dim=-1)
    exact = exact.where(nearest.values.isfinite(), math.inf)
    order = exact.argsort(stable=True)
    near = torch.full((len(own), NEIGHBOURS), NONE)
    distances = torch.full((len(own), NEIGHBOURS), math.inf)
    near[:, :count] = cells.first[nearest.indices.gather(1, order)].where(exact.gather(1, order).isfinite(), NONE)
    distances[:, :count] = exact.gather(1, order)
    return near.int().to(torch.uint16), distances


def _losses(found: Vectors) -> dict[str, Tensor]:
    assert found.losses is not None
    losses = found.losses[:].as_subclass(Tensor).double()[1:]
    shown = sampled_records(len(losses), LOSSES)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), losses.cumsum(0)])
    width = (shown + 1).clamp(max=SMOOTHING)
    means = (sums[shown + 1] - sums[shown + 1 - width]) / width
    return {"loss_steps": found.steps[1:][shown].int(), "losses": torch.stack([losses[shown], means]).float()}


# ---------------------------------------------------------------------------------------------------------------------
# Axes


def _directions(found: Vectors, shown: Tensor, axes: Sequence[int] | None) -> tuple[Tensor, list[str]]:
    """Return three unit vectors, float64 ``[3, D]``, and their names. A direction is 0 where there is none."""
    dim = found.vectors.shape[2]
    directions = torch.zeros(3, dim, dtype=torch.float64)
    if axes is not None:
        if len(axes) != 3 or len(set(axes)) != 3 or not all(0 <= axis < dim for axis in axes):
            raise BhfastError(
                f"axes must be three different dimensions from 0 to {dim - 1}, got {', '.join(map(str, axes))}"
            )
        directions[torch.arange(3), torch.tensor(axes)] = 1
        return directions, [f"dimension {axis}" for axis in axes]
    last = _record(found, -1)
    rows = shown if dim <= AXIS_ROWS else shown[_evenly(len(shown), AXIS_ROWS)]
    principal, shares = principal_axes(last[rows])
    directions[: len(principal)] = principal
    names = [f"axis {i + 1}: {share:.0%} of the variance" for i, share in enumerate(shares)]
    return directions, names + [""] * (3 - len(names))


def principal_axes(vectors: Tensor, count: int = 3) -> tuple[Tensor, list[float]]:
    """Return the first principal axes of ``[V, D]``, and their shares of the variance; none if the cloud has no extent.

    The sum of the coordinates of an axis is positive, as its sign is arbitrary.

    Returns:
        float64 ``[n, D]``, and n numbers; n is ``count`` or, if that is less, the number of axes with an extent.
    """
    finite = vectors[vectors.isfinite().all(1)].double()
    if len(finite) < 2:
        return vectors.new_zeros(0, vectors.shape[1], dtype=torch.float64), []
    values, axes = torch.linalg.svd(finite - finite.mean(0), full_matrices=False)[1:]
    has_extent = values[:count] > values[0] * 1e-12
    axes, variances = axes[:count][has_extent], values.square()
    axes = torch.where(axes.sum(1, keepdim=True) < 0, -axes, axes)
    return axes, (variances[:count][has_extent] / variances.sum()).tolist()
