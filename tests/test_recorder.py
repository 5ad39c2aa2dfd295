"""The recorder around loops of the user's own."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from copy_streams import SlowCopyStream
from torch import nn
from traces import flip

from bhfast.errors import BhfastError, ConfigError, RecordingWarning, StorageError
from bhfast.ops.checks import FIELDS
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.recording.slots import RecordSlots
from bhfast.trace import open_trace
from bhfast.verify import verify

OPTIMIZERS = {
    "FusedAdam": lambda p: FusedAdam(p, max_grad_norm=0.1),
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
}


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3, dtype=dtype)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    optimizer.zero_grad()
    loss = (model(torch.randn(4, 5, dtype=dtype)).float() ** 2).sum()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_records_every_step_to_the_bit(make, dtype, tmp_path: Path) -> None:
    model = linear(dtype)
    optimizer = make(model.parameters())
    path = tmp_path / "t.safetensors"
    wanted: dict[str, list[torch.Tensor]] = {}
    start = model.weight.detach().clone()
    with Recorder(optimizer, {"w": model.weight}, steps=7, path=path) as recorder:
        for _ in range(7):
            loss = train_step(model, optimizer)
            recorder.log(loss=loss)
            state = optimizer.state[model.weight]
            now = {"w": model.weight, "w.grad": model.weight.grad, "loss": loss}
            now |= {f"w.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
            for key, value in now.items():
                wanted.setdefault(key, []).append(value.detach().clone())
            with torch.no_grad():  # poison: what changes after the step is not the step's
                model.weight.grad.fill_(float("nan"))
    trace = open_trace(path)
    assert trace.steps.tolist() == list(range(8))
    assert torch.equal(trace["w"][0], start)
    assert all((trace[key][0] == 0).all() for key in ("w.grad", "w.exp_avg", "w.exp_avg_sq"))
    assert trace["loss"][0].isnan()
    for key, values in wanted.items():
        assert trace[key].dtype == values[0].dtype
        assert torch.equal(trace[key][1:], torch.stack(values)), key


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("make", [FusedAdam, torch.optim.AdamW])
def test_records_what_the_loop_changes_after_the_step(make, storage: str, tmp_path: Path) -> None:
    model = linear()
    optimizer = make(model.parameters())
    path = tmp_path / "t.safetensors"
    left, final = [], []
    with Recorder(optimizer, {"w": model.weight}, steps=6, path=path, storage=storage):
        for step in range(1, 7):
            train_step(model, optimizer)
            left.append(model.weight.detach().clone())
            if step in (2, 6):
                with torch.no_grad():
                    model.weight[0] += 0.5
                    optimizer.state[model.weight]["exp_avg"].mul_(0.5)
            final.append(model.weight.detach().clone())
    trace = open_trace(path)
    assert torch.equal(trace["w"][1:], torch.stack(final))
    assert trace["w.changed"].nonzero().flatten().tolist() == [2, 6]
    assert trace["w.exp_avg.changed"].nonzero().flatten().tolist() == [2, 6]
    assert torch.equal(trace["w.after_step"][[2, 6]], torch.stack([left[1], left[5]]))
    assert not trace["w.after_step"][[0, 1, 3, 4, 5]].any()
    assert "w.exp_avg_sq.changed" not in trace
    assert torch.equal(trace["w.exp_avg"][2], trace["w.exp_avg.after_step"][2] * 0.5)
    found = verify(path)
    assert (found.status, found.replayed) == (0, 6), found


def test_a_change_before_the_first_step_belongs_to_the_start(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    path = tmp_path / "t.safetensors"
    with Recorder(optimizer, {"w": model.weight}, steps=2, path=path):
        with torch.no_grad():
            model.weight.fill_(7)
        train_step(model, optimizer)
        train_step(model, optimizer)
    trace = open_trace(path)
    assert (trace["w"][0] == 7).all()
    assert trace["w.changed"].tolist() == [True, False, False]
    assert verify(path).status == 0


def test_a_write_through_data_is_not_called_damage(tmp_path: Path) -> None:
    """The recorder cannot notice it."""
    path = tmp_path / "t.safetensors"
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, {"w": model.weight}, steps=3, path=path):
        for _ in range(3):
            train_step(model, optimizer)
            model.weight.data[0] += 0.5
    assert str(verify(path)).endswith(
        "; all checksums match, so the state before this step was changed by something other than the optimizer, such "
        "as a write through .data"
    )


def test_a_damaged_change_is_found(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    path = tmp_path / "t.safetensors"
    with Recorder(optimizer, {"w": model.weight}, steps=3, path=path):
        for _ in range(3):
            train_step(model, optimizer)
            with torch.no_grad():
                model.weight[0] += 0.5
    flip(path, "w.after_step", 2, 0, 0, bit=3)
    found = verify(path)
    assert found.status == 1
    assert "step 2, w[0, 0]" in str(found)


def test_watching_does_not_change_the_run(tmp_path: Path) -> None:
    weights = []
    for watch in (False, True):
        model = linear()
        optimizer = FusedAdam(model.parameters())
        torch.manual_seed(1)
        if watch:
            with Recorder(optimizer, {"w": model.weight}, steps=5, path=tmp_path / "t"):
                for _ in range(5):
                    train_step(model, optimizer)
        else:
            for _ in range(5):
                train_step(model, optimizer)
        weights.append(model.weight)
    assert torch.equal(*weights)


def test_every_third_step(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    seen = {}
    with Recorder(optimizer, {"w": model.weight}, steps=8, every=3, path=tmp_path / "t") as recorder:
        for step in range(1, 9):
            recorder_loss = train_step(model, optimizer)
            recorder.log(loss=recorder_loss)
            seen[step] = model.weight.detach().clone(), recorder_loss.detach()
    trace = open_trace(tmp_path / "t")
    assert trace.steps.tolist() == [0, 3, 6]
    for record, step in ((1, 3), (2, 6)):
        assert torch.equal(trace["w"][record], seen[step][0])
        assert torch.equal(trace["loss"][record], seen[step][1])


def test_follows_storage_that_is_replaced(tmp_path: Path) -> None:
    """A stale pointer would record the first storage for ever."""
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, {"w": model.weight}, steps=3, path=tmp_path / "t"):
        train_step(model, optimizer)
        model.weight.data = torch.full((3, 5), 9.0).bfloat16()
        optimizer.zero_grad(set_to_none=True)
        train_step(model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        train_step(model, optimizer)
        wanted = model.weight.detach().clone()
    trace = open_trace(tmp_path / "t")
    assert (trace["w"][2] > 8).all()
    assert torch.equal(trace["w"][3], wanted)


def test_chosen_fields_and_several_parameters(tmp_path: Path) -> None:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params = {"w": model.weight, "b": model.bias}
    with Recorder(optimizer, params, steps=2, path=tmp_path / "t", fields=["param", "grad"]):
        train_step(model, optimizer)
    assert set(open_trace(tmp_path / "t")) == {"w", "w.grad", "b", "b.grad", "recorded_steps", "learning_rates"}


def test_a_run_cut_short_is_a_shorter_file(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    recorder = Recorder(optimizer, {"w": model.weight}, steps=9, path=tmp_path / "t.safetensors")
    with pytest.raises(RuntimeError, match="the user's own"), recorder:
        for _ in range(4):
            recorder.log(loss=train_step(model, optimizer))
        raise RuntimeError("the user's own")
    trace = open_trace(tmp_path / "t.safetensors")
    assert trace.steps.tolist() == [0, 1, 2, 3, 4]
    assert recorder.saved_steps == 4
    assert torch.equal(trace["w"][-1], model.weight)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_cut_short_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("longer")
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, {"w": model.weight}, steps=9, path=path, overwrite=True) as recorder:
        train_step(model, optimizer)
    assert path.read_text() == "longer"
    assert recorder.path == tmp_path / "t.cut-at-1.safetensors"
    assert open_trace(recorder.path).steps.tolist() == [0, 1]


def test_hooks_end_with_the_block(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, {"w": model.weight}, steps=1, path=tmp_path / "t"):
        train_step(model, optimizer)
    train_step(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_fifty_recorders_leak_neither_memory_nor_file_descriptors(tmp_path: Path) -> None:
    fds, statm = Path("/proc/self/fd"), Path("/proc/self/statm")
    if not fds.exists():
        pytest.skip("needs /proc")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    weight = torch.nn.Parameter(torch.zeros(1000, 500).bfloat16())
    optimizer = FusedAdam([weight])
    weight.grad = torch.ones_like(weight)
    for i in range(53):
        if i == 3:
            gc.collect()  # files that other tests have left open
            before = len(list(fds.iterdir())), threading.active_count(), resident()
        path = tmp_path / f"{i}.safetensors"
        with Recorder(optimizer, {"w": weight}, steps=2, path=path) as recorder:  # 12 MB
            for _ in range(2):
                optimizer.step()
                recorder.log(loss=torch.zeros(()))
        path.unlink()
    assert len(list(fds.iterdir())) == before[0]
    assert threading.active_count() == before[1]
    assert resident() - before[2] < 50 * 12e6 / 10


def test_a_fused_optimizer_records_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what it does not update: a parameter without a gradient at some steps is recorded all the same."""
    model = linear()
    optimizer = FusedAdam(model.parameters())
    copied = []
    real = RecordSlots.write
    monkeypatch.setattr(
        RecordSlots, "write", lambda self, field, value: (copied.append(field.name), real(self, field, value))
    )
    path = tmp_path / "t"
    with Recorder(optimizer, {"w": model.weight, "b": model.bias}, steps=4, path=path, fields=["param"]):
        wanted = []
        for step in range(4):
            model(torch.randn(2, 5).bfloat16()).sum().backward()
            if step == 2:
                model.bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
            wanted.append((model.weight.detach().clone(), model.bias.detach().clone()))
    assert copied == ["w", "b", "b"]  # record 0, and the step without a gradient
    trace = open_trace(path)
    for record, (weight, bias) in enumerate(wanted, start=1):
        assert torch.equal(trace["w"][record], weight)
        assert torch.equal(trace["b"][record], bias)


def test_one_optimizer_has_one_fused_recorder(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, {"w": model.weight}, steps=1, path=tmp_path / "a") as recorder:
        with (
            pytest.raises(BhfastError, match="recorded already; close the other recorder first"),
            Recorder(optimizer, {"b": model.bias}, steps=1, path=tmp_path / "b"),
        ):
            pass
        recorder.log(loss=train_step(model, optimizer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert torch.equal(open_trace(tmp_path / "a")["w"][1], model.weight)


def test_a_device_that_fails_leaves_the_records_that_had_arrived(tmp_path: Path) -> None:
    class FailingCopyStream(SlowCopyStream):
        def drain(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class RingSlots(RecordSlots):
        _make_copy_stream = staticmethod(lambda device: FailingCopyStream())
        _half_size = staticmethod(lambda record, records: 4)

    class RingRecorder(Recorder):
        _slots_class = RingSlots

    for name, own in (("a", None), ("b", ValueError("the user's own"))):
        model = linear()
        optimizer = FusedAdam(model.parameters())
        wanted = [model.weight.detach().clone()]
        with (
            pytest.raises(type(own or RuntimeError()), match="the user's own" if own else "illegal memory access"),
            RingRecorder(optimizer, {"w": model.weight}, steps=20, path=tmp_path / name),
        ):
            for _ in range(14):
                train_step(model, optimizer)
                wanted.append(model.weight.detach().clone())
                time.sleep(0.01)
            if own:
                raise own
        assert torch.equal(open_trace(tmp_path / name)["w"], torch.stack(wanted[:8]))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer_class", [FusedAdam, torch.optim.AdamW])
def test_records_through_a_ring_what_it_records_without(optimizer_class, every, tmp_path: Path) -> None:
    """As on a GPU, with a slow copy stream; steps that do not fill the last half; a loss logged late."""
    stream = SlowCopyStream(delay=0.002)

    class RingSlots(RecordSlots):
        _make_copy_stream = staticmethod(lambda device: stream)
        _half_size = staticmethod(lambda record, records: 4 if record < 200 else 2)

    class RingRecorder(Recorder):
        _slots_class = RingSlots

    for name, kind in (("straight", Recorder), ("ring", RingRecorder)):
        model = linear()
        optimizer = optimizer_class(model.parameters())
        torch.manual_seed(1)
        with kind(optimizer, {"w": model.weight}, steps=50, every=every, path=tmp_path / name) as recorder:
            for step in range(1, 43):
                loss = train_step(model, optimizer)
                if step > 6:
                    recorder.log(loss=loss, wide=torch.full((7, 9), step))
                if step % 9 == 0:
                    recorder.log(seldom=torch.tensor(step))
                with torch.no_grad():
                    model.weight.grad.fill_(float("nan"))  # poison: what changes after the step is not the step's
    assert stream.closed
    straight, through_ring = (open_trace(tmp_path / name) for name in ("straight", "ring"))
    assert straight.steps.tolist() == list(range(0, 43, every))
    for key in straight:
        assert torch.equal(straight[key].nan_to_num(nan=-1), through_ring[key].nan_to_num(nan=-1)), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps and every must be at least 1, got steps=0"),
        ({"every": 0}, "got steps=3, every=0"),
        ({"fields": []}, "fields must name at least one field, got none"),
        ({"keys": {f: "same" for f in FIELDS}}, "keys must give every tensor a name of its own, got same twice"),
        ({"storage": "cloud"}, "storage must be one of auto, memory, stream, got 'cloud'"),
        (
            {"storage": "memory", "steps": None},
            "storage memory needs steps=; if you do not know it, use storage stream",
        ),
    ],
)
def test_refuses_bad_arguments(options, message, tmp_path: Path) -> None:
    model = linear()
    arguments = {"steps": 3, "path": tmp_path / "t", **options}
    with pytest.raises(ConfigError, match=message):
        Recorder(FusedAdam(model.parameters()), {"w": model.weight}, **arguments)


def test_refuses_a_recording_that_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhfast.storage.choose.available_memory", lambda: 100)
    model = linear()
    optimizer = FusedAdam(model.parameters())
    for storage, wanted in (("memory", r"0\.1 MB"), ("stream", r"0\.1 MB"), ("auto", r"0\.1 MB")):
        recorder = Recorder(optimizer, {"w": model.weight}, steps=1000, path=tmp_path / "t", storage=storage)
        with (
            pytest.raises(StorageError, match=rf"too small for the recording: {wanted} wanted, 0\.0 MB available"),
            recorder,
        ):
            pass
        assert list(tmp_path.iterdir()) == []


def test_says_what_it_cannot_record(tmp_path: Path) -> None:
    model = linear()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(BhfastError, match="SGD keeps no exp_avg for parameter w; leave it out of fields="),
        Recorder(sgd, {"w": model.weight}, steps=1, path=tmp_path / "a", fields=["exp_avg"]),
    ):
        train_step(model, sgd)


def test_recording_stops_after_the_steps_that_were_announced(tmp_path: Path) -> None:
    model = linear()
    adam = FusedAdam(model.parameters())
    with (
        pytest.raises(BhfastError, match="opened for 1 steps; open it with a larger steps="),
        Recorder(adam, {"w": model.weight}, steps=1, path=tmp_path / "strict", strict=True),
    ):
        train_step(model, adam)
        train_step(model, adam)
    assert open_trace(tmp_path / "strict").steps.tolist() == [0, 1]
    with (
        pytest.warns(RecordingWarning, match="recording stopped after step 1, the last one announced with steps="),
        Recorder(adam, {"w": model.weight}, steps=1, path=tmp_path / "d") as recorder,
    ):
        recorder.log(loss=train_step(model, adam))
        wanted = model.weight.detach().clone()
        for _ in range(3):
            recorder.log(loss=train_step(model, adam) + 100)
    trace = open_trace(tmp_path / "d")
    assert trace.steps.tolist() == [0, 1]
    assert torch.equal(trace["w"][1], wanted)
    assert not torch.equal(model.weight, wanted)
    assert trace["loss"][1] < 100
    assert verify(tmp_path / "d").replayed == 1


@pytest.mark.parametrize("optimizer_class", [FusedAdam, torch.optim.AdamW, torch.optim.SGD])
def test_a_missing_gradient_is_zeros_and_said_to_be_missing(optimizer_class, tmp_path: Path) -> None:
    model = linear()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    has_grad, weights = [], []
    with (
        pytest.warns(
            RecordingWarning, match="b has no gradient at step 1: zeros are recorded, and b.has_grad"
        ) as warned,
        Recorder(optimizer, {"w": model.weight, "b": model.bias}, steps=6, path=tmp_path / "t") as recorder,
    ):
        for step in range(1, 7):
            model(torch.randn(2, 5).bfloat16()).sum().backward()
            has_grad.append(step % 3 != 1)
            if not has_grad[-1]:
                model.bias.grad = None
            optimizer.step()
            weights.append([x.detach().clone() for x in (model.bias, model.weight, model.weight.grad)])
            optimizer.zero_grad()
            recorder.log(loss=step)
    assert len(warned) == 1
    trace = open_trace(tmp_path / "t")
    assert "w.has_grad" not in trace
    assert trace["b.has_grad"].dtype == torch.bool
    assert trace["b.has_grad"].tolist() == [False, *has_grad]
    assert [bool(grad.any()) for grad in trace["b.grad"][1:]] == has_grad
    for record, wanted in enumerate(weights, start=1):
        assert all(torch.equal(trace[n][record], x) for n, x in zip(("b", "w", "w.grad"), wanted, strict=True))


def test_refuses_to_log_under_a_taken_name_or_in_another_shape(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, {"w": model.weight}, steps=1, path=tmp_path / "t") as recorder:
        recorder.log(x=torch.zeros(2))
        with pytest.raises(ConfigError, match="must have a name of its own, but w is recorded already"):
            recorder.log(w=torch.zeros(3, 5))
        with pytest.raises(ConfigError, match=r"must have one shape throughout: wanted \[2\], got \[\]"):
            recorder.log(x=torch.zeros(()))
    assert torch.equal(open_trace(tmp_path / "t")["w"][0], model.weight)
