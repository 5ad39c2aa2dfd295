"""Replay: it passes what was recorded and finds every kind of damage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bhfast import verify as module
from bhfast.config import TrainConfig
from bhfast.errors import TraceError
from bhfast.train import TrainResult, train
from bhfast.verify import main, verify


def flip(path: Path, tensor: str, *index: int, bit: int) -> None:
    """Flip one bit of one element in the file."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    entry = json.loads(content[8 : 8 + length])[tensor]
    element = 0
    for size, i in zip(entry["shape"], index, strict=True):
        element = element * size + i
    first, last = entry["data_offsets"]
    itemsize = (last - first) // torch.Size(entry["shape"]).numel()
    content[8 + length + first + element * itemsize + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_passes_what_was_recorded(run: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(run.path)
    assert result.difference is None
    assert result.replayed == 130
    assert main([str(run.path)]) == 0
    assert "130 steps replayed, all bits of moments and parameters agree" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [1, 8192 * 7, 8192 * 1000])
def test_does_not_depend_on_the_chunk(chunk, run: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert verify(run.path).difference is None


@pytest.mark.parametrize(
    "changes",
    [
        {"adam_rounding": "opmath"},
        {"weight_decay": 30.0, "sigma": 1e-2},
        {"beta1": 0.3, "beta2": 0.9, "eps": 1e-4, "lr_schedule": "constant"},
        {"max_grad_norm": 0.1},
        {"max_grad_norm": float("inf"), "lr": 0.0},
    ],
    ids=str,
)
def test_passes_other_settings(changes, text: str, tmp_path: Path) -> None:
    settings = TrainConfig(steps=20, corpus=text, out=str(tmp_path / "t"), device="cpu", quiet=True)
    assert verify(train(dataclasses.replace(settings, **changes)).path).difference is None


@pytest.mark.parametrize("tensor", ["embeddings", "momentum", "variance"])
@pytest.mark.parametrize(("step", "bit"), [(1, 0), (77, 3), (130, 14)])
def test_names_step_tensor_and_index_of_a_flipped_bit(tensor, step, bit, copy_of_run, capsys) -> None:
    flip(copy_of_run, tensor, step, 101, 33, bit=bit)
    difference = verify(copy_of_run).difference
    assert (difference.tensor, difference.step, difference.index) == (tensor, step, (101, 33))
    assert main([str(copy_of_run)]) == 1
    printed = capsys.readouterr().out
    assert f"DIFFERENT: step {step}, {tensor}[101, 33]: recorded" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("tensor", ["momentum", "variance"])
def test_moments_start_at_zero(tensor, copy_of_run: Path) -> None:
    flip(copy_of_run, tensor, 0, 5, 6, bit=0)
    difference = verify(copy_of_run).difference
    assert (difference.tensor, difference.step, difference.index) == (tensor, 0, (5, 6))


@pytest.mark.parametrize("bit", range(16))
def test_no_bit_of_a_gradient_can_hide(bit: int, copy_of_run: Path) -> None:
    """A low bit is rounded away in the moments: then the checksum names tensor and step."""
    flip(copy_of_run, "grads", 60, 11, 12, bit=bit)
    difference = verify(copy_of_run).difference
    assert difference.step == 60
    if difference.tensor == "grads":
        assert difference.index is None
        assert "step 60, grads: the CRC-32 of its bytes" in difference.text
    else:
        assert difference.index == (11, 12)


@pytest.mark.parametrize(
    ("tensor", "index", "step"), [("logits", (9, 3), 9), ("losses", (9,), None), ("bh_center", (5,), None)]
)
def test_what_is_not_replayed_has_checksums(tensor, index, step, copy_of_run: Path) -> None:
    flip(copy_of_run, tensor, *index, bit=1)
    difference = verify(copy_of_run).difference
    assert (difference.tensor, difference.step) == (tensor, step)


def test_a_learning_rate_that_was_not_used_is_noticed(copy_of_run: Path) -> None:
    flip(copy_of_run, "learning_rates", 44, bit=51)
    difference = verify(copy_of_run).difference
    assert (difference.tensor, difference.step) == ("embeddings", 44)


def test_gradients_that_are_not_finite_replay(text: str, tmp_path: Path) -> None:
    settings = TrainConfig(
        steps=30, lr=1e38, lr_schedule="constant", corpus=text, out=str(tmp_path / "t"), device="cpu", quiet=True
    )
    result = train(settings)
    assert not result.losses.isfinite().all()
    assert verify(result.path).difference is None


def test_a_run_of_some_steps_has_its_checksums_compared(text: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "t"
    train(TrainConfig(steps=9, record_every=3, corpus=text, out=str(path), device="cpu", quiet=True))
    reason = "a replay needs every step, and this run recorded some (--record-every)"
    assert verify(path) == module.Verification(replayed=0, reason=reason, difference=None)
    assert main([str(path)]) == 0
    assert "a replay needs every step" in capsys.readouterr().out
    flip(path, "momentum", 2, 3, 4, bit=0)
    assert verify(path).difference.step == 6


def test_cannot_verify_other_files(tmp_path: Path, copy_of_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"embeddings": torch.zeros(3, 2, 2).bfloat16(), "recorded_steps": torch.arange(3)}, foreign)
    with pytest.raises(TraceError, match="no single file that bhfast wrote, as it lacks optimizer"):
        verify(foreign)
    assert main([str(tmp_path / "gone")]) == 2
    copy_of_run.write_bytes(copy_of_run.read_bytes()[:-1000])
    assert main([str(copy_of_run)]) == 2
    error = capsys.readouterr().err
    assert "bhfast verify: error: cannot open the trace" in error
    assert "is truncated" in error


def test_checksums_of_records_that_have_no_step(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    metadata = {"optimizer": '{"arithmetic": null, "reason": "none"}', "crc32": '{"x": "AAAAAAAAAAAAAAAA"}'}
    save_file({"x": torch.ones(3, 2), "recorded_steps": torch.arange(0)}, path, metadata)
    with pytest.raises(TraceError, match="is corrupted: what it says of its optimizer does not fit its tensors"):
        verify(path)
