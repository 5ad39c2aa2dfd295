"""Gradients as a backward pass leaves them: after all processes have reduced them, and before anybody clips them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bhfast.recording.fields import RecordedParam


class BackwardWatch:
    """Notices backward passes of recorded parameters, and calls back when one has begun, and when it is over.

    ``DistributedDataParallel`` and ``fully_shard`` finish their reductions in callbacks at the end of the backward pass
    (``queue_callback`` of the autograd engine), which run in the order in which they were queued. A hook of a
    parameter runs before theirs are queued, or after; so its callback only queues another one, which runs after all of
    them.

    Args:
        begun: called in each backward pass when a first gradient is there, and before each forward pass in training.
        over: called at the end of each backward pass; None if nobody needs it.
    """

    def __init__(self, begun: Callable[[], None], over: Callable[[], None] | None) -> None:
        self._begun = begun
        self._over = over
        self._pass = -1  # the last backward pass that was noticed

    @contextmanager
    def watching(self, params: Sequence[RecordedParam], model: nn.Module | None) -> Iterator[None]:
        """Watch the backward passes through ``params`` inside the block, and those of ``model``'s outputs.

        Parameters under ``fully_shard`` have no hooks of their own that fire: of these only the model tells.
        """
        with ExitStack() as stack:
            for of in params:
                stack.callback(of.param.register_post_accumulate_grad_hook(self._notice).remove)
            if model is not None:
                stack.callback(model.register_forward_pre_hook(self._before_forward).remove)
                stack.callback(model.register_forward_hook(self._after_forward).remove)
            yield

    def _before_forward(self, model: nn.Module, args: object) -> None:
        if model.training:
            self._begun()

    def _after_forward(self, model: nn.Module, args: object, output: object) -> None:
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._notice)

    def _notice(self, _: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if current == self._pass:
            return
        self._pass = current
        self._begun()
        if self._over is not None:
            queue, over = torch.autograd.Variable._execution_engine.queue_callback, self._over  # type: ignore[attr-defined]
            queue(lambda: queue(over))
