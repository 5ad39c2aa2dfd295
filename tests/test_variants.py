"""Runs other than the reference run: other optimizers and networks, what to record, seeds apart, noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_graph import emulate
from traces import assert_same_data

from bhfast.compact import compact
from bhfast.config import TrainConfig
from bhfast.errors import BhfastError, ConfigError, StorageError, TraceError
from bhfast.experiment import is_run_of
from bhfast.trace import open_trace
from bhfast.train import train
from bhfast.verify import verify

BASE = {"steps": 7, "hidden_dim": 32, "context": 16, "batch_size": 2, "sigma": 0.02, "device": "cpu", "quiet": True}


@pytest.fixture
def config(tmp_path: Path, text: str) -> TrainConfig:
    return TrainConfig(**BASE, corpus=text, out=str(tmp_path / "t.safetensors"), engine="torch")


def traced(config: TrainConfig, **changes):
    return open_trace(train(replace(config, overwrite=True, **changes)).path)


def copied(trace) -> dict[str, torch.Tensor]:
    return {name: trace[name].clone().as_subclass(torch.Tensor) for name in trace}


# ---------------------------------------------------------------------------------------------------------------------
# What to record


@pytest.mark.parametrize("storage", ["memory", "stream"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_rows_are_those_of_the_whole_recording(engine: str, every: int, storage: str, config, request) -> None:
    if engine == "native":
        request.getfixturevalue("extension")
    changes = {"engine": engine, "record_every": every, "storage": storage}
    whole = traced(config, **changes)
    kept = copied(whole)
    dead = (kept["token_counts"] == 0).nonzero()[:, 0]
    trace = traced(config, **changes, rows="dead", hidden="mean,var")
    assert torch.equal(trace["wte.rows"], dead)
    for name in ("embeddings", "grads", "momentum", "variance"):
        assert torch.equal(trace[name][:], kept[name][:, dead]), name
    assert torch.equal(trace["losses"][1:], kept["losses"][1:])
    found = verify(trace.path)
    assert found.status == (0 if every == 1 else 2), found


@pytest.mark.usefixtures("extension")
def test_several_threads_record_the_same_rows(config: TrainConfig, two_threads) -> None:
    two = train(replace(config, engine="native", rows="3-90", hidden="mean,var"))
    kept = copied(open_trace(two.path))
    torch.set_num_threads(1)
    one = traced(config, engine="native", rows="3-90", hidden="mean,var")
    for name, value in kept.items():
        assert torch.equal(one[name].nan_to_num(), value.nan_to_num()), name


def test_chosen_fields_and_parameters(config: TrainConfig) -> None:
    trace = traced(config, fields="grads,embeddings", params="wte,h.*.attn.c_proj,ln_f")
    own = {name for name in trace if trace[name].dim() > 1} - {"logits"}
    params = {"h.0.attn.c_proj.weight", "h.1.attn.c_proj.weight"}
    assert own == {"embeddings", "grads", *params, *(f"{name}.grad" for name in params)} | {
        f"{name}{end}"
        for name in ("ln_f.weight", "ln_f.bias", "h.0.attn.c_proj.bias", "h.1.attn.c_proj.bias")
        for end in ("", ".grad")
    }
    assert verify(trace.path).reason == "a replay needs exp_avg, exp_avg_sq of wte"


@pytest.mark.usefixtures("extension")
def test_native_records_other_parameters(config: TrainConfig) -> None:
    trace = traced(config, engine="native", params="wte,h.1", rows="live")
    assert len(json.loads(trace.metadata["optimizer"])["params"]) == 13
    assert trace["h.1.mlp.c_fc.weight.exp_avg"][-1].any()
    assert verify(trace.path).status == 0


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_hidden_statistics_are_those_of_all_positions(grad_accum: int, config: TrainConfig, request) -> None:
    """Against float64, from the network as it is before the step."""
    states = []

    def keep(module, inputs, output) -> None:
        states.append(output.detach().double())

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda m, i, o: keep(m, i, o) if isinstance(m, torch.nn.LayerNorm) and m is not None else None
    )
    try:
        result = train(replace(config, hidden="mean,var", steps=3, grad_accum=grad_accum))
    finally:
        hook.remove()
    trace = open_trace(result.path)
    assert (trace["hidden_means"].dtype, list(trace["hidden_means"].shape)) == (torch.float32, [4, 32])
    assert trace["hidden_means"][0].isnan().all()
    final = states[4::5]  # of each micro-batch: two norms in each of two blocks come first
    for step in range(1, 4):
        exact = torch.cat(final[(step - 1) * grad_accum : step * grad_accum])
        assert torch.allclose(trace["hidden_means"][step].double(), exact.mean(0), rtol=1e-5, atol=1e-6)
        assert torch.allclose(trace["hidden_vars"][step].double(), exact.var(0, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("changes", [{}, {"context": 23, "batch_size": 3}, {"grad_accum": 2}, {"mlp_dim": 96}], ids=str)
def test_native_agrees_in_the_first_step(changes, config: TrainConfig) -> None:
    """At one step, as later ones start from other roundings."""
    settings = {"steps": 1, "hidden": "mean,var", "frozen_rows": "32-70,101", **changes}
    eager = copied(traced(config, **settings))
    native = traced(config, engine="native", **settings)
    for name in ("hidden_means", "hidden_vars"):  # of bfloat16 values, some of which round to a neighbor
        assert torch.allclose(native[name][1], eager[name][1], atol=0.01, rtol=0.01)
        assert not torch.equal(native[name][1], torch.zeros(32))
    frozen = [*range(32, 71), 101]
    live = [i for i in range(128) if i not in frozen]
    for grads in (native["grads"][1], eager["grads"][1]):
        assert not grads[frozen].any()
        assert grads[live].any(dim=1).all()
    assert torch.equal(native["embeddings"][1][frozen], native["embeddings"][0][frozen])


# ---------------------------------------------------------------------------------------------------------------------
# Large vocabularies


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_token_ids_beyond_bytes(engine: str, config: TrainConfig, tmp_path: Path, request) -> None:
    if engine == "native":
        request.getfixturevalue("extension")
    generator = np.random.default_rng(0)
    np.save(tmp_path / "ids.npy", (generator.integers(0, 500, 900) * 131).astype(np.uint16))
    trace = traced(config, engine=engine, corpus=str(tmp_path / "ids.npy"), vocab_size=65_536, rows="60000-65535")
    assert verify(trace.path).status == 0
    counts = trace["token_counts"][:]
    assert (len(counts), int(counts.sum())) == (65_536, 900)
    dead = counts[trace["wte.rows"][:]] == 0
    assert dead.any()
    assert not dead.all()
    grads = trace["grads"][1:].float().norm(dim=-1)
    assert grads[:, ~dead].max() > 4 * grads[:, dead].max()


# ---------------------------------------------------------------------------------------------------------------------
# Seeds apart


def test_seeds_apart(config: TrainConfig) -> None:
    def start_and_losses(**seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
        result = train(replace(config, overwrite=True, **seeds))
        return open_trace(result.path)["embeddings"][0].clone(), result.losses

    start, losses = start_and_losses(seed=1)
    for seeds, same_start, same_data in (
        ({"seed": 2, "init_seed": 1, "data_seed": 1}, True, True),
        ({"seed": 1, "init_seed": 2}, False, True),
        ({"seed": 1, "data_seed": 2}, True, False),
        ({"seed": 2, "init_seed": 1}, True, False),
    ):
        other_start, other_losses = start_and_losses(**seeds)
        assert torch.equal(start, other_start) == same_start, seeds
        assert torch.equal(losses, other_losses) == (same_start and same_data), seeds


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and networks


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum: float, config: TrainConfig) -> None:
    trace = traced(config, optimizer="sgd", momentum=momentum, lr=0.1, lr_schedule="constant", dtype="float32", steps=5)
    vectors, buffer = trace["embeddings"][0].clone(), torch.zeros(128, 32)
    for step in range(1, 6):
        grad = trace["grads"][step] * trace["clip_coefs"][step]
        buffer = momentum * buffer + grad
        vectors = vectors - 0.1 * buffer
        assert torch.allclose(vectors, trace["embeddings"][step], atol=1e-6)
        if momentum:
            assert torch.allclose(buffer, trace["momentum"][step], atol=1e-6)
    assert ("momentum" in trace) == bool(momentum)
    assert "variance" not in trace
    assert "adam_beta1" not in trace
    assert trace["clip_coefs"][1:].max() <= 1
    norms = trace["grads"][1:].double().flatten(1).norm(dim=1)
    assert (norms <= trace["grad_norms"][1:] * (1 + 1e-5)).all()
    assert verify(trace.path).reason == "a replay knows AdamW, not SGD"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"untied": True, "params": "wte,lm_head"},
        {"norm": "rmsnorm"},
        {"mlp_dim": 48},
        {"optimizer": "adam"},
        {"frozen_rows": "dead"},
        {"thermal_noise": 0.01, "thermal_rows": "dead"},
        {"start": "gaussian", "adam_rounding": "opmath"},
    ],
    ids=str,
)
def test_other_runs_can_be_replayed(changes, config: TrainConfig) -> None:
    trace = traced(config, **changes)
    assert trace["embeddings"].dtype == getattr(torch, changes.get("dtype", "bfloat16"))
    assert not torch.equal(trace["embeddings"][-1], trace["embeddings"][0])
    found = verify(trace.path)
    assert (found.status, found.replayed) == (0, 7), found
    assert is_run_of(trace.path, replace(config, **changes))
    assert not is_run_of(trace.path, config)


def test_untied_networks_have_an_output_of_their_own(config: TrainConfig) -> None:
    trace = traced(config, untied=True, params="wte,lm_head", steps=1, sigma=0.02)
    dead = trace["token_counts"][:] == 0
    assert not trace["grads"][1][dead].any()  # only the output layer knows of tokens that never occur
    assert trace["lm_head.weight.grad"][1][dead].any(dim=1).all()


def test_thermal_noise_moves_only_its_rows(config: TrainConfig) -> None:
    trace = traced(config, thermal_noise=0.01, thermal_rows="5-20", lr=0.0)
    assert trace["embeddings.changed"].tolist() == [False] + [True] * 7
    moves = (trace["embeddings"][1:].float() - trace["embeddings.after_step"][1:].float()).flatten(1)
    noise = (trace["embeddings"][1:] - trace["embeddings"][:-1]).float()
    assert not noise[:, [*range(5), *range(21, 128)]].any()
    assert noise[:, 5:21].std().item() == pytest.approx(0.01, rel=0.05)
    assert moves.std(dim=0).any()
    one, two = noise[0, 5:21].flatten(), noise[1, 5:21].flatten()
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.15
    kept = trace["embeddings"][:].clone()
    assert torch.equal(traced(config, thermal_noise=0.01, thermal_rows="5-20", lr=0.0)["embeddings"][:], kept)
    seeds = {"seed": 1, "init_seed": config.seed, "data_seed": config.seed}
    other = traced(config, thermal_noise=0.01, thermal_rows="5-20", lr=0.0, **seeds)
    assert not torch.equal(other["embeddings"][:], kept)


def test_a_run_with_noise_cannot_be_made_compact(config: TrainConfig, tmp_path: Path) -> None:
    path = train(replace(config, thermal_noise=0.01)).path
    with pytest.raises(TraceError, match=r"the loop changed embeddings after a step \(embeddings\.changed says"):
        compact(path, tmp_path / "compact.safetensors", keyframes=4)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "the native engine trains in bfloat16, not in float32"),
        ({"untied": True}, "the native engine needs tied embeddings"),
        ({"norm": "rmsnorm"}, "the native engine has layer normalization, not rmsnorm"),
        ({"optimizer": "sgd"}, "the native engine runs Adam, not sgd"),
        ({"thermal_noise": 0.1}, "the native engine adds no thermal noise"),
        ({"mlp_dim": 40}, "the native engine needs an mlp_dim divisible by 32, got 40"),
    ],
    ids=str,
)
def test_auto_says_why_it_takes_torch(changes, reason: str, config: TrainConfig, capsys) -> None:
    train(replace(config, engine="auto", quiet=False, steps=1, **changes))
    assert f"engine   torch ({reason})" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"engine native cannot run here: {reason}"):
        train(replace(config, engine="native", overwrite=True, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_decay": 0.1, "optimizer": "sgd"}, "weight_decay is for the optimizer adamw, not for sgd"),
        ({"weight_decay": 0.1, "optimizer": "adam"}, "weight_decay is for the optimizer adamw, not for adam"),
        ({"weight_decay": 0.1, "frozen_rows": "dead"}, "weight_decay would move frozen_rows"),
        ({"momentum": 0.9}, "momentum is for the optimizer sgd; adamw has beta1 and beta2"),
        ({"keyframes": 4, "optimizer": "sgd"}, "keyframes need an optimizer that can be replayed"),
        ({"keyframes": 4, "thermal_noise": 0.1}, "which thermal_noise changes"),
        ({"keyframes": 4, "fields": "grads"}, "keyframes need all fields"),
        ({"fields": "weights"}, "fields must be some of embeddings,grads,momentum,variance, got 'weights'"),
        ({"hidden": "mean,max"}, "hidden must be some of mean,var, got 'max'"),
        ({"params": "nothing.*"}, r"params: nothing matches 'nothing\.\*'"),
        ({"params": "ln_f", "rows": "dead"}, "rows are those of the token vectors, which params=ln_f leave out"),
        ({"rows": "0-128"}, "rows must be 0 to 127, got 0 to 128"),
        ({"frozen_rows": "x"}, "frozen_rows must be dead, live"),
        ({"thermal_noise": 0.1, "thermal_rows": "x"}, "thermal_rows must be dead, live"),
        ({"thermal_noise": -0.1}, "thermal_noise must be finite and at least 0, got -0.1"),
        ({"init_seed": -1}, "init_seed must be 0 to 2\\^63 - 1, got -1"),
        ({"norm": "batchnorm"}, "norm must be one of layernorm, rmsnorm, got 'batchnorm'"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, float32, got 'float16'"),
        ({"mlp_dim": -1}, "mlp_dim must be at least 1, or 0 for 4 times hidden_dim, got -1"),
        ({"start": "cube"}, "start must be one of black-hole, gaussian, sphere"),
    ],
    ids=str,
)
def test_refuses_bad_settings(changes, message: str, config: TrainConfig) -> None:
    with pytest.raises(BhfastError, match=message):
        train(replace(config, **changes))


def test_a_file_that_a_setting_names_is_part_of_the_experiment(config: TrainConfig, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("1 2 3")
    config = replace(config, rows=str(rows))
    path = train(config).path
    assert is_run_of(path, config)
    train(config)  # the same experiment may replace its trace
    rows.write_text("1 2 4")
    assert not is_run_of(path, config)
    with pytest.raises(StorageError, match=r"holds a run with other settings .*files_sha256"):
        train(config)


def test_a_trace_of_an_earlier_version_is_known(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not name the settings that are new since then."""
    monkeypatch.setattr(
        "bhfast.experiment.asdict",
        lambda config: {name: value for name, value in vars(config).items() if name not in ("start", "optimizer")},
    )
    monkeypatch.setattr("bhfast.experiment.FILES", ())
    path = train(config).path
    monkeypatch.undo()
    assert "optimizer" not in json.loads(open_trace(path).metadata["config"])
    assert is_run_of(path, config)
    assert not is_run_of(path, replace(config, start="gaussian"))


def test_graph_records_rows_and_statistics(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:

    emulate(monkeypatch)
    changes = {"rows": "dead", "hidden": "mean,var", "frozen_rows": "1-9", "params": "wte,h.0.attn"}
    reference = train(replace(config, out=str(tmp_path / "reference.safetensors"), **changes))
    result = train(replace(config, engine="graph", **changes))
    assert_same_data(result.path, reference.path)
