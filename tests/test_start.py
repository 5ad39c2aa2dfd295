"""Where the token vectors start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bhfast.errors import ConfigError
from bhfast.model import GPTConfig, build_model
from bhfast.start import Start

V, D = 300, 64


def tokens(start: Start, dtype: torch.dtype = torch.bfloat16, seed: int = 1):
    return start.tokens(V, D, torch.Generator().manual_seed(seed), dtype)


def test_a_black_hole_is_one_vector() -> None:
    vectors, center = tokens(Start())
    assert torch.equal(vectors, center.expand(V, D))
    assert 0.01 < center.std() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["per-op", "once"])
def test_noise_is_rounded_as_asked(rounding: str, dtype: torch.dtype) -> None:
    vectors, center = tokens(Start(sigma=0.003, rounding=rounding), dtype)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(center, (torch.randn(D, generator=generator) * 0.02).to(dtype))
    noise = torch.randn(V, D, generator=generator) * 0.003
    wanted = center + noise.to(dtype) if rounding == "per-op" else (center.float() + noise).to(dtype)
    assert vectors.dtype == dtype
    assert torch.equal(vectors, wanted)


def test_the_two_roundings_differ() -> None:
    one, other = (tokens(Start(sigma=0.003, rounding=rounding))[0] for rounding in ("per-op", "once"))
    assert 0.001 < (one != other).float().mean() < 0.5
    assert torch.allclose(one.float(), other.float(), atol=2**-10)


def test_a_gaussian_lies_around_zero() -> None:
    vectors, center = tokens(Start("gaussian", sigma=0.02), torch.float32)
    assert not center.any()
    assert vectors.std().item() == pytest.approx(0.02, rel=0.03)
    assert torch.equal(vectors, tokens(Start(sigma=0.02, init_scale=0.0), torch.float32)[0])


@pytest.mark.parametrize("kind", ["black-hole", "sphere"])
def test_the_center_has_the_norm_asked_for(kind: str) -> None:
    vectors, center = tokens(Start(kind, sigma=0.25, center_norm=1.0), torch.float32)
    assert center.norm().item() == pytest.approx(1, rel=1e-6)
    if kind == "sphere":
        assert torch.allclose((vectors - center).norm(dim=1), torch.tensor(0.25), rtol=1e-5)
        assert (vectors - center).mean(dim=0).norm() < 0.25 * 3 / V**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_is_taken_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "cloud.safetensors"
    given = torch.randn(V, D, dtype=dtype)
    save_file({"cloud": given}, path)
    vectors, center = tokens(Start(str(path)))
    assert center is None
    assert torch.equal(vectors, given.bfloat16())
    save_file({"one": given, "two": given + 1, "three": given[0].clone()}, path)
    assert torch.equal(tokens(Start(f"{path}:two"))[0], (given + 1).bfloat16())
    assert not torch.equal(tokens(Start(f"{path}:two", sigma=0.5))[0], (given + 1).bfloat16())


def test_a_start_does_not_change_the_rest_of_the_network(tmp_path: Path) -> None:
    path = tmp_path / "cloud.safetensors"
    save_file({"cloud": torch.zeros(128, 64)}, path)
    starts = [Start(), Start(sigma=1.0), Start("gaussian"), Start("sphere", 0.1, center_norm=1.0), Start(str(path))]
    networks = [dict(build_model(GPTConfig(), start, seed=3)[0].named_parameters()) for start in starts]
    for name, param in networks[0].items():
        for other in networks[1:]:
            assert torch.equal(param, other[name]) or name == "wte.weight"


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"kind": "cube"}, "start must be one of black-hole, gaussian, sphere, or a FILE.safetensors .*, got 'cube'"),
        ({"rounding": "twice"}, "start_rounding must be one of per-op, once, got 'twice'"),
        ({"kind": "gaussian", "center_norm": 1.0}, "center_norm is for the starts black-hole and sphere"),
        ({"kind": "no.safetensors"}, r"cannot read the start no\.safetensors"),
        ({"kind": "odd.safetensors"}, r"must have one tensor \[300, 64\]; it has a \[300, 32\], b \[2, 300, 64\]"),
        ({"kind": "odd.safetensors:a"}, r"must have one tensor \[300, 64\]; it has a \[300, 32\]"),
        ({"kind": "odd.safetensors:c"}, r"cannot read the start odd\.safetensors:c"),
        ({"kind": "half.safetensors"}, "must be bfloat16 or float32, got torch.float16"),
        ({"kind": "twice.safetensors"}, r"must have one tensor .* a \[300, 64\], b \[300, 64\]; .*:NAME names one"),
    ],
    ids=str,
)
def test_refuses_other_starts(start, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.zeros(V, D // 2), "b": torch.zeros(2, V, D)}, "odd.safetensors")
    save_file({"a": torch.zeros(V, D).half()}, "half.safetensors")
    save_file({"a": torch.zeros(V, D), "b": torch.ones(V, D)}, "twice.safetensors")
    with pytest.raises(ConfigError, match=message):
        tokens(Start(**start))
