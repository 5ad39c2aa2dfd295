"""The network and its initialization."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import GRADIENT, LOGITS, LOSS

from bhfast.errors import ConfigError
from bhfast.model import GPTConfig, TiedGPT, build_model, window_loss
from bhfast.start import Start


def build(sigma: float = 0.0, seed: int = 42, **sizes: int) -> tuple[TiedGPT, torch.Tensor]:
    return build_model(GPTConfig(**sizes), Start(sigma=sigma), seed=seed)


def test_has_the_reference_run_parameters() -> None:
    model, center = build()
    assert sum(p.numel() for p in model.parameters()) == 116_480
    assert len(list(model.parameters())) == 28
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert center.shape == (64,)
    assert center.dtype == torch.bfloat16


def test_starts_from_one_point_at_sigma_0() -> None:
    model, center = build()
    generator = torch.Generator().manual_seed(42)
    assert torch.equal(center, (torch.randn(64, generator=generator) * 0.02).bfloat16())
    assert torch.equal(model.wte.weight, center.expand(128, 64))


def test_noise_is_bfloat16_before_and_after_the_sum() -> None:
    model, center = build(sigma=1e-2)
    generator = torch.Generator().manual_seed(42)
    torch.randn(64, generator=generator)
    noise = (torch.randn(128, 64, generator=generator) * 1e-2).bfloat16()
    assert torch.equal(model.wte.weight, center + noise)


def test_the_rest_starts_as_gpt2_does_whatever_sigma() -> None:
    model, _ = build(hidden_dim=256, layers=3)
    params = dict(model.named_parameters())
    for name, std in (
        ("wpe.weight", 0.02),
        ("h.1.attn.c_attn.weight", 0.02),
        ("h.2.mlp.c_fc.weight", 0.02),
        ("h.0.attn.c_proj.weight", 0.02 / math.sqrt(6)),
        ("h.1.mlp.c_proj.weight", 0.02 / math.sqrt(6)),
    ):
        n = params[name].numel()
        assert params[name].float().std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name  # 5 sigma
    assert all((p == 0).all() for name, p in params.items() if name.endswith("bias"))
    assert all((p == 1).all() for name, p in params.items() if "ln_" in name and name.endswith("weight"))
    noisy = dict(build(sigma=1.0, hidden_dim=256, layers=3)[0].named_parameters())
    assert all(torch.equal(p, noisy[name]) for name, p in params.items() if name != "wte.weight")


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    build()
    assert torch.equal(torch.rand(3), wanted)


def test_is_causal(generator) -> None:
    model, _ = build(sigma=0.1)
    tokens = torch.randint(128, (2, 40), generator=generator)
    changed = tokens.clone()
    changed[:, 25:] = 7
    assert torch.equal(model(tokens)[:, :25], model(changed)[:, :25])


@pytest.mark.parametrize(("offset", "positions"), [(1, 12), (2, 11), (5, 8)])
def test_window_loss_predicts_the_byte_offset_away(offset, positions, generator) -> None:
    logits = torch.randn(3, 12, 128, generator=generator).bfloat16()
    window = torch.randint(128, (3, 13), generator=generator)
    terms = [
        -F.log_softmax(logits[b, t].double(), -1)[window[b, t + offset]] for b in range(3) for t in range(positions)
    ]
    loss = window_loss(logits, window, offset)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"context": 1}, {"context": 7, "heads": 1}, {"layers": 3, "heads": 4, "hidden_dim": 32, "vocab_size": 97}],
    ids=str,
)
def test_gradients_are_near_float64(sizes, generator) -> None:
    model, _ = build(sigma=0.02, **sizes)
    exact = TiedGPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    config = model.config
    window = torch.randint(config.vocab_size, (3, config.context + 1), generator=generator)
    losses = []
    for network in (model, exact):
        logits = network(window[:, :-1])
        targets = window[:, 1:].flatten()
        losses.append(
            F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets)
        )
        losses[-1].backward()
    assert abs(losses[0].item() - losses[1].item()) < LOSS
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if config.context == 1 and "c_attn" in name:
            continue  # a single position attends to itself whatever the scores, so two thirds of this gradient are zero
        error = (p.grad.double() - q.grad).norm() / q.grad.norm()
        assert error < GRADIENT, f"{name}: {error:.3g}"


def test_equals_hugging_face_gpt2(generator) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the bench extra: transformers")
    model, _ = build(sigma=0.02)
    config = transformers.GPT2Config(
        vocab_size=128, n_positions=128, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).bfloat16().eval()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {f"transformer.{name}": p.t() if name.endswith(conv1d) else p for name, p in model.state_dict().items()}
    theirs.load_state_dict({**weights, "lm_head.weight": model.wte.weight})
    tokens = torch.randint(128, (4, 128), generator=generator)
    with torch.no_grad():
        a, b = model(tokens).float(), theirs(tokens).logits.float()
    assert (a - b).abs().max() < LOGITS * b.abs().max()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_dim": 64, "heads": 3}, "hidden_dim must be divisible by heads, got 64 and 3"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"vocab_size": -5}, "vocab_size must be at least 1, got -5"),
    ],
)
def test_refuses_bad_sizes(sizes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**sizes)
