"""The recorder around optimizers of all kinds: whatever they do is recorded, and what can be replayed replays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bhfast.errors import BhfastError
from bhfast.ops import kernels
from bhfast.optim import FusedAdam
from bhfast.recording.optimizer_description import DTYPES
from bhfast.recording.recorder import Recorder
from bhfast.trace import Trace, open_trace
from bhfast.verify import verify

STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "FusedAdam": FusedAdam,
    "AdamW": torch.optim.AdamW,
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(20, 12).to(dtype)


def backward(model: nn.Module, scale: float = 1.0) -> Tensor:
    dtype = next(model.parameters()).dtype
    loss = (scale * model(torch.randn(4, 20).to(dtype)).float() ** 2).sum()
    loss.backward()
    return loss


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def state_of(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """What a record holds of a parameter, by field; copied."""
    own = {key: value for key, value in optimizer.state.get(param, {}).items() if key in STATES}
    return {key: value.detach().clone() for key, value in {"": param, ".grad": param.grad, **own}.items()}


def replays(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> bool:
    """Whether the optimizer's arithmetic is known to the bit: torch's is where its square root is exact."""
    return isinstance(optimizer, FusedAdam) or (dtype in DTYPES and kernels.torch_rounds_per_op(dtype))


def compare(trace: Trace, name: str, wanted: list[dict[str, Tensor]], rows: Tensor | None = None) -> None:
    """Records 1 and following hold the wanted values, bit for bit."""
    for field in wanted[0]:
        recorded = trace[name + field if field[:1] in ("", ".") else f"{name}.{field}"]
        assert recorded.dtype == wanted[0][field].dtype
        for record, values in enumerate(wanted, start=1):
            value = values[field] if rows is None else values[field][rows]
            assert torch.equal(bits(recorded[record]), bits(value)), (field, record)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rows_of_every_field(make, tmp_path: Path) -> None:
    model = linear()
    optimizer = make(model.parameters())
    rows = torch.tensor([7, 0, 7])
    wanted, biases = [], []
    chosen = {"weight": rows, "bias": torch.arange(12) % 2 == 1}
    start = model.weight.detach().clone()
    with Recorder(optimizer, "*", model=model, rows=chosen, steps=4, path=tmp_path / "t"):
        for _ in range(4):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            wanted.append(state_of(optimizer, model.weight))
            biases.append(state_of(optimizer, model.bias))
    trace = open_trace(tmp_path / "t")
    assert {name.removeprefix("weight.") for name in trace if name.startswith("weight.")} == {
        "grad",
        "rows",
        *(field for field in STATES if field in optimizer.state[model.weight]),
    }
    assert torch.equal(trace["weight.rows"], rows)
    assert trace["bias.rows"].tolist() == [1, 3, 5, 7, 9, 11]
    assert torch.equal(trace["weight"][0], start[rows])
    compare(trace, "weight", wanted, rows)
    compare(trace, "bias", biases, trace["bias.rows"])
    is_adam = not isinstance(optimizer, torch.optim.SGD)
    assert verify(tmp_path / "t").replayed == (4 if is_adam else 0)
    assert verify(tmp_path / "t").difference is None


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_no_rows_at_all(storage: str, tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, {"w": model.weight}, rows={"w": []}, steps=2, storage=storage, path=tmp_path / "t"):
        for _ in range(2):
            backward(model)
            optimizer.step()
    trace = open_trace(tmp_path / "t")
    assert trace["w"].shape == trace["w.grad"].shape == (3, 0, 20)
    assert verify(tmp_path / "t").difference is None


@pytest.mark.parametrize("make", [FusedAdam, torch.optim.AdamW])
def test_several_parameter_groups(make, tmp_path: Path) -> None:
    model = linear()
    groups = [
        {"params": [model.weight], "lr": 1e-2, "betas": (0.8, 0.9)},
        {"params": [model.bias], "lr": 3e-3, "weight_decay": 0.0, "eps": 1e-5},
    ]
    optimizer = make(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1 / (1 + step)])
    rates = []
    with Recorder(optimizer, "*", model=model, steps=5, path=tmp_path / "t"):
        for _ in range(5):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
            schedule.step()
    trace = open_trace(tmp_path / "t")
    assert trace["learning_rates"].shape == (6, 2)
    assert trace["learning_rates"][1:].tolist() == rates
    assert [trace.optimizer["params"][name]["group"] for name in ("weight", "bias")] == [0, 1]
    result = verify(tmp_path / "t")
    assert (result.replayed, result.difference) == (5, None)


@pytest.mark.parametrize("make", [FusedAdam, torch.optim.AdamW])
def test_a_resumed_optimizer_brings_its_moments(make, tmp_path: Path) -> None:
    model = linear()
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    restarted = make(model.parameters())
    restarted.load_state_dict(optimizer.state_dict())
    before = {key: value.clone() for key, value in restarted.state[model.weight].items()}
    with Recorder(restarted, "*", model=model, steps=4, path=tmp_path / "t"):
        for _ in range(4):
            restarted.zero_grad()
            backward(model)
            restarted.step()
    trace = open_trace(tmp_path / "t")
    for field in ("exp_avg", "exp_avg_sq"):
        assert before[field].any()
        assert torch.equal(trace[f"weight.{field}"][0], before[field])
    assert not trace["weight.grad"][0].any()
    assert trace.optimizer["params"]["weight"]["steps_done"] == 3
    result = verify(tmp_path / "t")
    assert (result.replayed, result.difference) == (4, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_every_dtype_of_a_parameter(dtype: torch.dtype, tmp_path: Path) -> None:
    model = linear(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    wanted = []
    with Recorder(optimizer, "weight", model=model, steps=4, path=tmp_path / "t"):
        for _ in range(4):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            wanted.append(state_of(optimizer, model.weight))
    trace = open_trace(tmp_path / "t")
    compare(trace, "weight", wanted)
    assert trace["weight"].dtype == dtype
    result = verify(tmp_path / "t")
    assert (result.replayed, result.difference) == (4 if replays(optimizer, dtype) else 0, None)


# ---------------------------------------------------------------------------------------------------------------------
# Closures


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_closure_makes_the_gradient_that_is_recorded(make, as_keyword: bool, tmp_path: Path) -> None:
    model = linear()
    optimizer = make(model.parameters())
    calls, wanted = [], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(backward(model).detach())
        return calls[-1]

    with Recorder(optimizer, "weight", model=model, steps=4, every=2, path=tmp_path / "t"):
        for step in range(4):
            loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
            assert loss is calls[-1]
            if step % 2:
                wanted.append(state_of(optimizer, model.weight))
    assert len(calls) == 4
    compare(open_trace(tmp_path / "t"), "weight", wanted)


def test_refuses_a_closure_that_is_called_again(tmp_path: Path) -> None:
    model = linear(torch.float32)
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    with (
        pytest.raises(BhfastError, match="cannot follow LBFGS, which calls the closure of a step more than once"),
        Recorder(optimizer, "weight", model=model, fields=["param", "grad"], steps=4, path=tmp_path / "t"),
    ):
        optimizer.step(closure)
    assert open_trace(tmp_path / "t").steps.tolist() == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Unclipped gradients


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", [FusedAdam, torch.optim.AdamW])
def test_unclipped_gradients_replay(make, dtype: torch.dtype, accumulate: int, tmp_path: Path) -> None:
    model = linear(dtype)
    optimizer = make(model.parameters())
    raw, norms, limit = [], [], 20.0
    with Recorder(optimizer, "*", model=model, unclipped=True, steps=40, path=tmp_path / "t"):
        for step in range(40):
            optimizer.zero_grad()
            for _ in range(accumulate):
                backward(model, scale=0.02 * (1 + step % 7 * 10) / accumulate)
            raw.append(model.weight.grad.detach().clone())
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
            optimizer.step()
    trace = open_trace(tmp_path / "t")
    assert min(norms) < limit < max(norms)
    assert torch.equal(bits(trace["weight.grad"][1:]), bits(torch.stack(raw)))
    coefs = trace["clip_coefs"][1:].double()
    for coef, norm in zip(coefs.tolist(), norms, strict=True):
        assert coef == pytest.approx(min(1.0, limit / norm), rel=4 * torch.finfo(dtype).eps)
    result = verify(tmp_path / "t")
    assert (result.replayed, result.difference) == (40 if replays(optimizer, dtype) else 0, None)


def test_a_gradient_that_was_changed_otherwise_has_no_factor(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    with Recorder(optimizer, "weight", model=model, unclipped=True, steps=2, path=tmp_path / "t"):
        for step in range(2):
            optimizer.zero_grad()
            backward(model)
            if step:
                nn.utils.clip_grad_value_(model.parameters(), 0.5)
            optimizer.step()
    assert open_trace(tmp_path / "t")["clip_coefs"][1] == 1
    assert math.isnan(open_trace(tmp_path / "t")["clip_coefs"][2])
    result = verify(tmp_path / "t")
    assert (
        result.reason == "between backward and step, gradients were changed by something other than one common factor"
    )
    assert result.difference is None


def test_unclipped_rows(tmp_path: Path) -> None:
    model = linear(torch.float32)
    optimizer = FusedAdam(model.parameters())
    raw = []
    with Recorder(
        optimizer, "weight", model=model, rows={"weight": [3, 1]}, unclipped=True, steps=3, path=tmp_path / "t"
    ):
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            raw.append(model.weight.grad[[3, 1]].clone())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert torch.equal(open_trace(tmp_path / "t")["weight.grad"][1:], torch.stack(raw))
    result = verify(tmp_path / "t")
    assert (result.replayed, result.difference) == (3, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_and_parameters_that_fit_several_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 1)).to(dtype)
    optimizer = FusedAdam(model.parameters())
    rows = {"0.weight": [1, 49]}  # of which the latter has no gradient but zeros
    with Recorder(optimizer, "*", model=model, rows=rows, unclipped=True, steps=30, path=tmp_path / "t"):
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.randint(5, (6,))).float().square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    assert open_trace(tmp_path / "t")["clip_coefs"][1:].max() < 1
    result = verify(tmp_path / "t")
    assert (result.replayed, result.reason, result.difference) == (30, None, None)


def test_unclipped_gradients_of_every_third_step_with_a_closure(tmp_path: Path) -> None:
    model = linear()
    optimizer = FusedAdam(model.parameters())
    raw = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = backward(model)
        raw.append(model.weight.grad.clone())
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    with Recorder(optimizer, "weight", model=model, unclipped=True, every=3, steps=6, path=tmp_path / "t"):
        for _ in range(6):
            optimizer.step(closure)
    trace = open_trace(tmp_path / "t")
    assert torch.equal(trace["weight.grad"][1:], torch.stack([raw[2], raw[5]]))
    assert not trace["clip_coefs"][1:].isnan().any()


class Doubled(torch.optim.AdamW):
    """Steps as AdamW does, with doubled gradients."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(2)
        super().step(closure)
        if getattr(self, "fails", False):
            raise RuntimeError("the step failed")


def test_a_step_that_calls_super_is_one_step(tmp_path: Path) -> None:
    model = linear()
    optimizer = Doubled(model.parameters(), lr=0.01)
    wanted = []
    with Recorder(optimizer, {"w": model.weight}, steps=4, path=tmp_path / "t"):
        for step in range(5):
            optimizer.zero_grad()
            backward(model)
            optimizer.fails = step == 2
            if optimizer.fails:
                with pytest.raises(RuntimeError, match="the step failed"):
                    optimizer.step()
                continue
            optimizer.step()
            wanted.append(model.weight.detach().clone())
    trace = open_trace(tmp_path / "t")
    assert trace.steps.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(trace["w"][1], wanted[0])
    assert torch.equal(trace["w"][2], wanted[1])
    assert torch.equal(trace["w"][4], wanted[3])
    assert torch.equal(trace["w"][3], wanted[2])
    assert verify(tmp_path / "t").reason == "it did several steps in record 3"  # the one that failed, and the next
