"""Replay: it passes what was recorded and finds every kind of damage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from traces import flip, joined, record, rewrite, split

from bhfast import replay
from bhfast import verify as module
from bhfast.config import TrainConfig
from bhfast.errors import DamageError, TraceError
from bhfast.ops import arithmetic, torch_adam
from bhfast.optim import FusedAdam
from bhfast.recording.optimizer_description import joined_descriptions
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.train import TrainResult, train
from bhfast.verify import main, verify


def test_passes_what_was_recorded(run: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(run.path)
    assert result.difference is None
    assert result.replayed == 130
    assert main([str(run.path)]) == 0
    assert "130 steps replayed, all bits of moments and parameters agree" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [1, 8192 * 7, 8192 * 1000])
def test_does_not_depend_on_the_chunk(chunk, run: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CHUNK", chunk)
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
    reason = "a replay needs every step, but this run recorded only some (--record-every)"
    assert verify(path) == module.Verification(replayed=0, reason=reason, difference=None)
    assert main([str(path)]) == 2
    assert capsys.readouterr().out == f"{path}: not replayed, because {reason}; all checksums match\n"
    flip(path, "momentum", 2, 3, 4, bit=0)
    assert verify(path).difference.step == 6


def test_cannot_verify_other_files(tmp_path: Path, copy_of_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"embeddings": torch.zeros(3, 2, 2).bfloat16(), "recorded_steps": torch.arange(3)}, foreign)
    with pytest.raises(TraceError, match="bhfast did not write it, because it has no optimizer"):
        verify(foreign)
    assert main([str(tmp_path / "gone")]) == 2
    copy_of_run.write_bytes(copy_of_run.read_bytes()[:-1000])
    assert main([str(copy_of_run)]) == 1
    error = capsys.readouterr().err
    assert "bhfast verify: error: cannot open the trace" in error
    assert "is truncated" in error


def test_checksums_of_records_that_have_no_step(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    crc32 = '{"x": "AAAAAAAAAAAAAAAA", "recorded_steps": "AAAAAA=="}'
    metadata = {"format": "bhfast-trace", "format_version": "1", "crc32": crc32}
    metadata["optimizer"] = '{"arithmetic": null, "reason": "none"}'
    save_file({"x": torch.ones(3, 2), "recorded_steps": torch.arange(0)}, path, metadata)
    with pytest.raises(TraceError, match="is corrupted: its description of the optimizer does not fit its tensors"):
        verify(path)


# ---------------------------------------------------------------------------------------------------------------------
# The header


def in_metadata(**changed: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update(changed)


def more_of_nothing(header: dict[str, Any]) -> None:
    end = max(x["data_offsets"][1] for name, x in header.items() if name != "__metadata__")
    header["more"] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [end, end]}


def without_header_checksum(header: dict[str, Any]) -> None:
    del header["__metadata__"]["header_crc32"]


def without_format(header: dict[str, Any]) -> None:
    for key in ("header_crc32", "format", "format_version"):
        del header["__metadata__"][key]


@pytest.mark.parametrize(
    "change",
    [
        in_metadata(of="e"),
        in_metadata(seed="2"),
        in_metadata(another="1"),
        in_metadata(format_version="1"),
        in_metadata(format_version="3"),
        in_metadata(format="other"),
        in_metadata(header_crc32="00000000"),
        without_header_checksum,
        without_format,
        lambda header: header["__metadata__"].pop("seed"),
        lambda header: header["loss"].update(dtype="I32"),
        lambda header: header["w"].update(shape=[7, 8, 5]),
        lambda header: header.update(lost=header.pop("loss")),
        more_of_nothing,
    ],
)
def test_a_changed_header_is_damage(change, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, data = split(recorded.read_bytes())
    change(header)
    recorded.write_bytes(joined(header, data))
    assert main([str(recorded)]) == 1
    output = capsys.readouterr()
    assert output.out.startswith(f"{recorded}: DIFFERENT: the header") or "its header is not the one" in output.err


def test_the_header_may_be_written_in_another_way(recorded: Path) -> None:
    header, data = split(recorded.read_bytes())
    recorded.write_bytes(joined(json.dumps(dict(sorted(header.items())), indent=3).encode(), data))
    assert main([str(recorded)]) == 0


def test_a_header_of_version_1_has_no_checksum(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, data = split(recorded.read_bytes())
    without_header_checksum(header)
    header["__metadata__"]["format_version"] = "1"
    recorded.write_bytes(joined(header, data))
    capsys.readouterr()
    assert main([str(recorded)]) == 0
    assert capsys.readouterr().out.endswith("all checksums match (but its header has none: format version 1)\n")


@pytest.mark.parametrize("byte", [b"{", b"}", b"\0"])
def test_a_header_that_is_no_longer_json_is_damage(byte: bytes, recorded: Path) -> None:
    content = bytearray(recorded.read_bytes())
    content[content.index(b":") : content.index(b":") + 1] = byte
    recorded.write_bytes(content)
    with pytest.raises(DamageError, match=r"is corrupted: its header is not valid JSON"):
        verify(recorded)
    assert main([str(recorded)]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


def reason_of(path: Path) -> str | None:
    found = verify(path)
    assert found.difference is None
    assert found.status == (2 if found.reason else 0)
    return found.reason


WEIGHTS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [torch.optim.Adam, partial(torch.optim.AdamW, **WEIGHTS), torch.optim.AdamW])
def test_fused_adamw_on_a_cpu_replays(make, dtype: torch.dtype, tmp_path: Path) -> None:
    """Sizes with and without a tail, and more elements than one chunk of the kernel has."""
    torch.manual_seed(0)
    shapes = [(1,), (31,), (64,), (5, 13), (3, 4, 40), (70, 601)]
    params = {f"p{i}": nn.Parameter(torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)}
    optimizer = make(params.values(), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    with Recorder(optimizer, params, steps=7, path=tmp_path / "t", rows={"p4": [2, 0]}) as recorder:
        for _ in range(7):
            for param in params.values():
                param.grad = torch.randn(param.shape).to(dtype)
            optimizer.step()
            schedule.step()
    assert recorder.saved_steps == verify(tmp_path / "t").replayed == 7 or reason_of(tmp_path / "t")
    assert reason_of(tmp_path / "t") == (
        "only some rows of p4 were recorded, but the bits of torch's fused AdamW depend on where in the parameter an "
        "element is"
    )


def test_rows_of_a_parameter_without_a_tail_replay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(16, 12))
    optimizer = torch.optim.AdamW([param], fused=True)
    with Recorder(optimizer, {"w": param}, rows={"w": [3, 1]}, steps=9, path=tmp_path / "t"):
        for _ in range(9):
            param.grad = torch.randn(param.shape)
            optimizer.step()
    assert reason_of(tmp_path / "t") is None
    flip(tmp_path / "t", "w.exp_avg", 4, 1, 11, bit=0)
    assert verify(tmp_path / "t").difference.index == (1, 11)


def test_fused_needs_the_torch_and_the_cpu_of_the_recording(tmp_path: Path, monkeypatch) -> None:
    record(tmp_path / "t", partial(torch.optim.AdamW, fused=True))
    assert reason_of(tmp_path / "t") is None
    here = torch_adam.fused_kernel()
    assert here.startswith(f"torch {torch.__version__} on ")
    monkeypatch.setattr(torch_adam, "fused_kernel", lambda: "torch 9.9 on a toaster")
    assert reason_of(tmp_path / "t") == (
        f"it was recorded with the fused AdamW of {here}, whose bits may differ from those of torch 9.9 on a toaster "
        "here"
    )


def test_foreach_on_a_cpu_is_known_by_trying(tmp_path: Path, monkeypatch) -> None:
    record(tmp_path / "t", partial(torch.optim.AdamW, foreach=True))
    assert torch_adam.foreach_rounds_per_op(torch.bfloat16)
    assert reason_of(tmp_path / "t") is None
    adam = arithmetic.adam
    monkeypatch.setattr(arithmetic, "adam", lambda *args: [x.nextafter(x + 1) for x in adam(*args)])
    assert not torch_adam.foreach_rounds_per_op.__wrapped__(torch.float32)


class SignAdam(torch.optim.AdamW):
    """An AdamW whose step is its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            self.state[param] = {"exp_avg": param.grad.sign(), "exp_avg_sq": param.grad.square()}
            param -= 0.1 * param.grad.sign()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(torch.optim.AdamW, amsgrad=True), "a replay does not know AdamW with amsgrad"),
        (partial(torch.optim.AdamW, maximize=True, fused=True), "a replay does not know AdamW with maximize"),
        (partial(torch.optim.Adam, weight_decay=0.1), "a replay knows AdamW, not Adam with weight decay"),
        (partial(torch.optim.Adam, weight_decay=0.1, fused=True), "a replay knows AdamW, not Adam with weight decay"),
        (
            partial(torch.optim.AdamW, lr=torch.tensor(1e-3)),
            "a replay does not know AdamW with a learning rate or betas that are tensors",
        ),
        (SignAdam, "a replay knows AdamW, not SignAdam, which has a step() of its own"),
        (torch.optim.NAdam, "a replay knows AdamW, not NAdam"),
    ],
    ids=str,
)
def test_status_2_where_the_arithmetic_is_not_known(make, reason: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "t"
    record(path, make)
    assert main([str(path)]) == 2
    assert capsys.readouterr().out == f"{path}: not replayed, because {reason}; all checksums match\n"
    flip(path, "loss", 3, bit=1)
    assert main([str(path)]) == 1


def test_settings_changed_during_the_run_are_noticed(tmp_path: Path) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], fused=True)
    with Recorder(optimizer, {"w": param}, steps=3, path=tmp_path / "t"):
        for step in range(3):
            optimizer.param_groups[0]["maximize"] = step == 1
            param.grad = torch.ones(3)
            optimizer.step()
    assert reason_of(tmp_path / "t") == "the optimizer's settings were changed before step 2"


def test_a_grad_scaler_works_inside_the_fused_step(tmp_path: Path) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([param], fused=True), torch.amp.GradScaler("cpu")
    with Recorder(optimizer, {"w": param}, steps=2, path=tmp_path / "t"):
        for _ in range(2):
            scaler.scale(param.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert reason_of(tmp_path / "t") == "a GradScaler changed gradients inside the step of AdamW"


def with_a_step_without_update(path: Path, at: int, **flags: torch.Tensor) -> None:
    """Insert a step at which nothing of the state changed."""
    trace = open_trace(path)
    whole = ("w.rows", "recorded_steps")
    tensors = {n: torch.cat([x[:at], x[at - 1 : at], x[at:]]) for n, x in trace.items() if n not in whole}
    for name in ("w.grad", "b.grad"):
        tensors[name][at] = 0.5
    tensors["recorded_steps"] = torch.arange(len(trace.steps) + 1)
    rewrite(path, {**tensors, **flags}, trace.metadata)


@pytest.mark.parametrize("make", [FusedAdam, torch.optim.AdamW, partial(torch.optim.AdamW, fused=True)])
def test_steps_without_update_keep_state_and_step_count(make, recorded: Path) -> None:
    record(recorded, make, overwrite=True)
    with_a_step_without_update(recorded, 3)
    assert verify(recorded).difference.step == 3
    others = {name: x for name, x in open_trace(recorded).items()}
    metadata = open_trace(recorded).metadata
    missed = torch.arange(8) == 3
    rewrite(recorded, {**others, "skipped": missed}, metadata)
    assert reason_of(recorded) is None
    rewrite(recorded, {**others, "w.has_grad": ~missed, "b.has_grad": ~missed}, metadata)
    assert reason_of(recorded) is None
    rewrite(recorded, {**others, "w.has_grad": ~missed}, metadata)
    assert verify(recorded).difference.tensor.startswith("b")
    rewrite(recorded, {**others, "skipped": missed, "b.has_grad": torch.arange(8) != 4}, metadata)
    assert reason_of(recorded) == "b changed in step 4, in which it had no gradient"
    rewrite(recorded, {**others, "skipped": missed, "recorded_steps": torch.arange(100, 108)}, metadata)
    assert reason_of(recorded) is None
    rewrite(recorded, {**others, "skipped": torch.stack([missed, missed], 1)}, metadata)
    assert reason_of(recorded) == "skipped is not one value for each step"


def test_several_optimizers_of_one_arithmetic_replay(tmp_path: Path) -> None:
    path = tmp_path / "t"
    record(path, partial(torch.optim.AdamW, fused=True))
    trace = open_trace(path)
    only = {name: {**trace.optimizer, "params": {name: trace.optimizer["params"][name]}} for name in ("w", "b")}
    both = joined_descriptions([*only.values()])
    assert both["params"]["b"]["group"] == 1
    rates = trace["learning_rates"][:, None].expand(-1, 2)
    rewrite(path, {**trace, "learning_rates": rates}, {**trace.metadata, "optimizer": json.dumps(both)})
    assert reason_of(path) is None


def test_a_list_of_optimizers_is_damage(recorded: Path) -> None:
    trace = open_trace(recorded)
    rewrite(recorded, trace, {**trace.metadata, "optimizer": json.dumps([trace.optimizer, trace.optimizer])})
    with pytest.raises(DamageError, match="the metadata's optimizer is not a JSON object"):
        verify(recorded)


def test_moments_of_another_dtype_are_not_replayed(recorded: Path) -> None:
    trace = open_trace(recorded)
    rewrite(recorded, {**trace, "w.exp_avg": trace["w.exp_avg"].float()}, trace.metadata)
    assert reason_of(recorded) == "w is torch.bfloat16, but its gradient or moments are torch.float32"
