"""The lattice functions, against slow and obvious computations."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bhfast import lattice
from bhfast.lattice import adjacency, motion

EVERY_VALUE = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
FINITE = EVERY_VALUE[EVERY_VALUE.isfinite()]

# Finite values in which zeros, subnormal numbers, the largest ones and both sides of powers of two are frequent.
edges = st.sampled_from(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x00FF, 0x3F7F, 0x3F80, 0xBF7F, 0xBF80, 0x7F7F]
)
bits = st.one_of(edges, st.integers(0, 0xFFFF)).filter(lambda b: b & 0x7F80 != 0x7F80)


def bfloat16(values: list) -> torch.Tensor:
    return torch.tensor(np.array(values, dtype=np.uint16)).view(torch.bfloat16)


def exact(x: torch.Tensor) -> Fraction:
    return Fraction(x.double().item())


def vectors_near(points: list[list[int]]) -> torch.Tensor:
    """Vectors with these integer coordinates."""
    c = torch.tensor(points)
    return bfloat16(torch.where(c < 0, -c | 0x8000, c).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates


def test_every_coordinate_is_one_from_the_next() -> None:
    order = FINITE[FINITE != 0].double().unique()
    order = torch.cat([order[order < 0], torch.zeros(1, dtype=torch.float64), order[order > 0]])
    numbers = lattice.coordinate(order.bfloat16()).int()
    assert (numbers.diff() == 1).all()
    assert numbers[order == 0] == 0
    assert lattice.coordinate(torch.tensor(-0.0, dtype=torch.bfloat16)) == 0


def test_ulp_of_every_value() -> None:
    spacing = lattice.ulp(FINITE)
    magnitude = FINITE.double().abs()
    grid = magnitude.unique()
    below_top = magnitude < grid[-1]
    step = grid[(torch.searchsorted(grid, magnitude) + 1).clamp(max=len(grid) - 1)] - magnitude
    assert torch.equal(spacing[below_top], step[below_top])
    assert (spacing[~below_top] == 2.0**120).all()
    assert lattice.ulp(EVERY_VALUE[~EVERY_VALUE.isfinite()]).isnan().all()


@given(st.lists(st.tuples(bits, bits), min_size=1, max_size=20))
def test_displacement(pairs: list[tuple[int, int]]) -> None:
    before, after = bfloat16([a for a, _ in pairs]), bfloat16([b for _, b in pairs])
    for start, end, moved in zip(before, after, lattice.displacement(before, after), strict=True):
        exponent = (start.view(torch.int16).item() >> 7) & 0xFF
        wanted = (exact(end) - exact(start)) / Fraction(2) ** (max(exponent, 1) - 134)
        assert moved.item() == pytest.approx(float(wanted), rel=2**-50)  # the difference alone may be rounded


def test_norms() -> None:
    l1, l2, linf = lattice.norms(torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64))
    assert (l1.tolist(), l2.tolist(), linf.tolist()) == ([7, 0], [5, 0], [4, 0])


@pytest.mark.parametrize("function", [lattice.ulp, lattice.coordinate, lambda x: lattice.displacement(x.bfloat16(), x)])
def test_other_dtypes_have_no_lattice(function) -> None:
    with pytest.raises(TypeError, match=r"the lattice is that of bfloat16, float16 or float32, got torch\.float64"):
        function(torch.zeros(3, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Adjacency

places = st.one_of(st.integers(-3, 3), st.integers(125, 131))
points = st.integers(1, 4).flatmap(lambda dim: st.lists(st.lists(places, min_size=dim, max_size=dim), max_size=40))


def slow_cells(c: list[tuple[int, ...]]) -> tuple[list[int], list[int], list[int]]:
    first = {}
    for i, point in enumerate(c):
        first.setdefault(point, i)
    numbers = {point: n for n, point in enumerate(first)}
    return [numbers[point] for point in c], list(first.values()), [Counter(c)[point] for point in first]


def slow_neighbours(c: list[tuple[int, ...]]) -> dict[tuple[int, int], int]:
    first = slow_cells(c)[1]
    found = {}
    for i, j in itertools.combinations(first, 2):
        apart = [abs(a - b) for a, b in zip(c[i], c[j], strict=True)]
        if max(apart) == 1:
            found[i, j] = sum(apart)
    return found


def slow_components(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    label = list(range(count))
    for _ in range(count):
        for i, j in pairs:
            label[i] = label[j] = min(label[i], label[j])
    return label


@pytest.mark.parametrize("leaf", [2, 256])
@settings(deadline=None)
@given(points, st.booleans())
def test_cells_neighbours_and_components(leaf: int, c: list[list[int]], collide: bool) -> None:
    vectors = vectors_near(c) if c else torch.empty(0, 3, dtype=torch.bfloat16)
    vectors[vectors == 0] *= -1  # to be taken for zeros all the same
    c = [tuple(point) for point in c]
    nothing = mock.patch.object(adjacency, "_hash_factors", lambda dim: torch.zeros(dim, dtype=torch.int64))
    with mock.patch.object(adjacency, "LEAF_SIZE", leaf), nothing if collide else mock.MagicMock():
        found, near = lattice.cells(vectors), lattice.neighbours(vectors)
    assert tuple(x.tolist() for x in found) == slow_cells(c)
    pairs = [tuple(pair) for pair in near.pairs.tolist()]
    assert dict(zip(pairs, near.axis_counts.tolist(), strict=True)) == slow_neighbours(c)
    assert lattice.components(len(c), near.pairs).tolist() == slow_components(len(c), pairs)


def test_black_holes_by_size() -> None:
    vectors = vectors_near([[5], [1], [7], [1], [5], [5], [9]])
    found = lattice.cells(vectors)
    assert found.first[found.black_holes].tolist() == [0, 1]
    assert found.multiplicity[found.black_holes].tolist() == [3, 2]


@given(bits, bits)
def test_neighbours_across_exponents_and_zero(one: int, other: int) -> None:
    values = bfloat16([one, other])
    grid = FINITE.double().unique()
    ranks = torch.searchsorted(grid, values.double())
    near = lattice.neighbours(values[:, None])
    assert len(near.pairs) == (abs(int(ranks[0] - ranks[1])) == 1)


def test_a_long_chain_is_one_component() -> None:
    vectors = vectors_near([[i, 0] for i in torch.randperm(3000).tolist()])
    near = lattice.neighbours(vectors)
    assert len(near.pairs) == 2999
    assert (lattice.components(3000, near.pairs) == 0).all()


def test_what_is_planted_in_many_dimensions_is_found(generator) -> None:
    """5,000 vectors, no two near one another but those made so: black holes, steps along one axis and along many."""
    vectors = (torch.randn(5000, 300, generator=generator) * 0.02).bfloat16()
    rows = torch.randperm(5000, generator=generator)
    hole, rows = rows[:40], rows[40:]
    vectors[hole] = vectors[hole[0]].clone()
    wanted = {}
    for start, end, axes in zip(rows[:60:2].tolist(), rows[1:60:2].tolist(), [1, 2, 300] * 10, strict=True):
        point = lattice.coordinate(vectors[start]).int()
        point[torch.randperm(300, generator=generator)[:axes]] += 1
        vectors[end] = vectors_near(point.tolist())
        wanted[min(start, end), max(start, end)] = axes
    near = lattice.neighbours(vectors)
    assert {tuple(p): a for p, a in zip(near.pairs.tolist(), near.axis_counts.tolist(), strict=True)} == wanted
    found = lattice.cells(vectors)
    assert found.multiplicity[found.black_holes].tolist() == [40]
    assert sorted(hole.tolist()) == (found.cell == found.black_holes[0]).nonzero()[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Motion


def walk(steps: list[list[list[int]]]) -> torch.Tensor:
    """Records ``[R, V, D]`` of tokens that begin at 1 and move by so many ulp along each axis: ``[V][R - 1][D]``."""
    ups = torch.tensor(steps, dtype=torch.float64).cumsum(1)
    path = 1 + torch.cat([torch.zeros_like(ups[:, :1]), ups], 1).transpose(0, 1) / 128
    assert torch.equal(path.bfloat16().double(), path)
    return path.bfloat16()


def test_life() -> None:
    still, small, long = [0, 0, 0, 0], [1, 1, 0, 0], [2, 0, 0, 0]
    longer = [2, 1, 0, 0]  # L2 above 2 = √D
    path = walk(
        [
            [longer, still, small, still, still],
            [still, longer, still, long, small],
            [still] * 5,
            [small, still, longer, still, still],
        ]
    )
    steps = torch.tensor([0, 10, 20, 30, 40, 50])
    found = lattice.life(path, steps)
    assert found.last_early_step.tolist() == [10, 20, 0, 30]
    assert found.last_midlife_step.tolist() == [10, 40, 0, 30]
    assert found.last_late_step.tolist() == [30, 50, 0, 30]
    assert found.frozen(50).tolist() == [True, False, True, True]
    assert found.phase(steps)[:, 0].tolist() == [0, 0, 2, 2, 3, 3]
    assert found.phase(steps)[:, 1].tolist() == [0, 0, 0, 1, 1, 2]
    assert found.phase(torch.tensor([1]))[:, 2].tolist() == [3]


def test_a_token_that_is_nan_is_never_at_rest() -> None:
    path = walk([[[0, 0, 0, 0]] * 3] * 2)
    path[2:, 1, 0] = torch.nan
    found = lattice.life(path, torch.tensor([0, 10, 20, 30]))
    assert [last.tolist() for last in found] == [[0, 30]] * 3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 50, 1 << 20]))
def test_streaming_sees_every_record(seed: int, values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    records, tokens = 9, 5
    vectors = vectors_near(torch.randint(-2, 3, (tokens, 2), generator=generator).tolist())
    which = torch.randint(tokens, (records, tokens), generator=generator)
    path = vectors[which]
    steps = torch.arange(records) * 3
    with mock.patch.object(motion, "CHUNK", values):
        life, escape = lattice.life(path, steps), lattice.escape_steps(path, steps)
    for token in range(tokens):
        sizes = [lattice.norms(lattice.displacement(a, b)) for a, b in itertools.pairwise(path[:, token])]
        for ends, limit in (
            (life.last_early_step, lambda s: s.l2 > math.sqrt(2)),
            (life.last_late_step, lambda s: s.l1 > 0),
        ):
            assert ends[token] == max([0, *(3 * (i + 1) for i, size in enumerate(sizes) if limit(size))])
        inside = []
        for record in path:
            same = [i for i in range(tokens) if (record[i] == record[token]).all()]
            counts = [sum(bool((a == b).all()) for b in record) for a in record]
            rivals = {lattice.fingerprints(record[i]).item() for i in range(tokens) if counts[i] == max(counts)}
            largest = len(same) == max(counts) > 1
            inside.append(largest and lattice.fingerprints(record[token]).item() == min(rivals))
        out = max([-1, *(i for i, is_in in enumerate(inside) if is_in)]) + 1
        assert escape[token] == (-1 if out == records else 3 * out)
    slow = [len({tuple(lattice.coordinate(v).tolist()) for v in record}) for record in path]
    assert lattice.count_distinct(path).tolist() == slow
    with mock.patch.object(motion, "CHUNK", values):
        assert lattice.per_record(lattice.count_distinct, path).tolist() == slow
        moved = lattice.per_record(lambda part: (part[1:] != part[:-1]).any(-1), path, overlap=1)
    assert torch.equal(moved, (path[1:] != path[:-1]).any(-1))


def test_pairwise_distances(generator) -> None:
    one = torch.randn(64, generator=generator).bfloat16()
    assert lattice.pairwise_distances(one.expand(300, 64)) == (0, 0)
    vectors = torch.randn(300, 8, generator=generator).bfloat16()
    apart = [(a.double() - b.double()).norm().item() for a, b in itertools.combinations(vectors, 2)]
    found = lattice.pairwise_distances(vectors)
    assert found.largest == pytest.approx(max(apart), rel=1e-6)
    assert found.mean == pytest.approx(sum(apart) / len(apart), rel=1e-6)
    far = torch.zeros(300, 2)
    far[299] = torch.tensor([3.0, 4.0])
    assert lattice.pairwise_distances(far).largest == 5
    assert lattice.pairwise_distances(far[:1]) == (0, 0)


@pytest.mark.parametrize("row", [0, 299])
def test_distances_to_what_is_not_a_number_are_not_numbers(row: int) -> None:
    vectors = torch.ones(300, 2)
    vectors[row, 0] = torch.nan
    assert all(math.isnan(distance) for distance in lattice.pairwise_distances(vectors))


def test_the_cloud(generator) -> None:
    x = torch.randn(3, 50, 8, generator=generator).bfloat16()
    middle = x.double().mean(1)
    assert torch.equal(lattice.centroid(x), middle)
    far = [[(v.double() - m).square().sum().sqrt() for v in record] for record, m in zip(x, middle, strict=True)]
    torch.testing.assert_close(lattice.radii(x, middle), torch.tensor(far, dtype=torch.float64))
    torch.testing.assert_close(lattice.radii(x), x.double().norm(dim=-1))
    spread = torch.stack([(record.double() - m).square().mean() for record, m in zip(x, middle, strict=True)])
    torch.testing.assert_close(lattice.temperature(x), spread)
    assert lattice.temperature(x[:, :1].expand(3, 50, 8)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("copies", [1, 40])
def test_pairwise_distances_count_every_pair(copies: int) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(1100, 3).bfloat16()  # more than one block of rows
    vectors[:copies] = vectors[-1]
    found = lattice.pairwise_distances(vectors)
    x = vectors.double()
    exact = (x[:, None] - x).norm(dim=-1)
    assert found.largest == pytest.approx(exact.max().item(), rel=1e-6)
    assert found.mean == pytest.approx(exact.sum().item() / (1100 * 1099), rel=1e-6)
