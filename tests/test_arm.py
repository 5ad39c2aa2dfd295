"""64-bit ARM in an emulator: the operations bit for bit, the native engine against float64 (make arm)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_native import assert_near_float64, make_run, state_of
from test_ops import coefficients, same_bits, tensors
from torch import Tensor

from bhfast.engines.native import NativeEngine
from bhfast.engines.torch import TorchEngine
from bhfast.ops import arithmetic
from bhfast.trace.format import bytes_of

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = "-std=c++20 -O2 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror".split()
SOURCES = [
    "csrc/cpu/operations.cpp",
    "csrc/native/engine.cpp",
    "csrc/native/optimizer_step.cpp",
    *(f"csrc/instruction_sets/{name}.cpp" for name in ("dispatch", "neon", "neonbf16", "portable")),
    "tests/arm/probe.cpp",
]
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"this machine has no {' and no '.join(MISSING)}"),
]

Probe = Callable[..., bytes]
sets = pytest.mark.parametrize("instruction_set", ["neonbf16", "neon", "portable"])


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """Runs tests/arm/probe.cpp: arguments, input values -> output."""
    folder = tmp_path_factory.mktemp("probe")

    def compiled(source: str) -> Path:
        target = folder / f"{Path(source).stem}.o"
        command = [COMPILER, *FLAGS, "-Icsrc", "-c", source, "-o", target]
        subprocess.run(command, cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    subprocess.run([COMPILER, "-static", *objects, "-o", folder / "probe"], check=True)

    def run(*arguments: object, values: Iterable[Tensor] = (), cpu: str = "max") -> bytes:
        command = [EMULATOR, "-cpu", cpu, folder / "probe", *map(str, arguments)]
        return subprocess.run(command, input=b"".join(map(bytes_of, values)), stdout=subprocess.PIPE, check=True).stdout

    return run


def split(data: bytes, *likes: Tensor) -> list[Tensor]:
    """Return bytes as tensors of the same dtypes and shapes."""
    assert len(data) == sum(x.nbytes for x in likes)
    pieces = torch.frombuffer(bytearray(data), dtype=torch.uint8).split([x.nbytes for x in likes])
    return [piece.view(x.dtype).view(x.shape) for piece, x in zip(pieces, likes, strict=True)]


def test_the_instruction_sets_are_those_of_the_processor(probe: Probe) -> None:
    assert probe("sets").split() == [b"neonbf16", b"neon", b"portable"]
    assert probe("sets", cpu="cortex-a72").split() == [b"neon", b"portable"]


@sets
@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("finite", [True, False])
def test_adam_has_the_specified_bits(instruction_set: str, rounding: str, dtype, finite, probe, generator) -> None:
    for n, weight_decay, beta1 in ((4097, 0.1, 0.9), (20_003, 0.0, 0.3)):
        state = tensors(n, dtype, generator, finite=finite)
        scalars, clip = coefficients(weight_decay=weight_decay, betas=(beta1, 0.999)), torch.tensor([0.333984375])
        clipped = (state[1].float() * clip).to(dtype)
        wanted = arithmetic.adam(state[0], clipped, *state[2:], scalars, rounding)
        arguments = int(dtype == torch.float32), arithmetic.ROUNDINGS.index(rounding)
        got = probe(instruction_set, "adam", *arguments, values=[torch.tensor([n]), scalars, clip, *state])
        for own, other in zip(split(got, *wanted), wanted, strict=True):
            assert same_bits(own, other)


@sets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gradient_norm_has_the_specified_bits(instruction_set: str, dtype, probe: Probe, generator) -> None:
    grad = torch.randn(1_100_003, generator=generator).to(dtype)
    got = probe(instruction_set, "norm", int(dtype == torch.float32), values=[torch.tensor([len(grad)]), grad])
    assert np.frombuffer(got, np.float32)[0] == arithmetic.grad_norm([grad]).item()


SHAPES = [{}, {"vocab_size": 97, "hidden_dim": 96, "heads": 3, "layers": 3, "context": 33, "batch": 3}]


def native_steps(probe: Probe, instruction_set: str, steps: int, shape: dict[str, int]) -> list[Tensor]:
    """Return what :func:`test_native.state_of` returns after these steps."""
    run = make_run(steps=steps, **shape)
    config, params = run.model.config, list(run.model.parameters())
    sizes = [config.vocab_size, config.hidden_dim, config.mlp_width, config.layers, config.heads, config.context]
    for p in params:
        p.grad = torch.zeros_like(p)
    (group,) = run.optimizer.schedule(run.lrs, 0)
    values = [
        torch.tensor([*sizes, run.offsets[0].numel(), run.target_offset, len(params), len(run.corpus)]),
        group.coefficients,
        torch.tensor([p.numel() for p in params]),
        *(p.detach() for p in params),
        run.corpus.int(),
        run.offsets,
    ]
    scalars = torch.empty(2, steps).unbind()
    likes = [*scalars, *(like for p in params for like in (p, p, p, p))]
    losses, norms, *rest = split(probe(instruction_set, "steps", steps, values=values), *likes)
    in_order = [rest[i + j] for i in range(0, len(rest), 4) for j in (1, 0, 2, 3)]
    return [*in_order, losses, norms]


@sets
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_as_near_to_float64_as_the_torch_engines(shape, instruction_set: str, probe: Probe) -> None:
    *params, losses, norms = native_steps(probe, instruction_set, 1, shape)
    assert_near_float64(TorchEngine(make_run(**shape)), losses[0].item(), norms[0].item(), params[1::4])


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_portable_steps_have_the_same_bits_everywhere(shape, probe: Probe) -> None:
    here = NativeEngine(make_run(steps=4, **shape), instruction_set="portable")
    here.run(4)
    there = native_steps(probe, "portable", 4, shape)
    assert all(same_bits(a, b) for a, b in zip(state_of(here), there, strict=True))
