"""The network, a small GPT-2 with tied embeddings, and its initialization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bhfast.errors import ConfigError
from bhfast.start import Start

NO_TARGET = -100
NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of the network. With the defaults it has 116,480 parameters.

    Attributes:
        mlp_dim: the width of the hidden layer of each MLP; 0: four times ``hidden_dim``.
        norm: one of ``NORMS``.
        untied: whether the output layer has weights of its own, ``lm_head.weight``.
    """

    vocab_size: int = 128
    hidden_dim: int = 64
    layers: int = 2
    heads: int = 2
    context: int = 128
    mlp_dim: int = 0
    norm: str = "layernorm"
    untied: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_dim", "layers", "heads", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mlp_dim < 0:
            raise ConfigError(f"mlp_dim must be at least 1, or 0 for 4 times hidden_dim, got {self.mlp_dim}")
        if self.norm not in NORMS:
            raise ConfigError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.hidden_dim % self.heads:
            raise ConfigError(f"hidden_dim must be divisible by heads, got {self.hidden_dim} and {self.heads}")

    @property
    def mlp_width(self) -> int:
        """The width of the hidden layer of each MLP."""
        return self.mlp_dim or 4 * self.hidden_dim

    def make_norm(self) -> nn.Module:
        """Return a new normalization of token vectors."""
        return NORMS[self.norm](self.hidden_dim, eps=1e-5)


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
    """Two linear layers with GELU, in its tanh form, between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_dim, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:  # [B * T, D]
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Transformer block that normalizes before attention and MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = config.make_norm()
        self.attn = Attention(config)
        self.ln_2 = config.make_norm()
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class TiedGPT(nn.Module):
    """GPT-2's network. The token embedding ``wte`` is also the output layer, unless there is an ``lm_head``; no bias.

    Parameters have GPT-2's names; linear weights are ``[out, in]`` (the transpose of Hugging Face's ``Conv1D``).
    """

    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.wpe = nn.Embedding(config.context, config.hidden_dim)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = config.make_norm()
        self.lm_head = nn.Linear(config.hidden_dim, config.vocab_size, bias=False) if config.untied else None
        mask = torch.full((config.context, config.context), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the final hidden state, after the last normalization: ``[B * T, D]`` from int64 ``[B, T]``."""
        time = tokens.size(1)
        x = (self.wte(tokens) + self.wpe.weight[:time]).flatten(0, 1)  # [B * T, D]: fewer views to differentiate
        mask = self.mask[:time, :time]
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)

    def logits(self, hidden: Tensor, batch: int) -> Tensor:
        """Return the logits ``[B, T, V]`` of a final hidden state ``[B * T, D]``."""
        output = self.wte if self.lm_head is None else self.lm_head
        return F.linear(hidden, output.weight).view(batch, len(hidden) // batch, -1)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] int64 -> logits [B, T, V]
        return self.logits(self.hidden(tokens), len(tokens))


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
    config: GPTConfig,
    start: Start,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[TiedGPT, Tensor | None]:
    """Return the network with its tokens where ``start`` puts them, in ``dtype`` on ``device``; and their center.

    The rest is initialized like GPT-2: weights and positions from N(0, 0.02), divided by sqrt(2 * layers) for the
    projections into the residual stream; biases 0; norms 1.

    All random numbers come from one CPU generator, those of the tokens first, so that every device starts from the same
    bits.

    Args:
        config: the architecture.
        start: the start of the tokens.
        seed: the seed of the generator.
        device: where to put the network.
        dtype: of all parameters.

    Returns:
        The network, and the center around which the tokens start: ``[D]`` on the CPU; None if ``start`` has none.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, center = start.tokens(config.vocab_size, config.hidden_dim, generator, dtype)
    with torch.random.fork_rng(devices=[]):  # torch's own initialization must not advance the global generator
        model = TiedGPT(config).to(dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name == "wte.weight":
                param.copy_(tokens)
            elif name.endswith("bias"):
                param.zero_()
            elif "ln_" in name:
                param.fill_(1)
            else:
                is_residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * config.layers) if is_residual else 0.02
                param.copy_((torch.randn(*param.shape, generator=generator) * std).to(dtype))
    return _make_adjacent(model.to(device)), center


def _make_adjacent(model: TiedGPT) -> TiedGPT:
    """Make all parameters views of one tensor, so that an optimizer can update them as one."""
    params = list(model.parameters())
    flat = torch._utils._flatten_dense_tensors([p.detach() for p in params])
    for param, piece in zip(params, torch._utils._unflatten_dense_tensors(flat, params), strict=True):
        param.data = piece
    return model
