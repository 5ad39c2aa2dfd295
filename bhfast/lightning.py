"""The recorder as a callback of Lightning's Trainer. Needs the ``lightning`` extra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from bhfast.recording.callback import RecordingCallback


class RecorderCallback(RecordingCallback, Callback):
    """Records what ``trainer.fit()`` does to chosen parameters, with a :class:`bhfast.Recorder`::

        trainer = Trainer(..., callbacks=[RecorderCallback("net.*", path="run.safetensors")])
        trainer.fit(module, batches)

    Record k is step k of the Trainer's ``global_step``. If the training resumes from a checkpoint, the first record is
    the state in the checkpoint. With ``append=True`` the recording goes on with the trace at ``path``, if there is one,
    from the step of the checkpoint. Several optimizers (manual optimization) make one record together, which the step
    of the last one completes. Lightning counts each of their steps, so ``global_step`` is k times the number of
    optimizers at record k.

    Gradients are recorded as ``backward()`` leaves them: summed over all micro-batches, averaged over all processes,
    and before Lightning clips them. The clipping factor is in ``clip_coefs``.

    ``losses`` (float32 or wider, ``[R]``) holds what ``training_step`` returned as loss. With
    ``accumulate_grad_batches`` it is the sum over the micro-batches, each divided by their number as Lightning does for
    the backward pass. Under manual optimization it is the loss of the last batch before the record was complete. Under
    DDP it is the loss of rank 0 alone. Without a returned loss there are no ``losses``.

    The trace is complete when the fit ends, even if it ends with an exception.

    Args:
        params: names, globs and regular expressions over the module's parameters; or parameters by name.
        path: the trace file.
        **options: for the recorder: ``rows``, ``fields``, ``every``, ``keyframes``, ``storage``, ``keys``,
            ``metadata``, ``overwrite``, ``append``, ``strict``; ``unclipped=False`` records gradients as the optimizer
            gets them;
            ``steps``, which Lightning does not know under manual optimization.

    Attributes:
        recorder: the recorder of the current fit, or of the last one; None before the first.

    Raises:
        ConfigError, StorageError: from ``trainer.fit()``; see :class:`bhfast.Recorder`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = trainer.global_step // len(trainer.optimizers)
        self.open_recorder(trainer.optimizers, pl_module, steps=_steps_to_come(trainer), start_step=start)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self.recorder is not None
        self.recorder.begin_step()  # training_step may log before it calls a network

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.step_loss is not None
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.step_loss.begin_step()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.step_loss.add(loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close_recorder()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close_recorder()


def _steps_to_come(trainer: Trainer) -> int | None:
    """Return how many steps the fit will have at most; None if that is not known."""
    is_scheduled = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if is_scheduled or not trainer.lightning_module.automatic_optimization:
        return None
    steps = trainer.estimated_stepping_batches
    return None if steps in (-1, math.inf) else max(1, int(steps) - trainer.global_step)
