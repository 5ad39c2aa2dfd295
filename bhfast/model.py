"""The network, a small GPT-2 with tied embeddings in bfloat16, and its initialization from a black hole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bhfast.errors import ConfigError

NO_TARGET = -100


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of the network. With the defaults it has 116,480 parameters."""

    vocab_size: int = 128
    hidden_dim: int = 64
    layers: int = 2
    heads: int = 2
    context: int = 128

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.hidden_dim % self.heads:
            raise ConfigError(f"hidden_dim must be divisible by heads, got {self.hidden_dim} and {self.heads}")


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.hidden_dim, 3 * config.hidden_dim)
        self.c_proj = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # x [B * T, D]; mask [T, T], 0 or -inf
        time, dim = len(mask), x.size(1)
        heads = self.c_attn(x).view(-1, time, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = heads.reshape(3, -1, time, dim // self.heads)  # each [B * H, T, D / H]
        # At these sizes, on a CPU, this is faster than scaled_dot_product_attention, forward and backward.
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(dim // self.heads))
        mixed = scores.softmax(-1) @ v
        return self.c_proj(mixed.view(-1, self.heads, time, dim // self.heads).transpose(1, 2).reshape(-1, dim))


class MLP(nn.Module):
    """Two linear layers with four times the width between them, and GELU in its tanh form."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_dim, 4 * config.hidden_dim)
        self.c_proj = nn.Linear(4 * config.hidden_dim, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:  # [B * T, D]
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-layer-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_dim, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_dim, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class TiedGPT(nn.Module):
    """GPT-2's network. The token embedding ``wte`` is also the output layer, which has no bias.

    Parameters have GPT-2's names; linear weights are ``[out, in]`` (the transpose of Hugging Face's ``Conv1D``).
    """

    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.wpe = nn.Embedding(config.context, config.hidden_dim)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.hidden_dim, eps=1e-5)
        mask = torch.full((config.context, config.context), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] int64 -> logits [B, T, V]
        batch, time = tokens.shape
        x = (self.wte(tokens) + self.wpe.weight[:time]).flatten(0, 1)  # [B * T, D]: fewer views to differentiate
        mask = self.mask[:time, :time]
        for block in self.h:
            x = block(x, mask)
        return F.linear(self.ln_f(x), self.wte.weight).view(batch, time, -1)


def window_loss(logits: Tensor, window: Tensor, target_offset: int) -> Tensor:
    """Return the mean cross-entropy in float32 of predicting byte t + ``target_offset`` at position t.

    Args:
        logits: ``[B, T, V]``, for the first T bytes of ``window``.
        window: int64 ``[B, T + 1]``. Positions whose target lies outside the window do not count.
        target_offset: 1 is next-byte training; 2 is the reference experiment.
    """
    targets = F.pad(window[:, target_offset:], (0, target_offset - 1), value=NO_TARGET)  # [B, T]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET)


def build_model(
    config: GPTConfig, *, sigma: float, init_scale: float, seed: int, device: torch.device | str = "cpu"
) -> tuple[TiedGPT, Tensor]:
    """Return the network with all tokens in a black hole, in bfloat16 on ``device``, and the black hole's center.

    Every token starts at ``center + noise``, with ``center = bf16(init_scale * N(0, 1))`` and
    ``noise = bf16(sigma * N(0, 1))``, added in bfloat16. The rest is initialized like GPT-2: weights and positions from
    N(0, 0.02), divided by sqrt(2 * layers) for the projections into the residual stream; biases 0; layer norms 1.

    All random numbers come from one CPU generator, the center first, so that every device starts from the same bits.
    The noise is also drawn for ``sigma = 0``: runs with the same seed differ only in its scale.

    Args:
        config: the sizes.
        sigma: standard deviation of the tokens around the center.
        init_scale: standard deviation of the center's coordinates.
        seed: the seed of the generator.
        device: where to put the network.

    Returns:
        The network, and the center: bfloat16 ``[D]`` on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).bfloat16()

    center = normal(config.hidden_dim, std=init_scale)
    noise = normal(config.vocab_size, config.hidden_dim, std=sigma)

    with torch.random.fork_rng(devices=[]):  # torch's own initialization must not advance the global generator
        model = TiedGPT(config).bfloat16()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name == "wte.weight":
                param.copy_(center + noise)
            elif name.endswith("bias"):
                param.zero_()
            elif "ln_" in name:
                param.fill_(1)
            else:
                is_residual = name.endswith("c_proj.weight")
                param.copy_(normal(*param.shape, std=0.02 / math.sqrt(2 * config.layers) if is_residual else 0.02))
    return _make_adjacent(model.to(device)), center


def _make_adjacent(model: TiedGPT) -> TiedGPT:
    """Make all parameters views of one tensor, so that an optimizer can update them as one."""
    params = list(model.parameters())
    flat = torch._utils._flatten_dense_tensors([p.detach() for p in params])
    for param, piece in zip(params, torch._utils._unflatten_dense_tensors(flat, params), strict=True):
        param.data = piece
    return model
