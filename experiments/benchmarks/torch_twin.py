"""A plain PyTorch version of the model and its Stage I loss, as a baseline for our train step."""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from looplm_jax.config import ModelConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x * rsqrt(mean(x^2) + eps) * weight`."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Layer(nn.Module):
    """A sandwich block: fused scaled-dot-product attention, then SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.head_width
        width, inner = config.width, config.num_heads * config.head_width
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width, bias=False)
        self.gate, self.up = (nn.Linear(width, config.mlp_width, bias=False) for _ in range(2))
        self.down = nn.Linear(config.mlp_width, width, bias=False)
        self.norms = nn.ModuleList(RMSNorm(width, config.norm_eps) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Applies the layer to [B, S, D]."""
        query, key, value = self.project(self.norms[0](x))
        mixed = functional.scaled_dot_product_attention(
            rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=True
        )
        return self.finish(x, mixed)

    def project(self, normal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values [B, H, S, Dh], before rotary embedding."""
        heads = [
            project(normal).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        ]
        return heads[0], heads[1], heads[2]

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Applies the rest of the layer to the attention's output `mixed` [B, H, S, Dh]."""
        # [B, H, S, Dh] -> [B, S, H * Dh]
        x = x + self.norms[1](self.out(mixed.transpose(1, 2).flatten(2)))
        normal = self.norms[2](x)
        return x + self.norms[3](self.down(functional.silu(self.gate(normal)) * self.up(normal)))


class TorchLoopLM(nn.Module):
    """Embedding, shared stack, final norm, gate and head. `recompute` checkpoints each layer for the backward pass."""

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, 1)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.init_std)

    def forward(self, tokens: Tensor, loops: int) -> tuple[list[Tensor], Tensor]:
        """Returns the hidden states of every loop, and gate logits [T, B, S]."""
        cos, sin = (table.to(tokens.device) for table in rotary_tables(tokens.shape[1], self.config))
        x, hidden = self.embedding(tokens), []
        for _ in range(loops):
            for layer in self.layers:
                x = self.maybe_recomputed(layer, x, cos, sin)
            x = self.norm(x)
            hidden.append(x)
        return hidden, torch.stack([self.gate(h)[..., 0] for h in hidden])

    def maybe_recomputed(self, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        """Returns `function(*arguments)`; with `recompute`, the backward pass computes its inner values again."""
        return checkpoint(function, *arguments, use_reentrant=False) if self.recompute else function(*arguments)


@dataclasses.dataclass
class TorchTrainer:
    """AdamW on Eq. 4. `autocast` is the dtype of the matrix products, if it differs from that of the parameters."""

    model: TorchLoopLM
    loops: int
    beta: float
    learning_rate: float = 3e-4
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), fused=True
        )

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """Runs one optimizer step. Returns the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._types(tokens.device.type):
            loss = stage1(self.model, tokens, targets, self.loops, self.beta)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def _types(self, device: str) -> contextlib.AbstractContextManager[object]:
        """Returns the context that selects the dtype of the matrix products."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=self.autocast)


def stage1(model: TorchLoopLM, tokens: Tensor, targets: Tensor, loops: int, beta: float) -> Tensor:
    """Returns Eq. 4, averaged over tokens."""

    def losses_of(hidden: Tensor) -> Tensor:
        logits = model.head(hidden).flatten(0, 1)
        return functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    hidden, gates = model(tokens, loops)
    gates = gates.float()
    # One loop at a time, so that with recomputation only the logits of one loop exist.
    losses = torch.stack([model.maybe_recomputed(losses_of, h) for h in hidden])
    survival = functional.logsigmoid(-gates[:-1]).cumsum(0)
    reached = torch.cat([torch.zeros_like(gates[:1]), survival])
    # log p_t, with the remaining probability at the last loop.
    log_pdf = reached + torch.cat([functional.logsigmoid(gates[:-1]), torch.zeros_like(gates[:1])])
    pdf = log_pdf.exp()
    return ((pdf * losses).sum(0) + beta * (pdf * log_pdf).sum(0)).mean()


def rotary_tables(length: int, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of positions 0 .. length - 1, [S, Dh/2]."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_width, 2) / config.head_width)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding of split halves."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
