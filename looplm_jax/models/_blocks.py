"""The transformer block and a stack of blocks.

The stack is an `nn.scan` over layers, so the size of the program does not depend on the number of layers.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.config import (
    AttentionKernel,
    Initializer,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Remat,
    Residual,
)
from looplm_jax.models import _attention as attention
from looplm_jax.models._attention_kernels import OUTPUT, self_attention
from looplm_jax.models._modulation import LayerTime, Modulation
from looplm_jax.models._parameters import GATHERED, Projection, RMSNorm, matrix_initializer
from looplm_jax.models._signals import sinusoids
from looplm_jax.sharding import target_platform, whole_sequences

# Names of the activations of a layer that may be saved for the backward pass.
_LAYER_INPUT = "layer_input"
_QUERIES_KEYS_VALUES = "queries_keys_values"
_MLP_OUTPUT = "mlp_output"
_SAVED = {
    Remat.SAVE_OUTPUTS: (OUTPUT, _MLP_OUTPUT),
    Remat.SAVE_QKV: (OUTPUT, _MLP_OUTPUT, _QUERIES_KEYS_VALUES),
}


# Inputs of a layer


@flax.struct.dataclass
class KeyValues:
    """Keys (after rotary embedding) and values. In those of a stack, the layer axis is first."""

    keys: Float[Array, "*L B C K Dh"]
    values: Float[Array, "*L B C K Dh"]

    def attend(
        self, layer: int | Int[Array, ""], queries: Float[Array, "B S H Dh"], own: "KeyValues", context: "Context"
    ) -> Float[Array, "B S H Dh"]:
        """Returns attention to the keys of one layer, masked by `context.past_mask`, and to the current tokens."""
        assert context.mask is not None
        assert context.past_mask is not None

        keys, values = (self.keys[layer], own.keys), (self.values[layer], own.values)
        return attention.attend(queries, keys, values, (context.past_mask, context.mask))


@runtime_checkable
class Past(Protocol):
    """Earlier tokens of all layers: `KeyValues`, or a view of a cache that attends in place."""

    def attend(
        self, layer: int | Int[Array, ""], queries: Float[Array, "B S H Dh"], own: KeyValues, context: "Context"
    ) -> Float[Array, "B S H Dh"]:
        """Returns attention of `queries` to the earlier tokens in one layer and to the current tokens, `own`."""


@flax.struct.dataclass
class Context:
    """Values that every layer of every loop shares: positions and visibility of the current tokens.

    Attributes:
      cos: the cosines of the rotary angles; None without rotary embedding.
      sin: the sines of the rotary angles; None without rotary embedding.
      position_signal: what is added to the input of every loop; None with rotary embedding.
      positions: the position of each token in its document.
      segment_ids: the document of each token.
      mask: which of the current tokens see each other, or None if `kernel` derives it from positions and segment ids.
      past_mask: which earlier tokens of `KeyValues` each token sees. A view of a cache needs none.
      kernel: the attention kernel, or None for masks.
    """

    cos: Float[Array, "B S 1 half"] | None
    sin: Float[Array, "B S 1 half"] | None
    position_signal: Float[Array, "B S D"] | None
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    mask: Bool[Array, "B S S"] | None
    past_mask: Bool[Array, "B S C"] | None = None
    kernel: AttentionKernel | None = flax.struct.field(pytree_node=False, default=None)


def make_context(
    config: ModelConfig,
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    past_positions: Int[Array, "B C"] | None = None,
    past_segment_ids: Int[Array, "B C"] | None = None,
    *,
    kernel: AttentionKernel | None = None,
) -> Context:
    """Returns the context of tokens at `positions` of documents `segment_ids`, optionally after a cache.

    With a `kernel`, the mask of the current tokens is not created. That is for calls without a cache.
    """
    cos = sin = position_signal = None
    match config.position_signal:
        case PositionSignal.ROTARY:
            cos, sin = attention.rotary_angles(positions, config.head_width, config.rope_theta)
        case PositionSignal.SINUSOID:
            position_signal = sinusoids(positions, config.width)
    mask = None if kernel else attention.visible(positions, segment_ids, positions, segment_ids)

    past_mask = None
    if past_positions is not None and past_segment_ids is not None:
        past_mask = attention.visible(positions, segment_ids, past_positions, past_segment_ids)

    if kernel:  # kernels need whole sequences; gathered once here instead of in every layer
        positions, segment_ids = whole_sequences(positions), whole_sequences(segment_ids)

    return Context(
        cos=cos,
        sin=sin,
        position_signal=position_signal,
        positions=positions,
        segment_ids=segment_ids,
        mask=mask,
        past_mask=past_mask,
        kernel=kernel,
    )


# Layers


class Attention(nn.Module):
    """Causal grouped-query self-attention. It also returns its keys and values, for a cache.

    Attributes:
      config: the architecture.
      looped: whether the layer is one of the shared stack.
    """

    config: ModelConfig
    looped: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Context,
        past: Past | None = None,
        layer: int | Int[Array, ""] | None = None,
        asking: Float[Array, "B S D"] | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValues]:
        """Returns the output, and the keys and values of this call.

        Args:
          x: the input.
          context: the values that all layers share.
          past: earlier tokens, or None.
          layer: the index of this layer in `past`.
          asking: the input of the queries, if it is not `x`.
        """
        config = self.config
        kv_shape = (config.kv_heads, config.head_width)
        query_shape = (config.num_heads, config.head_width)

        def project(name: str, shape: tuple[int, int], heads: str, x: Array, use_bias: bool) -> Array:
            initializer = _initializer(config, name, self.looped)
            return Projection(shape, ("embed", heads, "head_dim"), initializer, use_bias=use_bias, name=name)(x)

        queries = project("query", query_shape, "heads", x if asking is None else asking, config.qk_bias)
        keys = project("key", kv_shape, "kv_heads", x, config.qk_bias)
        values = project("value", kv_shape, "kv_heads", x, False)

        # After the projection, so that keys are cached as queries read them.
        if context.cos is not None and context.sin is not None:
            queries = attention.rotate(queries, context.cos, context.sin)
            keys = attention.rotate(keys, context.cos, context.sin)
        # Names for the policies of rematerialization.
        queries, keys, values = (checkpoint_name(x, _QUERIES_KEYS_VALUES) for x in (queries, keys, values))

        own = KeyValues(keys=keys, values=values)
        mixed = _mix(queries, own, context, past, layer)
        initializer = _initializer(config, "out", self.looped)
        out = Projection((config.width,), ("heads", "head_dim", "embed"), initializer, contracted=2, name="out")(mixed)
        return out, own


def _mix(
    queries: Float[Array, "B S H Dh"],
    own: KeyValues,
    context: Context,
    past: Past | None,
    layer: int | Int[Array, ""] | None,
) -> Float[Array, "B S H Dh"]:
    """Returns attention by the kernel, or by masks to the earlier and the current tokens."""
    if context.kernel is not None:
        return self_attention(context.kernel, queries, own.keys, own.values, context.positions, context.segment_ids)
    assert context.mask is not None

    if past is None or layer is None:
        # A CPU saves the products with masked keys. An accelerator prefers one large product.
        if target_platform() == "cpu":
            mixed = attention.attend_in_blocks(queries, own.keys, own.values, context.mask)
        else:
            mixed = attention.attend(queries, (own.keys,), (own.values,), (context.mask,))
        return checkpoint_name(mixed, OUTPUT)
    return past.attend(layer, queries, own, context)


class SwiGLU(nn.Module):
    """The feed-forward layer `down(silu(gate(x)) * up(x))`.

    Attributes:
      config: the architecture.
      looped: whether the layer is one of the shared stack.
    """

    config: ModelConfig
    looped: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Applies the layer."""
        config = self.config

        def project(name: str, width: int, axes: tuple[str, str], x: Array) -> Array:
            return Projection((width,), axes, _initializer(config, name, self.looped), name=name)(x)

        gate = project("gate", config.mlp_width, ("embed", "mlp"), x)
        up = project("up", config.mlp_width, ("embed", "mlp"), x)
        out = project("down", config.width, ("mlp", "embed"), nn.silu(gate) * up)
        return checkpoint_name(out, _MLP_OUTPUT)


def _initializer(config: ModelConfig, name: str, looped: bool) -> nn.initializers.Initializer:
    """Returns the initializer of the matrix `name` of a layer.

    Huginn divides what adds to the state by a square root of the depth (arXiv 2502.05171); DeepLoop multiplies all but
    queries and keys of the looped layers (arXiv 2607.13491).
    """
    factor = 1.0
    if config.initializer is Initializer.SCALED_BY_DEPTH and name in ("out", "up", "down"):
        factor /= math.sqrt(2 * config.unrolled_depth)
    if config.residual is Residual.DEEP_LOOP and looped and name not in ("query", "key"):
        factor /= math.sqrt(8 * config.loops * config.num_layers)
    return matrix_initializer(config, factor)


@flax.struct.dataclass
class Queries:
    """The source of the queries of all layers of a loop, if it is not their own input (injection `query`).

    Attributes:
      state: the state after the previous loop.
      first: where loop 1 runs, which has no earlier state: there, queries come from the input of each layer.
    """

    state: Float[Array, "B S D"]
    first: Bool[Array, "B 1 1"]

    def of(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the source of the queries of a layer with the input `x`."""
        return jnp.where(self.first, x, self.state)


class Block(nn.Module):
    """One layer: attention and SwiGLU as residual branches, with the norms of `config.norm_placement`.

    Attributes:
      config: the architecture.
      return_cache: whether to return keys and values.
      looped: whether the layer is one of the shared stack, whose sums have the weights of `config.residual`.
    """

    config: ModelConfig
    return_cache: bool = False
    looped: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        layer: int | Int[Array, ""] | None,
        past: Past | None,
        context: Context,
        queries: Queries | None = None,
        time: Float[Array, "b D"] | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
        """Returns the output, and keys and values if `return_cache`.

        Args:
          x: the state.
          layer: the index of this layer in `past`.
          past: earlier tokens, or None.
          context: the values that all layers share.
          queries: the source of the queries, or None for the input of the layer.
          time: the embedding of the time of the loop, for modulation, or None.
        """
        x = checkpoint_name(x, _LAYER_INPUT)
        modulated = None if time is None else Modulation(name="modulation")(time.astype(x.dtype))
        attention_gate, mlp_gate, attention_scale, mlp_scale = modulated or LayerTime()

        # The norm is the same module for both, so it has one weight.
        norm = self._before("attention_norm", attention_scale)
        asking = None if queries is None else norm(queries.of(x))
        attend = Attention(self.config, self.looped, name="attention")
        mixed, own = attend(norm(x), context, past, layer, asking)
        x = self._sum("attention_post_norm", x, mixed, attention_gate)

        transform = SwiGLU(self.config, self.looped, name="mlp")
        x = self._sum("mlp_post_norm", x, transform(self._before("mlp_norm", mlp_scale)(x)), mlp_gate)

        # Without it, XLA would choose a sharding of the state for each layer.
        x = nn.with_logical_constraint(x, ("batch", "sequence", "embed_activation"))
        return x, own if self.return_cache else None

    def _before(
        self, name: str, scale: Float[Array, "b 1 D"] | None
    ) -> Callable[[Float[Array, "B S D"]], Float[Array, "B S D"]]:
        """Returns what is before a branch: its norm, and the scale of a modulated layer."""
        plain = self.config.norm_placement is NormPlacement.POST
        norm = (lambda x: x) if plain else RMSNorm(self.config.norm_eps, name=name)
        return norm if scale is None else lambda x: (1.0 + scale) * norm(x)

    def _sum(
        self, name: str, x: Float[Array, "B S D"], branch: Float[Array, "B S D"], gate: Float[Array, "b 1 D"] | None
    ) -> Float[Array, "B S D"]:
        """Returns the sum of the state and a branch, which a modulated layer gates, with the norm after it."""
        placement, eps = self.config.norm_placement, self.config.norm_eps
        if placement is NormPlacement.SANDWICH:
            branch = RMSNorm(eps, self.config.second_norm_init, name=name)(branch)
        if gate is not None:
            branch = gate * branch

        skip, weight = self.config.residual_weights if self.looped else (1.0, 1.0)
        # Weights of 1 are no products, so that plain residuals compile as if there were no weights.
        total = (x if skip == 1 else skip * x) + (branch if weight == 1 else weight * branch)

        outside = placement in (NormPlacement.POST, NormPlacement.OUTER)
        return RMSNorm(eps, name=name)(total) if outside else total


class Stack(nn.Module):
    """A sequence of `length` blocks.

    Their parameters are stacked along a leading layer axis, unless the stack is `unrolled`. Then each layer has
    separate arrays (`unroll_layers`), which a decoder on a CPU reads without copying them first.

    Attributes:
      config: the architecture.
      length: the number of layers.
      remat: what the backward pass recomputes.
      unrolled: whether each layer has separate arrays.
      looped: whether this is the shared stack.
    """

    config: ModelConfig
    length: int
    remat: Remat = Remat.NONE
    unrolled: bool = False
    looped: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        context: Context,
        past: Past | None = None,
        return_cache: bool = False,
        queries: Queries | None = None,
        time: Float[Array, "b D"] | None = None,
    ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
        """Applies all layers. The returned keys and values have a leading layer axis."""
        if self.unrolled:
            return self._one_by_one(x, context, past, return_cache, queries, time)

        layers = nn.scan(
            _rematted(self.remat),
            variable_axes={"params": 0, GATHERED: 0},
            split_rngs={"params": True},
            # The index of the layer is scanned; all layers share the rest.
            in_axes=(0, *[nn.broadcast] * 4),
            length=self.length,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # layers share nothing, and the check would trace them twice
        )

        # Only `past` needs the index of the layer.
        numbers = None if past is None else jnp.arange(self.length)
        return layers(self.config, return_cache, self.looped, name="layers")(x, numbers, past, context, queries, time)

    def _one_by_one(
        self,
        x: Float[Array, "B S D"],
        context: Context,
        past: Past | None,
        return_cache: bool,
        queries: Queries | None,
        time: Float[Array, "b D"] | None,
    ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
        """Applies the layers of an unrolled stack. Does not create parameters."""
        block = Block(self.config, return_cache, self.looped, parent=None)

        # All layers share this function, so that one of them is traced and lowered, and not all.
        @jax.jit
        def layer(
            params: Any, x: Float[Array, "B S D"], number: Int[Array, ""], past: Past | None, context: Context
        ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
            applied: Any = block.apply({"params": params}, x, number, past, context, queries, time)
            output, own = applied
            return output, own

        caches = []
        for number in range(self.length):
            params: Any = self.get_variable("params", f"layer_{number}")
            x, own = layer(params, x, jnp.int32(number), past, context)
            caches.append(own)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches) if return_cache else None


def unroll_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters for `unrolled` stacks: separate arrays for each layer instead of stacked ones."""
    return {
        name: _one_tree_a_layer(value["layers"]) if isinstance(value, dict) and "layers" in value else value
        for name, value in params.items()
    }


@jax.jit
def _one_tree_a_layer(stacked: dict[str, Any]) -> dict[str, Any]:
    """Returns one tree of parameters per layer from stacked parameters."""
    length = jax.tree.leaves(stacked)[0].shape[0]
    return {f"layer_{number}": jax.tree.map(lambda x, at=number: x[at], stacked) for number in range(length)}


# Rematerialization


def _rematted(remat: Remat) -> type[Block]:
    """Returns the block with the given rematerialization."""
    if remat is Remat.LAYER:
        return nn.remat(Block, prevent_cse=False)

    policies = jax.checkpoint_policies
    if remat is Remat.DOTS:
        # Attention has products too, which the policy of dots does not save.
        kernel = policies.save_only_these_names(OUTPUT)
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kernel)
        return nn.remat(Block, prevent_cse=False, policy=policy)

    if remat in _SAVED:
        return nn.remat(Block, prevent_cse=False, policy=policies.save_only_these_names(*_SAVED[remat]))
    if remat is Remat.OFFLOAD:
        return nn.remat(Block, prevent_cse=False, policy=_offloaded())
    return Block


def _offloaded() -> Callable[..., Any] | None:
    """Returns a policy that keeps the inputs of layers in host memory.

    On a CPU it is None, because the inputs are in host memory already.
    """
    if target_platform() == "cpu":
        return None
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )
