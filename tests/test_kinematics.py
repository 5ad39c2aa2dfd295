"""Velocities, paths and shapes of the cloud, against loops over tokens and records in numpy."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bhfast import lattice
from bhfast.lattice import adjacency, cloud, motion

CLOSE = {"rtol": 1e-12, "atol": 0.0, "equal_nan": True}  # float64, sums of at most some hundred terms
CHUNKS = st.sampled_from([1, 20, 1 << 17])  # values processed at once


@st.composite
def records(draw: st.DrawFn, most: int = 9, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Records ``[R, V, D]`` in which tokens stand still, share a point, are zero, subnormal, far apart, or NaN."""
    shape = [draw(st.integers(1, size)) for size in (most, 5, 3)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([1.0, 1e-40, 1e30, 2.0**-9]))
    steps = (
        torch.randint(-2, 3, shape, generator=generator) * (torch.rand(shape[:2], generator=generator) < 0.7)[..., None]
    )
    path = (1.0 * draw(st.booleans()) + steps.cumsum(0) * size).to(dtype)
    for _ in range(draw(st.integers(0, 2))):
        record, token = (draw(st.integers(0, n - 1)) for n in shape[:2])
        path[record:, token] = path[record, draw(st.integers(0, shape[1] - 1))].clone()
    if draw(st.integers(0, 4)) == 0:
        path[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1)), 0] = torch.nan
    return path


def array(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def in_chunks(values: int) -> mock._patch:
    return mock.patch.object(motion, "CHUNK", values)


def steps_of(x: torch.Tensor) -> np.ndarray:
    """Displacements of tokens ``[R - 1, V, D]``."""
    return np.array([b - a for a, b in itertools.pairwise(array(x))]).reshape(len(x) - 1, *x.shape[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Velocities


@settings(deadline=None)
@given(records(), CHUNKS)
def test_temperatures(x: torch.Tensor, values: int) -> None:
    with in_chunks(values):
        found = lattice.per_record(lambda w: lattice.temperatures(lattice.velocities(w)), x, overlap=1)
        share = found.bulk_share
    v = steps_of(x)
    for k, record in enumerate(v):
        mean = sum(record) / len(record)
        total = sum(row @ row for row in record) / len(record)
        thermal = sum((row - mean) @ (row - mean) for row in record) / len(record)
        scale = np.abs(record).max() ** 2
        np.testing.assert_allclose(found.total[k], total, **CLOSE)
        np.testing.assert_allclose(found.bulk[k], mean @ mean, rtol=1e-12, atol=1e-15 * scale)
        np.testing.assert_allclose(found.thermal[k], thermal, rtol=1e-12, atol=1e-15 * scale)
        np.testing.assert_allclose(found.total[k], found.bulk[k] + found.thermal[k], **CLOSE)
        assert share[k].isnan() if total == 0 or math.isnan(total) else 0 <= share[k] <= 1 + 1e-12
    spread = lattice.temperature(lattice.velocities(x))
    torch.testing.assert_close(found.thermal, spread * x.shape[2], equal_nan=True)


def test_tokens_that_move_as_one_are_not_warm() -> None:
    together = torch.tensor([0.1, 0.3]).expand(1, 7, 2)
    found = lattice.temperatures(together)
    assert found.thermal.item() == 0
    assert found.bulk_share.item() == pytest.approx(1)


@settings(deadline=None)
@given(records(), CHUNKS)
def test_radial_and_tangential(x: torch.Tensor, values: int) -> None:
    def parts(w: torch.Tensor) -> lattice.Parts:
        return lattice.radial_and_tangential(lattice.velocities(w), lattice.centered(w[:-1]))

    with in_chunks(values):
        found = lattice.per_record(parts, x, overlap=1)
    v = steps_of(x)
    for k, i in np.ndindex(v.shape[:2]):
        offset = array(x[k, i]) - sum(array(row) for row in x[k]) / x.shape[1]
        radial, tangential = found.radial[k, i].item(), found.tangential[k, i].item()
        if not (np.abs(offset) > 1e-12 * np.abs(array(x[k])).max()).any():  # at the centroid, but for rounding; or NaN
            assert math.isnan(radial) or np.isfinite(offset).all()
            continue
        speed = np.linalg.norm(v[k, i])
        np.testing.assert_allclose(radial, v[k, i] @ offset / np.linalg.norm(offset), rtol=0, atol=1e-9 * speed)
        np.testing.assert_allclose(math.hypot(radial, tangential), speed, rtol=1e-9)
        assert not tangential < 0


def test_there_is_no_direction_from_the_centroid_to_itself() -> None:
    found = lattice.radial_and_tangential(torch.ones(1, 3, 2), lattice.centered(torch.full((1, 3, 2), 0.1)))
    assert found.radial.isnan().all()
    assert found.tangential.isnan().all()


@settings(deadline=None)
@given(records(), CHUNKS, st.integers(1, 9))
def test_turning_angles(x: torch.Tensor, values: int, bins: int) -> None:
    with in_chunks(values):
        found = lattice.per_record(lambda w: lattice.turning_angles(lattice.velocities(w)), x, overlap=2)
        histogram = lattice.turning_histogram(x, bins)
    v = steps_of(x)
    for k, i in np.ndindex(*found.shape):
        a, b = (row / np.abs(row).max() if np.abs(row).max() else row for row in (v[k, i], v[k + 1, i]))
        if np.isfinite([a, b]).all() and a.any() and b.any():
            cosine = (a @ b) / math.sqrt((a @ a) * (b @ b))
            assert found[k, i] == pytest.approx(math.acos(max(-1, min(1, cosine))), abs=3e-8)
        else:
            assert found[k, i].isnan()
    counts, edges = np.histogram(array(found[~found.isnan()]), bins, (0, math.pi))
    np.testing.assert_allclose(array(histogram.edges), edges, rtol=1e-15)
    assert histogram.counts.tolist() == np.histogram(array(found[~found.isnan()]), array(histogram.edges))[0].tolist()
    assert histogram.counts.sum() == counts.sum()


def test_small_angles_are_exact() -> None:
    turns = torch.tensor([[[1.0, 0.0]], [[1.0, 1e-9]], [[-1.0, -1e-9]]], dtype=torch.float64)
    assert lattice.turning_angles(turns)[:, 0].tolist() == pytest.approx([1e-9, math.pi], rel=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# Paths


@settings(deadline=None)
@given(records(), CHUNKS)
def test_path(x: torch.Tensor, values: int) -> None:
    with in_chunks(values):
        found = lattice.path(x)
        middle = lattice.path(lattice.per_record(lattice.centroid, x)[:, None])
    for i in range(x.shape[1]):
        length = sum(np.linalg.norm(step) for step in steps_of(x)[:, i])
        np.testing.assert_allclose(found.length[i], length, **CLOSE)
        np.testing.assert_allclose(found.displacement[i], np.linalg.norm(array(x[-1, i]) - array(x[0, i])), **CLOSE)
    still = found.length == 0
    assert found.efficiency[still].isnan().all()
    assert not (found.efficiency > 1 + 1e-12).any()
    means = [record.mean(0) for record in array(x)]
    scale = np.nan_to_num(np.abs(array(x)).max())
    length = sum(np.linalg.norm(b - a) for a, b in itertools.pairwise(means))
    np.testing.assert_allclose(middle.length, [length], rtol=1e-12, atol=1e-13 * scale)


@settings(deadline=None)
@given(records(), CHUNKS, st.data())
def test_mean_squared_displacement(x: torch.Tensor, values: int, data: st.DataObject) -> None:
    lags = data.draw(st.lists(st.integers(0, len(x) - 1), max_size=3))
    with in_chunks(values):
        found = lattice.mean_squared_displacement(x, lags)
    w = array(x)
    for row, lag in zip(found, lags, strict=True):
        wanted = np.mean([((w[t + lag] - w[t]) ** 2).sum(-1) for t in range(len(w) - lag)], axis=0)
        np.testing.assert_allclose(array(row), wanted, **CLOSE)


@settings(deadline=None)
@given(records(12).filter(lambda x: len(x) > 1), CHUNKS, st.data())
def test_autocorrelation(x: torch.Tensor, values: int, data: st.DataObject) -> None:
    max_lag = data.draw(st.integers(0, len(x) - 2))
    with in_chunks(values):
        found = lattice.autocorrelation(x, max_lag)
    v = steps_of(x)
    assert found.sums.shape == (max_lag + 1, x.shape[1])
    for lag, i in np.ndindex(*found.sums.shape):
        wanted = sum(v[t, i] @ v[t + lag, i] for t in range(len(v) - lag))
        if np.isnan(v[:, i]).any():
            continue
        np.testing.assert_allclose(found.sums[lag, i], wanted, rtol=1e-12, atol=1e-14 * (v[:, i] ** 2).sum())
    for i in range(x.shape[1]):
        assert found.sums[0, i].isnan() == np.isnan(v[:, i]).any()
    rho = found.per_token()
    assert ((rho.abs() <= 1 + 1e-12) | rho.isnan()).all()
    if not np.isnan(v).any() and v.any():
        sums = array(found.sums).sum(1)
        np.testing.assert_allclose(array(found.pooled()), sums / sums[0], rtol=1e-9, atol=1e-12)
        some = torch.arange(x.shape[1]) == 0
        if v[:, 0].any():
            np.testing.assert_allclose(array(found.pooled(some)), array(rho[:, 0]), **CLOSE)


def test_a_velocity_that_decays_has_its_time() -> None:
    rho = torch.exp(-torch.arange(200) / 20.0)
    assert lattice.correlation_time(rho) == pytest.approx(20, rel=0.01)
    assert lattice.correlation_time(torch.tensor([1.0, 0.0, 0.0, 0.0])) == 0.5
    assert math.isnan(lattice.correlation_time(rho[:50]))  # it has not decayed yet
    assert math.isnan(lattice.correlation_time(torch.full((9,), torch.nan)))


def test_lags_beyond_the_records() -> None:
    x = torch.zeros(5, 2, 3)
    for lag in (-1, 5):
        with pytest.raises(ValueError, match=f"a lag must be from 0 to 4 for so many records, got {lag}"):
            lattice.mean_squared_displacement(x, [0, lag])
    with pytest.raises(ValueError, match="a lag must be from 0 to 3 for so many records, got 4"):
        lattice.autocorrelation(x, 4)
    with pytest.raises(ValueError, match="rest must be at least 1 record, got 0"):
        lattice.reheatings(x, 0)
    with pytest.raises(ValueError, match="norm must be one of l1, l2, linf, got 'l3'"):
        phases(x.bfloat16(), 1000.0, "l3")


def test_memory_does_not_grow_with_the_records() -> None:
    """Only a few records may be read at once."""

    class Records:
        """Records made when they are read, and counted."""

        shape = torch.Size([100, 512, 64])
        most = 0

        def __len__(self) -> int:
            return self.shape[0]

        def __getitem__(self, index: slice | int | tuple) -> torch.Tensor:
            steps = range(100)[index]
            steps = [steps] if isinstance(steps, int) else steps
            self.most = max(self.most, len(steps))
            found = torch.tensor(list(steps)).view(-1, 1, 1).expand(-1, 512, 64).bfloat16()
            return found[0] if isinstance(index, int) else found

    for read in (
        lambda x: lattice.path(x),
        lambda x: lattice.mean_squared_displacement(x, [3, 60]),
        lambda x: lattice.turning_histogram(x),
        lambda x: lattice.reheatings(x, 3),
        lambda x: lattice.per_record(phases, x, 1),
        lambda x: lattice.autocorrelation(x, 10),
    ):
        source = Records()
        read(source)
        assert source.most <= 21


# ---------------------------------------------------------------------------------------------------------------------
# Phases


def phases(x: torch.Tensor, *options: float | str) -> torch.Tensor:
    return lattice.momentary_phases(lattice.norms(lattice.displacement(x[:-1], x[1:])), *options)


@settings(deadline=None)
@given(records(), CHUNKS, st.sampled_from(["l1", "l2", "linf"]), st.sampled_from([0.5, 3.0, 1000.0]))
def test_momentary_phases(x: torch.Tensor, values: int, norm: str, limit: float) -> None:
    with in_chunks(values):
        found = lattice.per_record(lambda w: phases(w, limit, norm), x, overlap=1)
    assert found.dtype == torch.int8
    for k, i in np.ndindex(*found.shape):
        ulps = array(x[k + 1, i] - x[k, i].float()) / array(lattice.ulp(x[k, i]))
        size = {"l1": np.abs(ulps).sum(), "l2": np.linalg.norm(ulps), "linf": np.abs(ulps).max()}[norm]
        name = (
            None
            if np.isnan(ulps).any()
            else "superluminal"
            if size > limit
            else "frozen"
            if not ulps.any()
            else "L1 ≤ 1"
            if np.abs(ulps).sum() <= 1
            else "moving"
        )
        assert found[k, i] == (-1 if name is None else lattice.PHASES.index(name))


def test_a_step_away_from_an_exact_zero_is_superluminal() -> None:
    """Its ulp is not 0: whoever divides by 0 gets infinity, and then calls the token frozen."""
    x = torch.tensor([[[0.0, 1.0]], [[1e-3, 1.0]], [[0.0, 1.0]], [[-0.0, 1.0]]]).bfloat16()
    assert phases(x)[:, 0].tolist() == [0, 1, 3]


@settings(deadline=None)
@given(records(15), CHUNKS, st.integers(1, 3))
def test_reheatings(x: torch.Tensor, values: int, rest: int) -> None:
    with in_chunks(values):
        found = lattice.reheatings(x, rest)
    again = np.zeros((len(x) - 1, x.shape[1]), dtype=int)
    for i in range(x.shape[1]):
        moves = [not np.array_equal(a, b) for a, b in itertools.pairwise(array(x[:, i]))]
        for k, moving in enumerate(moves):
            again[k, i] = moving and k > rest and not any(moves[k - rest : k]) and any(moves[:k])
    assert found.times.tolist() == again.sum(0).tolist()
    assert found.tokens.tolist() == again.sum(1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The cloud


@settings(deadline=None)
@given(records())
def test_spectrum_and_effective_dimension(x: torch.Tensor) -> None:
    found = lattice.per_record(lattice.principal_spectrum, x)
    dimension = lattice.effective_dimension(found)
    for spectrum, n, record in zip(found, dimension, array(x), strict=True):
        if not np.isfinite(record).all():
            assert spectrum.isnan().all()
            assert n.isnan()
            continue
        scale = np.abs(record).max() or 1.0
        away = (record - record.mean(0)) / scale
        values = np.zeros(record.shape[1])
        singular = np.linalg.svd(away, compute_uv=False)
        values[: len(singular)] = singular**2 / len(record)
        np.testing.assert_allclose(array(spectrum) / scale**2, values, rtol=1e-10, atol=1e-14)
        assert (spectrum.diff() <= 0).all()
        if values.max() > 1e-12:
            assert n.item() == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)


def test_effective_dimension_counts_axes() -> None:
    assert lattice.effective_dimension(torch.tensor([2.0, 2.0, 2.0, 0.0])).item() == pytest.approx(3)
    assert lattice.effective_dimension(lattice.principal_spectrum(torch.full((5, 4), 0.1))).isnan()


@settings(deadline=None)
@given(records())
def test_cell_entropy(x: torch.Tensor) -> None:
    found = lattice.per_record(lattice.cell_entropy, x)
    for bits, record in zip(found, x, strict=True):
        sizes = Counter(tuple(lattice.coordinate(v).tolist()) for v in record).values()
        wanted = -sum(n / len(record) * math.log2(n / len(record)) for n in sizes)
        assert bits.item() == pytest.approx(wanted, abs=1e-14)
        assert not bits.signbit()


@settings(deadline=None)
@given(records(1), st.integers(1, 9), st.sampled_from([1, 2, 256]))
def test_cosine_histogram(x: torch.Tensor, bins: int, rows: int) -> None:
    with mock.patch.object(cloud, "ROWS", rows):
        found = lattice.cosine_histogram(x[0], bins)
    vectors = [v / np.abs(v).max() for v in array(x[0]) if np.isfinite(v).all() and v.any()]
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in itertools.combinations(vectors, 2)]
    assert found.counts.sum() == len(cosines)
    edges = array(found.edges)
    np.testing.assert_allclose(edges, np.linspace(-1, 1, bins + 1), atol=1e-15)
    for i in range(bins):  # rounding may put a value into the bin next to its own
        sure = sum(edges[i] + 1e-12 < c < edges[i + 1] - 1e-12 for c in cosines)
        near = sum(edges[i] - 1e-12 <= c <= edges[i + 1] + 1e-12 for c in cosines)
        assert sure <= found.counts[i] <= near


@settings(deadline=None)
@given(records(1), st.sampled_from([0.0, 1.0, math.sqrt(2), 3.5]), st.booleans(), st.sampled_from([1, 2, 256]))
def test_components_within(x: torch.Tensor, distance: float, of_steps: bool, rows: int) -> None:
    points = lattice.coordinate(x[0]) if of_steps else x[0]
    with mock.patch.object(adjacency, "LEAF_SIZE", rows):
        found = lattice.components_within(points, distance)
    label = list(range(len(points)))
    for _ in label:
        for i, j in itertools.combinations(range(len(points)), 2):
            if np.linalg.norm(array(points[i]) - array(points[j])) <= distance:
                label[i] = label[j] = min(label[i], label[j])
    assert found.tolist() == label


def test_identical_vectors_are_no_distance_apart(generator: torch.Generator) -> None:
    """As products of matrices they would be some distance apart, in float64 too."""
    x = torch.randn(300, 64, generator=generator)
    assert lattice.components_within(torch.cat([x, x]), 0.0).tolist() == [*range(300), *range(300)]


# ---------------------------------------------------------------------------------------------------------------------
# Other lattices


@pytest.mark.parametrize(
    ("dtype", "smallest", "fraction"), [(torch.float16, 2.0**-24, 10), (torch.float32, 2.0**-149, 23)]
)
def test_lattices_of_other_dtypes(dtype: torch.dtype, smallest: float, fraction: int) -> None:
    values = torch.tensor([0.0, smallest, 1.0, 1.999, -2.0, torch.finfo(dtype).smallest_normal, 1000.0], dtype=dtype)
    up = torch.nextafter(values.abs(), torch.tensor(torch.inf, dtype=dtype))
    assert torch.equal(lattice.ulp(values), up.double() - values.abs().double())
    assert lattice.ulp(values)[2] == 2.0**-fraction
    assert (lattice.displacement(values.abs(), up) == 1).all()
    assert torch.equal(lattice.coordinate(up).long() - lattice.coordinate(values.abs()).long(), torch.ones(7).long())
    assert torch.equal(lattice.coordinate(-values), -lattice.coordinate(values))
    x = torch.stack([values.abs(), up, up])[:, :, None]
    assert phases(x).tolist() == [[2] * 7, [3] * 7]
    assert lattice.cells(torch.cat([values, up])[:, None]).multiplicity.tolist() == [1, 2] + [1] * 11
    pairs = lattice.neighbours(torch.cat([values.abs(), up])[:, None]).pairs.tolist()
    assert [2, 9] in pairs
    assert [4, 11] in pairs
    assert [2, 4] not in pairs


def test_a_displacement_has_one_lattice() -> None:
    with pytest.raises(TypeError, match=r"must be of one dtype, got torch\.bfloat16 and torch\.float32"):
        lattice.displacement(torch.zeros(1).bfloat16(), torch.zeros(1))
