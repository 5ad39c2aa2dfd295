"""The checker of what ptxas says, which `make cuda` runs."""

from __future__ import annotations

from pathlib import Path

import ptxas_log
import pytest

PREFIX = "_ZN6bhfast4cuda44_GLOBAL__N__b070a3ba_11_resident_cu_51ba13f3"
GOOD = "".join(
    f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{PREFIX}{name}' for '{architecture}'
ptxas info    : Function properties for {PREFIX}{name}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{shared}
ptxas info    : Compile time = 2653.489 ms
ptxas info    : Function properties for _ZN6bhfast4cuda8resident8multiplyILb0ELb0ELb1EEENS1_4Sums
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
    for name, registers, shared in (("15resident_kernelILb1E", 248, ""), ("11adam_kernel", 51, ", 4096 bytes smem"))
    for architecture in ("sm_90", "sm_100a")
)


def check(log: str, tmp_path: Path, *architectures: str) -> int:
    (tmp_path / "log").write_text(log)
    return ptxas_log.main([str(tmp_path / "log"), *(architectures or ("sm_90", "sm_100"))])


def test_a_good_log_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(GOOD, tmp_path) == 0
    assert capsys.readouterr().out == (
        "resident_kernelILb1E: sm_90 248 registers 0 B shared, sm_100 248 registers 0 B shared\n"
        "adam_kernel: sm_90 51 registers 4096 B shared, sm_100 51 registers 4096 B shared\n"
    )


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("0 bytes spill stores", "8 bytes spill stores", "resident_kernelILb1E for sm_90: 8 bytes are spilled"),
        ("0 bytes spill loads", "4 bytes spill loads", "resident_kernelILb1E for sm_90: 4 bytes are spilled"),
        ("0 bytes stack", "16 bytes stack", "resident_kernelILb1E for sm_90: a stack of 16 bytes"),
        ("Used 248", "Used 256", "resident_kernelILb1E for sm_90: 256 registers, at most 255"),
        ("4096 bytes smem", "49156 bytes smem", "adam_kernel for sm_90: 49156 bytes of shared memory, at most 49152"),
        ("Used 248", "Uses 248", "resident_kernelILb1E for sm_90: its registers are not in the log"),
        ("for 'sm_90'", "for 'sm_80'", "resident_kernelILb1E is not compiled for sm_90"),
    ],
)
def test_what_is_wrong_is_named(right: str, wrong: str, message: str, tmp_path: Path, capsys) -> None:
    assert check(GOOD.replace(right, wrong, 1), tmp_path) == 1
    assert capsys.readouterr().err == f"ptxas_log: error: {message}\n"


def test_spills_of_a_function_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = GOOD.rindex("0 bytes spill loads")
    assert check(GOOD[:last] + "1" + GOOD[last:], tmp_path) == 1
    assert "adam_kernel for sm_100: 10 bytes are spilled" in capsys.readouterr().err


@pytest.mark.parametrize("log", ["", "nvcc says nothing"])
def test_an_empty_log_is_not_good(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(log, tmp_path) == 1
    assert "the log has no kernels" in capsys.readouterr().err
