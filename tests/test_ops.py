"""The arithmetic, against torch's own and against exact sums."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bhfast import _ops

SIZES = [*range(1, 66), 4097, 32767, 32769, 65535, 65536, 65537]
DTYPES = [torch.bfloat16, torch.float32]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bits, signed zeros told apart; two NaN are equal whatever their payloads."""
    integer = {2: torch.int16, 4: torch.int32}[a.itemsize]
    a, b = a.detach().cpu(), b.detach().cpu()
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def awkward(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of all magnitudes, among them zeros, subnormals, infinities, NaN and exact ties."""
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


def coefficients(step: int = 7, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)):
    return _ops.adam_coefficients([step], [1e-3], betas=betas, eps=1e-8, weight_decay=weight_decay)


# ---------------------------------------------------------------------------------------------------------------------
# fma


def exact_fma(a: float, b: float, c: float) -> float:
    """a * b + c in rational numbers, rounded once to float32 (to nearest, ties to even)."""
    total = Fraction(a) * Fraction(b) + Fraction(c)
    nearest = np.float32(float(total))
    candidates = [nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))]
    finite = [x for x in candidates if np.isfinite(x)]
    return float(min(finite, key=lambda x: (abs(Fraction(float(x)) - total), int(x.view(np.uint32)) & 1)))


@settings(max_examples=400, deadline=None)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    total = abs(Fraction(a) * Fraction(b) + Fraction(c))
    if total > Fraction(2) ** 127:
        return  # may round to infinity, which has no nearest candidate
    args = [torch.tensor([x], dtype=torch.float32) for x in (a, b, c)]
    wanted = exact_fma(*(x.item() for x in args))
    assert _ops.fma(*args).item() == wanted
    assert _ops._fma_float64(*args).item() == wanted


def test_fma_emulation_equals_the_instruction(generator: torch.Generator) -> None:
    if not _ops._addcmul_is_fused():
        pytest.skip("this CPU has no fused multiply-add to compare with")
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 500_000), dtype=torch.int32, generator=generator)
    a, b, c = bits.view(torch.float32)
    assert same_bits(_ops._fma_float64(a, b, c), torch.addcmul(c, a, b))


def test_fma_emulation_does_not_round_twice() -> None:
    """The product lies 2^-70 below half an ulp: float64 alone would see a tie, and round it to the even neighbour."""
    a, b, c = (torch.tensor([x]) for x in (2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23))
    assert (a.double() * b.double() + c.double()).float().item() == 1 + 2.0**-22
    assert _ops._fma_float64(a, b, c).item() == 1 + 2.0**-23


def test_sqrt_is_correctly_rounded(device, generator) -> None:
    bits = torch.randint(0, 2**31 - 1, (500_000,), dtype=torch.int32, generator=generator)  # positive, all magnitudes
    x = bits.view(torch.float32)
    with np.errstate(invalid="ignore"):
        wanted = torch.from_numpy(np.sqrt(x.numpy()))
    assert same_bits(_ops.sqrt(x.to(_ops.exact_device(device))), wanted)


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
def test_grad_norm_sums_in_the_specified_order(sizes, dtype, device, generator) -> None:
    grads = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    norm = _ops.grad_norm([g.to(device) for g in grads])
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert norm.item() == slow_grad_norm(grads)


def test_grad_norm_does_not_depend_on_the_number_of_threads(generator) -> None:
    grads = [torch.randn(300_001, generator=generator)]
    threads = torch.get_num_threads()
    try:
        norms = set()
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            norms.add(_ops.grad_norm(grads).item())
    finally:
        torch.set_num_threads(threads)
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(grads[0].double().norm().item(), rel=1e-6)


@pytest.mark.parametrize(("norm", "wanted"), [(0.0, 1.0), (0.5, 1.0), (2.0, 0.5), (3.0, 0.333984375), (math.inf, 0.0)])
def test_clip_coefficient(norm: float, wanted: float) -> None:
    coefficient = _ops.clip_coefficient(torch.tensor(norm), 1.0, torch.bfloat16)
    assert coefficient.dtype == torch.bfloat16
    assert coefficient.item() == wanted


def test_clip_coefficient_of_a_nan_norm_is_nan() -> None:
    assert _ops.clip_coefficient(torch.tensor(math.nan), 1.0, torch.bfloat16).isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Adam


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "awkward"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 50.0])
def test_adam_per_op_equals_torch_operations_in_bfloat16(weight_decay, finite, generator) -> None:
    if not _ops._torch_rounds_per_op(torch.bfloat16):
        pytest.skip("this CPU has no fused multiply-add, so torch's operations round in other places")
    c = coefficients(weight_decay=weight_decay)
    for n in SIZES:
        p, g, m, v = tensors(n, torch.bfloat16, generator, finite=finite)
        wanted = _ops.adam(p, g, m, v, c, "per-op")
        _ops._adam_torch_(p, g, m, v, c)
        for name, got, want in zip(("param", "exp_avg", "exp_avg_sq"), (p, m, v), wanted, strict=True):
            assert same_bits(got, want), f"{name}, {n} elements"


@pytest.mark.parametrize("rounding", _ops.ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam_is_the_same_on_every_device(dtype, rounding, device, generator) -> None:
    c = coefficients(weight_decay=0.1)
    p, g, m, v = tensors(65537, dtype, generator, finite=False)
    wanted = _ops.adam(p, g, m, v, c, rounding)
    here = [x.to(device) for x in (p, g, m, v)]
    c = _ops.adam_coefficients(
        [7], [1e-3], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, device=_ops.exact_device(device)
    )
    _ops.adam_([here[0]], [here[1]], [here[2]], [here[3]], c, None, rounding)
    for got, want in zip((here[0], here[2], here[3]), wanted, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("rounding", _ops.ROUNDINGS)
@pytest.mark.parametrize("emulated", [False, True], ids=["fma", "emulated"])
def test_adam_does_not_depend_on_how_fma_is_made(rounding, emulated, generator, monkeypatch) -> None:
    state = tensors(4099, torch.bfloat16, generator, finite=False)
    wanted = _ops.adam(*state, coefficients(), rounding)
    monkeypatch.setattr(_ops, "_addcmul_is_fused", lambda: not emulated)
    for got, want in zip(_ops.adam(*state, coefficients(), rounding), wanted, strict=True):
        assert same_bits(got, want)


def test_opmath_rounds_once(generator) -> None:
    """Against the formula in float64: within half a bfloat16 ulp and a little, which per-op rounding exceeds."""
    p, g, m, v = tensors(10_000, torch.bfloat16, generator, finite=True)
    exact_m = m.double() + 0.1 * (g.double() - m.double())
    exact_v = 0.999 * v.double() + 0.001 * g.double() ** 2
    denom = exact_v.sqrt() / math.sqrt(1 - 0.999**7) + 1e-8
    exact_p = p.double() - 1e-3 / (1 - 0.9**7) * exact_m / denom
    _, exponent = torch.frexp(exact_p)
    half_ulp = 2.0 ** (exponent.double() - 9)
    errors = {}
    for rounding in _ops.ROUNDINGS:
        got, _, _ = _ops.adam(p, g, m, v, coefficients(), rounding)
        errors[rounding] = ((got.double() - exact_p).abs() / half_ulp).max().item()
    assert errors["opmath"] <= 1.001
    assert errors["per-op"] > 1.001


def test_adam_advances_many_steps_at_once(generator) -> None:
    """Coefficients of shape [steps, 1, 1] give what each step gives alone."""
    states = [tensors(6, torch.bfloat16, generator, finite=True) for _ in range(5)]
    lrs = [1e-3 * (1 - k / 5) for k in range(5)]
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    together = [torch.stack(x).view(5, 2, 3) for x in zip(*states, strict=True)]
    c = _ops.adam_coefficients(range(1, 6), lrs, **options).unsqueeze(2)
    results = _ops.adam(*together, c, "per-op")
    for k, state in enumerate(states):
        alone = _ops.adam(*state, _ops.adam_coefficients([k + 1], [lrs[k]], **options), "per-op")
        for many, one in zip(results, alone, strict=True):
            assert same_bits(many[k].flatten(), one)


def test_second_moment_never_decreases_in_per_op_bfloat16(generator) -> None:
    """0.1 % of decay is less than half an ulp of bfloat16: the recorder's users should know, and runs must show it."""
    v = torch.rand(10_000, generator=generator).bfloat16()
    zeros = torch.zeros_like(v)
    for step in range(1, 50):
        _, _, new = _ops.adam(zeros, zeros, zeros, v, coefficients(step), "per-op")
        assert (new >= v).all()
        v = new


@pytest.mark.parametrize("clip", [None, 0.25])
def test_adam_in_place_takes_views_and_any_layout(clip, generator) -> None:
    """Non-contiguous, scattered, and adjacent tensors all get what one flat tensor gets; gradients stay as they are."""
    p, g, m, v = tensors(3 * 35, torch.bfloat16, generator, finite=True)
    coefficient = None if clip is None else torch.tensor(clip, dtype=torch.bfloat16)
    clipped = g if clip is None else g * clip
    wanted = _ops.adam(p, clipped, m, v, coefficients(), "per-op")

    def scattered(flat: Tensor) -> list[Tensor]:
        wide = torch.zeros(5, 14, dtype=flat.dtype)
        wide[:, ::2] = flat[:35].view(5, 7)
        return [wide[:, ::2], flat[35:70].clone().view(7, 5).t().contiguous().t(), flat[70:].clone()]

    def adjacent(flat: Tensor) -> list[Tensor]:
        return list(flat.clone().split([35, 35, 35]))

    for layout in (scattered, adjacent):
        lists = [layout(x) for x in (p, g, m, v)]
        grads = [x.clone() for x in lists[1]]
        _ops.adam_(*lists, coefficients(), coefficient, "per-op")
        for got, want in zip((lists[0], lists[2], lists[3]), wanted, strict=True):
            assert same_bits(torch.cat([x.reshape(-1) for x in got]), want)
        assert all(torch.equal(a, b) for a, b in zip(grads, lists[1], strict=True))


def test_backend_says_why() -> None:
    name, reason = _ops.backend()
    assert name == "torch"
    assert reason
