"""The callback of the Hugging Face Trainer, and the recorder on models of transformers."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from children import fork, status_of
from deferred import Deferred
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import Dataset
from traces import raw

from bhfast.errors import ConfigError, RecordingWarning, StorageError
from bhfast.ops import checks
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.verify import verify

MISSING = "is not installed; it comes with bhfast[hf]"
transformers = Deferred("transformers", needs="transformers", reason=f"transformers {MISSING}")
accelerate = Deferred("accelerate", needs="accelerate", reason=f"accelerate {MISSING}")
hf = Deferred("bhfast.hf", needs="accelerate", reason=f"accelerate {MISSING}")

STEPS = 12
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


class Windows(Dataset):
    """Random tokens, of which window k counts all but the first k % 8; the model shifts the labels."""

    def __init__(self, fails_at: int | None = None, count: int = 384) -> None:
        self.count = count
        self.tokens = torch.randint(128, (400,), generator=torch.Generator().manual_seed(0))
        self.fails_at = fails_at
        self.read = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        self.read += 1
        if self.read == self.fails_at:
            raise RuntimeError("the data's own")
        window = self.tokens[start : start + 16]
        labels = window.clone()
        labels[: start % 8] = -100
        return {"input_ids": window, "labels": labels}


def tiny_gpt2(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).to(dtype)


def make_trainer(
    folder: Path,
    callback: Any,
    *,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    kind: Any = None,
    **arguments: Any,
) -> Any:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return (kind or transformers.Trainer)(
        model=model or tiny_gpt2(),
        args=transformers.TrainingArguments(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=data or Windows(),
        callbacks=[callback],
    )


class Watch:
    """Gradients between clipping and step, and parameters after it, seen without the recorder."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.params: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append({name: param.grad.clone() for name, param in model.named_parameters()})

    def on_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.params.append({name: param.detach().clone() for name, param in model.named_parameters()})


def new_watch() -> Any:
    return type("WatchCallback", (Watch, transformers.TrainerCallback), {})()


def logged_losses(trainer: Any) -> list[float]:
    """What the Trainer itself says of each step's loss, if it logs at every step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


LOGGING = {"logging_strategy": "steps", "logging_steps": 1}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_of_the_trainer_replays(accumulation: int, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    callback, watch = hf.RecorderCallback("*", path=path), new_watch()
    trainer = make_trainer(tmp_path, callback, gradient_accumulation_steps=accumulation, **LOGGING)
    trainer.add_callback(watch)
    trainer.train()
    result = verify(path)
    assert (result.replayed, result.reason, result.difference) == (STEPS, None, None)
    trace = open_trace(path)
    for name, param in trainer.model.named_parameters():
        assert torch.equal(trace[name][-1], param), name
    clipped, raw = torch.stack([step[WTE] for step in watch.gradients]), trace[f"{WTE}.grad"][1:]
    assert clipped.shape == raw.shape
    coefs = trace["clip_coefs"][1:]
    assert coefs.min() < 1
    assert coefs.max() <= 1
    assert torch.equal(raw * coefs.bfloat16()[:, None, None], clipped)
    norms = raw.float().flatten(1).norm(dim=1)
    assert (norms >= clipped.float().flatten(1).norm(dim=1)).all()
    assert trace["losses"].dtype == torch.float32
    assert trace["losses"][1:].tolist() == logged_losses(trainer)
    assert callback.recorder.saved_steps == STEPS


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"])
def test_the_step_of_all_its_micro_batches(optim: str, tmp_path: Path) -> None:
    """Of different numbers of items, in mixed precision, with checkpointed activations, and a last step of fewer."""
    callback, watch = hf.RecorderCallback("*", path=tmp_path / "t.safetensors"), new_watch()
    trainer = make_trainer(
        tmp_path,
        callback,
        model=tiny_gpt2(torch.float32),
        data=Windows(count=11),
        max_steps=-1,
        num_train_epochs=1,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=2,
        max_grad_norm=0.0,  # no clipping, so that gradients are seen before the step as backward() left them
        bf16=True,
        gradient_checkpointing=True,
        optim=optim,
        **LOGGING,
    )
    trainer.add_callback(watch)
    trainer.train()
    trace = open_trace(tmp_path / "t.safetensors")
    assert trace.steps.tolist() == [0, 1, 2]
    assert trace["clip_coefs"][1:].tolist() == [1, 1]
    assert trace["losses"][1:].tolist() == logged_losses(trainer)
    for name, _ in trainer.model.named_parameters():
        assert torch.equal(trace[f"{name}.grad"][1:], torch.stack([step[name] for step in watch.gradients])), name
        assert torch.equal(trace[name][1:], torch.stack([step[name] for step in watch.params])), name


def sum_of_squares(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    return outputs["logits"].float().square().sum() / num_items_in_batch


@pytest.mark.parametrize("how", ["compute_loss_func", "label_smoothing_factor"])
def test_losses_that_the_model_does_not_compute(how: str, tmp_path: Path) -> None:
    arguments = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    callback = hf.RecorderCallback(WTE, path=tmp_path / "t.safetensors")
    trainer = make_trainer(tmp_path, callback, gradient_accumulation_steps=2, **arguments, **LOGGING)
    if how == "compute_loss_func":
        trainer.compute_loss_func = sum_of_squares
    trainer.train()
    losses = open_trace(tmp_path / "t.safetensors")["losses"][1:].tolist()
    assert len(set(losses)) > 1
    assert losses == logged_losses(trainer)


def test_a_trainer_with_a_training_step_of_its_own_has_no_losses(tmp_path: Path) -> None:
    class OwnTrainer(transformers.Trainer):
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    trainer = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=tmp_path / "t.safetensors"), kind=OwnTrainer)
    with pytest.warns(RecordingWarning, match="losses are not recorded: this Trainer's training_step does not call"):
        trainer.train()
    trace = open_trace(tmp_path / "t.safetensors")
    assert "losses" not in trace
    assert torch.equal(trace[WTE][-1], trainer.model.get_parameter(WTE))


def test_two_callbacks_of_one_trainer(tmp_path: Path) -> None:
    """Each ends on its own, and the Trainer is left as it was."""
    original = transformers.Trainer.training_step
    callbacks = [hf.RecorderCallback(WTE, path=tmp_path / f"{every}", every=every, fields=["grad"]) for every in (1, 3)]
    trainer = make_trainer(tmp_path, callbacks[0])
    trainer.add_callback(callbacks[1])
    trainer.train()
    whole, third = (open_trace(tmp_path / name) for name in ("1", "3"))
    for name in ("losses", f"{WTE}.grad"):
        assert torch.equal(third[name][1:], whole[name][3::3]), name
    assert transformers.Trainer.training_step is original


def test_rows_every_other_step_streamed(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    callback = hf.RecorderCallback(WTE, path=path, rows={WTE: [3, 5]}, fields=["param"], every=2, storage="stream")
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    trace = open_trace(path)
    assert trace.steps.tolist() == list(range(0, STEPS + 1, 2))
    assert torch.equal(trace[WTE][-1], trainer.model.get_parameter(WTE)[[3, 5]])


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_an_exception_leaves_the_steps_so_far(storage: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with (
        pytest.raises(RuntimeError, match="the data's own"),
        hf.RecorderCallback(WTE, path=path, storage=storage) as callback,
    ):
        trainer = make_trainer(tmp_path, callback, data=Windows(fails_at=9))
        trainer.train()
    done = callback.recorder.saved_steps
    assert 0 < done < STEPS
    assert open_trace(path).steps.tolist() == list(range(done + 1))
    assert torch.equal(open_trace(path)[WTE][-1], trainer.model.get_parameter(WTE))
    result = verify(path)
    assert (result.replayed, result.difference) == (done, None)
    assert not list(tmp_path.glob("*.partial"))


def test_a_callback_that_is_garbage_leaves_the_steps_so_far(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    trainer = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=path), data=Windows(fails_at=9))
    with pytest.raises(RuntimeError, match="the data's own"):
        trainer.train()
    assert not path.exists()
    del trainer
    gc.collect()
    assert len(open_trace(path).steps) > 1


def test_a_fork_does_not_finish_the_recording_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    callback = hf.RecorderCallback(WTE, path=path)
    trainer = make_trainer(tmp_path, callback, data=Windows(fails_at=9))
    with pytest.raises(RuntimeError, match="the data's own"):
        trainer.train()

    def close() -> None:
        callback.close_recorder()
        raise SystemExit(path.exists())

    assert status_of(fork(close)) == 0
    callback.close_recorder()
    assert len(open_trace(path).steps) > 1


def test_an_interpreter_that_exits_leaves_the_steps_so_far(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"

    def work() -> None:
        trainer = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=path), data=Windows(fails_at=9))
        try:
            trainer.train()
        finally:
            atexit._run_exitfuncs()  # as Python does at its end

    assert status_of(fork(work, tmp_path / "errors")) == 1
    assert "the data's own" in (tmp_path / "errors").read_text()
    assert len(open_trace(path).steps) > 1


def test_training_again_replaces_a_trace_only_if_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    trainer = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=path))
    trainer.train()
    first = path.read_bytes()
    with pytest.raises(StorageError, match="exists"):
        trainer.train()
    assert path.read_bytes() == first
    trainer = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=path, overwrite=True))
    trainer.train()
    end = open_trace(path)[WTE][-1].clone()
    trainer.train()
    assert torch.equal(open_trace(path)[WTE][0], end)
    assert verify(path).difference is None


def test_a_run_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    paths = [tmp_path / "whole.safetensors", tmp_path / "rest.safetensors"]
    make_trainer(tmp_path, hf.RecorderCallback(WTE, path=paths[0]), save_strategy="steps", save_steps=8).train()
    trainer = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=paths[1]))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    whole, rest = map(open_trace, paths)
    assert rest.steps.tolist() == list(range(8, STEPS + 1))
    assert torch.equal(rest["losses"][1:], whole["losses"][9:])
    assert torch.equal(rest[WTE], whole[WTE][8:])
    assert torch.equal(rest[f"{WTE}.exp_avg"], whole[f"{WTE}.exp_avg"][8:])
    result = verify(paths[1])
    assert (result.replayed, result.reason, result.difference) == (STEPS - 8, None, None)


def test_a_recording_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The training fails at step 10, and resumes from the checkpoint at 8; then from that at 4."""
    path = tmp_path / "t.safetensors"
    whole = make_trainer(
        tmp_path, hf.RecorderCallback(WTE, path=tmp_path / "whole"), save_strategy="steps", save_steps=4
    )
    whole.train()
    with hf.RecorderCallback(WTE, path=path, append=True) as callback, pytest.raises(RuntimeError, match="own"):
        make_trainer(tmp_path, callback, data=Windows(fails_at=10)).train()
    assert open_trace(path).steps[-1] < STEPS
    wrong = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=path, append=True), model=tiny_gpt2(), seed=1)
    wrong.model.get_parameter(WTE).data.zero_()
    with pytest.raises(ConfigError, match=rf"has at step 0, but {WTE} differs from it; load the model"):
        wrong.train()
    for step in (8, 4):
        trainer = make_trainer(tmp_path, hf.RecorderCallback(WTE, path=path, append=True))
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        trace = open_trace(path)
        assert trace.steps.tolist() == [*range(STEPS + 1)]
        for name in (WTE, f"{WTE}.exp_avg", f"{WTE}.grad", "clip_coefs"):
            assert raw(trace[name][1:]) == raw(open_trace(tmp_path / "whole")[name][1:]), name
        assert trace["losses"][1:].tolist() == open_trace(tmp_path / "whole")["losses"][1:].tolist()
    assert verify(path).status == 0


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


class Integers(Dataset):
    """Small integers: few steps of a linear model by them are exact in float32, in any order of summation."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "x": torch.randint(-1, 2, (4,), generator=generator).float(),
            "y": torch.randint(-2, 3, (3,), generator=generator).float(),
        }


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
        return ((nn.functional.linear(x, self.weight) - y).square().sum(1).mean(),)


def train_exactly(path: Path, **arguments: Any) -> Any:
    accelerate.state.AcceleratorState._reset_state(
        reset_partial_state=True
    )  # of tests before, or of the parent process
    exact = {
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.25,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
    }
    trainer = make_trainer(
        path.parent,
        hf.RecorderCallback("*", path=path),
        model=Linear(),
        data=Integers(),
        **{**exact, "max_grad_norm": 0.0, **arguments},
        **LOGGING,
    )
    trainer.train()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return trainer


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_the_gradient_under_ddp_is_that_of_the_global_batch(max_grad_norm: float, tmp_path: Path) -> None:
    arguments = {"max_grad_norm": max_grad_norm, "max_steps": 1 if max_grad_norm else 4}  # clipped weights are inexact
    trainer = train_exactly(tmp_path / "alone", per_device_train_batch_size=4, **arguments)
    ddp = {**arguments, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    run_ranks(lambda: train_exactly(tmp_path / "ddp", **ddp), tmp_path)
    alone, ddp = open_trace(tmp_path / "alone"), open_trace(tmp_path / "ddp")
    assert ddp.steps.tolist() == [*range(arguments["max_steps"] + 1)]
    for name in ("weight", "weight.grad", "clip_coefs"):
        assert alone[name][1:].any(), name
        assert torch.equal(ddp[name][1:], alone[name][1:]), name
    assert (alone["clip_coefs"][1:] < 1).all() == bool(max_grad_norm)
    assert alone["losses"][1:].tolist() == logged_losses(trainer)
    assert len(ddp["losses"]) == len(ddp.steps)  # of rank 0 alone
    assert not torch.equal(ddp["losses"][1:], alone["losses"][1:])


# ---------------------------------------------------------------------------------------------------------------------
# Accelerate without the Trainer


def test_accelerate_steps_only_when_it_has_accumulated(tmp_path: Path) -> None:
    """What is logged after a micro-batch belongs to the step to come."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=1))
    gradients, losses = [], []
    with Recorder(optimizer, "*", model=model, unclipped=True, steps=4, path=tmp_path / "t") as recorder:
        for number, batch in enumerate(loader):
            with accelerator.accumulate(model):
                loss = model(batch).square().sum()
                accelerator.backward(loss)
                losses.append(loss.item())
                if accelerator.sync_gradients:
                    gradients.append(model.weight.grad.clone())
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                else:
                    recorder.log(before_the_step=number)
                optimizer.step()
                optimizer.zero_grad()
                recorder.log(loss=loss)
    trace = open_trace(tmp_path / "t")
    assert trace.steps.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(trace["weight.grad"][1:], torch.stack(gradients))
    assert (trace["clip_coefs"][1:] < 1).all()
    assert trace["loss"][1:].tolist() == losses[2::3]
    assert trace["before_the_step"].tolist() == [0, 1, 4, 7, 10]
    assert torch.equal(trace["weight"][-1], model.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def train_once(model: nn.Module, **arguments: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(8)[None]
    with Recorder(optimizer, model=model, steps=1, **arguments):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def test_a_compiled_model_has_the_names_of_the_one_inside(tmp_path: Path) -> None:
    model = tiny_gpt2()
    with torch.compiler.set_stance("force_eager"):  # names are those of what compile() returns; to trace takes seconds
        train_once(torch.compile(model), params="*.h.0.attn.*", path=tmp_path / "t")
    trace = open_trace(tmp_path / "t")
    inside = {name for name, _ in model.named_parameters() if ".h.0.attn." in name}
    assert trace.optimizer["params"].keys() == inside
    assert all(torch.equal(trace[name][-1], model.get_parameter(name)) for name in inside)


@pytest.mark.parametrize("params", [WTE, HEAD, [WTE, HEAD], "*"], ids=str)
def test_tied_weights_are_recorded_once(params: Any, tmp_path: Path) -> None:
    model = tiny_gpt2()
    assert model.get_parameter(WTE) is model.get_parameter(HEAD)
    train_once(model, params=params, path=tmp_path / "t")
    trace = open_trace(tmp_path / "t")
    asked = [WTE, HEAD] if params == "*" else [params] if isinstance(params, str) else params
    assert sum(name in {WTE, HEAD} for name in trace) == 1
    for name in asked:
        assert torch.equal(trace[name][-1], model.get_parameter(name))
        for field in checks.FIELDS[1:]:
            assert trace[f"{name}.{field}"].shape == (2, 128, 64)
