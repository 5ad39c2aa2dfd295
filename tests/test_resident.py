"""The resident engine, executed by the CPU: its gradients and records, and that blocks do not change its bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_native import assert_near_float64, first_step, make_run, sharpened, state_of
from test_ops import same_bits
from tolerances import LOGITS
from traces import assert_proves_itself, assert_same_data

from bhfast.config import TrainConfig
from bhfast.engines.base import TrainingRun
from bhfast.engines.choose import Demands, make_engine, select_engine
from bhfast.engines.resident import ResidentEngine, default_blocks
from bhfast.engines.torch import TorchEngine
from bhfast.errors import BhfastError, ConfigError
from bhfast.model import GPTConfig
from bhfast.ops import arithmetic, extension, kernels
from bhfast.recording.null import NullSlots
from bhfast.trace import open_trace
from bhfast.train import train
from bhfast.verify import verify

SMALL = {"vocab_size": 97, "hidden_dim": 32, "heads": 1, "layers": 1, "context": 7, "batch": 2}
SHAPES = [
    SMALL,
    {"vocab_size": 40, "hidden_dim": 32, "layers": 1, "context": 1, "target_offset": 1},
    {"vocab_size": 97, "hidden_dim": 48, "heads": 3, "layers": 3, "context": 33},
    {"vocab_size": 130, "hidden_dim": 64, "layers": 2, "context": 16, "batch": 3, "target_offset": 5, "mlp_dim": 80},
    {},
    pytest.param({"vocab_size": 300, "hidden_dim": 256, "layers": 1, "context": 40}, marks=pytest.mark.slow),
]
LITTLE_MEMORY = 48 << 10  # of shared memory: most matrices are in the workspace


@pytest.fixture(autouse=True)
def stand_in(cuda_on_cpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let engines run on the stand-in for a GPU."""
    monkeypatch.setattr(extension, "_resident_module", lambda: cuda_on_cpu.module)
    monkeypatch.setattr(extension, "resident_unavailable", lambda device: None)
    return cuda_on_cpu


def done(run: TrainingRun, steps: int = 1, **settings: int) -> ResidentEngine:
    engine = ResidentEngine(run, **settings)
    engine.run(steps)
    return engine


def assert_same_state(*engines: ResidentEngine) -> None:
    first, *others = map(state_of, engines)
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_as_near_to_float64_as_the_torch_engines(shape: dict[str, int]) -> None:
    engine = done(sharpened(make_run(**shape)), blocks=2)
    assert_near_float64(TorchEngine(sharpened(make_run(**shape))), *first_step(engine))


def test_accumulation_is_a_larger_batch() -> None:
    assert_same_state(done(make_run(**SMALL)), done(make_run(**{**SMALL, "batch": 1}, grad_accum=2)))


def test_nan_goes_everywhere() -> None:
    run = make_run(**SMALL)
    with torch.no_grad():
        run.model.h[0].mlp.c_fc.bias[3] = torch.nan
    engine = done(run)
    assert engine.losses[0].isnan()
    assert engine.grad_norms[0].isnan()
    assert run.model.wte.weight.grad.isnan().all()


def test_frozen_tokens_get_no_gradient() -> None:
    run = make_run(**SMALL)
    frozen = torch.zeros(97, dtype=torch.bool)
    frozen[[3, 40, 96]] = True
    free = done(run).training_run.model.wte.weight.grad
    held = done(TrainingRun(**{**vars(make_run(**SMALL)), "frozen": frozen})).training_run.model.wte.weight.grad
    assert (held[frozen] == 0).all()
    assert torch.equal(held[~frozen], free[~frozen])


def test_tokens_that_never_occur_stay_one_vector() -> None:
    run = make_run(steps=5, sigma=0, **SMALL)
    start = run.model.wte.weight[0].clone()
    done(run, 5)
    dead = run.model.wte.weight[79:]
    assert (dead == dead[0]).all()
    assert not torch.equal(dead[0], start)


# ---------------------------------------------------------------------------------------------------------------------
# Bits


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        (SMALL, 3),
        ({**SMALL, "context": 17, "layers": 2}, 2),
        pytest.param({}, 20, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_neither_blocks_nor_memory_nor_order_change_the_bits(shape, steps: int, stand_in: SimpleNamespace) -> None:
    engines = []
    for seed, blocks, shared_bytes in [(1, 1, None), (2, 4, None), (3, 2, LITTLE_MEMORY), (4, 1, LITTLE_MEMORY)]:
        stand_in.seed(seed)
        engines.append(ResidentEngine(make_run(steps=steps, **shape), blocks=blocks, shared_bytes=shared_bytes))
        engines[-1].run(1)
        engines[-1].run(steps - 1)
    assert engines[0].program.workspace_bytes < engines[-1].program.workspace_bytes
    assert engines[-1].program.shared_bytes <= LITTLE_MEMORY
    assert_same_state(*engines)


def test_a_resumed_run_has_the_same_bits() -> None:
    whole, begun = done(make_run(steps=4, **SMALL), 4), done(make_run(steps=4, **SMALL), 2)
    resumed = ResidentEngine(TrainingRun(**{**vars(begun.training_run), "start": 2}))
    resumed.run(2)
    assert resumed.done == 4
    assert same_bits(whole.losses[2:], resumed.losses[2:])
    for p, q in zip(whole.training_run.model.parameters(), resumed.training_run.model.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())


def test_clipping_and_adam_are_those_of_the_operations() -> None:
    engine, before = ResidentEngine(make_run(**SMALL)), make_run(**SMALL)
    engine.run(1)
    params = list(engine.training_run.model.parameters())
    grads = [p.grad for p in params]
    norm, clip_coef = kernels.clip_coefficient(grads, 1.0)
    assert same_bits(norm, engine.grad_norms[0])
    assert clip_coef < 1
    for p, grad in zip(before.model.parameters(), grads, strict=True):
        p.grad = grad
    before.optimizer.step()
    for p, q in zip(params, before.model.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(engine.training_run.optimizer.state[p][key], before.optimizer.state[q][key])


@pytest.mark.slow
def test_sixteen_blocks_change_no_bits() -> None:
    assert_same_state(*(done(make_run(**SMALL), blocks=blocks) for blocks in (1, 16)))


def test_runs_beside_each_other_are_single_runs() -> None:
    def run(sigma: float) -> TrainingRun:
        return make_run(steps=3, sigma=sigma, **SMALL)

    single = [done(run(sigma), 3, blocks=2) for sigma in (0.01, 0.02, 0.03)]
    beside = [ResidentEngine(run(sigma), blocks=2) for sigma in (0.01, 0.02, 0.03)]
    program = extension.resident_engine([engine.arguments for engine in beside], blocks=2)
    program.run(2)
    program.run(1)
    for one, other in zip(single, beside, strict=True):
        assert_same_state(one, other)
    assert not torch.equal(*(engine.losses for engine in beside[:2]))


def test_a_run_that_fails_leaves_the_others_alone() -> None:
    broken, sound = (ResidentEngine(make_run(steps=2, **SMALL)) for _ in range(2))
    with torch.no_grad():
        broken.training_run.model.wte.weight[5] = torch.inf
    extension.resident_engine([broken.arguments, sound.arguments], blocks=1).run(2)
    assert broken.losses.isnan().all()
    assert_same_state(sound, done(make_run(steps=2, **SMALL), 2))


# ---------------------------------------------------------------------------------------------------------------------
# Records


@pytest.fixture
def settings(text: str, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        steps=6, corpus=text, out=str(tmp_path / "t.safetensors"), device="cpu", engine="resident", quiet=True,
        sigma=1e-3, weight_decay=0.1, batch_size=2, context=7, hidden_dim=32, layers=1, heads=1,
    )  # fmt: skip


@pytest.mark.parametrize("rounding", arithmetic.ROUNDINGS)
def test_its_trace_proves_itself(rounding: str, settings: TrainConfig) -> None:
    result = train(replace(settings, adam_rounding=rounding))
    assert result.steps == 6
    trace = assert_proves_itself(result, "resident")
    assert trace["learning_rates"][1:].tolist() == [settings.learning_rate(step) for step in range(1, 7)]


def test_it_logs_the_statistics_of_the_hidden_state(settings: TrainConfig) -> None:
    run = make_run(**SMALL)
    windows = run.corpus.long().unfold(0, 8, 1)[run.offsets[0, 0]]
    with torch.no_grad():
        hidden = run.model.hidden(windows[:, :-1]).float()
    var, mean = torch.var_mean(hidden, dim=0, correction=0)
    logged = {"hidden_means": torch.empty(1, 32), "hidden_vars": torch.empty(1, 32)}

    class Hidden(NullSlots):
        def log_into(self, **values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: logged[name] for name in values if name in logged}

    done(TrainingRun(**{**vars(run), "recorder": Hidden(), "hidden": ("mean", "var")}), blocks=2)
    assert torch.allclose(logged["hidden_means"][0], mean, atol=LOGITS * hidden.abs().max().item())
    assert torch.allclose(logged["hidden_vars"][0], var, rtol=2 * LOGITS)


@pytest.mark.slow
def test_the_reference_run_trains(text: str, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    result = train(TrainConfig(steps=20, corpus=text, out=str(out), device="cpu", engine="resident", quiet=True))
    assert verify(out).difference is None
    eager = train(TrainConfig(steps=20, corpus=text, record_every=0, device="cpu", engine="native", quiet=True))
    assert result.losses.mean().item() == pytest.approx(eager.losses.mean().item(), abs=0.05)


def test_its_logits_are_those_of_the_first_window() -> None:
    logits = torch.empty(1, 97, dtype=torch.bfloat16)

    class Logits(NullSlots):
        def log_into(self, **values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": logits}

    run = TrainingRun(**{**vars(make_run(**SMALL)), "recorder": Logits()})
    window = run.corpus.long().unfold(0, 8, 1)[run.offsets[0, 0]]
    with torch.no_grad():
        wanted = run.model(window[:, :-1])[0, -1].float()
    done(run)
    assert (logits[0].float() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_records_do_not_depend_on_how_often_or_where_to(settings: TrainConfig, tmp_path: Path) -> None:
    every = train(settings)
    some = train(replace(settings, record_every=2, out=str(tmp_path / "some")))
    stream = train(replace(settings, storage="stream", out=str(tmp_path / "stream")))
    none = train(replace(settings, record_every=0))
    assert_same_data(every.path, stream.path)
    a, b = open_trace(every.path), open_trace(some.path)
    for name in ("embeddings", "grads", "momentum", "variance", "logits", "losses", "learning_rates", "grad_norms"):
        assert torch.equal(a[name][2::2], b[name][1:]), name
    for result in (some, stream, none):
        assert torch.equal(result.model.wte.weight, every.model.wte.weight)
        assert torch.equal(result.losses, every.losses)


def test_it_records_chosen_rows(settings: TrainConfig, tmp_path: Path) -> None:
    whole = open_trace(train(settings).path)
    part = open_trace(train(replace(settings, rows="32,101", out=str(tmp_path / "part"))).path)
    for name in ("embeddings", "grads", "momentum", "variance"):
        assert torch.equal(part[name], whole[name][:, [32, 101]]), name


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs


def test_it_is_taken_only_by_name() -> None:
    cpu = torch.device("cpu")
    assert select_engine("resident", cpu) == ("resident", "as asked; not measured on a GPU yet")
    assert select_engine("auto", cpu)[0] == "native"
    assert isinstance(make_engine("resident", make_run(**SMALL)), ResidentEngine)


@pytest.mark.parametrize(
    ("demands", "reason"),
    [
        (Demands(GPTConfig(hidden_dim=40)), "needs a hidden_dim divisible by 16 times heads, got 40 and 2"),
        (Demands(GPTConfig(mlp_dim=100)), "needs an mlp_dim divisible by 16, got 100"),
        (Demands(GPTConfig(layers=300)), r"needs \d+ bytes of shared memory for 300 layers, a block has 232448"),
        (Demands(GPTConfig(vocab_size=1 << 21)), "takes at most 67108864 parameters, got 134326016"),
        (Demands(GPTConfig(untied=True)), "needs tied embeddings"),
        (Demands(GPTConfig(norm="rmsnorm")), "has layer normalization, not rmsnorm"),
        (Demands(dtype="float32"), "trains in bfloat16, not in float32"),
        (Demands(optimizer="sgd"), "runs Adam, not sgd"),
        (Demands(has_thermal_noise=True), "adds no thermal noise"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_says_why_it_cannot_run(demands: Demands, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"engine resident cannot run here: the resident engine {reason}; use"):
        select_engine("resident", torch.device("cpu"), demands)


def test_the_shapes_it_promises_fit() -> None:
    sizes = {"vocab_size": 16_384, "mlp_dim": 1024, "hidden_dim": 256, "layers": 8, "heads": 16, "context": 512}
    assert extension.resident_unsupported(**sizes, blocks=8, shared_bytes=0) is None
    assert "takes 1, 2, 4, 8 or 16 blocks" in extension.resident_unsupported(**sizes, blocks=3, shared_bytes=0)
    assert "for 8 layers, a block has 5000" in extension.resident_unsupported(**sizes, blocks=8, shared_bytes=5000)


def test_it_takes_as_many_blocks_as_have_rows() -> None:
    assert [default_blocks(make_run(context=context)) for context in (1, 33, 100, 128)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": 3}, "takes 1, 2, 4, 8 or 16 blocks for a run, got 3"),
        ({"shared_bytes": 5000}, "needs .* bytes of shared memory for 1 layers, a block has 5000"),
        ({"runs": []}, "runs must be at least one, got none"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses_what_it_cannot_run(change, message, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extension.resident_engine
    monkeypatch.setattr(
        extension,
        "resident_engine",
        lambda runs, **settings: real(**{"runs": runs, **settings, **change}),
    )
    with pytest.raises(ValueError, match=message):
        ResidentEngine(make_run(**SMALL))


def test_refuses_runs_of_different_sizes_and_steps_beyond_the_last() -> None:
    one, other = ResidentEngine(make_run(**SMALL)), ResidentEngine(make_run(**{**SMALL, "context": 40}))
    with pytest.raises(ValueError, match="all runs must have the same sizes"):
        extension.resident_engine([one.arguments, other.arguments], blocks=1)
    with pytest.raises(ValueError, match="steps must be at most the 1 that a run has left, got 2"):
        one.program.run(2)


def test_a_moved_parameter_is_an_error() -> None:
    run = make_run(steps=2, **SMALL)
    engine = done(run)
    run.model.wte.weight.data = run.model.wte.weight.data.clone()
    with pytest.raises(BhfastError, match="the resident engine still uses the old one; use --engine torch"):
        engine.run(1)
