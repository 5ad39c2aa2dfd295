"""Recorder: what an optimizer does to chosen parameters, bit for bit at every step, without changing the loop."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bhfast.errors import BhfastError, ConfigError, StorageError
from bhfast.ops import checks, kernels
from bhfast.recording.clipping import clip_coefficient
from bhfast.recording.fields import KEY, Source, default_fields, source_of
from bhfast.recording.optimizer_description import Description
from bhfast.recording.protocols import RecordsItself
from bhfast.recording.selection import Params, select
from bhfast.recording.shards import Share, local
from bhfast.signals import deferred_signals, terminable
from bhfast.storage.base import STORAGES, Stats, Storage
from bhfast.storage.choose import open_storage
from bhfast.storage.claim import Claim
from bhfast.trace.format import FORMAT, FORMAT_VERSION, format_bytes
from bhfast.transfer.host_memory import populator
from bhfast.transfer.lanes import make_lane
from bhfast.transfer.ring import Ring, half_size

FIELDS = checks.FIELDS


class Recorder:
    """Records parameters, their gradients and their optimizer state at every step of an optimizer.

    It hooks into ``optimizer.step()``. Record k holds the gradient that step k was given, and the parameter and the
    optimizer's state after step k. Record 0 holds parameters and state at the start, and zeros. On leaving the ``with``
    block the records so far become a trace file, also if an exception, Ctrl-C or SIGTERM ends the block::

        with Recorder(optimizer, {"wte": model.wte.weight}, steps=1000, path="run.safetensors") as recorder:
            for batch in batches:
                ...
                loss.backward()
                optimizer.step()
                recorder.log(loss=loss)

    Nothing is cached between steps: a parameter or gradient whose storage is replaced is read where it then is.
    :class:`bhfast.FusedAdam` writes the records in the same pass that updates the parameters; on a CUDA device they
    go through a ring (:mod:`bhfast.transfer.ring`), and the run waits only if that is full.

    With ``storage="stream"`` a thread writes the records into the file meanwhile, in flat memory, and a run that is
    killed leaves ``PATH.partial``, of which ``python -m bhfast.recover`` makes a trace.

    Under ``torch.distributed`` every process opens a recorder with the same arguments. What is replicated, and what is
    logged, is recorded by rank 0; of what is sharded (DTensor) each rank records its part, to ``STEM-0000K-of-0000N``,
    and rank 0 writes ``PATH.index.json``, which :func:`bhfast.open_trace` opens. Nothing is gathered during the run.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that keeps the ``fields`` asked for. If it is stepped with a closure,
            the closure must be called once in a step.
        params: parameters by the name they get in the file; or names, globs and compiled regular expressions over
            ``model.named_parameters()``. A parameter under several names is recorded once.
        steps: the number of steps the run will have; None if it is not known, and the file is to grow.
        path: the trace file; grown under ``PATH.partial``.
        model: for names in ``params``.
        rows: of the parameters named here, record only these rows: indices along axis 0, or a mask over it. The file
            has them as ``NAME.rows``.
        fields: ``param``, ``grad``, and keys of the optimizer's state. None: ``param``, ``grad``, and ``exp_avg`` and
            ``exp_avg_sq``; for SGD ``momentum_buffer``, if it has momentum.
        every: record each step that is a multiple of this, beside step 0.
        unclipped: record each gradient as ``backward()`` leaves it, not as ``step()`` finds it: for loops that clip in
            between. The factor that was applied is found from the bits, and recorded as ``clip_coefs``, NaN if the
            gradient was changed in another way.
        storage: ``memory`` keeps all records and writes them at the end, ``stream`` writes them meanwhile. ``auto``
            takes memory where the number of steps is known, and the recording takes no more than half of it.
        keys: for each field the name of its tensor in the file, with ``{name}`` for the parameter's.
        metadata: strings for the file's ``__metadata__``.
        overwrite: whether an existing file, and a ``.partial`` left by an earlier run, may be replaced. A run
            that is cut short replaces no file all the same: it is saved beside it, as ``STEM.cut-at-STEP.safetensors``.

    Attributes:
        path: where the file is, once it is written.
        saved_steps: the last recorded step in it.
        constants: tensors of the whole run, to be written as they are; fill it at any time inside the block.

    Beside what is asked for and logged, the file gets ``learning_rates`` (float64 ``[R]``, or ``[R, groups]``), and of
    an optimizer that clips inside ``clip_coefs`` and ``grad_norms``, unless the run logs its own; the metadata has what
    :mod:`bhfast.verify` needs for a replay.

    Raises:
        ConfigError: an argument is out of range, or two tensors would get one name.
        StorageError: on entering, if memory or disk are too small, or the folder cannot be written to. Inside the
            block, at the next step, if the disk filled up or failed; what was committed becomes a trace.
    """

    _open_storage = staticmethod(open_storage)
    _half_size = staticmethod(half_size)
    _make_lane = staticmethod(make_lane)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Params,
        *,
        path: str | os.PathLike[str],
        steps: int | None = None,
        model: nn.Module | None = None,
        rows: Mapping[str, Tensor | Sequence[int]] | None = None,
        fields: Sequence[str] | None = None,
        every: int = 1,
        unclipped: bool = False,
        storage: str = "auto",
        keys: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        if (steps is not None and steps < 1) or every < 1:
            raise ConfigError(f"steps and every must be at least 1, got {steps=}, {every=}")
        if storage not in STORAGES:
            raise ConfigError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        if storage == "memory" and steps is None:
            raise ConfigError("storage memory needs steps=; if it is not known, use storage stream")
        if unclipped and getattr(optimizer, "max_grad_norm", None) is not None:
            raise ConfigError(
                f"unclipped is for loops that clip between backward() and step(); {type(optimizer).__name__} with "
                "max_grad_norm clips inside, and its gradients are recorded unclipped anyway"
            )
        fields = default_fields(optimizer) if fields is None else fields
        if not fields:
            raise ConfigError("fields must name at least one field, got none")
        self.optimizer = optimizer
        self.every = every
        self.metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **(metadata or {})}
        self.path = Path(path)
        self.constants: dict[str, Tensor] = {}
        self._kept: set[str] = set()  # of the constants, those that the storage has
        self.saved_steps = 0
        self._steps = math.inf if steps is None else steps
        self._records = None if steps is None else steps // every + 1
        self._step = 0  # steps begun, or on their way
        self._step_tensor = torch.zeros((), dtype=torch.int64)  # the same, for the operations
        self._in_closure = False  # which calls backward() inside the step
        self._row: int | None = 0  # the record that log() writes to; None: the last step is not recorded
        self._complete = 0  # records that are whole
        self._entered_at = time.monotonic()
        self._left_at: float | None = None
        self._overwrite = overwrite
        self._unclipped = unclipped
        self._wanted_storage = storage
        self._storage: Storage
        self._hosts: dict[str, Tensor] = {}  # by name in the file, [slots, ...]
        self._slots: dict[str, Tensor] = {}  # where the records are made: on the source's device, or in hosts itself
        self._rings: dict[tuple[torch.device, int], Ring] = {}  # by the size of a half
        self._fused: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)  # slots that the optimizer fills itself
        self._end_fused: Callable[[], None] = lambda: None
        self._by_hand: list[Source] = []  # what of the step at hand it does not fill
        self._own: set[str] | None = None  # what the recorder logs by itself
        self._raw_grads: dict[str, Tensor] = {}  # by parameter, as backward() left them; if they are wanted unclipped
        self._replay = Description(optimizer)
        self._stack = ExitStack()
        selections, self._tied = select(params, model=model, optimizer=optimizer, rows=rows or {})
        self._share = Share(selections, self.path)
        keys = keys or {}
        self._sources = [
            source_of(piece, field, keys.get(field, KEY if field != "param" else "{name}"), optimizer)
            for piece in self._share.pieces
            for field in fields
        ]
        self._rows = {piece.name: piece.chosen for piece in self._share.pieces if piece.chosen is not None}
        names = [source.key for source in self._sources]
        self._reserved = {*names, "recorded_steps", *(f"{name}.rows" for name in self._rows)}
        if twice := {key for key in names if names.count(key) > 1}:
            raise ConfigError(f"keys must give every tensor a name of its own, got {', '.join(sorted(twice))} twice")

    # -----------------------------------------------------------------------------------------------------------------
    # Life

    def __enter__(self) -> Recorder:
        try:
            with self._share.agreement():
                self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        pieces = {piece.name: piece for piece in self._share.pieces}
        self._share.meet(
            {source.key: pieces[source.name] for source in self._sources},
            {source.key: source.shape for source in self._sources},
        )
        if self._share.is_empty:
            self.path = self._share.index or self.path
            return
        with ExitStack() as stack:
            self._stack = stack
            self._populator = populator()
            stack.callback(self._populator.close)
            claim = stack.enter_context(Claim(self._share.path, overwrite=self._overwrite))
            self.metadata = {**self.metadata, **self._describe_replay(), **self._share.metadata()}
            sizes = {source.key: source.nbytes for source in self._sources}
            self._storage, self._where = self._open_storage(
                claim,
                self._wanted_storage,
                records=self._records,
                every=self.every,
                sizes=sizes,
                group=self._half(0),
                metadata=self.metadata,
            )
            stack.callback(self._storage.close)
            for source in self._sources:
                self._add(source.key, source.shape, source.dtype, local(source.param).device, None)
                self._fill_record_0(source)
            for name, rows in self._rows.items():
                self._storage.set_constant(f"{name}.rows", rows.cpu())
            self._complete = 1
            if isinstance(self.optimizer, RecordsItself):
                for source in self._sources:
                    if self._is_fused(source):
                        self._fused[source.param][source.field] = self._slots[source.key]
                self._record_fused()
                stack.callback(lambda: self._end_fused())
            if self._unclipped:
                for source in self._sources:
                    if source.field == "grad":
                        stack.callback(self._keep_raw_grads(source))
            stack.callback(self.optimizer.register_step_pre_hook(self._before_step).remove)
            stack.callback(self.optimizer.register_step_post_hook(self._after_step).remove)
            stack.enter_context(terminable())
            self._entered_at = time.monotonic()
            self._stack = stack.pop_all()

    def _add(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, blank: float | None
    ) -> None:
        """Make room for a tensor's records: on the host, and in a ring on its device."""
        half = self._half(math.prod(shape) * dtype.itemsize)
        self._hosts[key] = self._storage.add(key, shape, dtype, blank, group=half, first=self._row or 0)
        self._slots[key] = self._make_slots(key, device, blank)

    def _half(self, size: int) -> int:
        """Return how many records are sent from a device together, of a tensor with records of ``size`` bytes."""
        return self._half_size(max(size, sum(source.nbytes for source in self._sources)), self._records or 1 << 62)

    def _make_slots(self, key: str, device: torch.device, blank: float | None) -> Tensor:
        """Return where the records of a tensor are made: in a ring on its device, or where they are kept."""
        half = self._half(self._hosts[key][0].nbytes)
        if (device, half) not in self._rings:
            lane = self._make_lane(device)
            if lane is None:
                if blank is None:
                    self._populator.add(self._hosts[key])
                return self._hosts[key]
            self._stack.callback(lane.close)
            self._rings[device, half] = Ring(lane, half, first=self._row or 0)
        return self._rings[device, half].add(self._hosts[key], device, blank)

    def _fill_record_0(self, source: Source) -> None:
        state = self.optimizer.state.get(source.param, {})
        if source.field == "param":
            self._write(source, source.param.detach())
        elif source.field in state:
            self._write(source, state[source.field])
        else:
            self._slots[source.key][0] = 0

    def _is_fused(self, source: Source) -> bool:
        is_raw = self._unclipped and source.field == "grad"
        return source.field in FIELDS and source.rows is None and source.dtype == source.param.dtype and not is_raw

    def _describe_replay(self) -> dict[str, str]:
        """Return what the metadata say of the optimizer, and of parameters with several names."""
        keys: dict[str, dict[str, str]] = defaultdict(dict)
        params = {source.name: source.param for source in self._sources}
        for source in self._sources:
            keys[source.name][source.field] = source.key
        own = {"optimizer": json.dumps(self._replay.describe(params, keys))}
        tied = {
            key.replace(name, other, 1): key
            for other, name in self._tied.items()
            for key in [*keys.get(name, {}).values(), *([f"{name}.rows"] if name in self._rows else [])]
            if key.startswith(name)
        }
        return {**own, "tied": json.dumps(tied)} if tied else own

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._share.is_empty:
            return
        with self._stack:
            with deferred_signals(redeliver=True):
                fault = self._save()
        if fault is not None and error is None:
            raise fault

    def _save(self) -> Exception | None:
        """Turn the records so far into the trace; return what befell the rest of them."""
        self._left_at = time.monotonic()
        fault = self._drain()
        self._keep_constants()
        saved = self._storage.settle(self._complete)
        if saved == 0:
            raise StorageError(f"{self._storage.failure}; nothing was saved")
        self.saved_steps = (saved - 1) * self.every
        path = self._share.path
        is_cut = self._records is not None and saved < self._records
        if is_cut and path.exists() and not self._share.is_sharded:
            path = path.with_name(f"{path.stem}.cut-at-{self.saved_steps}{path.suffix}")
        self._storage.save({**self.metadata, **self._describe_replay()}, path)
        names = [*self._hosts, "recorded_steps", *self._kept, *(f"{name}.rows" for name in self._rows)]
        self.path = self._share.finish(path, names, saved)
        if saved < self._complete and fault is None:
            fault = StorageError(
                f"{self._storage.failure}; steps 0 to {self.saved_steps:,} of {self._step:,} were saved: {self.path}"
            )
        return fault

    def _keep_constants(self) -> None:
        for name, value in self.constants.items():
            if name not in self._kept:
                self._storage.set_constant(name, value)
                self._kept.add(name)

    def _drain(self) -> Exception | None:
        """Bring all records to the host; if the device failed, go back to those that are there and return its error."""
        fault = None
        for ring in self._rings.values():
            try:
                ring.drain(self._complete)
            except RuntimeError as error:
                fault = error
                self._complete = max(1, min(self._complete, ring.landed))
        return fault

    @property
    def description(self) -> str:
        """Where the recording is kept and goes, for people."""
        if self._share.is_empty:
            return "recorded by rank 0"
        record = sum(math.prod(x.shape[1:]) * x.itemsize for x in self._hosts.values())
        size = f"{format_bytes(record)} a step"
        if self._records is not None:
            size = f"{format_bytes(record * self._records)} for {self._records:,} records"
        return f"{self._where}: {size} -> {self._share.path}"

    def stats(self) -> Stats:
        """Return figures of the recording so far, or of all of it after the block."""
        if self._share.is_empty:
            return Stats(0, 0, 0, 0, 0, 0.0)
        record = sum(math.prod(x.shape[1:]) * x.itemsize for x in self._hosts.values())
        return Stats(
            steps=max(0, self._complete - 1) * self.every,
            records=self._complete,
            committed=self._storage.committed,
            bytes=self._complete * record,
            waits=self._storage.waits + sum(ring.lane.waits for ring in self._rings.values()),
            seconds=(self._left_at or time.monotonic()) - self._entered_at,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.begin(1)
        self._replay.look(self._step)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._record_gradients()
            return None
        calls = 0

        def recording_closure() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise BhfastError(
                    f"the recorder cannot follow {type(optimizer).__name__}, which calls the closure of a step more "
                    "than once"
                )
            self._in_closure = True
            try:
                loss = closure()
            finally:
                self._in_closure = False
            self._record_gradients()
            return loss

        return (args[0], recording_closure), {k: v for k, v in kwargs.items() if k != "closure"}

    def _record_gradients(self) -> None:
        """Record the gradients, and find out what else of this step the optimizer does not record itself."""
        if self._row is None:
            return
        self._by_hand = []
        clipped: list[tuple[Tensor, Tensor]] = []  # before and after
        for source in self._sources:
            grad = source.param.grad
            if grad is not None and source.field in self._fused.get(source.param, ()):
                continue
            self._by_hand.append(source)
            if source.field != "grad":
                continue
            raw = self._raw_grads.pop(source.key, None)
            if grad is None or (raw is None and self._unclipped):
                raise BhfastError(
                    f"parameter {source.name} has no gradient at step {self._step}; call backward() first"
                )
            if raw is not None:
                self._slots[source.key][self._slot(source.key)] = raw
                clipped.append((raw, source.rows_of(grad)))
            else:
                self._write(source, grad)
        if clipped:
            self.log(clip_coefs=clip_coefficient(clipped))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._row is None:
            return
        for source in self._by_hand:
            if source.field == "param":
                self._write(source, source.param.detach())
            elif source.field != "grad":
                state = optimizer.state[source.param]
                if source.field not in state:
                    raise BhfastError(
                        f"{type(optimizer).__name__} keeps no {source.field} for parameter {source.name}; "
                        "leave it out of fields="
                    )
                self._write(source, state[source.field])
        self._log_by_itself()
        self.end()

    def _log_by_itself(self) -> None:
        """Log what a replay needs, but for what the run has logged itself before its first step."""
        if self._own is None:
            self._own = {"learning_rates", "grad_norms", "clip_coefs"} - self._hosts.keys()
        values = {}
        if "learning_rates" in self._own:
            rates = [float(group["lr"]) for group in self.optimizer.param_groups]
            values["learning_rates"] = torch.tensor(rates if len(rates) > 1 else rates[0], dtype=torch.float64)
        if getattr(self.optimizer, "max_grad_norm", None) is not None and not self._unclipped:
            values["grad_norms"], values["clip_coefs"] = self.optimizer.grad_norm, self.optimizer.clip_coef  # type: ignore[attr-defined]
        self.log(**{name: value for name, value in values.items() if name in self._own})

    def _keep_raw_grads(self, source: Source) -> Callable[[], None]:
        """Keep the gradient that each ``backward()`` leaves; return what ends that."""

        def keep(param: Tensor) -> None:
            step = self._step if self._in_closure else self._step + 1
            if step % self.every == 0:
                assert param.grad is not None
                self._raw_grads[source.key] = source.rows_of(param.grad).clone()

        return source.param.register_post_accumulate_grad_hook(keep).remove

    def _slot(self, key: str) -> int:
        return self._step // self.every % len(self._slots[key])

    def _write(self, source: Source, value: Tensor) -> None:
        """Copy a value, or its rows, to the slot of the record at hand."""
        slot = self._slots[source.key][self._slot(source.key)]
        value = local(value)
        shape = value.shape if source.rows is None else torch.Size([len(source.rows), *value.shape[1:]])
        if value.dtype != slot.dtype or shape != slot.shape:
            raise BhfastError(
                f"{source.field} of parameter {source.name} is {value.dtype} {list(value.shape)} at step {self._step}, "
                f"wanted {slot.dtype} {list(slot.shape)}; open the recorder after the optimizer's first step"
            )
        if source.rows is None:
            slot.copy_(value)
        else:
            torch.index_select(value, 0, source.rows, out=slot)

    def begin(self, most: int) -> int:
        """Begin up to ``most`` further steps; return how many there is room for, at least one.

        The hooks call it, and :meth:`end`; so do engines whose steps are not the optimizer's.

        Raises:
            BhfastError: the recorder was opened for fewer steps.
            StorageError: the disk filled up or failed.
        """
        if self._share.is_empty:
            return most
        if self._step + most > self._steps:
            raise BhfastError(f"the recorder was opened for {self._steps} steps; open it with a larger steps=")
        storage, rings = self._storage, self._rings.values()
        complete = self._step // self.every + 1
        if storage.is_due(complete) or complete >= storage.room or any(complete == ring.room for ring in rings):
            self._keep_constants()
            tickets = [ticket for ring in rings if (ticket := ring.send(complete)) is not None]
            storage.submit(complete, tickets)
        for ring in rings:
            if complete == ring.room:
                ring.turn()
        if complete >= storage.room and complete != self._records:
            storage.wait(complete)
        room = min([storage.room, *(ring.room for ring in rings)])
        most = min(most, room * self.every - 1 - self._step)
        self._step += most
        self._step_tensor.fill_(self._step)
        self._row = None if self._step % self.every else self._step // self.every
        return most

    def end(self) -> None:
        """Say that the steps begun are done, or on their way on the device."""
        self._complete = self._step // self.every + 1

    @contextmanager
    def counted_by(self, step: Tensor) -> Iterator[None]:
        """Inside the block, what the optimizer and :meth:`log` record goes by a counter on a device.

        So a CUDA graph captured there records step after step, whoever replays it between :meth:`begin` and
        :meth:`end`.

        Args:
            step: int64 scalar, which the graph itself counts up before each step.
        """
        own = self._step_tensor, self._row
        self._step_tensor, self._row = step, 0
        self._record_fused()
        try:
            yield
        finally:
            self._step_tensor, self._row = own
            self._record_fused()

    def _record_fused(self) -> None:
        if isinstance(self.optimizer, RecordsItself):
            self._end_fused()
            self._end_fused = self.optimizer.record_into(self._fused, self._step_tensor, self.every)

    def log(self, **values: Tensor) -> None:
        """Record more values with the last step, or with record 0 before the first; nothing if it is not recorded.

        Args:
            values: by the name they get in the file. The first one under a name fixes shape and dtype, and later ones
                are cast to that dtype. Records without one hold NaN, integers 0.

        Raises:
            ConfigError: a parameter's tensor has that name, or the shape has changed.
            StorageError: the disk is too small for a new name.
        """
        if self._row is None or self._share.is_empty or self._share.rank > 0:
            return
        # Those with rings of one size together.
        records: dict[tuple[torch.device, int], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, value in values.items():
            value = local(value.detach())
            slots = self._slots_of(name, value)
            sources, rings = records[slots.device, len(slots)]
            sources.append(value.to(slots.device, slots.dtype))
            rings.append(slots)
        for sources, rings in records.values():
            kernels.record_(sources, rings, self._step_tensor, self.every)

    def log_into(self, **values: Tensor) -> dict[str, Tensor]:
        """Make room for values as :meth:`log` does, but record nothing: for engines that write records themselves.

        Args:
            values: see :meth:`log`; only shape, dtype and device matter.

        Returns:
            For each name ``[slots, *shape]``; record k goes to slot ``k % slots``. Nothing if no values are recorded in
            this process.
        """
        if self._share.is_empty or self._share.rank > 0:
            return {}
        return {name: self._slots_of(name, value) for name, value in values.items()}

    def _slots_of(self, name: str, value: Tensor) -> Tensor:
        """Return where records of a logged value are made, after :meth:`_add` if it is new."""
        if name in self._reserved:
            raise ConfigError(f"log({name}=...) must have a name of its own, but {name} is recorded already")
        if name not in self._hosts:
            self._add(name, value.shape, value.dtype, value.device, _blank(value.dtype))
        elif value.shape != self._hosts[name].shape[1:]:
            wanted, got = list(self._hosts[name].shape[1:]), list(value.shape)
            raise ConfigError(f"log({name}=...) must have one shape throughout: wanted {wanted}, got {got}")
        elif value.device.type == "cuda" and self._slots[name].device.type != "cuda":
            self._slots[name] = self._make_slots(name, value.device, _blank(value.dtype))
        return self._slots[name]


def _blank(dtype: torch.dtype) -> float:
    """What records without a logged value hold."""
    return math.nan if dtype.is_floating_point else 0
