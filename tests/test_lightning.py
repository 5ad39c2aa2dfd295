"""The callback of Lightning's Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deferred import Deferred
from ranks import run_ranks
from torch import Tensor, nn

from bhfast.errors import ConfigError
from bhfast.trace import open_trace
from bhfast.verify import verify

run = Deferred("lightning_run", needs="lightning", reason="lightning is not installed; it comes with bhfast[lightning]")
WEIGHT = "net.weight"


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Of a trace; nothing unfinished may be left beside it."""
    yield tmp_path / "t.safetensors"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_step_replays(accumulation: int, path: Path) -> None:
    callback, module = run.RecorderCallback("*", path=path), run.Regression()
    module.bfloat16()
    trainer = run.make_trainer(path.parent, callback, gradient_clip_val=0.5, accumulate_grad_batches=accumulation)
    trainer.fit(module, torch.utils.data.DataLoader(run.batches(count=36).dataset.bfloat16(), batch_size=2))
    trace = open_trace(path)
    assert trace.steps.tolist() == list(range(7))
    assert torch.equal(trace[f"{WEIGHT}.grad"][1:], torch.stack(module.gradients))
    assert torch.equal(trace[WEIGHT][1:], torch.stack(module.weights[accumulation - 1 :: accumulation]))
    wanted = (torch.stack(module.losses) / accumulation).float().view(6, accumulation)
    assert torch.equal(trace["losses"][1:], torch.stack([sum(row.unbind()) for row in wanted]))
    assert trace["clip_coefs"][1:].min() < 1
    result = verify(path)
    assert (result.replayed, result.difference) == (6, None)


def test_mixed_precision_and_an_epoch_that_ends_within_a_step(path: Path) -> None:
    callback, module = run.RecorderCallback("*", path=path, fields=["param", "grad"]), run.Regression()
    trainer = run.make_trainer(
        path.parent, callback, max_steps=-1, max_epochs=2, accumulate_grad_batches=3, precision="bf16-mixed"
    )
    trainer.fit(module, run.batches(count=8))
    trace = open_trace(path)
    assert trace.steps.tolist() == [0, 1, 2, 3, 4] == list(range(trainer.global_step + 1))
    assert torch.equal(trace[f"{WEIGHT}.grad"][1:], torch.stack(module.gradients))
    thirds = [loss.float() / 3 for loss in module.losses]
    sums = [thirds[i] + thirds[i + 1] + thirds[i + 2] if i % 4 == 0 else thirds[i] for i in (0, 3, 4, 7)]
    assert torch.equal(trace["losses"][1:], torch.stack(sums))


def test_a_run_resumed_from_a_checkpoint(path: Path) -> None:
    whole = path.with_name("whole.safetensors")
    run.make_trainer(path.parent, run.RecorderCallback("*", path=whole)).fit(run.Regression(), run.batches())
    trainer = run.make_trainer(path.parent, max_steps=4)
    trainer.fit(run.Regression(), run.batches())
    trainer.save_checkpoint(path.parent / "at-4")
    run.make_trainer(path.parent, run.RecorderCallback("*", path=path)).fit(
        run.Regression(),
        torch.utils.data.DataLoader(run.batches().dataset[8:], batch_size=2),
        ckpt_path=path.parent / "at-4",
    )
    rest, wanted = open_trace(path), open_trace(whole)
    assert rest.steps.tolist() == [4, 5, 6]
    for name in (WEIGHT, f"{WEIGHT}.exp_avg"):
        assert torch.equal(rest[name], wanted[name][4:]), name
    for name in (f"{WEIGHT}.grad", "losses"):
        assert torch.equal(rest[name][1:], wanted[name][5:]), name


def test_a_resumed_run_goes_on_with_its_trace(path: Path) -> None:
    """From the step of the checkpoint, although the trace went further."""
    whole = path.with_name("whole.safetensors")
    run.make_trainer(path.parent, run.RecorderCallback("*", path=whole)).fit(run.Regression(), run.batches())
    module = run.Regression()
    trainer = run.make_trainer(path.parent, run.RecorderCallback("*", path=path), max_steps=4)
    trainer.fit(module, run.batches())
    trainer.save_checkpoint(path.parent / "at-4")
    rest = torch.utils.data.DataLoader(run.batches().dataset[8:], batch_size=2)
    for _ in range(2):  # the second time over the steps that the first one has done
        callback = run.RecorderCallback("*", path=path, append=True)
        run.make_trainer(path.parent, callback).fit(run.Regression(), rest, ckpt_path=path.parent / "at-4")
    assert sorted(path.name for path in path.parent.glob("t.*")) == [
        "t.part-00002.safetensors",
        "t.part-00003.safetensors",
        "t.safetensors",
    ]
    found, wanted = open_trace(path), open_trace(whole)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name][1:], wanted[name][1:]), name


def test_another_state_than_that_of_the_trace_is_refused(path: Path) -> None:
    trainer = run.make_trainer(path.parent, run.RecorderCallback("*", path=path), max_steps=4)
    trainer.fit(run.Regression(), run.batches())
    trainer.save_checkpoint(path.parent / "at-4")
    checkpoint = torch.load(path.parent / "at-4", weights_only=False)
    checkpoint["state_dict"][WEIGHT][1, 2] += 1
    torch.save(checkpoint, path.parent / "changed")
    callback = run.RecorderCallback("*", path=path, append=True)
    with pytest.raises(ConfigError, match=f"{WEIGHT}"):
        run.make_trainer(path.parent, callback).fit(run.Regression(), run.batches(), ckpt_path=path.parent / "changed")
    assert open_trace(path).steps.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_an_exception_leaves_the_steps_so_far(storage: str, path: Path) -> None:
    module = run.Regression(fails_at=4)
    with pytest.raises(RuntimeError, match="the module's own"):
        run.make_trainer(path.parent, run.RecorderCallback("*", path=path, storage=storage)).fit(module, run.batches())
    trace = open_trace(path)
    assert trace.steps.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(trace[WEIGHT][-1], module.net.weight)


def test_what_a_training_step_logs_belongs_to_its_step(path: Path) -> None:
    """Also if it is the first of several batches, whose network has not been called yet."""

    class Logging(run.Regression):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            if batch_idx % 2 == 0:
                callback.recorder.log(batch=batch_idx)
            return super().training_step(batch, batch_idx)

    callback = run.RecorderCallback("*", path=path)
    run.make_trainer(path.parent, callback, accumulate_grad_batches=2).fit(Logging(), run.batches())
    assert open_trace(path)["batch"].tolist() == [0, 0, 2, 4, 6, 8, 10]


def test_two_optimizers(path: Path) -> None:
    module = run.Adversaries()
    trainer = run.make_trainer(path.parent, run.RecorderCallback("*", path=path), max_steps=12)
    trainer.fit(module, run.batches())
    trace = open_trace(path)
    assert trainer.global_step == 12
    assert trace.steps.tolist() == list(range(7))
    for name, param in module.named_parameters():
        assert torch.equal(trace[name][-1], param), name
        assert f"{name}.has_grad" not in trace
    weight = "critic.weight"
    step = trace[weight][:-1] - 0.1 * trace[f"{weight}.grad"][1:]
    torch.testing.assert_close(trace[weight][1:], step)
    assert torch.equal(trace["losses"][1:], torch.stack(module.losses))


def fit_exactly(path: Path, data: Any, **arguments: Any) -> None:
    module = run.Regression(optimizer=torch.optim.SGD, lr=0.25)
    nn.init.zeros_(module.net.weight)
    nn.init.zeros_(module.net.bias)
    run.make_trainer(path.parent, run.RecorderCallback("*", path=path), max_steps=3, **arguments).fit(module, data)


def test_the_gradient_under_ddp_is_that_of_the_global_batch(path: Path) -> None:
    ddp = path.with_name("ddp.safetensors")

    def work() -> None:
        data = run.batches(2, rank=int(os.environ["RANK"]), world=2)
        settings = {"accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        fit_exactly(ddp, data, **settings)

    fit_exactly(path, run.batches(8))
    run_ranks(work, path.parent)
    alone, ranks = open_trace(path), open_trace(ddp)
    assert ranks.steps.tolist() == [0, 1, 2, 3]
    for name in (WEIGHT, f"{WEIGHT}.grad", "net.bias.grad"):
        assert alone[name][1:].any(), name
        assert torch.equal(ranks[name], alone[name]), name
    assert len(ranks["losses"]) == 4  # of rank 0 alone
    assert not torch.equal(ranks["losses"][1:], alone["losses"][1:])
