"""Huginn, the recurrent-depth model of arXiv 2502.05171, in PyTorch, for transformers 4.57 and 5.

    e = prelude(wte(ids) * sqrt(D))                  # once
    h = 0, or noise
    for t in 1..T:                                   # the same weights in every loop
        h = core_block(adapter([h, e]))
    logits = lm_head(ln_f(coda(ln_f(h))))            # one norm, used twice; the head is the embedding

    layer:  x = norm_2(x + attn(norm_1(x)));  x = norm_4(x + mlp(norm_3(x)))

Tensors have the published names. Masks, positions and the treatment of arguments are those of `modeling_looplm`, which
is beside this file.

Shapes: B sequences, S tokens of this call, P tokens in the cache, D model width, H heads, Dh width of a head, V
vocabulary, T loops.
"""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import ModelOutput

from .configuration_huginn import RavenConfig

# `modeling_looplm` needs this file, and transformers 4.57 copies only files that are named here.
from .configuration_looplm import OuroConfig  # noqa: F401
from .modeling_looplm import (
    Angles,
    Mask,
    OuroRMSNorm,
    Write,
    given,
    positions_and_mask,
    refuse_unknown,
    returns_dict,
    rotary_angles,
)

_CUT = 3.0  # standard deviations at which noise is cut

# ------------------------------------------------------------------------------------------------------------ layers


class RavenLinear(nn.Linear):
    """A matrix without bias.

    Its rows from `added` on compute what is added to a state: they start smaller, the deeper the unrolled model is.
    """

    def __init__(self, width_in: int, width_out: int, added: int | None = None) -> None:
        super().__init__(width_in, width_out, bias=False)
        self.added = width_out if added is None else added


class RavenAttention(nn.Module):
    """Self-attention with biases of queries and keys, and rotary positions of neighboring entries."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.n_heads, config.head_dim
        self.Wqkv = RavenLinear(config.n_embd, 3 * config.n_embd)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.heads, self.head_dim))
        self.proj = RavenLinear(config.n_embd, config.n_embd, added=0)

    def forward(self, x: Tensor, angles: Angles, mask: Mask, write: Write | None) -> Tensor:
        """Mixes `x` [B, S, D] over the tokens that `mask` makes visible."""
        queries, keys, values = self.Wqkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)  # [B, S, H, Dh]
        queries, keys = queries + self.qk_bias[0], keys + self.qk_bias[1]
        queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
        queries, keys = rotate_pairs(queries, angles), rotate_pairs(keys, angles)

        if write is not None:
            keys, values = write(keys, values)

        shown = {"is_causal": mask} if isinstance(mask, bool) else {"attn_mask": mask}
        mixed = F.scaled_dot_product_attention(queries, keys, values, **shown)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def rotate_pairs(x: Tensor, angles: Angles) -> Tensor:
    """Applies the rotary embedding in float32 to pairs of neighboring entries: 2i with 2i + 1."""
    cos, sin = angles
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


class RavenMLP(nn.Module):
    """SwiGLU: `proj(silu(g) * u)` with `[g, u] = fc(x)`."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.fc = RavenLinear(config.n_embd, 2 * config.intermediate_size, added=config.intermediate_size)
        self.proj = RavenLinear(config.intermediate_size, config.n_embd, added=0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, S, D] for `x` [B, S, D]."""
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class RavenBlock(nn.Module):
    """One layer: attention, then SwiGLU, each after a norm and followed by a norm of the sum."""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (
            OuroRMSNorm(config.n_embd, config.norm_eps) for _ in range(4)
        )
        self.attn = RavenAttention(config)
        self.mlp = RavenMLP(config)

    def forward(self, x: Tensor, angles: Angles, mask: Mask, write: Write | None) -> Tensor:
        """Maps [B, S, D] to [B, S, D]; arguments as in `RavenAttention`."""
        x = self.norm_2(x + self.attn(self.norm_1(x), angles, mask, write))
        return self.norm_4(x + self.mlp(self.norm_3(x)))


# ------------------------------------------------------------------------------------------------------------- cache


class RavenCache:
    """A transformers `Cache` viewed as the layers of prelude and coda, and then T planes of the shared layers."""

    def __init__(self, cache: Cache, config: RavenConfig, loops: int) -> None:
        self.cache = cache
        self.coda = config.n_layers_in_prelude
        self.core = self.coda + config.n_layers_in_coda
        self.layers = config.n_layers_in_recurrent_block

        if not isinstance(cache, DynamicCache):
            raise ValueError(f"a {type(cache).__name__} cannot hold {loops} loops; pass a DynamicCache() or nothing")
        needed = self.core + loops * self.layers
        cache.layers.extend(DynamicLayer() for _ in range(needed - len(cache.layers)))

        # The last plane must be as long as the first, and nothing may follow it: otherwise the planes belong to another
        # number of loops.
        self.past = cache.get_seq_length()
        if self.past and (cache.get_seq_length(needed - 1) != self.past or cache.get_seq_length(needed)):
            raise ValueError(
                f"the cache was not filled with num_steps={loops}; keep its number of loops or use a new cache"
            )

    def writer(self, first: int) -> Write:
        """Returns the function that appends keys and values [B, H, S, Dh] of one layer, counted from `first` on."""
        return lambda layer, keys, values: self.cache.update(keys, values, first + layer)

    def of_loop(self, loop: int) -> Write:
        """Returns the `writer` of the shared layers in a loop, from 0."""
        return self.writer(self.core + loop * self.layers)


# --------------------------------------------------------------------------------------------------------- the model


@dataclasses.dataclass
class RavenOutput(ModelOutput):
    """The output of `RavenForCausalLM`.

    `logits` [B, S, V] are those of the last loop; `latent_states` [B, S, D] is its state after the norm, which the coda
    reads; `hidden_states` has the state of every loop before the norm, if it was asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    latent_states: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class RavenForCausalLM(PreTrainedModel, GenerationMixin):
    """Prelude, shared stack, coda and head. Arguments of a call, in addition to those of `OuroForCausalLM`:

    num_steps: the loops, T, at least 1; or a pair (n, k): n loops without gradient, then k loops with it. Default:
        `config.mean_recurrence`.
    init_scale: the state of each token starts from normal noise of this many times the published standard deviation,
        sqrt(2/5), cut at three of them. Default: 0, a zero state.
    input_states [B, S, D]: the state before the first loop instead.
    labels [B, S]: targets, usually `input_ids`; position i is scored against label i + 1, and -100 is ignored.
    num_items_in_batch: the divisor of the sum of token losses. Default: the number of targets that are not ignored.

    All calls that share a cache must use the same number of loops. Values that are out of range, in conflict or unknown
    raise a ValueError of one line.
    """

    config: RavenConfig
    freqs_cis: Tensor
    config_class = RavenConfig
    _no_split_modules = ["RavenBlock"]  # noqa: RUF012 - the type that transformers declares
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 - 4.57 reads only the keys
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch

    def __init__(self, config: RavenConfig) -> None:
        config.check()
        super().__init__(config)

        def stack(length: int) -> nn.ModuleList:
            return nn.ModuleList(RavenBlock(config) for _ in range(length))

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "prelude": stack(config.n_layers_in_prelude),
                "adapter": nn.Linear(2 * config.n_embd, config.n_embd, bias=False),
                "core_block": stack(config.n_layers_in_recurrent_block),
                "coda": stack(config.n_layers_in_coda),
                "ln_f": OuroRMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Saved for the published code, which reads its angles from here. They are computed in float32 below, because
        # the files of a bfloat16 model round them.
        self.register_buffer("freqs_cis", self._rotary_table(), persistent=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.transformer["wte"] = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        input_states: Tensor | None = None,
        labels: Tensor | None = None,
        num_steps: int | tuple[int, int] | None = None,
        init_scale: float = 0.0,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> RavenOutput | tuple[Any, ...]:
        """Returns the logits after the last loop, and the loss if labels are given; see the class."""
        refuse_unknown(kwargs)
        constant, traced = _loops(given(num_steps, self.config.mean_recurrence))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")

        x = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        x = x * math.sqrt(self.config.n_embd)

        by_default = self.config.use_cache and labels is None and not self.training and not torch.jit.is_tracing()
        if past_key_values is None and given(use_cache, by_default):
            past_key_values = DynamicCache()
        cache = None if past_key_values is None else RavenCache(past_key_values, self.config, constant + traced)
        past, new = cache.past if cache else 0, x.shape[1]
        position_ids, mask, _ = positions_and_mask(attention_mask, position_ids, past, new, x.device)
        angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_base)

        def run(stack: str, x: Tensor, write: Write | None) -> Tensor:
            layers: Any = self.transformer[stack]
            for number, layer in enumerate(layers):
                x = layer(x, angles, mask, write and functools.partial(write, number))
            return x

        embedded = run("prelude", x, None if cache is None else cache.writer(0))
        state = self._initial_state(embedded, input_states, init_scale)

        states = []
        for loop in range(constant + traced):
            with torch.set_grad_enabled(torch.is_grad_enabled() and loop >= constant):
                entering = self.transformer["adapter"](torch.cat([state, embedded], dim=-1))
                state = run("core_block", entering, None if cache is None else cache.of_loop(loop))
            states.append(state)

        latent = self.transformer["ln_f"](state)
        hidden = self.transformer["ln_f"](run("coda", latent, None if cache is None else cache.writer(cache.coda)))
        # `slice(-0, None)` keeps everything, which is what 0 means.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep

        result = RavenOutput(
            loss=None if labels is None else self._loss(hidden, labels, num_items_in_batch),
            logits=self.lm_head(hidden[:, kept]),
            past_key_values=past_key_values,
            latent_states=latent,
            hidden_states=tuple(states) if given(output_hidden_states, self.config.output_hidden_states) else None,
        )
        return result if given(return_dict, returns_dict(self.config)) else result.to_tuple()

    def _initial_state(self, embedded: Tensor, given_state: Tensor | None, scale: float) -> Tensor:
        """Returns the state before the first loop, [B, S, D]."""
        if given_state is not None:
            if scale or given_state.shape != embedded.shape:
                raise ValueError(f"input_states must be {list(embedded.shape)}, without init_scale")
            return given_state.to(embedded)
        if scale < 0:
            raise ValueError(f"init_scale must be at least 0, not {scale}")
        if scale == 0:
            return torch.zeros_like(embedded)
        noise = torch.empty(embedded.shape, device=embedded.device)  # float32
        _init_normal(noise, scale * math.sqrt(2 / 5))
        return noise.to(embedded.dtype)

    def _loss(self, hidden: Tensor, labels: Tensor, items: int | Tensor | None) -> Tensor:
        """Returns the mean cross-entropy over the targets that are not ignored."""
        logits = self.lm_head(hidden[:, :-1]).float()
        targets = labels[:, 1:].to(logits.device)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
        # With gradient accumulation, Trainer passes the number of targets of all batches of a step.
        count = (targets != -100).sum().clamp(min=1)
        return total / (count if items is None else torch.as_tensor(items, device=total.device))

    def _rotary_table(self) -> Tensor:
        """Returns the cosines and sines of all positions, float32 [1, block_size, 1, Dh/2, 2]."""
        positions = torch.arange(self.config.block_size)[None]
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_base)  # [1, 1, block_size, Dh/2]
        return torch.stack([cos, sin], dim=-1).transpose(1, 2)

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes matrices with the published spread, biases with 0, norms with 1, and the table of angles."""
        config = self.config
        std = math.sqrt(2 / (5 * config.n_embd))
        if isinstance(module, nn.Linear | nn.Embedding):
            _init_normal(module.weight, std)
        if isinstance(module, RavenLinear) and module.added < module.out_features:
            outside = config.n_layers_in_prelude + config.n_layers_in_coda
            depth = outside + config.n_layers_in_recurrent_block * config.mean_recurrence
            _init_normal(module.weight[module.added :], std / math.sqrt(2 * depth))

        if isinstance(module, RavenAttention):
            nn.init.zeros_(module.qk_bias)
        if isinstance(module, OuroRMSNorm):
            nn.init.ones_(module.weight)
        if module is self:
            with torch.no_grad():
                self.freqs_cis.copy_(self._rotary_table())


def _init_normal(tensor: Tensor, std: float) -> None:
    """Fills a tensor with normal noise that is cut at three standard deviations."""
    nn.init.trunc_normal_(tensor, std=std, a=-_CUT * std, b=_CUT * std)


def _loops(steps: int | tuple[int, int]) -> tuple[int, int]:
    """Returns how many loops run without gradient, and with it."""
    constant, traced = (0, steps) if isinstance(steps, int) else steps
    if constant < 0 or traced < 1:
        raise ValueError(f"num_steps must be at least 1, or a pair of at least 0 and at least 1, not {steps}")
    return int(constant), int(traced)


# Folders saved with this class get a copy of this file, so that they load with trust_remote_code.
RavenForCausalLM.register_for_auto_class("AutoModelForCausalLM")
