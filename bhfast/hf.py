"""The recorder as a callback of the Hugging Face Trainer. Needs the ``hf`` extra."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bhfast.errors import RecordingWarning
from bhfast.recording.callback import RecordingCallback, StepLoss
from bhfast.recording.replaced_method import ReplacedMethod


class RecorderCallback(RecordingCallback, TrainerCallback):
    """Records what ``trainer.train()`` does to chosen parameters, with a :class:`bhfast.Recorder`::

        with RecorderCallback("transformer.wte.weight", path="run.safetensors") as callback:
            trainer = Trainer(..., callbacks=[callback])
            trainer.train()

    Record k is step k of the Trainer's ``global_step``. If the training resumes from a checkpoint, the first record is
    the state in the checkpoint. With ``append=True`` the recording goes on with the trace at ``path``, if there is one:
    from the step of the checkpoint, which need not be its last one.

    Gradients are recorded as ``backward()`` leaves them: summed over all micro-batches, averaged over all processes,
    and before the Trainer clips them. The clipping factor is in ``clip_coefs``.

    ``losses`` (float32 ``[R]``) holds the loss of the whole step as the Trainer counts it: the sum of what
    ``Trainer.training_step`` returned for its micro-batches, each already scaled by the number of items in the batch or
    by the number of micro-batches. Under DDP it is the loss of rank 0 alone; the Trainer logs the mean over all ranks.
    If your Trainer overrides ``training_step`` without calling ``Trainer.training_step``, there are no ``losses``, and
    a warning says so.

    The trace is complete when training ends. The Trainer does not report an exception to its callbacks: after one,
    leaving the ``with`` block saves the steps so far. Without a block, they are saved when the callback is
    garbage-collected, or when the interpreter exits. You may call ``trainer.train()`` again, but it replaces an
    existing trace only with ``overwrite=True``.

    Args:
        params: names, globs and regular expressions over the parameters of the Trainer's model; or parameters by name.
        path: the trace file.
        **options: for the recorder: ``rows``, ``fields``, ``every``, ``keyframes``, ``storage``, ``keys``,
            ``metadata``, ``overwrite``, ``append``, ``strict``; ``unclipped=False`` records gradients as the optimizer
            gets them.

    Attributes:
        recorder: the recorder of the current training, or of the last one; None before the first.

    Raises:
        ConfigError, StorageError: from ``trainer.train()``; see :class:`bhfast.Recorder`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = max(1, state.max_steps - state.global_step)  # resuming a finished training does no step
        self.open_recorder(kwargs["optimizer"], kwargs["model"], steps=steps, start_step=state.global_step)
        assert self.step_loss is not None
        self.enter_context(_method.heard_by((kwargs["optimizer"], self.step_loss)))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.step_loss is not None
        if self.step_loss.is_empty:
            warnings.warn(
                "losses are not recorded: this Trainer's training_step does not call Trainer.training_step",
                RecordingWarning,
                stacklevel=2,
            )
        self.step_loss.begin_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close_recorder()


# Callbacks do not see the losses of a step. So while a recorder is open, Trainer.training_step is replaced by a
# function that also passes on what the original returns.


@wraps(Trainer.training_step)
def _training_step(self: Trainer, *args: Any, **kwargs: Any) -> Tensor:
    loss = _method.original(self, *args, **kwargs)
    for optimizer, step_loss in _method.listeners:
        if optimizer is self.optimizer:
            step_loss.add(loss)
    return loss


_method: ReplacedMethod[tuple[torch.optim.Optimizer, StepLoss]] = ReplacedMethod(
    Trainer, "training_step", _training_step
)
