"""FusedAdam compared with torch.optim.AdamW: bits, state, schedulers, groups, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bhfast.errors import ConfigError
from bhfast.ops import arithmetic
from bhfast.optim import ALIGNMENT, FusedAdam

SHAPES = [(128, 64), (192,), (3, 5, 7), (1,)]


def params(generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype)) for shape in SHAPES]


def twins(generator: torch.Generator, dtype: torch.dtype = torch.bfloat16):
    ours = params(generator, dtype)
    return ours, copy.deepcopy(ours)


def give_gradients(*copies: list[nn.Parameter], generator: torch.Generator, scale: float = 0.01) -> None:
    for group in zip(*copies, strict=True):
        gradient = (torch.randn(group[0].shape, generator=generator) * scale).to(group[0].dtype)
        for p in group:
            p.grad = gradient.clone()


def assert_same(ours: list[nn.Parameter], a: torch.optim.Optimizer, theirs: list[nn.Parameter], b) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert a.state[p]["step"] == b.state[q]["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(a.state[p][key], b.state[q][key]), key


@pytest.mark.skipif(not arithmetic._addcmul_is_fused(), reason="torch's AdamW has other bits on a CPU without FMA")
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.0},
        {"weight_decay": 10.0},
        {"betas": (0.3, 0.9), "weight_decay": 0.0},
        {"eps": 1e-3, "lr": 0.1},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_equals_torch_adamw_over_20_steps(options, generator) -> None:
    ours, theirs = twins(generator)
    a = FusedAdam(ours, **options)
    b = torch.optim.AdamW(theirs, foreach=False, fused=False, **options)
    for step in range(20):
        give_gradients(ours, theirs, generator=generator, scale=10.0 ** -(step % 9))
        a.step()
        b.step()
        assert_same(ours, a, theirs, b)


def test_float32_is_near_torch_adamw(generator) -> None:
    """torch's float32 square root may be off by one ulp, so the bits of its AdamW are not a reference."""
    ours, theirs = twins(generator, torch.float32)
    a, b = FusedAdam(ours), torch.optim.AdamW(theirs, foreach=False, fused=False)
    for _ in range(20):
        give_gradients(ours, theirs, generator=generator)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(a.state[p]["exp_avg_sq"], b.state[q]["exp_avg_sq"])
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not arithmetic._addcmul_is_fused(), reason="torch's AdamW has other bits on a CPU without FMA")
def test_state_dict_goes_both_ways(generator) -> None:
    """FusedAdam, AdamW, FusedAdam, three steps each, with the state saved in a file between: torch's bits."""
    ours, theirs = twins(generator)
    a, b = FusedAdam(ours), torch.optim.AdamW(theirs, foreach=False, fused=False)
    other = torch.optim.AdamW(ours, foreach=False, fused=False)
    for optimizer, source in ((a, None), (other, a), (a, other)):
        if source is not None:
            file = io.BytesIO()
            torch.save(source.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(3):
            give_gradients(ours, theirs, generator=generator)
            optimizer.step()
            b.step()
        assert_same(ours, optimizer, theirs, b)


def test_works_with_schedulers_and_groups(generator) -> None:
    ours, theirs = twins(generator)

    def groups(p: list[nn.Parameter]) -> list[dict]:
        return [{"params": p[:2], "weight_decay": 5.0}, {"params": p[2:], "lr": 1e-2, "betas": (0.5, 0.9)}]

    a, b = FusedAdam(groups(ours)), torch.optim.AdamW(groups(theirs), foreach=False, fused=False)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(x, T_max=10) for x in (a, b)]
    for _ in range(5):
        give_gradients(ours, theirs, generator=generator)
        for x in (a, b, *schedulers):
            x.step()
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] < 1e-3
    if arithmetic._addcmul_is_fused():
        assert_same(ours, a, theirs, b)
    torch.optim.lr_scheduler.OneCycleLR(a, max_lr=0.1, total_steps=5)  # reads and cycles betas


def test_parameters_without_gradient_wait(generator) -> None:
    ours = params(generator)
    optimizer = FusedAdam(ours)
    optimizer.step()
    assert not optimizer.state
    ours[0].grad = torch.ones_like(ours[0])
    optimizer.step()
    ours[1].grad = torch.ones_like(ours[1])
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in ours[:2]] == [2, 1]
    assert ours[2] not in optimizer.state


def test_clips_without_touching_gradients(generator) -> None:
    ours, theirs = twins(generator)
    a, b = FusedAdam(ours, max_grad_norm=0.5), FusedAdam(theirs)
    give_gradients(ours, generator=generator, scale=1.0)
    before = [p.grad.clone() for p in ours]
    a.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
    assert a.grad_norm.item() == pytest.approx(
        torch.cat([g.flatten() for g in before]).double().norm().item(), rel=1e-6
    )
    assert a.clip_coef.item() == torch.tensor(0.5 / a.grad_norm.item()).bfloat16().item()
    for q, g in zip(theirs, before, strict=True):
        q.grad = g * a.clip_coef.bfloat16()
    b.step()
    assert_same(ours, a, theirs, b)


def test_mixed_dtypes_in_one_optimizer(generator) -> None:
    mixed = [*params(generator), *params(generator, torch.float32)]
    alone = copy.deepcopy(mixed)
    together, one, two = FusedAdam(mixed), FusedAdam(alone[:4]), FusedAdam(alone[4:])
    give_gradients(mixed, alone, generator=generator)
    for optimizer in (together, one, two):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(mixed, alone, strict=True))


def test_closure_and_hooks(generator) -> None:
    ours = params(generator)
    optimizer, calls = FusedAdam(ours), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p.float() ** 2).sum() for p in ours)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[0]
    assert calls == ["before", "after"] * 3
    optimizer.zero_grad()
    assert ours[0].grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be finite and at least 0, got -1\.0"),
        ({"eps": float("nan")}, "eps must be finite and at least 0, got nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1\.0"),
        ({"rounding": "nearest"}, "rounding must be one of per-op, opmath, got 'nearest'"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be above 0, or None for no clipping, got 0\.0"),
    ],
)
def test_refuses_bad_hyperparameters(options, message, generator) -> None:
    with pytest.raises(ConfigError, match=message):
        FusedAdam(params(generator), **options)


def test_refuses_other_dtypes_and_sparse_gradients() -> None:
    with pytest.raises(TypeError, match=r"bfloat16 and float32 parameters, got torch\.float16"):
        FusedAdam([nn.Parameter(torch.zeros(2, dtype=torch.float16))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"grads\[0\] must be dense, got a sparse one: build the embedding with sparse=False"
    ):
        FusedAdam(embedding.parameters()).step()


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
def test_refuses_a_state_it_cannot_continue(flag, generator) -> None:
    theirs = torch.optim.AdamW(params(generator), **{flag: True})
    with pytest.raises(ConfigError, match=rf"no {flag}, but param_groups\[0\]"):
        FusedAdam(params(generator)).load_state_dict(theirs.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# What is kept between steps


@pytest.mark.parametrize("change", ["step", "state", "clear", "exp_avg", "grad", "group", "load"])
def test_what_is_changed_between_steps_counts(change, generator) -> None:
    """FusedAdam caches lists of its tensors between steps, which must not be noticeable."""
    results = []
    for forget in (False, True):
        generator.manual_seed(3)
        ours = params(generator)
        optimizer = FusedAdam(ours, lr=1e-2)
        for step in range(6):
            give_gradients(ours, generator=generator)
            if step == 3:
                state = optimizer.state[ours[1]]
                match change:
                    case "step":
                        state["step"] += 5
                    case "state":
                        optimizer.state[ours[1]] = {key: x.clone() + 1 for key, x in state.items()}
                    case "clear":
                        optimizer.state.clear()
                    case "exp_avg":
                        state["exp_avg"] = torch.ones_like(ours[1])
                    case "grad":
                        ours[1].grad = None
                    case "group":
                        extra = nn.Parameter(torch.ones(3).bfloat16())
                        extra.grad = torch.ones_like(extra)
                        optimizer.add_param_group({"params": [extra], "lr": 0.5})
                    case "load":
                        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if forget:
                optimizer._cached.clear()
            optimizer.step()
        results.append([*ours, *(x for state in optimizer.state.values() for x in state.values())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_goes_on_alike(duplicate, generator) -> None:
    ours = params(generator)
    optimizer = FusedAdam(ours, rounding="opmath", max_grad_norm=0.5)
    give_gradients(ours, generator=generator, scale=1.0)
    optimizer.step()
    twin = duplicate(optimizer)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.clone()
    optimizer.step()
    twin.step()
    assert_same(ours, optimizer, theirs, twin)
    assert torch.equal(optimizer.grad_norm, twin.grad_norm)


def test_scheduled_steps_are_the_steps(generator) -> None:
    """What a CUDA graph replays: coefficients from a table, selected by a counter; two groups."""
    ours, theirs = twins(generator)
    lrs = [1e-3 * (1 - k / 7) for k in range(7)]
    groups = [[{"params": ps[:2]}, {"params": ps[2:], "weight_decay": 0.3}] for ps in (ours, theirs)]
    a, b = (FusedAdam(group, max_grad_norm=0.1) for group in groups)
    for optimizer, ps in ((a, ours), (b, theirs)):
        generator.manual_seed(5)
        give_gradients(ps, generator=generator)
        optimizer.step()
    schedules = a.schedule(lrs)
    assert [own.coefficients.shape for own in schedules] == [(7, 7), (7, 7)]
    for k, lr in enumerate(lrs):
        give_gradients(ours, theirs, generator=generator)
        a.scheduled_step(schedules, torch.tensor(k))
        for group in b.param_groups:
            group["lr"] = lr
        b.step()
    a.count(7)
    assert_same(ours, a, theirs, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_moments_of_every_parameter_are_aligned_for_the_cuda_kernels(dtype: torch.dtype) -> None:
    """Whatever the sizes before them: the CUDA kernels process misaligned tensors one element at a time."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 3), torch.nn.Linear(3, 10), torch.nn.LayerNorm(1)).to(dtype)
    optimizer = FusedAdam(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param in model.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[param][key]
            assert moment.data_ptr() % ALIGNMENT == 0
            assert moment.shape == param.shape
            assert moment.is_contiguous()
