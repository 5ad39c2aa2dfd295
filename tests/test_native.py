"""The native engine: its gradients and records, and that threads do not change its bits."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import INSTRUCTION_SETS
from tolerances import LOSS
from torch import nn
from traces import assert_proves_itself, assert_same_data

from bhfast.config import TrainConfig
from bhfast.engines.base import TrainingRun
from bhfast.engines.choose import Demands, make_engine, select_engine
from bhfast.engines.compiled import CompiledEngine
from bhfast.engines.native import NativeEngine
from bhfast.engines.torch import TorchEngine
from bhfast.errors import BhfastError, ConfigError
from bhfast.model import GPTConfig, TiedGPT, build_model, window_loss
from bhfast.ops import arithmetic, extension
from bhfast.optim import FusedAdam
from bhfast.recording.null import NullSlots
from bhfast.start import Start
from bhfast.trace import open_trace
from bhfast.train import train

pytestmark = pytest.mark.usefixtures("extension")

SHAPES = [
    {},
    {"context": 1, "target_offset": 1},
    {"context": 7, "batch": 3, "heads": 1},
    {"context": 127, "batch": 3},
    {"vocab_size": 97, "hidden_dim": 96, "heads": 3, "layers": 3, "context": 33},
    {"hidden_dim": 32, "heads": 2, "layers": 1, "context": 16, "batch": 2, "target_offset": 5},
    {"vocab_size": 10_000, "context": 40, "batch": 2, "target_offset": 1},
]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> str:
    if request.param not in extension.native_instruction_sets():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def make_run(
    *, steps: int = 1, sigma: float = 0.02, batch: int = 1, grad_accum: int = 1, target_offset: int = 2, **sizes: int
) -> TrainingRun:
    """A run on random tokens, without a recorder."""
    generator = torch.Generator().manual_seed(3)
    config = GPTConfig(**sizes)
    model, _ = build_model(config, Start(sigma=sigma), seed=1)
    tokens = config.vocab_size if config.vocab_size > 256 else min(config.vocab_size, 79)
    dtype = torch.int32 if tokens > 256 else torch.uint8
    corpus = torch.randint(tokens, (5000,), dtype=dtype, generator=generator)
    last = len(corpus) - config.context - 1
    return TrainingRun(
        model=model,
        optimizer=FusedAdam(model.parameters(), lr=1e-3, weight_decay=0.0, max_grad_norm=1.0),
        recorder=NullSlots(),
        corpus=corpus,
        offsets=torch.randint(last + 1, (steps, grad_accum, batch), generator=generator),
        lrs=[1e-3] * steps,
        target_offset=target_offset,
    )


def state_of(engine: NativeEngine) -> list[torch.Tensor]:
    """Everything that a run changes."""
    state = engine.training_run.optimizer.state
    kept = [
        x
        for p in engine.training_run.model.parameters()
        for x in (p, p.grad, state[p]["exp_avg"], state[p]["exp_avg_sq"])
    ]
    return [*kept, engine.losses, engine.grad_norms]


# ---------------------------------------------------------------------------------------------------------------------
# Values


def sharpened(run: TrainingRun) -> TrainingRun:
    """Make attention look closely at some keys; with the initial weights it barely matters how scores come about."""
    with torch.no_grad():
        for block in run.model.h:
            block.attn.c_attn.weight.mul_(8)
    return run


def by_name(model: TiedGPT, grads: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return gradients of all parameters in float64, those of the weights of queries, keys and values apart.

    (Not those of their biases: that of the keys is 0, as no score then changes beside the others, and rounding errors.)
    """
    named = {}
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        parts = grad.double().chunk(3 if name.endswith("c_attn.weight") else 1)
        named.update({f"{name} {i}": part for i, part in enumerate(parts)})
    return named


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]


def assert_near_float64(eager: TorchEngine, loss: float, grad_norm: float, grads: Sequence[torch.Tensor]) -> None:
    """Check a first step, which ``eager`` is to do from the same start: the gradients are as near as its own."""
    model = eager.training_run.model
    exact = TiedGPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    windows = eager.windows[eager.offsets[0, 0]].long()
    targets = windows[:, eager.training_run.target_offset :]
    logits = exact(windows[:, :-1])[:, : targets.size(1)]
    wanted_loss = -logits.log_softmax(-1).gather(2, targets[..., None]).mean()
    wanted_loss.backward()
    eager.run(1)
    assert loss == pytest.approx(wanted_loss.item(), abs=LOSS)
    found, usual, wanted = (by_name(model, x) for x in (grads, gradients(model), gradients(exact)))
    norm = torch.cat([grad.flatten() for grad in wanted.values()]).norm().item()
    assert grad_norm == pytest.approx(norm, rel=2e-2)
    for name, grad in wanted.items():
        error, torchs = ((x[name] - grad).norm().item() for x in (found, usual))
        assert error <= 1.5 * torchs + 1e-3 * grad.norm().item() + 1e-9, f"{name}: {error:.3g}, torch {torchs:.3g}"


def first_step(engine: CompiledEngine) -> tuple[float, float, list[torch.Tensor]]:
    """Return loss, gradient norm and gradients of the first step, which the engine has done."""
    return engine.losses[0].item(), engine.grad_norms[0].item(), gradients(engine.training_run.model)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_as_near_to_float64_as_the_torch_engines(shape, instruction_set: str) -> None:
    native = NativeEngine(sharpened(make_run(**shape)), threads=2, instruction_set=instruction_set)
    native.run(1)
    assert_near_float64(TorchEngine(sharpened(make_run(**shape))), *first_step(native))


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_have_the_loss_of_the_torch_engine(steps: int, text: str) -> None:
    """Not from a black hole: there the smallest rounding decides which token leaves first, and where to."""
    config = TrainConfig(
        steps=steps, sigma=0.02, lr=3e-4, corpus=text, record_every=0, quiet=True, device="cpu", engine="native"
    )
    native, eager = (train(replace(config, engine=engine)).losses for engine in ("native", "torch"))
    assert native.mean().item() == pytest.approx(eager.mean().item(), abs=1e-3)  # seeds differ by 0.02
    assert native[-steps // 5 :].mean() < native[: steps // 5].mean() - 0.3


def test_accumulation_is_a_larger_batch(instruction_set: str) -> None:
    runs = make_run(steps=3, batch=6), make_run(steps=3, batch=2, grad_accum=3)
    engines = [NativeEngine(run, instruction_set=instruction_set) for run in runs]
    for engine in engines:
        engine.run(3)
    assert all(torch.equal(a, b) for a, b in zip(*map(state_of, engines), strict=True))


def test_nan_goes_where_it_goes_in_the_torch_engine(instruction_set: str) -> None:
    engines = [NativeEngine(make_run(), instruction_set=instruction_set), TorchEngine(make_run())]
    for engine in engines:
        with torch.no_grad():
            engine.training_run.model.h[1].mlp.c_fc.bias[3] = torch.nan
        engine.run(1)
        assert engine.losses[0].isnan()
        assert engine.grad_norms[0].isnan()
        assert engine.training_run.model.wte.weight.grad.isnan().all()


def test_products_of_torch_in_the_same_thread_stay_right(instruction_set: str) -> None:
    """Both may use the same registers, which torch configures only if they are not as it left them."""
    one, other = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = one @ other
    engine = NativeEngine(make_run(steps=2), threads=1, instruction_set=instruction_set)
    for _ in range(2):
        engine.run(1)
        assert torch.equal(one @ other, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Bits


@pytest.mark.parametrize("shape", [{}, SHAPES[2], SHAPES[4]], ids=str)
def test_any_number_of_threads_makes_the_same_bits(shape, instruction_set: str) -> None:
    engines = [
        NativeEngine(make_run(steps=12, **shape), threads=threads, instruction_set=instruction_set)
        for threads in (1, 2, 2, 3, 5)
    ]
    for engine in engines:
        engine.run(5)
        engine.run(7)
    first, *others = map(state_of, engines)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("vocab_size", "threads"),
    [
        (97, 3),
        (128, 2),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(97, 1), (97, 2), (128, 1), (128, 3)]),
    ],
)
def test_tokens_that_never_occur_stay_one_vector(vocab_size: int, threads: int, instruction_set: str) -> None:
    run = make_run(steps=60, sigma=0, vocab_size=vocab_size)
    start = run.model.wte.weight[0].clone()
    NativeEngine(run, threads=threads, instruction_set=instruction_set).run(60)
    dead, live = run.model.wte.weight[79:], run.model.wte.weight[:79]
    assert (dead == dead[0]).all()
    assert not torch.equal(dead[0], start)
    assert len(live.unique(dim=0)) > 70


# ---------------------------------------------------------------------------------------------------------------------
# Records


@pytest.fixture
def settings(text: str, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        steps=40, corpus=text, out=str(tmp_path / "t.safetensors"), device="cpu", engine="native", quiet=True,
        sigma=1e-3, weight_decay=0.1, batch_size=2, context=24,
    )  # fmt: skip


@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
def test_its_trace_proves_itself(rounding: str, settings: TrainConfig) -> None:
    result = train(replace(settings, adam_rounding=rounding))
    assert result.steps == 40
    trace = assert_proves_itself(result, "native")
    assert trace.metadata["instruction_set"] == extension.native_instruction_sets()[0]


def test_its_logits_are_those_of_the_first_window(settings: TrainConfig) -> None:
    run = make_run(batch=3, context=24)
    logits = torch.empty(1, 128, dtype=torch.bfloat16)

    class Logits(NullSlots):
        def log_into(self, **values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": logits}

    run = TrainingRun(**{**vars(run), "recorder": Logits()})
    window = run.corpus.long().unfold(0, 25, 1)[run.offsets[0, 0]]
    with torch.no_grad():
        wanted = run.model(window[:, :-1])[0, -1].float()
    NativeEngine(run).run(1)
    assert (logits[0].float() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_records_do_not_depend_on_how_often_or_where_to(settings: TrainConfig, tmp_path: Path) -> None:
    every = train(settings)
    some = train(replace(settings, record_every=7, out=str(tmp_path / "some")))
    stream = train(replace(settings, storage="stream", out=str(tmp_path / "stream")))
    none = train(replace(settings, record_every=0))
    assert_same_data(every.path, stream.path)
    a, b = open_trace(every.path), open_trace(some.path)
    assert b.steps.tolist() == [0, 7, 14, 21, 28, 35]
    for name in ("embeddings", "grads", "momentum", "variance", "logits", "losses", "learning_rates", "grad_norms"):
        assert torch.equal(a[name][7::7], b[name][1:]), name
    for result in (some, stream, none):
        assert torch.equal(result.model.wte.weight, every.model.wte.weight)
        assert torch.equal(result.losses, every.losses)


def test_the_optimizer_knows_the_steps_it_did_not_perform() -> None:
    run = make_run(steps=8)
    engine = NativeEngine(run)
    engine.run(3)
    engine.run(5)
    assert {state["step"].item() for state in run.optimizer.state.values()} == {8}


# ---------------------------------------------------------------------------------------------------------------------
# Running


def test_other_threads_of_python_go_on(settings: TrainConfig) -> None:
    engine = NativeEngine(make_run(steps=60, vocab_size=2000, batch=2), threads=1)
    thread = threading.Thread(target=engine.run, args=(60,))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20


def test_a_moved_parameter_is_an_error() -> None:
    run = make_run(steps=2)
    engine = NativeEngine(run)
    engine.run(1)
    run.model.wte.weight.data = run.model.wte.weight.data.clone()
    with pytest.raises(
        BhfastError,
        match="moved or replaced during the run, but the native engine still uses the old one; use --engine torch",
    ):
        engine.run(1)


def test_profile_says_what_time_is_spent_on() -> None:
    engine = NativeEngine(make_run(steps=20), threads=2)
    engine.run(10)
    assert set(engine.program.profile().values()) == {0}
    engine.program.set_profiling(True)
    begun = time.perf_counter()
    engine.run(10)
    passed = time.perf_counter() - begun
    seconds = engine.program.profile()
    assert 0 < seconds["products"] < sum(seconds.values()) <= 2 * passed


def test_auto_takes_it_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert select_engine("auto", cpu) == ("native", "the fastest for cpu")
    odd = Demands(GPTConfig(hidden_dim=24, heads=2))
    reason = "the native engine needs a hidden_dim divisible by 32, and by 16 times heads, got 24 and 2"
    assert select_engine("auto", cpu, odd) == ("torch", reason)
    with pytest.raises(ConfigError, match=f"engine native cannot run here: {reason}; use --engine torch"):
        select_engine("native", cpu, odd)
    with pytest.raises(ConfigError, match="the native engine runs on the CPU, not on cuda"):
        select_engine("native", torch.device("cuda"))
    assert isinstance(make_engine("native", make_run()), NativeEngine)


def test_without_the_extension_auto_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_extension", None)
    monkeypatch.setattr(extension, "_unavailable", "the extension is not built")
    reason = "the native engine needs the C++ kernels: the extension is not built"
    assert select_engine("auto", torch.device("cpu")) == ("torch", reason)


def rows_of(row: int, width: int = 64) -> list[tuple[torch.Tensor, ...]]:
    return [(torch.zeros(128, 64).bfloat16(), torch.tensor([row]), torch.zeros(2, 1, width, dtype=torch.bfloat16))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"instruction_set": "mmx"},
            r"instruction_set must be one that this machine supports \(.*portable\), got 'mmx'",
        ),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"heads": 3}, "needs a hidden_dim divisible by 32, and by 16 times heads, got 64 and 3"),
        ({"target_offset": 129}, "target_offset must be 1 to 128, got 129"),
        ({"offsets": torch.tensor([[5000]])}, "offsets must be 0 to 4871"),
        ({"corpus": torch.full((5000,), 200, dtype=torch.int32)}, "corpus must have tokens below 128"),
        ({"corpus": torch.full((5000,), -1, dtype=torch.int32)}, "corpus must have tokens below 128"),
        ({"frozen": torch.zeros(127, dtype=torch.bool)}, re.escape("frozen must have shape [128], got [127]")),
        ({"recorded_rows": rows_of(128)}, "recorded rows must be 0 to 127"),
        ({"recorded_rows": rows_of(3, width=63)}, re.escape("must have shape [2, 1, 64], got [2, 1, 63]")),
        ({"losses": torch.empty(2)}, re.escape("losses must have shape [1], got [2]")),
        ({"grad_norms": torch.empty(1).double()}, "grad_norms must be float32, got float64"),
        ({"parameters": []}, "parameters must be those of a TiedGPT"),
        (
            {"logs": {"logits": torch.empty(3, 64).bfloat16()}},
            re.escape("logits must have shape [3, 128], got [3, 64]"),
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses_what_would_write_beyond_memory(change, message, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extension.native_engine
    monkeypatch.setattr(extension, "native_engine", lambda **arguments: real(**{**arguments, **change}))
    with pytest.raises((ValueError, TypeError), match=message):
        NativeEngine(make_run())


def test_window_loss_is_what_it_minimises() -> None:
    """The mean over all windows and positions that have a target."""
    run = make_run(batch=4, target_offset=3)
    window = run.corpus.long().unfold(0, 129, 1)[run.offsets[0, 0]]
    with torch.no_grad():
        wanted = window_loss(run.model(window[:, :-1]), window, 3).item()
    engine = NativeEngine(run)
    engine.run(1)
    assert engine.losses[0].item() == pytest.approx(wanted, abs=LOSS)
