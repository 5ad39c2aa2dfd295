"""The recorder: what an optimizer does to chosen parameters, bit for bit at every step, without changing the loop."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bhfast.errors import ConfigError, StorageError
from bhfast.recording.cycle import StepCycle
from bhfast.recording.fields import FieldPlan, local, unwrapped
from bhfast.recording.followers import Followers
from bhfast.recording.logged import as_tensors, flattened
from bhfast.recording.optimizer_description import require_rebuildable
from bhfast.recording.selection import Params, require_supported, select
from bhfast.recording.series import find_seam, require_no_parts
from bhfast.recording.shards import RankPartition
from bhfast.recording.slots import RecordSlots
from bhfast.signals import deferred_signals, terminable
from bhfast.storage.base import STORAGES, Stats
from bhfast.storage.output import OutputFile
from bhfast.trace.format import FORMAT, FORMAT_VERSION
from bhfast.trace.recorded import RecordedTensor

NEEDED = {"learning_rates", "clip_coefs", "skipped"}  # to rebuild states between key frames


class Recorder:
    """Records parameters, their gradients and their optimizer state at every step of an optimizer.

    It hooks into ``optimizer.step()``. Record k holds the gradient that step k was given, and the parameter and the
    optimizer's state after step k, with what the loop itself does to them before step k + 1. Record 0 holds parameters
    and state at the start, and zeros as gradients. When the ``with`` block ends, even with an exception, Ctrl-C,
    SIGTERM or SIGHUP, the records so far become a trace file::

        with Recorder(optimizer, {"wte": model.wte.weight}, steps=1000, path="run.safetensors") as recorder:
            for batch in batches:
                ...
                loss.backward()
                optimizer.step()
                recorder.log(loss=loss)

    :meth:`start` and :meth:`close` do the same without a block. No address is cached between steps: if the storage of a
    parameter or gradient is replaced, the recorder reads the new one. :class:`bhfast.FusedAdam` writes the records in
    the pass that updates the parameters. From a CUDA device, records go to the host through a ring of slots; the run
    waits only if the ring is full.

    Missing values are marked as missing, with one warning, and never stop the training. A parameter without a gradient
    has zeros for it, and ``NAME.has_grad`` (bool ``[R]``) says which steps had one. A step that a
    ``torch.amp.GradScaler`` skips is recorded too, and marked in ``skipped`` (bool ``[R]``). Gradients are recorded
    without the loss scale. If the loop changes a recorded tensor after the step, ``NAME.changed`` (bool ``[R]``) says
    so, and ``NAME.after_step`` holds what the step had left, and zeros in other records. Writes through ``.data`` go
    unnoticed.

    Under ``torch.distributed`` every process opens a recorder with the same arguments. Rank 0 records replicated
    parameters, and what it logs. Each rank records its own shards (DTensor), to
    ``STEM-0000K-of-0000N.safetensors``, and rank 0 writes ``PATH.index.json``, which :func:`bhfast.open_trace` opens.
    Nothing is gathered. After a fork, only the process that opened the recorder records.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or several. The steps of several make one step of the recording
            together; the step of the last one completes the record. Wrappers that keep their optimizer as
            ``.optimizer`` (Accelerate, Lightning) are unwrapped. If ``step()`` gets a closure, it must call it once.
        params: parameters by the name they get in the file; or names, globs and compiled regular expressions over
            ``model.named_parameters()``. The name of a module stands for all its parameters. Patterns skip frozen
            parameters. A tied parameter is recorded once.
        steps: the number of steps the run will have; the recording stops after that many, with a warning. None if the
            number is not known: the file grows.
        path: the trace file; called ``PATH.partial`` while it grows.
        model: needed for names in ``params``. With it, values logged during its forward pass in training mode belong to
            the next step.
        rows: for each parameter named here, record only these rows: int64 indices along axis 0, or a bool mask over it.
            The file lists the indices as ``NAME.rows``.
        fields: ``param``, ``grad``, and keys of the optimizer's state. None: ``param``, ``grad``, and every tensor in
            the optimizer's state of a parameter, except the step count.
        every: besides record 0, record each step that is a multiple of this, counted from record 0 (``start_step``).
        keyframes: record parameters and moments at key frames only: record 0, each record that is a multiple of this,
            and the last one. They are recorded as ``NAME.keyframes`` ``[F, ...]``, and readers rebuild all other
            records from the gradients. Takes about a quarter of the bytes. For optimizers whose arithmetic is known
            to the bit.
        unclipped: record each gradient as the backward pass leaves it, reduced over all processes, instead of as
            ``step()`` finds it: for loops that clip in between. The factor that was applied is found from the bits, and
            recorded as ``clip_coefs`` (float32 ``[R]``); NaN if the gradients were changed in another way.
        storage: ``memory`` keeps all records and writes them at the end. ``stream`` writes them during the run, in
            constant memory, and a killed run leaves ``PATH.partial``, which ``python -m bhfast.recover`` turns into a
            trace. ``auto`` takes memory if ``steps`` is known and the recording fits into half of the free memory.
        keys: for each field the name of its tensor in the file, with ``{name}`` for the parameter's; and for the name
            of a parameter such a mapping of its own.
        metadata: strings for the file's ``__metadata__``.
        overwrite: whether to replace an existing file, and a ``.partial`` left by an earlier run. A run that is cut
            short never replaces a file: it is saved beside it, as ``STEM.cut-at-STEP.safetensors``.
        append: if there is a trace at ``path``, go on with it in a file beside it, ``STEM.part-00002.safetensors`` and
            so on. :func:`bhfast.open_trace` reads all parts as one trace. What is recorded must be the same as before,
            and parameters and optimizer state must be bit for bit those that the trace has at ``start_step``; what it
            has after that step is left out when it is read. No earlier file is changed.
        start_step: the step of record 0, for a run that resumes: record k holds step ``start_step + k * every``. None:
            0, or, with ``append``, the last step of the trace.
        strict: at a step beyond ``steps``, raise BhfastError instead of warning.

    Attributes:
        path: where the file is, once it is written.
        saved_steps: the last recorded step in it, counted from record 0.
        every: how many steps records are apart.
        constants: tensors of the whole run, by name, written as they are; you may add some anywhere inside the block.
        slots: where engines that perform steps without the optimizer's ``step()`` begin and end them.

    Besides the fields and what you log, the file gets ``learning_rates`` (float64 ``[R]``, or ``[R, groups]`` if there
    are several parameter groups). If the optimizer clips inside its step, it also gets ``clip_coefs`` and
    ``grad_norms`` (float32 ``[R]``). Your own values under these names take precedence. With several optimizers,
    ``clip_coefs``, ``grad_norms`` and ``skipped`` are ``[R, optimizers]``. The metadata has the rest for a replay.

    Raises:
        ConfigError: an argument is out of range, or two tensors would get the same name.
        StorageError: on entering, if memory or disk are too small, or the folder cannot be written to. Inside the
            block, at the next step, if the disk filled up or failed; what was committed becomes a trace.
    """

    _slots_class = RecordSlots

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        params: Params,
        *,
        path: str | os.PathLike[str],
        steps: int | None = None,
        model: nn.Module | None = None,
        rows: Mapping[str, Tensor | Sequence[int]] | None = None,
        fields: Sequence[str] | None = None,
        every: int = 1,
        keyframes: int | None = None,
        unclipped: bool = False,
        storage: str = "auto",
        keys: Mapping[str, str | Mapping[str, str]] | None = None,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        append: bool = False,
        start_step: int | None = None,
        strict: bool = False,
    ) -> None:
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        optimizers = [unwrapped(own) for own in given]
        _check_arguments(optimizers, steps, every, keyframes, fields, storage, unclipped, start_step)
        if append and overwrite:
            raise ConfigError("append and overwrite exclude each other: pass one of them")
        require_supported(optimizers, model)
        own = {"keyframes": str(keyframes)} if keyframes else {}
        self.metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **(metadata or {}), **own}
        self.path = Path(path)
        self.saved_steps = 0
        self.every = every
        self.slots = self._slots_class(steps=steps, every=every, keyframes=keyframes)
        self.constants = self.slots.constants
        self._model = model
        self._start_step = start_step
        self._append = append
        self._wanted_storage = storage
        self._overwrite = overwrite
        self._is_open = False
        self._started_at = time.monotonic()
        self._closed_at: float | None = None
        self._stack = ExitStack()
        self._known: Mapping[str, RecordedTensor] = {}  # what an earlier trace logged
        self._cycle = StepCycle(self.slots, strict=strict)
        selected, tied = select(params, model=model, optimizers=optimizers, rows=rows or {})
        self._partition = RankPartition(selected, self.path)
        self._partition.require_gradients_of(unclipped, model)
        plans = [FieldPlan(own, self._partition.params, fields, keys or {}, keyframes) for own in optimizers]
        self._followers = Followers(plans, self._cycle, self._partition, tied, unclipped=unclipped)
        self._row_indices = {of.name: of.all_rows for of in self._partition.params if of.all_rows is not None}

    # -----------------------------------------------------------------------------------------------------------------
    # Start and end

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def start(self) -> None:
        """Open the file and begin to record, as entering the ``with`` block does; see :class:`Recorder` for errors."""
        try:
            with self._partition.agreement():
                self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> None:
        fields = self._followers.fields
        self._partition.meet(fields)
        self.slots.is_logging = self._partition.rank == 0
        if self._partition.is_empty:
            self.path = self._partition.index or self.path
            return
        with ExitStack() as stack:
            seam = find_seam(self._partition, self._start_step) if self._append else None
            if seam is not None:
                seam.require_same(self._followers, self._row_indices, self.slots)
                self._start_step, self._known = seam.step, seam.logged
                self.metadata |= seam.metadata
            else:
                require_no_parts(self._partition.path)
            self._output = stack.enter_context(OutputFile(self._partition.path, overwrite=self._overwrite))
            if self.slots.keyframes:
                require_rebuildable(self._followers.description(), fields.values())
            self.metadata |= {**self._followers.metadata(), **self._partition.metadata()}
            tensors = {name: field.tensor for name, field in fields.items()}
            start = self._start_step or 0
            stack.enter_context(
                self.slots.opened(self._output, self._wanted_storage, tensors, start_step=start, metadata=self.metadata)
            )
            for name, field in fields.items():
                self.slots.add(tensors[name], local(field.of.param).device)
                self.slots.reserve_name(field.key)
            for name, rows in self._row_indices.items():
                self.slots.reserve_name(f"{name}.rows")
                self.constants[f"{name}.rows"] = rows.cpu()
            self._followers.record_start()
            if seam is not None:
                seam.require_same_state(self.slots, fields.values())
            self.slots.complete = 1
            stack.enter_context(self._followers.following(self._model))
            stack.enter_context(terminable())
            self._started_at = time.monotonic()
            self._stack = stack.pop_all()
            self._is_open = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_open or self._cycle.is_in_other_process:
            return
        self._is_open = False
        with self._stack:
            with deferred_signals(redeliver=True):
                fault = self._save()
        if fault is not None and error is None:
            raise fault

    def close(self) -> None:
        """Turn the records so far into the trace, as leaving the ``with`` block does. Calling it again does nothing.

        Raises:
            StorageError: some records could not be saved.
        """
        self.__exit__(None, None, None)

    def _save(self) -> Exception | None:
        """Turn the records so far into the trace; return the error that lost the remaining records, if any."""
        self._closed_at = time.monotonic()
        self._cycle.record_changes()
        saved, fault = self.slots.settle()
        if saved == 0:
            raise StorageError(f"{self.slots.failure}; nothing was saved")
        self.saved_steps = (saved - 1) * self.every
        path = self._partition.path
        is_cut = saved < (self.slots.records or 0) and not 0 < self.slots.carried <= saved
        if is_cut and path.exists() and not self._partition.is_sharded:
            path = path.with_name(f"{path.stem}.cut-at-{(self._start_step or 0) + self.saved_steps}{path.suffix}")
        metadata = {
            **self.metadata,
            **self._followers.metadata(),
            **self._partition.metadata(self.slots.tensors),
        }
        names = self.slots.save(metadata, path)
        self.path = self._partition.finish(path, names, saved, self.slots.frames)
        if saved < self.slots.complete and fault is None:
            fault = StorageError(
                f"{self.slots.failure}; steps 0 to {self.saved_steps:,} of {self.slots.step:,} were saved: {self.path}"
            )
        return fault

    # -----------------------------------------------------------------------------------------------------------------
    # Meanwhile

    def log(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Record more values with the last step, or with record 0 before the first step.

        Once the next step is under way, values belong to that step instead. A step is under way when its backward pass
        has begun; if the recorder was given the ``model``, when the model's forward pass in training mode has begun; or
        after :meth:`begin_step`. If a name is logged several times for one step, the last value counts.

        Args:
            values, named: by the name they get in the file: tensors, numpy arrays, numbers, and mappings of these,
                whose names are joined with dots. The first value under a name fixes its shape and dtype. Records
                without a value hold NaN, or 0 for integers.

        Raises:
            ConfigError: a recorded tensor has that name, or shape or dtype has changed.
            StorageError: the disk is too small for a new name.
        """
        if self._partition.is_empty or self._cycle.is_off:
            return
        flat = flattened({**(values or {}), **named})
        if self.slots.keyframes and (own := sorted(flat.keys() & NEEDED)):
            raise ConfigError(f"log({own[0]}=...) must have a name of its own: states are rebuilt with {own[0]}")
        self.slots.require_loggable(flat)
        found = as_tensors(flat, {**self._known, **self.slots.tensors, **self._cycle.pending})
        if self._cycle.is_under_way:
            self._cycle.pending |= {name: value.clone() for name, value in found.items()}
        else:
            self.slots.log(**found)

    def begin_step(self) -> None:
        """From now on, let :meth:`log` give values to the next step, even before its forward pass has begun."""
        self._cycle.note_activity()

    @property
    def description(self) -> str:
        """Human-readable storage kind, size and path."""
        if self._partition.is_empty:
            return "recorded by rank 0"
        return f"{self.slots.description} -> {self._partition.path}"

    def stats(self) -> Stats:
        """Return figures of the recording so far; of the whole recording once it is closed."""
        if self._partition.is_empty:
            return Stats(0, 0, 0, 0, 0, 0.0)
        records = self.slots.complete
        return Stats(
            steps=max(0, records - 1) * self.every,
            records=records,
            committed=self.slots.committed,
            bytes=records * self.slots.nbytes,
            waits=self.slots.waits,
            seconds=(self._closed_at or time.monotonic()) - self._started_at,
        )


def _check_arguments(
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int | None,
    every: int,
    keyframes: int | None,
    fields: Sequence[str] | None,
    storage: str,
    unclipped: bool,
    start_step: int | None,
) -> None:
    if not optimizers or len({id(own) for own in optimizers}) < len(optimizers):
        raise ConfigError("optimizer must be an optimizer or a sequence of different ones")
    if (steps is not None and steps < 1) or every < 1:
        raise ConfigError(f"steps and every must be at least 1, got {steps=}, {every=}")
    if start_step is not None and start_step < 0:
        raise ConfigError(f"start_step must be at least 0, got {start_step}")
    if keyframes is not None and keyframes < 2:
        raise ConfigError(f"keyframes must be at least 2, got {keyframes}")
    if keyframes is not None and every > 1:
        raise ConfigError(f"keyframes need the gradients of every step, got every={every}")
    if storage not in STORAGES:
        raise ConfigError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    if storage == "memory" and steps is None:
        raise ConfigError("storage memory needs steps=; if you do not know it, use storage stream")
    if fields is not None and not fields:
        raise ConfigError("fields must name at least one field, got none")
    for own in optimizers:
        if unclipped and getattr(own, "max_grad_norm", None) is not None:
            raise ConfigError(
                f"unclipped is for loops that clip between backward() and step(); {type(own).__name__} with "
                "max_grad_norm clips inside, and its gradients are recorded unclipped anyway"
            )
