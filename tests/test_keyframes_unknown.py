"""Compact traces of steps that do not follow from the gradients: refused at once, or said where they begin."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from keyframe_runs import KEYFRAME, RUNS, STEPS, Params, Run, adamw, assert_same_bits, fused_adam, two
from torch import nn

from bhfast import train as training
from bhfast.errors import ConfigError, RecordingWarning, TraceError
from bhfast.recording.recorder import Recorder
from bhfast.trace import Trace, open_trace
from bhfast.trace.format import AFTER_STEP, CHANGED, KEYFRAMES
from bhfast.verify import verify

Optimizers = Sequence[torch.optim.Optimizer]


# ---------------------------------------------------------------------------------------------------------------------
# At the start


def sgd(params: Params) -> Optimizers:
    return [torch.optim.SGD(params.values())]


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (sgd, {}, "a replay knows AdamW, not SGD"),
        (lambda p: adamw(p, amsgrad=True), {}, "a replay does not know AdamW with amsgrad"),
        (lambda p: adamw(p, betas=(0.0, 0.9)), {}, "at betas[0] = 0 the sign"),
        (lambda p: adamw(p, lr=torch.tensor(0.1)), {}, "a learning rate or betas that are tensors"),
        (adamw, {"fields": ["param", "grad"]}, "exp_avg, exp_avg_sq of matrix are not recorded"),
        (fused_adam, {"fields": ["param", "exp_avg", "exp_avg_sq"]}, "grad of matrix are not recorded"),
        (
            lambda p: adamw(p, foreach=None, fused=True),
            {"rows": {"matrix": [1]}},
            "the bits of torch's fused AdamW depend on where in matrix a row is",
        ),
    ],
    ids=["SGD", "amsgrad", "beta1", "lr", "moments", "gradients", "fused rows"],
)
def test_refuses_what_cannot_be_rebuilt(make: Any, options: Any, reason: str, tmp_path: Path) -> None:
    said = rf"keyframes need steps that can be rebuilt to the bit: .*{re.escape(reason)}.*; record without keyframes"
    with pytest.raises(ConfigError, match=said):
        Run(make, options=options).record(tmp_path / "t", keyframes=KEYFRAME)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keyframes": 1}, "keyframes must be at least 2, got 1"),
        ({"keyframes": 0}, "keyframes must be at least 2, got 0"),
        ({"keyframes": 4, "every": 2}, "keyframes need the gradients of every step, got every=2"),
    ],
    ids=str,
)
def test_refuses_arguments(options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        RUNS["FusedAdam"].record(tmp_path / "t", **options)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--keyframes", "1"], "keyframes must be 0, or at least 2, got 1"),
        (["--keyframes", "-3"], "keyframes must be 0, or at least 2, got -3"),
        (["--keyframes", "8", "--record-every", "2"], "keyframes need the gradients of every step, got record_every=2"),
    ],
    ids=str,
)
def test_the_program_refuses_flags(flags: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert training.main([*flags, "--out", str(tmp_path / "t")]) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# From some step on

BEFORE = 10  # the last step that is known
FIRST_FRAME_AFTER = 16


def after(step: int, work: Callable[[Params, Optimizers], object]) -> Callable[[int, Params, Optimizers], None]:
    """Do something right after one step."""
    return lambda number, params, optimizers: work(params, optimizers) if number == step else None


def write(params: Params, optimizers: Optimizers) -> None:
    with torch.no_grad():
        params["matrix"].mul_(2)


def load(params: Params, optimizers: Optimizers) -> None:
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))


def set_group(**settings: Any) -> Callable[[Params, Optimizers], None]:
    return lambda params, optimizers: optimizers[0].param_groups[0].update(settings)


CHANGES = {
    "weight decay": (fused_adam, set_group(weight_decay=0.5), "the optimizer's settings were changed before step 11"),
    "fused": (adamw, set_group(fused=True), "the optimizer's settings were changed before step 11"),
    "rounding": (fused_adam, lambda p, o: setattr(o[0], "rounding", "opmath"), "settings were changed before step 11"),
    "no clipping": (
        partial(fused_adam, max_grad_norm=1.0),
        lambda p, o: setattr(o[0], "max_grad_norm", None),
        "settings were changed before step 11",
    ),
    "parameter": (fused_adam, write, "parameters or their state were changed between steps, before step 11"),
    "moments": (adamw, load, "parameters or their state were changed between steps, before step 11"),
    "extra step": (adamw, lambda p, o: o[0].state[p["matrix"]]["exp_avg"].zero_(), "were changed between steps"),
}


def read(trace: Trace, name: str, record: int) -> torch.Tensor:
    return trace[name][record]


def stepped(full: Path) -> dict[str, torch.Tensor]:
    """What the steps left in each record, as a compact trace has it: a full one also has later changes."""
    trace = open_trace(full)
    found = {name: trace[name].clone().as_subclass(torch.Tensor) for name in trace}
    for name in [name for name in found if name + CHANGED in found]:
        found[name][found[name + CHANGED]] = found[name + AFTER_STEP][found[name + CHANGED]]
    return found


def assert_known_before(compact: Path, full: Path, reason: str) -> None:
    """All up to ``BEFORE`` and at key frames is as in the full trace; the rest raises an error with the reason."""
    trace, wanted = open_trace(compact), stepped(full)
    for name in ("matrix", "cube.exp_avg", "tiny.exp_avg_sq", "scalar"):
        for record in (*range(BEFORE + 1), FIRST_FRAME_AFTER, STEPS):
            assert_same_bits(open_trace(compact)[name][record : record + 1], wanted[name][record : record + 1])
        assert_same_bits(trace[name][: BEFORE + 1], wanted[name][: BEFORE + 1])
        frames = [i for i in trace["keyframe_steps"].tolist() if i <= BEFORE or i in (FIRST_FRAME_AFTER, STEPS)]
        assert_same_bits(trace[name][frames], wanted[name][frames])
        for index in (BEFORE + 1, FIRST_FRAME_AFTER + 1, STEPS - 1, slice(BEFORE, BEFORE + 2), slice(None)):
            with pytest.raises(TraceError, match=f"cannot be rebuilt: .*{reason}.*; its key frames can be read"):
                trace[name][index]
        assert_same_bits(trace[f"{name}{KEYFRAMES}"], wanted[name][trace["keyframe_steps"]])
    assert_same_bits(trace["matrix.grad"], wanted["matrix.grad"])
    found = verify(compact)
    assert found.status == 2
    assert re.search(reason, found.reason or "")


@pytest.mark.parametrize("name", CHANGES)
def test_records_before_a_change_stay_readable(name: str, tmp_path: Path) -> None:
    make, work, reason = CHANGES[name]
    run = Run(make, after_step=after(BEFORE, work))
    said = rf"from step {BEFORE + 1} on, states between key frames cannot be rebuilt: .*{reason}"
    with pytest.warns(RecordingWarning, match=said) as caught:
        compact = run.record(tmp_path / "compact", keyframes=KEYFRAME)
    assert len(caught) == 1
    assert_known_before(compact, run.record(tmp_path / "full"), reason)


def test_a_change_before_the_first_step(tmp_path: Path) -> None:
    params = {"w": nn.Parameter(torch.ones(3, 4))}
    optimizers = fused_adam(params)
    with (
        pytest.warns(RecordingWarning, match=r"from step 1 on, .* were changed between steps, before step 1$"),
        Recorder(optimizers, params, steps=3, path=tmp_path / "t", keyframes=8),
    ):
        with torch.no_grad():
            params["w"].zero_()
        for _ in range(3):
            params["w"].grad = torch.ones(3, 4)
            optimizers[0].step()
    trace = open_trace(tmp_path / "t")
    assert_same_bits(trace["w"][0], torch.ones(3, 4))
    assert_same_bits(trace["w"][3], params["w"].detach())
    with pytest.raises(TraceError, match="before step 1"):
        trace["w"][2]


def test_a_compiled_step(tmp_path: Path) -> None:
    """Nothing is known from the first one on."""
    params = {"w": nn.Parameter(torch.ones(3, 4).bfloat16())}
    optimizers = adamw(params)
    step = torch.compile(optimizers[0].step, backend="eager")
    with (
        pytest.warns(RecordingWarning, match="from step 2 on, states between key frames .*: its step was compiled"),
        Recorder(optimizers, params, steps=5, path=tmp_path / "t", keyframes=3),
    ):
        for number in range(5):
            params["w"].grad = torch.ones(3, 4).bfloat16()
            optimizers[0].step() if number == 0 else step()
    trace = open_trace(tmp_path / "t")
    assert trace["w"][0].sum() == 12
    assert trace["w"][1].shape == (3, 4)
    with pytest.raises(TraceError, match="steps 2 to 2 of w cannot be rebuilt: its step was compiled"):
        trace["w"][2]
    assert trace["w"][3].shape == (3, 4)
    assert verify(tmp_path / "t").status == 2


def clamp(params: Params, low: int, high: int) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
    count = iter(range(1, 1000))

    def hook(*_: object) -> None:
        if low <= next(count) <= high:
            for param in params.values():
                param.grad.clamp_(-0.5, 0.5)

    return hook


def test_gradients_that_no_single_factor_changed(tmp_path: Path) -> None:
    """Only the records up to the next key frame are lost."""

    def make(params: Params) -> Optimizers:
        optimizers = adamw(params)
        optimizers[0].register_step_pre_hook(clamp(params, BEFORE + 1, BEFORE + 1))
        return optimizers

    run = Run(make, options={"unclipped": True})
    reason = "between backward and step, gradients were changed by something other than one common factor"
    said = rf"^states from step {BEFORE + 1} to the next key frame cannot be rebuilt: {reason}$"
    with pytest.warns(RecordingWarning, match=said) as caught:
        compact = run.record(tmp_path / "compact", keyframes=KEYFRAME)
    assert len(caught) == 1
    trace, full = open_trace(compact), open_trace(run.record(tmp_path / "full"))
    known = [*range(BEFORE + 1), *range(FIRST_FRAME_AFTER, STEPS + 1)]
    assert_same_bits(trace["cube"][known], full["cube"][known])
    for record in range(BEFORE + 1, FIRST_FRAME_AFTER):
        with pytest.raises(TraceError, match=rf"cannot be rebuilt: {reason}"):
            trace["cube"][record]
    assert (verify(compact).status, verify(compact).reason) == (2, reason)


# ---------------------------------------------------------------------------------------------------------------------
# What the recorder cannot see


def write_behind(params: Params, optimizers: Optimizers) -> None:
    params["matrix"].data[4, 6] += 1


def test_a_parameter_changed_through_its_data_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    run = Run(after_step=after(BEFORE, write_behind))
    compact = run.record(tmp_path / "compact", keyframes=KEYFRAME)
    trace, full = open_trace(compact), open_trace(run.record(tmp_path / "full"))
    known = [*range(KEYFRAME + 1), *range(FIRST_FRAME_AFTER, STEPS + 1)]
    assert_same_bits(trace["matrix"][known], full["matrix"][known])
    assert_same_bits(trace["matrix"][:, :4], full["matrix"][:, :4])
    assert_same_bits(trace["cube"][:], full["cube"][:])
    for index in (KEYFRAME + 1, FIRST_FRAME_AFTER - 1, (12, 4), slice(None), (slice(3, 10), slice(2, None)), [9, 20]):
        with pytest.raises(
            TraceError,
            match=r"steps 9 to 16 do not lead from one key frame of matrix to the next, so nothing between them can be "
            r"rebuilt: the file is damaged \(bhfast verify says where\), or something other than the optimizer's steps",
        ):
            open_trace(compact)["matrix"][index]
    found = verify(compact)
    assert found.status == 1
    assert re.search(
        r"step 16, matrix.keyframes\[4, 6\]: .*; all checksums of compact match, so it was changed after step 8 by "
        "something other than the optimizer's steps",
        str(found),
    )


@pytest.mark.parametrize("work", [write, write_behind])
@pytest.mark.parametrize("done", [13, 21])
def test_a_change_after_the_last_step_does_not_become_its_record(work: Any, done: int, tmp_path: Path) -> None:
    """As when a loop loads its best weights before the recorder is closed."""
    run = Run(after_step=after(done, work), done=done)
    compact = run.record(tmp_path / "compact", keyframes=KEYFRAME)
    trace, full = open_trace(compact), stepped(run.record(tmp_path / "full"))
    assert_same_bits(trace["cube"][:], full["cube"][:])
    if work is write:
        assert_same_bits(trace["matrix"][:], full["matrix"][:])
        assert verify(compact).status == 0
        return
    last_grid = done // KEYFRAME * KEYFRAME
    assert_same_bits(trace["matrix"][: last_grid + 1], full["matrix"][: last_grid + 1])
    for record in range(last_grid + 1, done + 1):
        with pytest.raises(TraceError, match=f"steps {last_grid + 1} to {done} do not lead from one key frame"):
            open_trace(compact)["matrix"][record]


def test_a_change_between_the_steps_of_two_optimizers(tmp_path: Path) -> None:
    """The first optimizer's record, and key frame, is the state after its own step."""

    def make(params: Params) -> Optimizers:
        optimizers = two(params)
        count = iter(range(1, 1000))

        def change(*_: object) -> None:
            if next(count) == KEYFRAME:
                write(params, optimizers)

        optimizers[1].register_step_pre_hook(change)
        return optimizers

    with pytest.warns(RecordingWarning, match=f"from step {KEYFRAME + 1} on, .* changed between steps") as caught:
        compact = Run(make).record(tmp_path / "compact", keyframes=KEYFRAME)
    assert len(caught) == 1
    trace, full = open_trace(compact), stepped(Run(make).record(tmp_path / "full"))
    assert_same_bits(trace["matrix"][: KEYFRAME + 1], full["matrix"][: KEYFRAME + 1])
    with pytest.raises(TraceError, match=f"changed between steps, before step {KEYFRAME + 1}"):
        trace["matrix"][KEYFRAME + 1]


def test_a_fused_kernel_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(RUNS["AdamW fused"], after_step=after(BEFORE, set_group(weight_decay=0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordingWarning)
        trace = open_trace(run.record(tmp_path / "t", keyframes=KEYFRAME))
    monkeypatch.setattr("bhfast.ops.torch_adam.fused_kernel", lambda: "torch 9.9 on riscv64")
    assert trace["cube"][KEYFRAME].shape == (3, 2, 65)
    with pytest.raises(
        TraceError, match=r"it was recorded with the fused AdamW of .*, whose bits may differ from those"
    ):
        trace["cube"][3]
