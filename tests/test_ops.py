"""The operations, compared with torch's and with exact sums."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from bhfast.ops import arithmetic
from bhfast.ops import kernels as torch_kernels

VECTORS = [*range(1, 66), 4097]
CHUNKS = [32767, 32769, 65535, 65536, 65537]  # whole and started ones
DTYPES = [torch.bfloat16, torch.float32]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether the bits are equal. Zeros differ by sign; any two NaN are equal."""
    integer = {2: torch.int16, 4: torch.int32}[a.itemsize]
    a, b = a.detach().cpu(), b.detach().cpu()
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def awkward(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of all magnitudes, including zeros, subnormals, infinities, NaN and exact ties."""
    x = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-12, 4, (n,), generator=generator)
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 2.0**-133, math.inf, -math.inf, math.nan, 1 + 2.0**-8, 3e38])
    chosen = torch.rand(n, generator=generator) < 0.2
    x[chosen] = special[torch.randint(len(special), (int(chosen.sum()),), generator=generator)]
    return x.to(dtype)


def tensors(n: int, dtype: torch.dtype, generator: torch.Generator, *, finite: bool) -> list[Tensor]:
    """Param, grad, exp_avg, exp_avg_sq."""
    if not finite:
        p, g, m, v = (awkward(n, dtype, generator) for _ in range(4))
        return [p, g, m, v.abs()]
    scales = (0.02, 0.01, 0.01, 1e-4)
    p, g, m, v = ((torch.randn(n, generator=generator) * scale).to(dtype) for scale in scales)
    return [p, g, m, v.abs()]


def coefficients(step: int = 7, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)) -> Tensor:
    """``[1, 7]``."""
    return arithmetic.adam_coefficients([step], [1e-3], betas=betas, eps=1e-8, weight_decay=weight_decay)


# ---------------------------------------------------------------------------------------------------------------------
# Square root


def test_sqrt_is_correctly_rounded(device, generator) -> None:
    bits = torch.randint(0, 2**31 - 1, (500_000,), dtype=torch.int32, generator=generator)  # positive, all magnitudes
    x = bits.view(torch.float32)
    with np.errstate(invalid="ignore"):
        wanted = torch.from_numpy(np.sqrt(x.numpy()))
    assert same_bits(arithmetic.sqrt(x.to(arithmetic.exact_device(device))), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Norm and clipping


def slow_grad_norm(grads: list[Tensor]) -> np.float32:
    """The specified order of summation in plain numpy, one addition at a time."""
    x = [np.float32(v) * np.float32(v) for g in grads for v in g.float().flatten().tolist()]
    while len(x) > 1:
        x += [np.float32(0)] * (-len(x) % 1024)
        sums = []
        for start in range(0, len(x), 1024):
            block = x[start : start + 1024]
            while len(block) > 1:
                half = len(block) // 2
                block = [block[i] + block[i + half] for i in range(half)]
            sums += block
        x = sums
    return np.sqrt(x[0])


@pytest.mark.parametrize("sizes", [(1,), (3, 5), (1024,), (1025,), (700, 1, 2000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_norm_sums_in_the_specified_order(sizes, dtype, kernels, generator) -> None:
    grads = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    norm, _ = kernels.clip_coefficient([g.to(kernels.device) for g in grads], 1.0)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert norm.device.type == kernels.device.type
    assert norm.item() == slow_grad_norm(grads)


def test_grad_norm_of_many_and_large_tensors(kernels, generator) -> None:
    """Three levels of sums, two dtypes; more tensors than a kernel takes at once, not contiguous."""
    for grads in (
        [torch.randn(1_100_000, generator=generator), torch.randn(3, generator=generator).bfloat16()],
        [torch.randn(2, 3, generator=generator).bfloat16().t() for _ in range(450)],
    ):
        wanted = arithmetic.grad_norm([g.contiguous() for g in grads])
        norm, _ = kernels.clip_coefficient([g.to(kernels.device) for g in grads], 1.0)
        assert norm.item() == wanted.item()


def test_grad_norm_does_not_depend_on_the_number_of_threads(kernels, generator) -> None:
    grads = [torch.randn(300_001, generator=generator).to(kernels.device)]
    threads = torch.get_num_threads()
    try:
        norms = set()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            norms.add(kernels.clip_coefficient(grads, 1.0)[0].item())
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(grads[0].double().norm().item(), rel=1e-6)


@pytest.mark.usefixtures("two_threads")
def test_adam_does_not_depend_on_the_number_of_threads(kernels, generator) -> None:
    state = tensors(200_003, torch.bfloat16, generator, finite=True)
    wanted = arithmetic.adam(*state, coefficients(), "per-op")
    p, g, m, v = ([x.clone().to(kernels.device) for x in whole.split([70_001, 130_002])] for whole in state)
    rings = [torch.zeros(1, 130_002, dtype=torch.bfloat16, device=kernels.device)]
    kernels.adam_(p, g, m, v, coefficients()[0], None, "per-op", rings, [4], torch.tensor(1), 1)
    for got, want in zip((p, m, v), wanted, strict=True):
        assert same_bits(torch.cat(got), want)
    assert same_bits(rings[0][0], p[1])


@pytest.mark.parametrize(
    ("grad", "limit", "wanted"),
    [(0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (2.0, 1.0, 0.5), (3.0, 1.0, 0.333984375), (3.0, math.inf, 1.0),
     (math.inf, 1.0, 0.0)],
)  # fmt: skip
def test_clip_coefficient(grad: float, limit: float, wanted: float, kernels) -> None:
    grads = [torch.tensor([grad], device=kernels.device)]
    _, coefficient = kernels.clip_coefficient([grads[0].bfloat16()], limit)
    assert coefficient.dtype == torch.float32
    assert coefficient.item() == wanted
    _, coefficient = kernels.clip_coefficient(grads, limit)
    assert coefficient.item() == pytest.approx(wanted, rel=2e-3)
    if grad == 3 and limit == 1:
        assert coefficient.item() != wanted  # float32 gradients: not rounded to bfloat16


def test_clip_coefficient_of_a_nan_norm_is_nan(kernels) -> None:
    norm, coefficient = kernels.clip_coefficient([torch.tensor([1.0, math.nan], device=kernels.device)], 1.0)
    assert norm.isnan()
    assert coefficient.isnan()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF, -1, -0x8000], ids=hex)
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
def test_clip_coefficient_of_any_nan_is_nan(bits: int, mixed: bool, kernels) -> None:
    """Whatever its payload. A GPU's NaN is all ones; rounding to bfloat16 must not carry into the exponent."""
    grads = [torch.tensor([bits], dtype=torch.int32).view(torch.float32).to(kernels.device)]
    if mixed:
        grads.append(torch.ones(3, dtype=torch.bfloat16, device=kernels.device))
    norm, coefficient = kernels.clip_coefficient(grads, 1.0)
    assert norm.isnan()
    assert coefficient.isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Adam


@pytest.mark.parametrize("number", ["clip_coef", *arithmetic.AdamCoefficients._fields])
@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
def test_adam_carries_on_any_nan_among_its_numbers(number: str, rounding: str, kernels, generator) -> None:
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    c, clip = coefficients(weight_decay=0.1)[0], torch.tensor(0.5)
    if number == "clip_coef":
        clip = nan
    else:
        c[arithmetic.AdamCoefficients._fields.index(number)] = nan
    p, g, m, v = tensors(100, torch.bfloat16, generator, finite=True)
    wanted = arithmetic.adam(p, g * clip, m, v, c[None], rounding)
    p, g, m, v = (x.to(kernels.device) for x in (p, g, m, v))
    kernels.adam_([p], [g], [m], [v], c, clip.to(kernels.device), rounding)
    for got, want in zip((p, m, v), wanted, strict=True):
        assert same_bits(got, want)
    assert p.isnan().all()


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "awkward"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 50.0])
def test_adam_per_op_equals_torch_operations_in_bfloat16(weight_decay, finite, generator) -> None:
    if not torch_kernels.torch_rounds_per_op(torch.bfloat16):
        pytest.skip("this CPU has no fused multiply-add, so torch's operations round in other places")
    c = coefficients(weight_decay=weight_decay)
    for n in VECTORS + CHUNKS:
        p, g, m, v = tensors(n, torch.bfloat16, generator, finite=finite)
        wanted = arithmetic.adam(p, g, m, v, c, "per-op")
        torch_kernels._adam_torch_(p, g, m, v, c)
        for name, got, want in zip(("param", "exp_avg", "exp_avg_sq"), (p, m, v), wanted, strict=True):
            assert same_bits(got, want), f"{name}, {n} elements"


@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "awkward"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 50.0, "step": 1},
        {"betas": (0.3, 0.9), "step": 10_000},
        {"betas": (0.0, 0.0)},
    ],
    ids=str,
)
def test_all_kernels_have_the_bits_of_the_formula(options, finite, dtype, rounding, kernels) -> None:
    has_the_bits_of_the_formula(kernels, VECTORS, dtype, rounding, finite=finite, **options)


@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_have_the_bits_of_the_formula(dtype, rounding, kernels) -> None:
    has_the_bits_of_the_formula(kernels, CHUNKS, dtype, rounding, finite=False)


def has_the_bits_of_the_formula(kernels, sizes: list[int], dtype, rounding: str, *, finite: bool, **options) -> None:
    c, clip = coefficients(**options), torch.tensor(0.333984375)
    states = made_for_all_kernels(tuple(sizes), dtype, finite)
    p, g, m, v = (torch.cat(x) for x in zip(*states, strict=True))
    formula = [x.split(sizes) for x in arithmetic.adam(p, g * clip, m, v, c, rounding)]
    for n, state, *wanted in zip(sizes, states, *formula, strict=True):
        p, g, m, v = (x.clone().to(kernels.device) for x in state)
        given = g.clone()
        kernels.adam_([p], [g], [m], [v], c[0], clip.to(kernels.device), rounding)
        for name, got, want in zip(("param", "exp_avg", "exp_avg_sq"), (p, m, v), wanted, strict=True):
            assert same_bits(got, want), f"{name}, {n} elements"
        assert same_bits(g, given)


@cache
def made_for_all_kernels(sizes: tuple[int, ...], dtype: torch.dtype, finite: bool) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tensors(n, dtype, generator, finite=finite) for n in sizes]


def test_torch_signs_zeros_by_their_place_at_beta1_zero() -> None:
    """So no formula has torch's bits there. If this fails, torch has fixed it: remove torch_has_one_lerp."""
    start, end = torch.zeros(67, dtype=torch.bfloat16), torch.full((67,), -0.0, dtype=torch.bfloat16)
    signs = torch.lerp(start, end, 1.0).signbit()
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no vector instructions that torch knows")
    assert signs.any()
    assert not signs.all()
    assert not torch_kernels.torch_has_one_lerp(0.0)
    assert not torch_kernels.torch_has_one_lerp(1e-9)  # 1 - 1e-9 is 1 in float32
    assert torch_kernels.torch_has_one_lerp(1e-3)


@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
@pytest.mark.parametrize("emulated", [False, True], ids=["fma", "emulated"])
def test_adam_does_not_depend_on_how_fma_is_made(rounding, emulated, generator, monkeypatch) -> None:
    state = tensors(4099, torch.bfloat16, generator, finite=False)
    wanted = arithmetic.adam(*state, coefficients(), rounding)
    monkeypatch.setattr(arithmetic, "_addcmul_is_fused", lambda: not emulated)
    for got, want in zip(arithmetic.adam(*state, coefficients(), rounding), wanted, strict=True):
        assert same_bits(got, want)


def test_opmath_rounds_once(generator) -> None:
    """Against float64: within little more than half a bfloat16 ulp, which per-op rounding exceeds."""
    p, g, m, v = tensors(10_000, torch.bfloat16, generator, finite=True)
    exact_m = m.double() + 0.1 * (g.double() - m.double())
    exact_v = 0.999 * v.double() + 0.001 * g.double() ** 2
    denom = exact_v.sqrt() / math.sqrt(1 - 0.999**7) + 1e-8
    exact_p = p.double() - 1e-3 / (1 - 0.9**7) * exact_m / denom
    _, exponent = torch.frexp(exact_p)
    half_ulp = 2.0 ** (exponent.double() - 9)
    errors = {}
    for rounding in arithmetic.ROUNDINGS:
        got, _, _ = arithmetic.adam(p, g, m, v, coefficients(), rounding)
        errors[rounding] = ((got.double() - exact_p).abs() / half_ulp).max().item()
    assert errors["opmath"] <= 1.001
    assert errors["per-op"] > 1.001


def test_adam_advances_many_steps_at_once(generator) -> None:
    """Coefficients of shape [steps, 1, 1] give what each step gives alone."""
    states = [tensors(6, torch.bfloat16, generator, finite=True) for _ in range(5)]
    lrs = [1e-3 * (1 - k / 5) for k in range(5)]
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    together = [torch.stack(x).view(5, 2, 3) for x in zip(*states, strict=True)]
    c = arithmetic.adam_coefficients(range(1, 6), lrs, **options)[:, None, None]
    results = arithmetic.adam(*together, c, "per-op")
    for k, state in enumerate(states):
        alone = arithmetic.adam(*state, arithmetic.adam_coefficients([k + 1], [lrs[k]], **options), "per-op")
        for many, one in zip(results, alone, strict=True):
            assert same_bits(many[k].flatten(), one)


def test_second_moment_never_decreases_in_per_op_bfloat16(generator) -> None:
    """A decay of 0.1 % is less than half an ulp of bfloat16. Every right run shows this."""
    v = torch.rand(10_000, generator=generator).bfloat16()
    zeros = torch.zeros_like(v)
    for step in range(1, 50):
        _, _, new = arithmetic.adam(zeros, zeros, zeros, v, coefficients(step), "per-op")
        assert (new >= v).all()
        v = new


@pytest.mark.parametrize("clip", [None, 0.25])
def test_adam_in_place_takes_views_and_any_layout(clip, kernels, generator) -> None:
    """Tensors that are scattered, adjacent, misaligned or not contiguous get the same results as one flat tensor."""
    p, g, m, v = tensors(3 * 35, torch.bfloat16, generator, finite=True)
    coefficient = None if clip is None else torch.tensor(clip)
    clipped = g if clip is None else g * coefficient
    wanted = arithmetic.adam(p, clipped, m, v, coefficients(), "per-op")

    def scattered(flat: Tensor) -> list[Tensor]:
        wide = torch.zeros(5, 14, dtype=flat.dtype, device=kernels.device)
        wide[:, ::2] = flat[:35].view(5, 7)
        return [wide[:, ::2], flat[35:70].clone().view(7, 5).t().contiguous().t(), flat[70:].clone()]

    def adjacent(flat: Tensor) -> list[Tensor]:
        return list(flat.clone().split([35, 35, 35]))

    def misaligned(flat: Tensor) -> list[Tensor]:
        return list(torch.cat([flat[:1], flat])[1:].split([35, 35, 35]))

    for layout in (scattered, adjacent, misaligned):
        lists = [layout(x.to(kernels.device)) for x in (p, g, m, v)]
        kernels.adam_(*lists, coefficients()[0], coefficient, "per-op")
        for got, want in zip((lists[0], lists[2], lists[3]), wanted, strict=True):
            assert same_bits(torch.cat([x.reshape(-1) for x in got]), want)


def test_adam_takes_more_tensors_than_a_kernel_does_at_once(kernels, generator) -> None:
    sizes = [1 + i % 5 for i in range(700)]
    state = tensors(sum(sizes), torch.bfloat16, generator, finite=True)
    wanted = arithmetic.adam(*state, coefficients(), "per-op")
    lists = [[x.clone() for x in t.to(kernels.device).split(sizes)] for t in state]
    kernels.adam_(*lists, coefficients()[0], None, "per-op")
    for got, want in zip((lists[0], lists[2], lists[3]), wanted, strict=True):
        assert same_bits(torch.cat(got), want)


def test_numbers_may_lie_on_the_device(kernels, generator) -> None:
    state = [x.to(kernels.device) for x in tensors(1000, torch.bfloat16, generator, finite=True)]
    results = []
    for where in ("cpu", kernels.device):
        p, g, m, v = (x.clone() for x in state)
        ring = torch.zeros(3, 1000, dtype=torch.bfloat16, device=kernels.device)
        numbers = coefficients()[0].to(where), torch.tensor(0.5, device=where)
        kernels.adam_([p], [g], [m], [v], *numbers, "per-op", [ring], [0], torch.tensor(8, device=where), 2)
        results.append((p, ring))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert same_bits(results[0][1][4 % 3], results[0][0])


def test_autograd_sees_that_parameters_were_written_to(kernels, generator) -> None:
    p, g, m, v = (x.to(kernels.device) for x in tensors(5, torch.float32, generator, finite=True))
    x = torch.ones(5, requires_grad=True, device=kernels.device)
    product = x * p
    kernels.adam_([p], [g], [m], [v], coefficients()[0], None, "per-op")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Recording


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
def test_adam_records_what_it_read_and_what_it_made(rounding, dtype, kernels, generator) -> None:
    """Some fields of two of three tensors, in the step's slot; nothing at steps that are not recorded."""
    sizes = [70, 5000, 33]
    state = tensors(sum(sizes), dtype, generator, finite=False)
    lists = [[x.to(kernels.device) for x in t.split(sizes)] for t in state]
    params, grads, exp_avgs, exp_avg_sqs = lists
    wanted = {0: params[0], 1: grads[0], 2: exp_avgs[0], 3: exp_avg_sqs[0], 8: params[2], 11: exp_avg_sqs[2]}
    rings = [torch.full((4, *x.shape), 7.0, dtype=dtype, device=kernels.device) for x in wanted.values()]
    for step in range(1, 13):
        before = [ring.clone() for ring in rings]
        kernels.adam_(*lists, coefficients(step)[0], None, rounding, rings, list(wanted), torch.tensor(step), 3)
        for ring, old, source in zip(rings, before, wanted.values(), strict=True):
            if step % 3 == 0:
                old[step // 3 % 4] = source
            assert same_bits(ring, old)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool], ids=str)
def test_record_copies_to_the_slot_of_the_step(dtype, kernels, generator) -> None:
    shapes = [(), (3,), (128,), (5000, 3), (4, 6)]
    values = [torch.randint(0, 2, shape, generator=generator).to(kernels.device, dtype) for shape in shapes]
    values[-1] = values[-1].t()
    rings = [torch.zeros(5, *x.shape, dtype=dtype, device=kernels.device) for x in values]
    kernels.record_(values, rings, torch.tensor(26), 2)
    kernels.record_([torch.ones_like(x) for x in values], rings, torch.tensor(27), 2)
    for value, ring in zip(values, rings, strict=True):
        assert torch.equal(ring[13 % 5], value)
        assert not ring[[0, 1, 2, 4]].any()


def test_record_takes_more_tensors_than_a_kernel_does_at_once(kernels) -> None:
    values = [torch.tensor(i, device=kernels.device) for i in range(100)]
    rings = [torch.zeros(2, dtype=torch.int64, device=kernels.device) for _ in values]
    kernels.record_(values, rings, torch.tensor(1), 1)
    assert [ring.tolist() for ring in rings] == [[0, i] for i in range(100)]
