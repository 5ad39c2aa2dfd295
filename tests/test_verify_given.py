"""verify with given settings: recordings of other programs, as far as their tensors allow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from traces import record

from bhfast.errors import ConfigError, TraceError
from bhfast.foreign.given import GivenSettings
from bhfast.foreign.importing import import_recording
from bhfast.verify import main, verify

V, D, STEPS = 40, 30, 25  # more elements than the witnesses of clipping


def train(
    path: Path,
    *,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    dtype: torch.dtype = torch.bfloat16,
    max_grad_norm: float | None = None,
    linear: bool = False,
    every: int = 1,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Train as a user's loop does, record as the notebook does, and save."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(V, D, generator=generator).to(dtype))
    optimizer = make([param], **{"lr": 1e-2, "weight_decay": 0.0, "foreach": False, **settings})
    zero = torch.zeros_like(param.detach())
    found: dict[str, list[torch.Tensor]] = {
        "embeddings": [param.detach().clone()],
        **{name: [zero] for name in ("grads", "momentum", "variance")},
    }
    norms = [torch.tensor(0.0)]
    for step in range(STEPS):
        param.grad = (torch.randn(V, D, generator=generator) * torch.rand(1, generator=generator) / 10).to(dtype)
        found["grads"].append(param.grad.clone())
        if max_grad_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_([param], max_grad_norm).detach().clone())
        if linear:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * ((STEPS - step) / STEPS)
        optimizer.step()
        state = optimizer.state[param]
        values = param.detach(), state["exp_avg"], state["exp_avg_sq"]
        for name, value in zip(("embeddings", "momentum", "variance"), values, strict=True):
            found[name].append(value.clone())
    own = {name: torch.stack(values)[::every].contiguous() for name, values in found.items()}
    own["recorded_steps"] = torch.arange(STEPS + 1)[::every].contiguous()
    save_file(own, path)
    return {**own, "norms": torch.stack(norms)} if max_grad_norm else own


GIVEN = GivenSettings("adamw", lr=1e-2)


@pytest.mark.parametrize(
    ("trained", "given"),
    [
        ({}, {}),
        ({"dtype": torch.float32, "fused": True, "foreach": None}, {"rounding": "torch-fused"}),
        ({"make": torch.optim.Adam}, {"optimizer": "adam"}),
        (
            {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1},
            {"betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1},
        ),
        ({"linear": True}, {"lr_schedule": "linear", "steps": STEPS}),
        ({"fused": True, "foreach": None}, {"rounding": "torch-fused"}),
    ],
)
def test_right_settings_prove_a_recording(trained: dict[str, Any], given: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "old", **trained)
    settings = {"optimizer": "adamw", "lr": 1e-2, **given}
    found = verify(tmp_path / "old", GivenSettings(**settings))
    assert found.status == 0
    assert str(found) == (
        f"{STEPS} steps replayed with the settings given, all bits of embeddings, momentum, variance agree; "
        "the file has no checksums"
    )
    import_recording(tmp_path / "old", tmp_path / "new")
    assert str(verify(tmp_path / "new", GivenSettings(**settings))).endswith("variance agree; all checksums match")


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 1.1e-2},
        {"betas": (0.8, 0.999)},
        {"betas": (0.9, 0.99)},
        {"eps": 1e-2},
        {"weight_decay": 0.5},
        {"rounding": "opmath"},
        {"lr_schedule": "linear", "steps": STEPS},
    ],
)
def test_wrong_settings_show(wrong: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "old")
    found = verify(tmp_path / "old", GivenSettings(**{"optimizer": "adamw", "lr": 1e-2, **wrong}))
    assert found.status == 1
    assert found.difference.step <= 5
    assert "; the settings given are not those of this step, or something in the file is damaged" in str(found)


@pytest.mark.parametrize("name", ["embeddings", "momentum", "variance", "grads"])
def test_one_bit_shows(name: str, tmp_path: Path) -> None:
    own = train(tmp_path / "old")
    own[name].view(torch.int16)[7, 3, 2] ^= 64
    save_file(own, tmp_path / "old")
    found = verify(tmp_path / "old", GIVEN)
    assert (found.status, found.difference.step, found.difference.index) == (1, 7, (3, 2))


@pytest.mark.parametrize("missing", [["momentum"], ["variance"], ["momentum", "variance"]])
def test_missing_moments_are_computed(missing: list[str], tmp_path: Path) -> None:
    own = train(tmp_path / "old")
    save_file({name: x for name, x in own.items() if name not in missing}, tmp_path / "old")
    found = verify(tmp_path / "old", GIVEN)
    assert found.status == 0
    there = [name for name in ("embeddings", "momentum", "variance") if name not in missing]
    assert f"{STEPS} steps replayed with the settings given, all bits of {', '.join(there)} agree; exp_avg" in str(
        found
    )
    assert "of embeddings were computed from the gradients, as they are not in the file" in str(found)
    own["embeddings"].view(torch.int16)[9, 3, 2] ^= 1
    save_file({name: x for name, x in own.items() if name not in missing}, tmp_path / "old")
    difference = verify(tmp_path / "old", GIVEN).difference
    assert (difference.tensor, difference.step, difference.index) == ("embeddings", 9, (3, 2))


@pytest.mark.parametrize("linear", [False, True])
def test_clipping_factors_follow_from_the_moments(linear: bool, tmp_path: Path) -> None:
    own = train(tmp_path / "old", max_grad_norm=1.0, linear=linear)
    clipped = int((own.pop("norms")[1:] > 1).sum())
    assert 5 < clipped < STEPS
    more = {"lr_schedule": "linear", "steps": STEPS} if linear else {}
    assert verify(tmp_path / "old", GivenSettings("adamw", lr=1e-2, **more)).status == 1
    given = GivenSettings("adamw", lr=1e-2, max_grad_norm=1.0, **more)
    found = verify(tmp_path / "old", given)
    assert found.status == 0
    assert f"the clipping factors of {clipped} steps were inferred from momentum" in str(found)
    del own["variance"]
    save_file(own, tmp_path / "old")
    assert verify(tmp_path / "old", given).status == 0
    own["grads"].view(torch.int16)[11, 3, 2] ^= 64
    save_file(own, tmp_path / "old")
    difference = verify(tmp_path / "old", given).difference
    assert (difference.step, difference.index) == (11, (3, 2))


def test_clipping_factors_follow_from_recorded_norms(tmp_path: Path) -> None:
    own = train(tmp_path / "old", max_grad_norm=1.0)
    norms = own.pop("norms")
    save_file({**own, "grad_norms": norms.float()}, tmp_path / "old")
    found = verify(tmp_path / "old", GivenSettings("adamw", lr=1e-2, max_grad_norm=1.0))
    assert found.status == 0
    assert "inferred" not in str(found)
    assert verify(tmp_path / "old", GivenSettings("adamw", lr=1e-2, max_grad_norm=1.1)).status == 1


def test_recorded_learning_rates_are_used(tmp_path: Path) -> None:
    own = train(tmp_path / "old", linear=True)
    rates = torch.tensor([1e-2 * ((STEPS - max(0, k - 1)) / STEPS) for k in range(STEPS + 1)], dtype=torch.float64)
    save_file({**own, "learning_rates": rates}, tmp_path / "old")
    assert verify(tmp_path / "old", GivenSettings("adamw")).status == 0
    with pytest.raises(TraceError, match="has learning_rates of its own: verify it without --lr"):
        verify(tmp_path / "old", GIVEN)


def test_json_says_what_was_compared_and_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "old")
    assert main([str(tmp_path / "old"), "--optimizer", "adamw", "--lr", "1e-2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["replayed"], found["checksums"]) == (STEPS, "none")
    assert found["compared"] == ["embeddings", "momentum", "variance"]
    assert found["remarks"] == verify(tmp_path / "old", GIVEN).given.remarks


def test_names_of_parameters(tmp_path: Path) -> None:
    """As bhfast.Recorder writes them, without what it says of the optimizer; from a step other than 0."""
    own = train(tmp_path / "old")
    ends = {"embeddings": "", "grads": ".grad", "momentum": ".exp_avg", "variance": ".exp_avg_sq"}
    names = {"recorded_steps": "recorded_steps", **{name: f"wte{end}" for name, end in ends.items()}}
    save_file({names[name]: x[4:].clone() for name, x in own.items()}, tmp_path / "old")
    found = verify(tmp_path / "old", GIVEN)
    assert str(found).startswith(f"{STEPS - 4} steps replayed with the settings given, all bits of wte, wte.exp_avg, ")


def without(*names: str, first: int = 0) -> Callable[[Any], Any]:
    return lambda own: {name: x[first:].clone() for name, x in own.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "more", "text"),
    [
        (without("grads"), {}, "the gradients of embeddings are not in the file, and without them nothing follows"),
        (without("variance", first=2), {}, "moments of embeddings are not in the file, and they cannot be computed"),
        (without("momentum"), {"max_grad_norm": 1.0}, "the clipping factors are not known: that takes clip_coefs"),
        (without("embeddings"), {}, "it has no embeddings, nor any tensors NAME and NAME.grad"),
        (lambda own: {**own, "grads": own["grads"].float()}, {}, "different shapes or dtypes"),
        (
            lambda own: {k: x.float() if x.dim() == 3 else x for k, x in own.items()},
            {},
            "in float32 torch's Adam differs",
        ),
        (lambda own: {k: x.half() if x.dim() == 3 else x for k, x in own.items()}, {}, "is torch.float16"),
        (lambda own: {k: x[::5].clone() for k, x in own.items()}, {}, "a replay needs every step"),
    ],
)
def test_what_cannot_be_proven_is_said(change: Any, more: dict[str, Any], text: str, tmp_path: Path) -> None:
    save_file(change(train(tmp_path / "old")), tmp_path / "old")
    found = verify(tmp_path / "old", GivenSettings("adamw", lr=1e-2, **more))
    assert found.status == 2
    assert text in str(found)
    assert str(found).startswith("not replayed, because ")


def test_damage_of_an_imported_trace_shows(tmp_path: Path) -> None:
    save_file({**train(tmp_path / "old"), "losses": torch.zeros(STEPS + 1).bfloat16()}, tmp_path / "old")
    import_recording(tmp_path / "old", tmp_path / "new")
    content = bytearray((tmp_path / "new").read_bytes())
    content[-3] ^= 1  # losses, which no replay sees
    (tmp_path / "new").write_bytes(content)
    assert "losses: the CRC-32 of its bytes does not match" in str(verify(tmp_path / "new", GIVEN))
    content = (tmp_path / "new").read_bytes().replace(b"imported from old", b"imported from new")
    (tmp_path / "new").write_bytes(content)
    assert "DIFFERENT: the header" in str(verify(tmp_path / "new", GIVEN))


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "old", linear=True, betas=(0.8, 0.99), weight_decay=0.1)
    record(tmp_path / "own")
    flags = ["--optimizer", "adamw", "--lr", "1e-2", "--lr-schedule", "linear", "--steps", str(STEPS)]
    assert main([str(tmp_path / "old"), *flags, "--betas", "0.8", "0.99", "--weight-decay", "0.1"]) == 0
    assert main([str(tmp_path / "old"), *flags]) == 1
    capsys.readouterr()
    for file, arguments, text in (
        ("own", ["--optimizer", "adamw", "--lr", "1"], "describes its optimizer itself: verify it without --optimizer"),
        ("own", ["--lr", "1", "--max-grad-norm", "1"], "--lr, --max-grad-norm needs --optimizer: settings are given"),
        ("old", ["--optimizer", "adamw"], "has no learning_rates: give --lr"),
        ("old", [], "it has no optimizer, crc32; give its --optimizer and settings"),
        (
            "old",
            ["--optimizer", "adamw", "--lr", "1", "--lr-schedule", "linear"],
            "the linear schedule needs the",
        ),
        (
            "old",
            ["--optimizer", "adamw", "--lr", "1", "--steps", "3"],
            "and only that one does",
        ),
        ("old", [*flags[:-1], "9"], "goes to step 25, but the linear schedule ends at 9"),
        ("gone", ["--optimizer", "adamw", "--lr", "1"], "cannot open the trace"),
        ("x.index.json", ["--optimizer", "adamw", "--lr", "1"], "name one whole file"),
    ):
        assert main([str(tmp_path / file), *arguments]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.startswith("bhfast verify: error: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw, got 'sgd'"),
        ({"lr": -1.0}, "lr must be at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be from 0 to less than 1, got 0.9 and 1"),
        ({"eps": float("inf")}, "eps must be at least 0, got inf"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be more than 0, got 0"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "a replay knows adamw, not adam with weight decay"),
        ({"rounding": "none"}, "rounding must be one of per-op, opmath, torch-fused, got 'none'"),
        (
            {"lr": None, "lr_schedule": "linear", "steps": 3},
            "the linear schedule needs the learning rate",
        ),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GivenSettings(**{"optimizer": "adamw", "lr": 1.0, **settings})
