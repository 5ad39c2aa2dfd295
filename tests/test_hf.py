"""The callback of the Hugging Face Trainer, and the recorder on models of transformers."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bhfast.errors import StorageError
from bhfast.ops import checks
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.verify import verify

transformers = pytest.importorskip("transformers", reason="transformers is not installed; it comes with bhfast[hf]")
hf = pytest.importorskip("bhfast.hf", reason="accelerate is not installed; it comes with bhfast[hf]")

STEPS = 12
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


class Windows(Dataset):
    """Random tokens; the model shifts the labels."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.tokens = torch.randint(128, (400,), generator=torch.Generator().manual_seed(0))
        self.fails_at = fails_at
        self.read = 0

    def __len__(self) -> int:
        return len(self.tokens) - 16

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        self.read += 1
        if self.read == self.fails_at:
            raise RuntimeError("the data's own")
        window = self.tokens[start : start + 16]
        return {"input_ids": window, "labels": window}


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).bfloat16()


def make_trainer(folder: Path, callback: Any, *, data: Windows | None = None, **arguments: Any) -> Any:
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
    return transformers.Trainer(
        model=tiny_gpt2(),
        args=transformers.TrainingArguments(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=data or Windows(),
        callbacks=[callback],
    )


class Watch(transformers.TrainerCallback):
    """What the model returns, and gradients between backward and step, seen without the recorder."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.clipped: list[Tensor] = []

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        model.register_forward_hook(lambda model, args, output: self.losses.append(output.loss.detach().clone()))

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.clipped.append(model.get_parameter(WTE).grad.clone())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_of_the_trainer_replays(accumulation: int, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    callback, watch = hf.RecorderCallback("*", path=path), Watch()
    trainer = make_trainer(tmp_path, callback, gradient_accumulation_steps=accumulation)
    trainer.add_callback(watch)
    trainer.train()
    result = verify(path)
    assert (result.replayed, result.reason, result.difference) == (STEPS, None, None)
    trace = open_trace(path)
    for name, param in trainer.model.named_parameters():
        assert torch.equal(trace[name][-1], param), name
    clipped, raw = torch.stack(watch.clipped), trace[f"{WTE}.grad"][1:]
    assert clipped.shape == raw.shape
    coefs = trace["clip_coefs"][1:]
    assert coefs.min() < 1
    assert coefs.max() <= 1
    assert torch.equal(raw * coefs.bfloat16()[:, None, None], clipped)
    norms = raw.float().flatten(1).norm(dim=1)
    assert (norms >= clipped.float().flatten(1).norm(dim=1)).all()
    assert len(watch.losses) == STEPS * accumulation
    assert torch.equal(trace["losses"][1:], torch.stack(watch.losses[accumulation - 1 :: accumulation]))
    assert callback.recorder.saved_steps == STEPS


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


def test_an_interpreter_that_exits_leaves_the_steps_so_far(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    code = f"""
from pathlib import Path
from test_hf import WTE, Windows, hf, make_trainer
trainer = make_trainer(Path({str(tmp_path)!r}), hf.RecorderCallback(WTE, path={str(path)!r}), data=Windows(fails_at=9))
trainer.train()
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "the data's own" in run.stderr
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
    assert len(rest.steps) == STEPS - 8 + 1
    assert torch.equal(rest[WTE], whole[WTE][8:])
    assert torch.equal(rest[f"{WTE}.exp_avg"], whole[f"{WTE}.exp_avg"][8:])
    result = verify(paths[1])
    assert (result.replayed, result.reason, result.difference) == (STEPS - 8, None, None)


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
    train_once(torch.compile(model, backend="eager"), params="*.h.0.attn.*", path=tmp_path / "t")
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
