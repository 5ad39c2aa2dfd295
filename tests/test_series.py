"""Recordings that go on with an earlier trace: the seam, the parts, and reading them as one trace."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from children import fork, status_of
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from traces import flip, joined, raw, split

from bhfast import compact, expand
from bhfast.errors import BhfastError, ConfigError, StorageError, TraceError
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.recover import recover
from bhfast.trace import Trace, open_trace
from bhfast.trace.series import open_parts
from bhfast.verify import verify

ADAM = partial(FusedAdam, lr=0.01)


class Run:
    """A run that can be recorded in several pieces, and go back to a checkpoint.

    Args:
        make: the optimizer.
    """

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = ADAM) -> None:
        torch.manual_seed(0)
        self.params = {
            "w": nn.Parameter(torch.randn(6, 16).bfloat16()),
            "b": nn.Parameter(torch.randn(3).bfloat16()),
        }
        self.optimizer = make(self.params.values())
        self.step = 0

    def checkpoint(self) -> dict[str, Any]:
        return copy.deepcopy({"params": dict(self.params), "optimizer": self.optimizer.state_dict(), "step": self.step})

    def load(self, checkpoint: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, value in checkpoint["params"].items():
                self.params[name].copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        self.step = checkpoint["step"]

    def train(
        self, path: Path, steps: int, *, after_step: Callable[[int, Recorder], None] = lambda *_: None, **options: Any
    ) -> Recorder:
        options = {"steps": steps, "append": True, **options}
        with Recorder(self.optimizer, self.params, path=path, **options) as recorder:
            for _ in range(steps):
                self.step += 1
                for param in self.params.values():
                    param.grad = (param.detach() * self.step).cos()
                self.optimizer.step()
                recorder.log(loss=self.step / 7)
                after_step(self.step, recorder)
        return recorder


def assert_same(found: Trace, wanted: Trace) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].shape == wanted[name].shape, name
        assert found[name].dtype == wanted[name].dtype, name
        assert raw(found[name][:]) == raw(wanted[name][:]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The run of 30 steps in one recording."""
    path = tmp_path_factory.mktemp("whole") / "t.safetensors"
    return open_trace(Run().train(path, 30).path)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_three_parts_are_one_trace(storage: str, whole: Trace, tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "t.safetensors"
    paths = [run.train(path, steps, storage=storage).path.name for steps in (12, 3, 15)]
    assert paths == ["t.safetensors", "t.part-00002.safetensors", "t.part-00003.safetensors"]
    trace = open_trace(path)
    assert trace.steps.tolist() == [*range(31)]
    assert_same(trace, whole)
    result = verify(path)
    assert (result.replayed, result.reason, result.difference) == (30, None, None)
    assert open_trace(tmp_path / "t.part-00002.safetensors").steps.tolist() == [12, 13, 14, 15]
    assert trace.optimizer == {}
    assert verify(tmp_path / "t.part-00002.safetensors").replayed == 3
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(paths)


def test_indices_of_all_kinds(whole: Trace, tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "t.safetensors"
    for steps in (12, 3, 15):
        run.train(path, steps)
    tensor, own = open_trace(path)["w"], whole["w"]
    for index in [
        *(0, 12, 13, -1, slice(3, 9), slice(10, 20), slice(None, None, 7), slice(20, 10), [5, 29, 2, 2, 13]),
        *((4, 5), (slice(10, 15), slice(1, 3)), (slice(None), 3), (slice(1, 30, 2), slice(4, None), slice(3, 5))),
        *(torch.arange(31) % 3 == 0, torch.tensor([-1, 0]), (slice(0, 30), [1, 5]), (..., 2), (14, ..., 1)),
    ]:
        assert torch.equal(tensor[index], own[index]), index
    with pytest.raises(IndexError, match="out of bounds"):
        tensor[31]
    with pytest.raises(ValueError, match="step must be greater than zero"):
        tensor[::-1]
    with pytest.raises(TypeError, match="a joined tensor has no __mul__: index it first"):
        tensor * 2
    assert torch.equal(tensor.first(14)[:], own[:14])


def test_after_an_exception(whole: Trace, tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "t.safetensors"

    def fail(step: int, recorder: Recorder) -> None:
        if step == 12:
            raise RuntimeError("the run's own")

    with pytest.raises(RuntimeError, match="own"):
        run.train(path, 20, after_step=fail)
    run.train(path, 18)
    assert_same(open_trace(path), whole)


def test_compact_parts(tmp_path: Path) -> None:
    one, run = Run(), Run()
    one.train(tmp_path / "whole.safetensors", 30, keyframes=8)
    path = tmp_path / "t.safetensors"
    for steps in (12, 3, 15):
        run.train(path, steps, keyframes=8)
    trace, wanted = open_trace(path), open_trace(tmp_path / "whole.safetensors")
    for name in ("w", "w.exp_avg", "b", "b.exp_avg_sq", "w.grad", "loss"):
        assert raw(trace[name][:]) == raw(wanted[name][:]), name
    assert trace["keyframe_steps"].tolist() == [0, 8, 12, 15, 23, 30]
    assert torch.equal(trace["w.keyframes"][:], wanted["w"][[0, 8, 12, 15, 23, 30]])
    assert torch.equal(trace["w"][10:20, 2:4], wanted["w"][10:20, 2:4])
    assert verify(path).replayed == 30


def test_parts_are_made_compact_and_expanded(tmp_path: Path) -> None:
    paths = {form: tmp_path / form / "t.safetensors" for form in ("full", "small", "compact", "expanded")}
    for form, keyframes in (("full", None), ("compact", 4)):
        run = Run()
        for steps in (9, 6):
            run.train(paths[form], steps, keyframes=keyframes)
    compact.compact(paths["full"], paths["small"], keyframes=4)
    expand.expand(paths["small"], paths["expanded"])
    assert len(open_trace(paths["small"]).steps) == 16
    for one, other in (("small", "compact"), ("expanded", "full")):
        for path in (paths[one], paths[one].with_name("t.part-00002.safetensors")):
            assert path.read_bytes() == (paths[other].parent / path.name).read_bytes()
    with pytest.raises(TraceError, match="has several files, which cannot replace themselves; choose another out="):
        compact.compact(paths["full"], paths["full"], keyframes=4, overwrite=True)


def test_back_to_a_checkpoint(tmp_path: Path) -> None:
    """Steps after it were done again: the series has them once, from the later part, even if a part is left out."""
    run, path = Run(), tmp_path / "t.safetensors"
    kept: dict[int, Any] = {}

    def keep(step: int, recorder: Recorder) -> None:
        if step in (5, 14):
            kept[step] = run.checkpoint()

    run.train(path, 10, after_step=keep)
    run.train(path, 10, after_step=keep)
    run.load(kept[14])
    run.train(path, 2, start_step=14)
    assert open_trace(path).steps.tolist() == [*range(17)]
    run.load(kept[5])
    run.optimizer.param_groups[0]["lr"] = 0.02  # from here on another run
    run.train(path, 4, start_step=5)
    trace, parts = open_trace(path), open_parts(path)
    assert [len(part.steps) for part in parts] == [11, 11, 3, 5]
    assert trace.steps.tolist() == [*range(10)]
    assert raw(trace["w"][:6]) == raw(parts[0]["w"][:6])
    assert raw(trace["w"][6:]) == raw(parts[3]["w"][1:])
    assert trace["learning_rates"].tolist()[5:7] == [0.01, 0.02]
    assert trace["loss"].tolist()[1:] == [step / 7 for step in range(1, 10)]
    assert verify(path).replayed == 10 + 10 + 2 + 4


def test_what_only_some_parts_have(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "t.safetensors"
    run.train(path, 2, after_step=lambda step, recorder: recorder.log(early=step, norm=torch.ones(2)))
    with pytest.warns(match="has no gradient"), Recorder(run.optimizer, run.params, path=path, append=True) as recorder:
        run.params["b"].grad = None
        run.params["w"].grad = torch.ones_like(run.params["w"])
        run.optimizer.step()
        recorder.log(late=torch.tensor(5, dtype=torch.int32))
        recorder.constants["answer"] = torch.tensor(42)
    trace = open_trace(path)
    assert trace["early"].tolist() == [0, 1, 2, 0]
    assert str(trace["norm"][:].tolist()) == "[[nan, nan], [1.0, 1.0], [1.0, 1.0], [nan, nan]]"
    assert trace["late"].tolist() == [0, 0, 0, 5]
    assert trace["late"].dtype == torch.int32
    assert str(trace["loss"].tolist()[-1]) == "nan"
    assert trace["b.has_grad"].tolist() == [False, True, True, False]
    assert int(trace["answer"]) == 42
    with pytest.raises(ConfigError, match=r"log\(norm=...\) must have one shape throughout: wanted \[2\], got \[3\]"):
        run.train(path, 1, after_step=lambda step, recorder: recorder.log(norm=torch.ones(3)))


def test_every_other_step_and_rows(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "t.safetensors"
    options = {"every": 2, "rows": {"w": [1, 4]}}
    for _ in range(2):
        run.train(path, 6, **options)
    trace = open_trace(path)
    assert trace.steps.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert trace["w.rows"].tolist() == [1, 4]
    assert trace["w"].shape == (7, 2, 16)


def test_the_first_part_need_not_start_at_zero(tmp_path: Path) -> None:
    run, path = Run(), tmp_path / "t.safetensors"
    run.train(path, 3, start_step=100)
    run.train(path, 3)
    assert open_trace(path).steps.tolist() == [*range(100, 107)]


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.Adagrad)])
def test_any_optimizer(make: Any, tmp_path: Path) -> None:
    run, one, path = Run(make), Run(make), tmp_path / "t.safetensors"
    for steps in (4, 5):
        run.train(path, steps)
    one.train(tmp_path / "one", 9)
    assert_same(open_trace(path), open_trace(tmp_path / "one"))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot go on


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Run, Path]:
    """A recorded run of 10 steps."""
    run = Run()
    run.train(tmp_path / "t.safetensors", 10)
    return run, tmp_path / "t.safetensors"


def files(path: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in path.parent.iterdir()}


@pytest.mark.parametrize(("what", "name"), [("param", "w"), ("exp_avg", "b.exp_avg"), ("exp_avg_sq", "w.exp_avg_sq")])
def test_a_wrong_state(what: str, name: str, ended: tuple[Run, Path]) -> None:
    run, path = ended
    before, param = files(path), run.params[name[0]]
    value = param if what == "param" else run.optimizer.state[param][what]
    value.data.view(-1)[-1:].view(torch.int16).bitwise_xor_(1)
    with pytest.raises(ConfigError, match=rf"has at step 10, but {name} differs from it; load the model and the optim"):
        run.train(path, 3)
    assert files(path) == before


def test_an_optimizer_whose_state_was_not_loaded(ended: tuple[Run, Path]) -> None:
    run, path = ended
    run.optimizer = ADAM(run.params.values())
    with pytest.raises(ConfigError, match=r"at step 10, but w.exp_avg differs from it"):
        run.train(path, 3)


def test_a_state_of_another_step(ended: tuple[Run, Path]) -> None:
    run, path = ended
    with pytest.raises(ConfigError, match=r"at step 7, but w differs from it"):
        run.train(path, 3, start_step=7)
    with pytest.raises(ConfigError, match=r"cannot be continued from step 11: it has the steps 0 to 10"):
        run.train(path, 3, start_step=11)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 2}, "every was 1, and is 2 now"),
        ({"keyframes": 4}, "keyframes was None, and is 4 now"),
        ({"rows": {"w": [0]}}, r"rows of w was None, and is \[0\] now"),
        (
            {"fields": ["param", "grad"]},
            r"fields of w was \{.*exp_avg_sq'\}, and is \{'param': 'w', 'grad'",
        ),
        ({"keys": {"grad": "{name}.g"}}, r"fields of w was \{.*'w.grad'.*\}, and is \{.*'w.g'.*\} now"),
    ],
    ids=lambda x: str(x)[:12],
)
def test_another_recording(options: dict[str, Any], said: str, ended: tuple[Run, Path]) -> None:
    run, path = ended
    before = files(path)
    with pytest.raises(ConfigError, match=rf"append=True must record .*t\.safetensors as before: {said}"):
        run.train(path, 3, **options)
    assert files(path) == before


def test_other_parameters(ended: tuple[Run, Path]) -> None:
    run, path = ended
    with pytest.raises(ConfigError, match=r"as before: parameters was \['b', 'w'\], and is \['w'\] now"):
        Recorder(run.optimizer, {"w": run.params["w"]}, path=path, append=True).start()
    wide = nn.Parameter(torch.zeros(7, 16).bfloat16())
    with pytest.raises(ConfigError, match=r"as before: the shape of w was \[6, 16\], and is \[7, 16\] now"):
        Recorder(ADAM([wide, run.params["b"]]), {"w": wide, "b": run.params["b"]}, path=path, append=True).start()
    single = nn.Parameter(torch.zeros(6, 16))
    with pytest.raises(ConfigError, match=r"the dtype of w was torch.bfloat16, and is torch.float32 now"):
        Recorder(ADAM([single, run.params["b"]]), {"w": single, "b": run.params["b"]}, path=path, append=True).start()


def test_other_groups(ended: tuple[Run, Path]) -> None:
    run, path = ended
    state = run.optimizer.state
    run.optimizer = ADAM([{"params": [run.params["w"]]}, {"params": [run.params["b"]]}])
    run.optimizer.state = state
    with pytest.raises(ConfigError, match="as before: the number of parameter groups was 1, and is 2 now"):
        run.train(path, 3)
    several = [ADAM([run.params["w"]]), ADAM([run.params["b"]])]
    with pytest.raises(ConfigError, match="as before: the number of optimizers was 1, and is 2 now"):
        Recorder(several, run.params, path=path, append=True).start()


def test_append_and_overwrite(ended: tuple[Run, Path]) -> None:
    run, path = ended
    with pytest.raises(ConfigError, match="append and overwrite exclude each other"):
        run.train(path, 3, overwrite=True)


def test_a_killed_run_is_recovered_first(tmp_path: Path, whole: Trace) -> None:
    path = tmp_path / "t.safetensors"

    def kill(step: int, recorder: Recorder) -> None:
        if step == 20:
            recorder.slots._storage._commit_seconds = 0
        if step > 20 and recorder.stats().committed > 12:
            os.kill(os.getpid(), signal.SIGKILL)

    def run_on() -> None:
        run = Run()
        run.train(path, 10)
        run.train(path, 1_000_000, storage="stream", after_step=kill)

    assert status_of(fork(run_on)) == -signal.SIGKILL
    run = Run()
    run.train(tmp_path / "other", 10)
    left = tmp_path / "t.part-00002.safetensors.partial"
    with pytest.raises(StorageError, match=r"part-00002.safetensors.partial was left by .* bhfast.recover"):
        run.train(path, 5)
    assert open_trace(left).steps[0] == 10
    assert recover(left).path.name == "t.part-00002.safetensors"
    last = int(open_trace(path).steps[-1])
    assert last > 20
    run.train(tmp_path / "other", last - 10)
    run.train(path, 2)
    assert open_trace(path).steps.tolist() == [*range(last + 3)]
    assert raw(open_trace(path)["w"][:21]) == raw(whole["w"][:21])
    assert verify(path).difference is None


def test_a_trace_that_was_replaced_or_removed(ended: tuple[Run, Path]) -> None:
    run, path = ended
    run.train(path, 5)
    with pytest.raises(StorageError, match=r"part-00002.safetensors continues the trace .*: go on with it"):
        run.train(path, 5, append=False, overwrite=True)
    run.train(path, 5)
    (path.parent / "t.part-00002.safetensors").rename(path.parent / "kept")
    with pytest.raises(TraceError, match=r"part-00002.safetensors is missing: .*part-00003.safetensors goes on"):
        open_trace(path)
    (path.parent / "kept").rename(path.parent / "t.part-00002.safetensors")
    path.unlink()
    with pytest.raises(StorageError, match=r"part-00002.safetensors continues the trace"):
        Run().train(path, 5)
    Run(partial(ADAM, lr=0.5)).train(path.with_name("new"), 10)
    path.with_name("new").rename(path)
    with pytest.raises(TraceError, match=r"part-00002.safetensors does not continue .*t.safetensors, which was"):
        open_trace(path)


def test_files_that_only_look_like_parts(ended: tuple[Run, Path]) -> None:
    run, path = ended
    Run().train(path.with_name("t.part-00002.safetensors"), 3)
    assert open_trace(path).steps.tolist() == [*range(11)]
    with pytest.raises(StorageError, match=r"the trace .*t.part-00002.safetensors exists"):
        run.train(path, 3)


def test_traces_of_other_kinds(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=r"append=True needs a trace of Recorder at .*, and this file is not one"):
        Run().train(tmp_path / "t.safetensors", 3)
    (tmp_path / "t.safetensors").write_bytes(b"junk")
    with pytest.raises(TraceError, match="is not a safetensors file"):
        Run().train(tmp_path / "t.safetensors", 3)


def test_a_trace_of_version_1(ended: tuple[Run, Path]) -> None:
    run, path = ended
    header, data = split(path.read_bytes())
    del header["__metadata__"]["header_crc32"]
    header["__metadata__"]["format_version"] = "1"
    path.write_bytes(joined(header, data))
    with pytest.raises(TraceError, match=r"cannot be continued: its header has no checksum \(format version 1\)"):
        run.train(path, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def test_ddp_goes_on_and_shards_do_not(tmp_path: Path) -> None:
    def train() -> None:
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        replica = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            with Recorder(optimizer, "*", model=model, path=tmp_path / "t.safetensors", append=True):
                for _ in range(3):
                    optimizer.zero_grad()
                    replica(torch.randn(2, 4)).square().sum().backward()
                    optimizer.step()
        with pytest.raises(
            BhfastError, match="weight differs from it" if torch.distributed.get_rank() == 0 else "rank 0"
        ):
            model.weight.data.zero_()
            Recorder(optimizer, "*", model=model, path=tmp_path / "t.safetensors", append=True).start()
        mesh = init_device_mesh("cpu", (2,))
        shard = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        with pytest.raises(ConfigError, match="append=True takes parameters that are not sharded"):
            Recorder(torch.optim.AdamW([shard]), {"w": shard}, path=tmp_path / "s.safetensors", append=True).start()

    run_ranks(train, tmp_path)
    assert open_trace(tmp_path / "t.safetensors").steps.tolist() == [*range(7)]
    assert verify(tmp_path / "t.safetensors").difference is None
    assert not list(tmp_path.glob("s.*"))


# ---------------------------------------------------------------------------------------------------------------------
# Verifying


def test_damage_in_a_part(ended: tuple[Run, Path]) -> None:
    run, path = ended
    run.train(path, 5)
    flip(path.with_name("t.part-00002.safetensors"), "w", 3, 2, 5, bit=4)
    found = verify(path)
    assert found.difference is not None
    assert found.difference.text.startswith("t.part-00002.safetensors: step 13, w[2, 5]: recorded")


def test_a_seam_that_does_not_hold(ended: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, path = ended
    run.params["w"].data[0, 0] = 7
    with monkeypatch.context() as patch:
        patch.setattr("bhfast.recording.series.state_that_differs", lambda *_: None)
        run.train(path, 5)
    assert all(verify(part.path).difference is None for part in open_parts(path)[1:])
    found = verify(path)
    assert found.status == 1
    assert found.difference is not None
    assert found.difference.text == "t.part-00002.safetensors does not start with the w that step 10 ended with"
