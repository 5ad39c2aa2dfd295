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

RIGHT = ["adam", "norm", "record", "resident", "warps", "barriers", "product", "launches"]
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
BROKEN = [  # file, an expression, a wrong one, the probe that must fail with it, its message
    ("adam_pack.h", "i + P::kSize <= t.numel", "i < t.numel", "adam", OVERFLOW),
    ("adam.cu", "all_aligned<T>(tensors[i])", "true", "adam", "misaligned address"),
    ("adam_pack.h", "slot * numel + i", "slot * numel + i + 1", "adam", OVERFLOW),
    ("norm.cu", "begin + kNormBlock <= grads.first[index + 1]", "begin < grads.first[index + 1]", "norm", OVERFLOW),
    ("halving.h", "is_aligned(block)", "true", "norm", "misaligned"),
    ("halving.h", "kWarp / 2", "kWarp / 4", "norm", "the result is wrong"),
    ("record.cu", "min(begin + kBlockBytes, t.bytes)", "begin + kBlockBytes", "record", OVERFLOW),
    ("resident/product.h", "lane / 2 >= t.rows", "false", "resident", OVERFLOW),
    ("resident/weight_gradients.h", "token + i >= run.vocab", "false", "resident", OVERFLOW),
    ("resident/pass.h", "cluster_wait()", "(void)0", "resident", ""),
    ("launch.h", "high - low > 1", "high - low > 2", "adam", ""),
]


BARRIERS = [  # of the resident engine: file, line, the barrier, a weaker one
    (path.name, number, *barrier)
    for path in sorted((build.ROOT / "csrc/cuda/resident").glob("*.h"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    for barrier in (("pass.sync();", "(void)0;"), ("pass.sync_cluster();", "pass.sync();"))
    if line.strip() == barrier[0]
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


@pytest.fixture(scope="module")
def broken_probes(probes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probes of kernels that are wrong where the environment variable FAULT says: one build for all faults."""
    copy = Path(shutil.copytree(build.ROOT / "csrc", tmp_path_factory.mktemp("broken") / "csrc"))
    for number, (file, right, wrong, *_) in enumerate(BROKEN):
        text = (copy / "cuda" / file).read_text()
        assert text.count(right) == 1
        (copy / "cuda" / file).write_text(text.replace(right, f"(fault == {number} ? ({wrong}) : ({right}))"))
    for number, (file, line, right, wrong) in enumerate(BARRIERS, len(BROKEN)):
        path = copy / "cuda/resident" / file
        lines = path.read_text().splitlines(keepends=True)
        lines[line - 1] = lines[line - 1].replace(right, f"if (fault == {number}) {{ {wrong} }} else {{ {right} }}")
        path.write_text("".join(lines))
    header = copy / "cuda/launch.h"
    fault = '#include <cstdlib>\ninline const int fault = std::atoi(std::getenv("FAULT"));\n'
    header.write_text(header.read_text().replace("#pragma once\n", "#pragma once\n" + fault))
    return build.probes(copy)


@pytest.mark.parametrize("fault", range(len(BROKEN)), ids=[case[2] for case in BROKEN])
def test_broken_kernels_are_noticed(fault: int, broken_probes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, probe, message = BROKEN[fault]
    monkeypatch.setenv("FAULT", str(fault))
    done = run(broken_probes, probe)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("barrier", range(len(BARRIERS)), ids=[f"{file}:{line}" for file, line, *_ in BARRIERS])
def test_a_missing_barrier_is_noticed(barrier: int, broken_probes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", str(len(BROKEN) + barrier))
    assert run(broken_probes, "barriers_of_resident").returncode != 0


def test_nothing_is_noticed_without_a_fault(broken_probes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "-1")
    done = run(broken_probes, *{case[3] for case in BROKEN})
    assert done.returncode == 0, done.stderr


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
