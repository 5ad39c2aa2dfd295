"""Short runs of the same bits, recorded in full or compact, with all that a loop may do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bhfast.errors import RecordingWarning
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES
from bhfast.trace.updates import bits

STEPS = 21
KEYFRAME = 8  # every so many records
SHAPES = {"matrix": (5, 7), "cube": (3, 2, 65), "vector": (70,), "tiny": (3,), "scalar": (), "empty": (0, 4)}
Params = dict[str, nn.Parameter]


def adamw(params: Params, **options: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(params.values(), **{"lr": 0.05, "foreach": False, **options})]


def fused_adam(params: Params, **options: Any) -> list[torch.optim.Optimizer]:
    return [FusedAdam(params.values(), **{"lr": 0.05, **options})]


def groups(params: Params, kind: Any = FusedAdam) -> list[torch.optim.Optimizer]:
    first, *others = params.values()
    own = {"params": [first], "lr": 0.01, "betas": (0.3, 0.9), "weight_decay": 0.3, "eps": 1e-4}
    return [kind([own, {"params": others}], lr=0.05)]


def two(params: Params, kind: Any = torch.optim.AdamW) -> list[torch.optim.Optimizer]:
    first, *others = params.values()
    return [kind([first], lr=0.05, betas=(0.8, 0.99)), kind(others, lr=0.01, weight_decay=0.2)]


class Stop(Exception):
    """Ends a run."""


@dataclass(frozen=True)
class Run:
    """What a run does.

    Attributes:
        make: returns its optimizers.
        dtype: of the parameters.
        clip: to what ``clip_grad_norm_`` clips between backward and step; None for no clipping.
        schedules: whether the learning rate of an optimizer changes right after its step.
        has_closure: whether the step gets one.
        has_scaler: whether a GradScaler performs the steps; step 6 has infinite gradients.
        without: steps in which a parameter has no gradient, by name.
        before: steps done before the recording begins.
        done: how many are recorded.
        fails: in which step an exception ends the run, before its update.
        after_step: called with the number of the step, the parameters and the optimizers.
        options: of the recorder.
    """

    make: Callable[[Params], Sequence[torch.optim.Optimizer]] = fused_adam
    dtype: torch.dtype = torch.bfloat16
    clip: float | None = None
    schedules: bool = False
    has_closure: bool = False
    has_scaler: bool = False
    without: dict[str, tuple[int, ...]] = field(default_factory=dict)
    before: int = 0
    done: int = STEPS
    fails: int | None = None
    after_step: Callable[[int, Params, Sequence[torch.optim.Optimizer]], None] = lambda *_: None
    options: dict[str, Any] = field(default_factory=dict)

    def record(self, path: Path, **more: Any) -> Path:
        """Record it, with further options of the recorder."""
        generator = torch.Generator().manual_seed(0)
        start = {name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in SHAPES.items()}
        params = {name: nn.Parameter(value) for name, value in start.items()}
        optimizers = self.make(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if self.has_scaler else None
        recorder = Recorder(optimizers, params, path=path, **{"steps": STEPS, **self.options, **more})
        for step in range(1 - self.before, 1):
            self._step(step, params, optimizers, None, generator)
        with suppress(Stop), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* has no gradient at step", RecordingWarning)
            with recorder:
                for step in range(1, self.done + 1):
                    loss = self._step(step, params, optimizers, scaler, generator)
                    recorder.log(loss=loss)
                    self.after_step(step, params, optimizers)
        return path

    def _step(
        self,
        step: int,
        params: Params,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        generator: torch.Generator,
    ) -> Tensor:
        noise = [torch.randn(param.shape, generator=generator).to(self.dtype) for param in params.values()]

        def backward() -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            used = [
                (p * x).sum() + p.square().sum() / 8
                for (name, p), x in zip(params.items(), noise, strict=True)
                if step not in self.without.get(name, ())
            ]
            loss = torch.stack(used).sum() * (torch.inf if scaler and step == 6 else 1)
            (scaler.scale(loss) if scaler else loss).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_([p for p in params.values() if p.grad is not None], self.clip)
            if step == self.fails:
                raise Stop
            return loss.detach()

        loss = None if self.has_closure else backward()
        for optimizer in optimizers:
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                found = optimizer.step(backward if self.has_closure else None)
                loss = found if self.has_closure else loss
            for group in optimizer.param_groups if self.schedules else ():
                group["lr"] *= 0.9
        assert loss is not None
        return loss


ROWS = {"matrix": [0, 3], "cube": [2, 1], "vector": [1, 5, 69]}
RUNS = {
    "FusedAdam": Run(),
    "opmath": Run(partial(fused_adam, rounding="opmath", weight_decay=0.1, max_grad_norm=0.5)),
    "clipping inside": Run(partial(fused_adam, max_grad_norm=0.1), schedules=True),
    "float32": Run(partial(fused_adam, betas=(0.4, 0.8)), torch.float32),
    "float32 opmath, clipping inside": Run(partial(fused_adam, rounding="opmath", max_grad_norm=1.0), torch.float32),
    "groups": Run(groups, schedules=True),
    "AdamW": Run(adamw, schedules=True),
    "AdamW foreach": Run(partial(adamw, foreach=True)),
    "AdamW fused": Run(partial(adamw, foreach=None, fused=True), schedules=True),
    "AdamW fused float32": Run(partial(adamw, foreach=None, fused=True), torch.float32),
    "AdamW groups": Run(partial(groups, kind=torch.optim.AdamW)),
    "unclipped": Run(adamw, clip=0.3, options={"unclipped": True}),
    "unclipped, not always": Run(adamw, clip=25.0, options={"unclipped": True}),
    "closure": Run(adamw, has_closure=True),
    "FusedAdam, closure": Run(has_closure=True),
    "scaler": Run(adamw, has_scaler=True),
    "scaler, two optimizers": Run(two, has_scaler=True),
    "rows": Run(options={"rows": ROWS}),
    "AdamW, rows": Run(adamw, options={"rows": ROWS}),
    "without gradients": Run(without={"matrix": (1, 2, 8, 9), "tiny": (3, 16, 17), "scalar": tuple(range(1, 12))}),
    "AdamW without gradients": Run(adamw, without={"matrix": (5,), "vector": tuple(range(1, 22)), "empty": (8,)}),
    "fused without gradients": Run(
        partial(adamw, foreach=None, fused=True), without={"cube": (1, 8, 16), "tiny": (9,)}
    ),
    "two optimizers": Run(two, schedules=True),
    "two FusedAdam": Run(partial(two, kind=partial(FusedAdam, max_grad_norm=0.5)), schedules=True),
    "resumed": Run(before=4, options={"start_step": 100}),
    "AdamW resumed": Run(adamw, before=3, schedules=True, options={"start_step": 7}),
    "fails": Run(fails=14, schedules=True),
    "two optimizers, fails": Run(two, fails=20),
    "shorter": Run(done=13),
    "shorter, on the grid": Run(done=16),
    "only the start": Run(done=0),
    "one step": Run(done=1),
}


def assert_same(full: Path, compact: Path) -> None:
    """Both traces have the same tensors of every step, bit for bit."""
    a, b = open_trace(full), open_trace(compact)
    assert set(b) == set(a) | {KEYFRAME_STEPS} | {name for name in b if name.endswith(KEYFRAMES)}
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert_same_bits(a[name][...], b[name][...])


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert torch.equal(bits(one), bits(other))
