"""What the callbacks for training frameworks share: a recorder that is closed however the training ends."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from bhfast.recording.recorder import Recorder
from bhfast.recording.selection import Params


class RecordingCallback:
    """Opens a recorder when training begins, and closes it when training ends.

    The callback is a context manager: leaving its block closes the recorder after an exception that the framework
    did not report. Without a block, the recorder is closed when the callback is garbage-collected, or when the
    interpreter exits.

    Args:
        params, path, options: for :class:`bhfast.Recorder`.

    Attributes:
        recorder: the recorder of the current training, or of the last one; None before the first.
        step_loss: logs the loss of each step to that recorder.
    """

    def __init__(self, params: Params, *, path: str | os.PathLike[str], **options: Any) -> None:
        self.recorder: Recorder | None = None
        self.step_loss: StepLoss | None = None
        self._params = params
        self._options = {"path": path, **options}
        self._stack = ExitStack()
        self._close: weakref.finalize[Any, Any] | None = None  # not before it is needed: a finalizer cannot be pickled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._close is not None and self._close.detach():
            self._stack.__exit__(*error)

    def open_recorder(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module,
        **options: Any,
    ) -> None:
        """Open a recorder of unclipped gradients, after closing any that a failed training left open.

        Args:
            optimizer, model: what to record.
            **options: for the recorder; those that the user gave take precedence.

        Raises:
            ConfigError, StorageError: see :class:`bhfast.Recorder`.
        """
        self.close_recorder()
        recorder = Recorder(optimizer, self._params, model=model, **{"unclipped": True, **options, **self._options})
        self.recorder, self.step_loss = recorder, StepLoss(recorder)
        self._stack = ExitStack()
        self._close = weakref.finalize(self, self._stack.close)
        self._stack.enter_context(recorder)

    def enter_context(self, context: AbstractContextManager[object]) -> None:
        """Enter a context that ends before the recorder is closed; it must not refer to the callback."""
        self._stack.enter_context(context)

    def close_recorder(self) -> None:
        """Turn the records so far into the trace, if a recorder is open."""
        if self._close is not None:
            self._close()


class StepLoss:
    """Logs the loss of a step as ``losses``: the sum over its micro-batches, in float32 or wider."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._sum: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the step has no loss yet."""
        return self._sum is None

    def begin_step(self) -> None:
        """Begin the sum of another step."""
        self._sum = None

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch, a scalar, and log the sum so far."""
        loss = loss.detach()
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        self._sum = loss if self._sum is None else self._sum + loss
        self._recorder.log(losses=self._sum)
