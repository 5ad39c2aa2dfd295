"""The recorder as a callback of the Hugging Face Trainer. Needs the ``hf`` extra."""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bhfast.recording.recorder import Recorder
from bhfast.recording.selection import Params


class RecorderCallback(TrainerCallback):
    """Records what ``trainer.train()`` does to chosen parameters, with a :class:`bhfast.Recorder`::

        with RecorderCallback("transformer.wte.weight", path="run.safetensors") as callback:
            trainer = Trainer(..., callbacks=[callback])
            trainer.train()

    Gradients are recorded as ``backward()`` leaves them, with those of all micro-batches added up, before the Trainer
    clips them; the factor is in ``clip_coefs``. ``losses`` holds what the model returned as loss, in the forward pass
    before the step: with gradient accumulation that of the last micro-batch, scaled as the Trainer has the model scale
    it. A model that returns no loss has no ``losses``.

    The trace is complete when training ends. The Trainer does not tell its callbacks of an exception, so it is the
    ``with`` block that makes a trace of the steps so far; without one, that happens once the callback is garbage or the
    interpreter exits. ``trainer.train()`` may be called again: a trace that exists is replaced only with
    ``overwrite=True``. If it resumes from a checkpoint, record 0 is the state in the checkpoint.

    Args:
        params: names, globs and regular expressions over the parameters of the Trainer's model; or parameters by name.
        path: the trace file.
        **options: for the recorder: ``rows``, ``fields``, ``every``, ``storage``, ``keys``, ``metadata``,
            ``overwrite``.

    Attributes:
        recorder: of the training at hand, or of the last one; None before the first.

    Raises:
        ConfigError: from ``trainer.train()``, if an argument is out of range.
        StorageError: likewise, as the recorder does.
    """

    def __init__(self, params: Params, *, path: str | os.PathLike[str], **options: Any) -> None:
        self.recorder: Recorder | None = None
        self._params = params
        self._options = {"path": path, **options}
        self._stack = ExitStack()
        self._close = weakref.finalize(self, self._stack.close)

    def __enter__(self) -> RecorderCallback:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._close.detach():
            self._stack.__exit__(*error)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()  # a training before this one may have failed
        with ExitStack() as stack:
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            if isinstance(optimizer, AcceleratedOptimizer):
                optimizer = optimizer.optimizer
            steps = state.max_steps - state.global_step
            recorder = Recorder(optimizer, self._params, model=model, steps=steps, unclipped=True, **self._options)
            self.recorder = stack.enter_context(recorder)
            losses = _Losses(recorder)
            stack.callback(model.register_forward_hook(losses.keep).remove)
            stack.callback(optimizer.register_step_post_hook(losses.log).remove)
            self._stack = stack.pop_all()
        self._close = weakref.finalize(self, self._stack.close)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()


class _Losses:
    """Logs the loss that a model returned last, after each step. Unlike the callback, hooks may keep it alive."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._loss: Tensor | None = None

    def keep(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training:
            loss = output.get("loss") if isinstance(output, dict) else None
            self._loss = None if loss is None else loss.detach()

    def log(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._loss is not None:
            self._recorder.log(losses=self._loss)
