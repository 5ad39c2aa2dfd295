"""The CUDA kernels, executed by the CPU under sanitizers; and whether the emulation of CUDA notices faults."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import build
from test_ops import coefficients, same_bits, tensors

from bhfast.ops import kernels as torch_kernels

RIGHT = ["adam", "norm", "record", "warps", "barriers", "product", "launches"]
FAULTS = {
    "missing_barrier": "the result is wrong",
    "divergent_barrier": "threads of one group wait at different barriers",
    "barrier_without_everyone": "threads wait at a barrier for a thread that has left",
    "half_a_cluster": "threads wait for each other forever",
    "beyond_shared_memory": "index 63 out of bounds",
    "beyond_dynamic_memory": "AddressSanitizer: heap-buffer-overflow",
    "beyond_the_tensor": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": "misaligned address",
    "misaligned_matrix": "ldmatrix from an address not aligned to 16 bytes",
}
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
BROKEN = [  # file, code, code in a broken copy, the probe that must fail, its message
    ("cuda/adam.cu", "aligned && i + P::kSize <= t.numel", "aligned && i < t.numel", "adam", OVERFLOW),
    ("cuda/adam.cu", "all_aligned<T>(tensors[i])", "true", "adam", "misaligned address"),
    ("cuda/adam.cu", "slot * numel + i;", "slot * numel + i + 1;", "adam", OVERFLOW),
    ("cuda/norm.cu", "begin + kNormBlock <= grads", "begin < grads", "norm", OVERFLOW),
    ("cuda/norm.cu", "const bool aligned = is_aligned(block);", "const bool aligned = true;", "norm", "misaligned"),
    ("cuda/norm.cu", "width = kWarp / 2", "width = kWarp / 4", "norm", "the result is wrong"),
    ("cuda/record.cu", "min(begin + kBlockBytes, t.bytes)", "begin + kBlockBytes", "record", OVERFLOW),
    ("cuda/launch.h", "high - low > 1", "high - low > 2", "adam", ""),
]


def run(program: Path, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *names], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def probes() -> Path:
    if shutil.which(build._compiler()[0]) is None:
        pytest.skip("there is no C++ compiler")
    return build.probes()


def test_kernels_and_stand_in_are_right(probes: Path) -> None:
    done = run(probes, *RIGHT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str, probes: Path) -> None:
    done = run(probes, fault)
    assert done.returncode != 0
    assert FAULTS[fault] in done.stderr


@pytest.mark.parametrize(("file", "right", "wrong", "probe", "message"), BROKEN, ids=[case[2] for case in BROKEN])
def test_broken_kernels_are_noticed(
    file: str, right: str, wrong: str, probe: str, message: str, probes: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(build.ROOT / "csrc", tmp_path / "csrc"))
    text = (copy / file).read_text()
    assert text.count(right) == 1
    (copy / file).write_text(text.replace(right, wrong))
    done = run(build.probes(copy), probe)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("by_value", [False, True])
def test_numbers_of_a_step_come_by_address_or_by_value(by_value: bool, cuda_on_cpu, generator) -> None:
    state = tensors(4099, torch.bfloat16, generator, finite=False)
    results = []
    cuda_on_cpu.by_value(by_value)
    try:
        for adam_, record_ in ((cuda_on_cpu.adam_, cuda_on_cpu.record_), (torch_kernels.adam_, torch_kernels.record_)):
            p, g, m, v = (x.clone() for x in state)
            rings = [torch.full((3, 4099), 7.0, dtype=torch.bfloat16) for _ in range(3)]
            step, clip = torch.tensor(8), torch.tensor(0.5)
            adam_([p], [g], [m], [v], coefficients()[0], clip, "per-op", rings[:2], [0, 3], step, 2)
            record_([g], rings[2:], step, 4)
            results.append([p, m, v, *rings])
    finally:
        cuda_on_cpu.by_value(False)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_results_do_not_depend_on_the_order_of_threads(cuda_on_cpu, generator) -> None:
    grads = [torch.randn(n, generator=generator) for n in (5000, 3, 2049)]
    wanted = torch_kernels.clip_coefficient(grads, 1.0)
    for seed in range(20):
        cuda_on_cpu.seed(seed)
        for got, want in zip(cuda_on_cpu.clip_coefficient(grads, 1.0), wanted, strict=True):
            assert same_bits(got, want)
