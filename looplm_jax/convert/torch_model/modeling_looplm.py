"""LoopLM, the looped language model of Ouro (arXiv 2510.25741 v4), in PyTorch, for transformers 4.57 and 5.

    h = embed_tokens(ids)
    for t in 1..T:                                   # the same weights in every loop
        for layer in layers:
            h = h + input_layernorm_2(attention(input_layernorm(h)))
            h = h + post_attention_layernorm_2(mlp(post_attention_layernorm(h)))
        h = norm(h)                                  # inside the loop: feeds the head, the gate and the next loop
        gate_t = early_exit_gate(h)
    logits_t = lm_head(h_t)

The file reads from top to bottom: layers, positions and masks, cache, exits, the stack, the language model. Loading,
saving and `generate` come from transformers. Masks, rotary positions and the use of the cache are implemented here, so
that they do not change between versions of transformers.

Shapes: B sequences, S tokens of this call, P tokens in the cache, D model width, H query heads, K key/value heads, Dh
width of a head, V vocabulary, L layers, T loops. Arguments and results count loops from 1, the cache counts from 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_looplm import OuroConfig

Angles = tuple[Tensor, Tensor]  # cosines and sines, float32 [B, 1, S, Dh/2]
Mask = Tensor | bool  # which keys a query sees: bool [B, 1, S, P+S]; if P = 0, True for causal; False for all keys
Write = Callable[..., tuple[Tensor, Tensor]]  # maps the keys and values of this call to those of all P+S tokens


# ------------------------------------------------------------------------------------------------------------ layers


class OuroRMSNorm(nn.Module):
    """RMSNorm: `x * rsqrt(mean(x^2) + eps)` in float32, cast back, then times the weight (not one plus the weight)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes along the last axis."""
        # Squares overflow in float16 and lose digits in bfloat16.
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)


class OuroAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.attention_dropout
        self.is_grouped = config.num_key_value_heads != config.num_attention_heads
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angles: Angles, mask: Mask, write: Write | None) -> Tensor:
        """Mixes `x` [B, S, D] over the tokens that `mask` makes visible."""
        queries = rotate(self._heads(self.q_proj(x)), angles)
        keys, values = rotate(self._heads(self.k_proj(x)), angles), self._heads(self.v_proj(x))

        if write is not None:
            keys, values = write(keys, values)

        # With is_causal, PyTorch can use its flash kernel, which takes no mask.
        shown = {"is_causal": mask} if isinstance(mask, bool) else {"attn_mask": mask}
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=dropout, enable_gqa=self.is_grouped, **shown
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, S, H * Dh] -> [B, H, S, Dh]


class OuroMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, S, D] for `x` [B, S, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OuroDecoderLayer(nn.Module):
    """One layer: attention, then SwiGLU, each between two norms (a "sandwich")."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        norm = functools.partial(OuroRMSNorm, config.hidden_size, config.rms_norm_eps)
        self.self_attn = OuroAttention(config)
        self.mlp = OuroMLP(config)
        self.input_layernorm, self.input_layernorm_2 = norm(), norm()
        self.post_attention_layernorm, self.post_attention_layernorm_2 = norm(), norm()

    def forward(self, x: Tensor, angles: Angles, mask: Mask, write: Write | None) -> Tensor:
        """Maps [B, S, D] to [B, S, D]; arguments as in `OuroAttention`."""
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), angles, mask, write))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class OuroExitGate(nn.Linear):
    """The exit gate, `h @ w + b`: one scalar per token.

    It is computed in float32 even under autocast, because probabilities are derived from it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, S, D] to float32 [B, S, 1]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


# ----------------------------------------------------------------------------------------------- positions and masks


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Angles:
    """Returns cosines and sines of `positions * theta ** (-2 i / Dh)`, for positions [B, S]."""
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * theta ** (-steps / head_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Applies the rotary embedding of split halves, in float32: element i is paired with element i + Dh/2."""
    (cos, sin), (first, second) = angles, x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def real_tokens(attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """Returns bool [B, P+S], False for padding; None if there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] != columns:
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask must be [batch, {columns}], for cached and new tokens, not {shape}")
    real = attention_mask.bool()

    # While a graph is recorded, no branch may depend on the values of a tensor.
    return None if not makes_a_graph() and real.all() else real


def visible(real: Tensor | None, documents: Tensor | None, past: int, new: int, device: torch.device) -> Mask:
    """Returns the mask: each token sees itself and the real tokens of its document before it.

    Padding sees itself too, because a softmax over no keys is NaN. No tensor is built where a constant is enough.
    """
    if real is None and documents is None:
        if past == 0:  # a constant per branch: torch.compile records only symbols of `past`
            return True
        if new == 1:
            return False

    columns = torch.arange(past + new, device=device)
    own = columns[past:, None]
    mask = (columns < own)[None]

    if real is not None:
        mask = mask & real[:, None, :]
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return (mask | (columns == own))[:, None]


def positions_and_mask(
    attention_mask: Tensor | None, position_ids: Tensor | None, past: int, new: int, device: torch.device
) -> tuple[Tensor, Mask, Tensor | None]:
    """Returns positions of the new tokens, [B or 1, S]; the mask; and `real_tokens`.

    Positions are given by the caller, or counted over the real tokens. Packed documents are recognized by their
    positions, only without a mask and without cached tokens.
    """
    real = real_tokens(attention_mask, past + new)
    documents = None
    if position_ids is None:
        columns = torch.arange(past + new, device=device)[None] if real is None else real.cumsum(-1) - 1
        position_ids = columns[:, past:].clamp(min=0)
    elif attention_mask is None and past == 0:
        documents = documents_of(position_ids)
    return position_ids, visible(real, documents, past, new, device), real


def makes_a_graph() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording, so control flow may not depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def documents_of(position_ids: Tensor) -> Tensor:
    """Returns the document of each token [B, S]: a new one starts wherever positions do not increase by one."""
    return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


# ------------------------------------------------------------------------------------------------------------- cache


class LoopCache:
    """A transformers `Cache` viewed as T planes of L layers: layer l of loop t (from 0) is its layer `t * L + l`."""

    def __init__(self, cache: Cache, loops: int, layers: int) -> None:
        self.cache, self.loops, self.layers = cache, loops, layers

        needed = loops * layers
        if isinstance(cache, DynamicCache):  # `generate` creates it with L layers
            cache.layers.extend(DynamicLayer() for _ in range(needed - len(cache.layers)))
        elif len(getattr(cache, "layers", ())) < needed:
            kind = type(cache).__name__
            raise ValueError(f"a {kind} cannot hold {loops} loops of {layers} layers; pass a DynamicCache() or nothing")

        # The last plane must be as long as the first, and nothing may follow it: otherwise the planes belong to another
        # number of loops.
        self.past = cache.get_seq_length()
        if self.past and (cache.get_seq_length(needed - 1) != self.past or cache.get_seq_length(needed)):
            raise ValueError(
                f"the cache was not filled with loops={loops}; keep its number of loops or use a new cache"
            )
        self._newest: dict[int, tuple[Tensor, Tensor]] = {}  # per layer: the keys and values that the last loop wrote

    def write(self, loop: int, running: Tensor | None, layer: int, keys: Tensor, values: Tensor) -> Any:
        """Appends keys and values [B, K, S, Dh] to their plane and returns the whole plane.

        Sequences that have exited, according to `running` [B, 1], write the same values as in the loop before.
        """
        if running is not None:
            runs, (old_keys, old_values) = running.to(keys.device)[:, None, :, None], self._newest[layer]
            keys, values = torch.where(runs, keys, old_keys), torch.where(runs, values, old_values)

        if keys.shape[2] == 1:  # a longer prompt runs all loops, so these are not needed
            self._newest[layer] = keys, values
        return self.cache.update(keys, values, loop * self.layers + layer)

    def fill(self, loops_run: int) -> None:
        """Copies what the last loop wrote to the planes of the loops that did not run ("last exited")."""
        for loop in range(loops_run, self.loops):
            for layer, (keys, values) in self._newest.items():
                self.cache.update(keys, values, loop * self.layers + layer)


# ------------------------------------------------------------------------------------------------------------- exits


def log_exit_distribution(gate_logits: Tensor) -> Tensor:
    """Returns `log p_t` [..., T] (section 3.2), from float32 gate logits [..., T].

    lambda_t = sigmoid(gate_t),  S_t = prod_{j<=t} (1 - lambda_j),  p_t = lambda_t S_{t-1},  p_T = S_{T-1}

    Computed in log space, so that saturated gates stay exact and have finite gradients. The last gate is not used.
    """
    # The last probability is what remains, so that they sum to 1.
    before_last = gate_logits[..., :-1]
    reached = F.pad(F.logsigmoid(-before_last).cumsum(-1), (1, 0))  # log S_{t-1}
    return reached + F.pad(F.logsigmoid(before_last), (0, 1))


@dataclasses.dataclass(frozen=True)
class ExitRule:
    """The loop that a token's hidden state is taken from: the first with `CDF >= q`, and `latest` at the latest."""

    loops: int  # T
    latest: int
    threshold: float  # q; with 1, no token exits before `latest`
    weighted: bool  # take the mean over the exit distribution of all loops instead of one loop

    @classmethod
    def of_call(
        cls, config: OuroConfig, loops: int | None, exit_loop: int | None, threshold: float | None, weighted: bool
    ) -> "ExitRule":
        """Returns the rule of a call: from its arguments, or else from the configuration."""
        loops = given(loops, config.total_ut_steps)
        if (exit_loop is not None) + (threshold is not None) + bool(weighted) > 1:
            raise ValueError("exit_loop, exit_threshold and exit_weighted exclude each other; give one of them")

        if loops < 1:
            raise ValueError(f"loops must be at least 1, not {loops}")
        if exit_loop is not None and not 1 <= exit_loop <= loops:
            raise ValueError(f"exit_loop must be in 1..{loops}, not {exit_loop}")

        # A call that chooses the loop itself turns off the threshold of the configuration.
        by_default = 1.0 if exit_loop is not None or weighted else config.early_exit_threshold
        threshold = given(threshold, by_default)
        if not 0 <= threshold <= 1:
            raise ValueError(f"exit_threshold must be in [0, 1], not {threshold}")

        return cls(loops, exit_loop or loops, threshold, weighted)

    def leaves(self, log_survival: Tensor, loop: int) -> Tensor:
        """Returns the tokens that exit after `loop`, if not earlier: `CDF >= q`, computed as `log S <= log(1 - q)`."""
        if loop >= self.latest:
            return torch.ones_like(log_survival, dtype=torch.bool)
        # A tensor, because math.log1p raises an error for q = 1, where this is -inf.
        reached = torch.log1p(torch.full((), -self.threshold, dtype=torch.float32, device=log_survival.device))
        return log_survival <= reached


class Exits:
    """The exits of all tokens while the loops run: which loop each token exited at, and with which state."""

    def __init__(self, rule: ExitRule, state: Tensor) -> None:
        self.rule = rule
        self.hidden = state  # [B, S, D], the state at each token's exit
        self.loops = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)  # [B, S]; 0 before the exit
        self.log_survival = torch.zeros(state.shape[:2], dtype=torch.float32, device=state.device)
        self.states: list[Tensor] = []
        self.gates: list[Tensor] = []

    @property
    def running(self) -> Tensor:
        """Returns bool [B, S]: the tokens that have not exited."""
        return self.loops == 0

    def take(self, state: Tensor, gate: Tensor) -> None:
        """Records the states [B, S, D] and gate logits [B, S] of one more loop."""
        self.states.append(state)
        self.gates.append(gate)

        self.hidden = torch.where(self.running[..., None], state, self.hidden)
        self.log_survival = self.log_survival + F.logsigmoid(-gate)

        leave = self.running & self.rule.leaves(self.log_survival, len(self.states))
        self.loops = torch.where(leave, len(self.states), self.loops)

    def output(self, cache: Cache | None, with_states: bool) -> "OuroModelOutput":
        """Returns the output of the model. Gates of loops that did not run are NaN."""
        unknown = self.rule.loops - len(self.gates)
        gate_logits = F.pad(torch.stack(self.gates, dim=-1), (0, unknown), value=float("nan"))
        probabilities = log_exit_distribution(gate_logits).exp()

        if self.rule.weighted:
            # Summed in float32, because the states may be narrower.
            mean = torch.einsum("bst,tbsd->bsd", probabilities, torch.stack(self.states).float())
            self.hidden = mean.to(self.hidden.dtype)

        return OuroModelOutput(
            last_hidden_state=self.hidden,
            past_key_values=cache,
            hidden_states=tuple(self.states) if with_states else None,
            gate_logits=gate_logits,
            exit_probabilities=probabilities,
            exit_loops=self.loops,
            loops_run=torch.full((), len(self.states), device=self.hidden.device),
        )


# --------------------------------------------------------------------------------------------------------- the stack


@dataclasses.dataclass
class OuroModelOutput(BaseModelOutputWithPast):
    """The output of `OuroModel`.

    `last_hidden_state` [B, S, D] is the state at each token's exit; `hidden_states` has one state per loop, T in total.
    `gate_logits` and `exit_probabilities` are float32 [B, S, T], NaN for loops that did not run. `exit_loops` [B, S]
    counts from 1. `loops_run` [] is the number of passes through the stack.
    """

    gate_logits: Tensor | None = None
    exit_probabilities: Tensor | None = None
    exit_loops: Tensor | None = None
    loops_run: Tensor | None = None


class OuroPreTrainedModel(PreTrainedModel):
    """Declares the model's properties to transformers, and initializes weights."""

    config: OuroConfig
    config_class = OuroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OuroDecoderLayer"]  # noqa: RUF012 - the type that transformers declares
    _keep_in_fp32_modules = ["early_exit_gate"]  # noqa: RUF012 - quantizers skip the modules named here
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes matrices, the gate's too, from Normal(0, initializer_range), its bias with 0, norms with 1."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, OuroRMSNorm):
            nn.init.ones_(module.weight)


class OuroModel(OuroPreTrainedModel):
    """Embedding, shared stack, norm and exit gate: everything except the head.

    Arguments of a call:

    input_ids [B, S] or inputs_embeds [B, S, D]: the new tokens.
    attention_mask [B, P+S]: 0 for padding, on either side.
    position_ids [B, S]: by default, counted over the real tokens. Without mask and cache, a new document starts
        wherever they do not increase by one, and documents do not see each other.
    past_key_values: a `DynamicCache` of P tokens, which is appended to. All calls must use the same number of loops.
    use_cache: create a cache if none is given. Default: `config.use_cache`, but not in training.
    output_hidden_states: return the states of all T loops.
    return_dict: return a dataclass (default) or a tuple. torch.jit.trace gets a tuple, and no cache, unless requested.
    loops: T, at least 1. Default: `config.total_ut_steps`.
    exit_loop: take every token's state from this loop.
    exit_threshold: q in [0, 1]: take the first loop with CDF >= q; 1 is loop T. Default: `config.early_exit_threshold`.
    exit_weighted: take the mean of all loops, `sum_t p_t h_t`; its logits are the expected logits.

    Values that are out of range, in conflict or unknown raise a ValueError of one line.

    An early exit saves work if nothing else needs the remaining loops. Without a cache, the loops stop when every token
    has exited; for one new token after a filled cache, they stop when every sequence has. A sequence that exits before
    the others keeps its state, and the deeper planes of the cache take the keys and values of its exit. All T loops run
    for a prompt that goes into a cache, in training, for `exit_weighted`, when hidden states are requested, and in
    graphs of torch.compile, torch.export and torch.jit.trace, because a graph cannot stop halfway.
    """

    def __init__(self, config: OuroConfig) -> None:
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OuroDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = OuroExitGate(config.hidden_size, 1)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loops: int | None = None,
        exit_loop: int | None = None,
        exit_threshold: float | None = None,
        exit_weighted: bool = False,
        **kwargs: Any,
    ) -> OuroModelOutput | tuple[Any, ...]:
        """Runs the loops, and takes each token's hidden state from the loop at which it exits; see the class."""
        refuse_unknown(kwargs)
        rule = ExitRule.of_call(self.config, loops, exit_loop, exit_threshold, exit_weighted)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")

        state = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._open_cache(past_key_values, use_cache, rule.loops)
        past, new = cache.past if cache else 0, state.shape[1]

        position_ids, mask, real = positions_and_mask(attention_mask, position_ids, past, new, state.device)
        angles = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        waited_for = None if real is None else real[:, past:]
        keep_states = given(output_hidden_states, self.config.output_hidden_states)
        exits = self._run(state, angles, mask, cache, Exits(rule, state), waited_for, keep_states)
        output = exits.output(cache.cache if cache else None, keep_states)

        return output if given(return_dict, returns_dict(self.config)) else output.to_tuple()

    def _open_cache(self, cache: Cache | None, use_cache: bool | None, loops: int) -> LoopCache | None:
        """Returns the caller's cache, a new one, or None, viewed as planes of loops."""
        if cache is not None and self._recomputes:
            raise ValueError("gradient checkpointing cannot append to past_key_values; leave out one of them")
        if cache is None:
            by_default = self.config.use_cache and not self.training and not torch.jit.is_tracing()
            wanted = given(use_cache, by_default)
            cache = DynamicCache() if wanted and not self._recomputes else None
        return None if cache is None else LoopCache(cache, loops, len(self.layers))

    def _run(
        self,
        state: Tensor,
        angles: Angles,
        mask: Mask,
        cache: LoopCache | None,
        exits: Exits,
        waited_for: Tensor | None,
        keep_states: bool,
    ) -> Exits:
        """Runs the loops. Loops that only tokens outside `waited_for`, bool [B, S], would need may be left out."""
        rule = exits.rule
        # With one new token per sequence, the planes of loops that do not run can be filled with its last keys and
        # values.
        is_decoding = cache is not None and cache.past > 0 and state.shape[1] == 1 and not self.training
        may_stop = (cache is None or is_decoding) and not (self.training or keep_states or rule.weighted)

        for loop in range(rule.latest if may_stop else rule.loops):
            running = exits.running if is_decoding and loop > 0 else None
            write = functools.partial(cache.write, loop, running) if cache else None
            following = self._one_loop(state, angles, mask, write)
            gate = self.early_exit_gate(following).squeeze(-1).to(state.device, torch.float32)
            if running is not None:  # a sequence that has exited keeps its state
                following = torch.where(running[..., None], following, state)
                gate = gate.masked_fill(~running, float("nan"))

            state = following
            exits.take(state, gate)
            if may_stop and rule.threshold < 1 and not makes_a_graph() and not _any(exits.running, waited_for):
                break

        if cache is not None:
            cache.fill(len(exits.states))
        return exits

    def _one_loop(self, state: Tensor, angles: Angles, mask: Mask, write: Write | None) -> Tensor:
        x = state
        for index, layer in enumerate(self.layers):
            x = self.recomputed(layer, x, angles, mask, write and functools.partial(write, index))
        return self.norm(x).to(state.device)  # with layers on several devices, it ends on its first device

    def recomputed(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Returns `function(*inputs)`, recomputed in the backward pass if gradient checkpointing is on."""
        return self._gradient_checkpointing_func(function, *inputs) if self._recomputes else function(*inputs)

    @property
    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()


# Arguments that `generate` passes on after using them, or that follow from the cache and the mask.
_WITHOUT_EFFECT = {"assistant_tokenizer", "cache_position", "token_type_ids", "tokenizer"}


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments that other models support and this one does not."""
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    unknown = sorted(asked - _WITHOUT_EFFECT)
    if unknown:
        raise ValueError(f"this model does not know {', '.join(unknown)}; leave it out")


def given(value: Any, default: Any) -> Any:
    """Returns an argument, or its default for None."""
    return default if value is None else value


def returns_dict(config: PretrainedConfig) -> bool:
    """Whether a call returns a dataclass by default; torch.jit.trace supports only tuples."""
    return bool(config.return_dict) and not torch.jit.is_tracing()


def _any(tokens: Tensor, among: Tensor | None) -> bool:
    """Whether any of the tokens is set, optionally only among some of them."""
    return bool((tokens if among is None else tokens & among).any())


# ------------------------------------------------------------------------------------------------ the language model


@dataclasses.dataclass
class OuroCausalLMOutput(CausalLMOutputWithPast):
    """The output of `OuroForCausalLM`.

    `loss` is Eq. 4; `logits` [B, S, V] are those at each token's exit; the rest is as in `OuroModelOutput`.
    """

    gate_logits: Tensor | None = None
    exit_probabilities: Tensor | None = None
    exit_loops: Tensor | None = None
    loops_run: Tensor | None = None


def expected_loss(token_losses: Tensor, gate_logits: Tensor, entropy_weight: float) -> Tensor:
    """Returns Eq. 4 for each token, `sum_t p_t L^(t) - beta H(p)`, from losses and gate logits [..., T]."""
    log_p = log_exit_distribution(gate_logits)
    return (log_p.exp() * (token_losses + entropy_weight * log_p)).sum(-1)  # -H(p) = sum_t p_t log p_t


class OuroForCausalLM(OuroPreTrainedModel, GenerationMixin):
    """The stack with its head. A call has the arguments of `OuroModel`, and:

    labels [B, S]: targets, usually `input_ids`; position i is scored against label i + 1, and -100 is ignored. The loss
        is Eq. 4 over all T loops. With labels, no cache is created unless `use_cache` is given.
    entropy_weight: beta of Eq. 4. Default: `config.entropy_weight`.
    num_items_in_batch: the divisor of the sum of token losses. Default: the number of targets that are not ignored.
    logits_to_keep: compute logits of the last `logits_to_keep` positions, or of the given positions. 0 means all. The
        loss always uses all positions.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - 4.57 reads only the keys
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch

    def __init__(self, config: OuroConfig) -> None:
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loops: int | None = None,
        exit_loop: int | None = None,
        exit_threshold: float | None = None,
        exit_weighted: bool = False,
        entropy_weight: float | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> OuroCausalLMOutput | tuple[Any, ...]:
        """Returns logits at each token's exit, and the loss if labels are given; see the class."""
        keep_states = given(output_hidden_states, self.config.output_hidden_states)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if labels is None else bool(use_cache),
            output_hidden_states=keep_states or labels is not None,
            return_dict=True,
            loops=loops,
            exit_loop=exit_loop,
            exit_threshold=exit_threshold,
            exit_weighted=exit_weighted,
            **kwargs,
        )

        loss = None
        if labels is not None:
            beta = given(entropy_weight, self.config.entropy_weight)
            loss = self._stage1_loss(output.hidden_states, output.gate_logits, labels, beta, num_items_in_batch)

        # `slice(-0, None)` keeps everything, which is what 0 means.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])

        unwanted = {"last_hidden_state"} if keep_states else {"last_hidden_state", "hidden_states"}
        rest = {name: value for name, value in output.items() if name not in unwanted}
        result = OuroCausalLMOutput(loss=loss, logits=logits, **rest)
        return result if given(return_dict, returns_dict(self.config)) else result.to_tuple()

    def _stage1_loss(
        self, states: tuple[Tensor, ...], gate_logits: Tensor, labels: Tensor, beta: float, items: int | Tensor | None
    ) -> Tensor:
        """Returns the mean Stage I loss over the targets that are not ignored."""
        targets = labels[:, 1:].to(gate_logits.device)
        # With gradient checkpointing, logits of one loop at a time are in memory.
        losses = [self.model.recomputed(self._token_losses, state[:, :-1], targets) for state in states]
        per_token = expected_loss(torch.stack(losses, dim=-1), gate_logits[:, :-1], beta)
        counts = targets != -100
        # With gradient accumulation, Trainer passes the number of targets of all batches of a step.
        items = counts.sum().clamp(min=1) if items is None else torch.as_tensor(items, device=per_token.device)
        return per_token.masked_fill(~counts, 0.0).sum() / items

    def _token_losses(self, state: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(state).float().to(targets.device)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        return losses.view_as(targets)


# Folders saved with these classes get a copy of this file, so that they load with trust_remote_code.
OuroModel.register_for_auto_class("AutoModel")
OuroForCausalLM.register_for_auto_class("AutoModelForCausalLM")
