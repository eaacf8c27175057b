"""LoopLM: embed, then one shared stack applied T times, with a head and an exit gate after every loop (paper,
section 3.1).

    h = E[tokens]
    for t in 1..T:  h = RMS(stack(h));  hidden[t] = h;  gate[t] = h . w + b

The final norm is inside the loop: its output feeds the head, the gate and the next loop. A prelude runs once before the
loops. A coda runs on the way from every loop's state to its head and gate; the next loop does not see it.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from looplm_jax.config import ComputeConfig, Dtype, Injection, ModelConfig, Remat
from looplm_jax.errors import UserError
from looplm_jax.models import gathered
from looplm_jax.models.attention_kernels import choose_kernel
from looplm_jax.models.blocks import Context, KeyValues, Past, RMSNorm, Stack, make_context, parameter
from looplm_jax.sharding import target_platform, whole_length

_STACKS = ("prelude", "core", "coda")
UNCAST = ("gate",)  # groups of parameters that no pass casts to the dtype of its products: probabilities come of them
_IN_PRODUCTS = (*_STACKS, "injection")
Params = dict[str, Any]  # nested, by the names of modules; leaves are arrays


@flax.struct.dataclass
class LoopLMOutput:
    """States and gate logits of every loop; logits are `hidden[t] @ head_matrix(...)`."""

    hidden: Float[Array, "T B S D"]
    gate_logits: Float[Array, "T B S"]


@flax.struct.dataclass
class ModelCache:
    """Keys and values of every layer: those of the prelude once, those of core and coda for each loop (leading T)."""

    core: KeyValues
    prelude: KeyValues | None = None
    coda: KeyValues | None = None


@flax.struct.dataclass
class LoopOutput:
    """What one loop gives: the state that the next loop starts from, what the head reads, and the gate."""

    state: Float[Array, "B S D"]
    hidden: Float[Array, "B S D"]
    gate_logits: Float[Array, "B S"]


class LoopLM(nn.Module):
    """A looped language model. `init_params` makes its parameters; `head_matrix` finds its head among them.

    `unrolled` runs on parameters that `unroll_layers` made.
    """

    config: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    unrolled: bool = False

    def setup(self) -> None:
        """Declare the parameters."""
        config, remat = self.config, self.compute.remat
        normal = nn.initializers.normal(config.init_std)
        self.embedding = parameter(self, "embedding", normal, ("vocab", "embed"), (config.vocab_size, config.width))
        if config.prelude_layers:
            self.prelude = Stack(config, config.prelude_layers, remat, self.unrolled)
        self.core = Stack(config, config.num_layers, remat, self.unrolled)
        self.norm = RMSNorm(config.norm_eps)
        if config.injection is Injection.LINEAR:
            shape = (2 * config.width, config.width)
            self.injection = parameter(self, "injection", _starts_as_add, ("embed_in", "embed"), shape)
        if config.coda_layers:
            self.coda = Stack(config, config.coda_layers, remat, self.unrolled)
            self.coda_norm = RMSNorm(config.norm_eps)
        self.gate = ExitGate(config.init_std)
        if not config.tied_head:
            self.head = parameter(self, "head", normal, ("embed", "vocab"), (config.width, config.vocab_size))

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        loops: int | None = None,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> LoopLMOutput:
        """States and gate logits after each of `loops` loops (default: `config.loops`).

        Args:
          tokens: token ids.
          loops: any number from 1 up, also beyond the depth that was trained.
          positions: place of each token in its document; default: its column.
          segment_ids: document of each token; tokens see their own document only. Default: one document a row.
        """
        output, _ = self.prefill(tokens, loops=loops, positions=positions, segment_ids=segment_ids, return_cache=False)
        return output

    def prefill(
        self,
        tokens: Int[Array, "B S"],
        *,
        loops: int | None = None,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        return_cache: bool = True,
    ) -> tuple[LoopLMOutput, ModelCache | None]:
        """The forward pass, and the keys and values of all its layers and loops when `return_cache`."""
        loops = self.config.loops if loops is None else loops
        _check_call(self.config, tokens, loops)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        kernel = choose_kernel(
            self.compute,
            length=whole_length(tokens.shape[1]),
            head_width=self.config.head_width,
            dtype=compute_dtype(self.compute),
        )
        context = make_context(self.config, positions, segment_ids, kernel=kernel)
        embedded, prelude_cache = self.embed(tokens, context, return_cache=return_cache)

        def loop(model: LoopLM, state: Array, _: None) -> tuple[Array, PyTree]:
            output, core_cache, coda_cache = model.loop_step(state, embedded, context, return_cache=return_cache)
            return output.state, (output.hidden, output.gate_logits, core_cache, coda_cache)

        if self.compute.remat is Remat.LOOP:
            loop = nn.remat(loop, prevent_cse=False)
        shared = ["params", gathered.COLLECTION]
        scan = nn.scan(
            loop,
            variable_broadcast=shared,
            split_rngs={"params": False},
            length=loops,
            # Flax traces the loop twice to check that its parameters are the same in all loops, which only those can
            # violate that are made in it.
            check_constancy_invariants=self.is_initializing(),
        )
        _, (hidden, gate_logits, core_cache, coda_cache) = scan(self, self.initial_state(embedded), None)
        cache = ModelCache(core=core_cache, prelude=prelude_cache, coda=coda_cache) if return_cache else None
        return LoopLMOutput(hidden=hidden, gate_logits=gate_logits), cache

    def embed(
        self,
        tokens: Int[Array, "B S"],
        context: Context,
        past: Past | None = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
        """Token embeddings, through the prelude if there is one."""
        # Whole rows of the table: from parts of rows the partitioner would gather parts of what no one wants.
        table = nn.with_logical_constraint(self.embedding, ("vocab", "embed_activation"))
        x = jnp.take(table, tokens, axis=0).astype(compute_dtype(self.compute))
        x = nn.with_logical_constraint(x, ("batch", "sequence", "embed_activation"))
        if not self.config.prelude_layers:
            return x, None
        return self.prelude(x, context, past, return_cache)

    def head_weights(self) -> Float[Array, "D V"]:
        """Returns the matrix from hidden states to logits, or the gathered copy that came with it."""
        return self.embedding.T if self.config.tied_head else self.head

    def initial_state(self, embedded: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What loop 1 starts from: the embedded input, or zero where injection adds it in every loop."""
        return embedded if self.config.injection is Injection.NONE else jnp.zeros_like(embedded)

    def loop_step(
        self,
        state: Float[Array, "B S D"],
        embedded: Float[Array, "B S D"],
        context: Context,
        core_past: Past | None = None,
        coda_past: Past | None = None,
        return_cache: bool = False,
    ) -> tuple[LoopOutput, KeyValues | None, KeyValues | None]:
        """One loop over the shared stack, with the keys and values of core and coda when `return_cache`."""
        state, core_cache = self.core(self._inject(state, embedded), context, core_past, return_cache)
        state = self.norm(state)
        hidden, coda_cache = state, None
        if self.config.coda_layers:
            hidden, coda_cache = self.coda(state, context, coda_past, return_cache)
            hidden = self.coda_norm(hidden)
        output = LoopOutput(state=state, hidden=hidden, gate_logits=self.gate(hidden))
        return output, core_cache, coda_cache

    def _inject(self, state: Float[Array, "B S D"], embedded: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        match self.config.injection:
            case Injection.NONE:
                return state
            case Injection.ADD:
                return state + embedded
            case Injection.LINEAR:
                return jnp.concatenate([state, embedded], axis=-1) @ self.injection.astype(state.dtype)


class ExitGate(nn.Module):
    """`h @ w + b`: one scalar per token, in float32 because probabilities are made of it."""

    init_std: float

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Gate logits of every token."""
        normal = nn.initializers.normal(self.init_std)
        weight = parameter(self, "kernel", normal, ("embed_in",), (hidden.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.zeros, ("norm",), (1,))
        return hidden.astype(jnp.float32) @ weight.astype(jnp.float32) + bias[0].astype(jnp.float32)


def compute_dtype(compute: ComputeConfig) -> jnp.dtype:
    """The type of the matrix products; `auto` asks what the program will run on."""
    if compute.dtype is Dtype.AUTO:
        return jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)
    return jnp.dtype(compute.dtype.value)


def gather_stacks(model: LoopLM, params: Params) -> Params:
    """Copies of the parameters of all stacks in the type of the matrix products, whole but for `tensor`.

    They go to `LoopLM.apply` as the collection `gathered`, for programs that run many loops on one set of parameters.
    """
    stacks = {name: value for name, value in params.items() if name in _STACKS}
    axes = parameter_axes(model.config)
    return gathered.gather(stacks, {name: axes[name] for name in stacks}, compute_dtype(model.compute))


def parameter_axes(config: ModelConfig) -> PyTree:
    """Returns the logical names of the axes of every parameter."""
    return cast(PyTree, nn.get_partition_spec(boxed_shapes(config)))


def copy_dtypes(model: LoopLM) -> PyTree:
    """Returns the type that the model uses each parameter in, of those in one array for all layers.

    Embedding and head are in float32: their gradients are sums over all tokens, made in float32.
    """
    matrices = compute_dtype(model.compute)
    return {
        name: jax.tree.map(lambda _, own=matrices if name in _IN_PRODUCTS else jnp.float32: jnp.dtype(own), group)
        for name, group in nn.meta.unbox(boxed_shapes(model.config)).items()
    }


def head_matrix(params: Params, config: ModelConfig) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits: the head, or the transposed embedding where they are tied."""
    return params["embedding"].T if config.tied_head else params["head"]


def init_params(model: LoopLM, key: PRNGKeyArray) -> Params:
    """Initial float32 parameters as plain arrays (Normal(0, 0.02); ones for norms; zero for the gate's bias)."""
    return _initializer(model.config)(key)


@functools.lru_cache(maxsize=8)
def _initializer(config: ModelConfig) -> Callable[[PRNGKeyArray], Params]:
    return jax.jit(lambda key: nn.meta.unbox(boxed_params(LoopLM(config), key)))


def boxed_params(model: LoopLM, key: PRNGKeyArray) -> PyTree:
    """Initial parameters, each boxed with the logical names of its axes."""
    plain = LoopLM(model.config)  # a rematted loop would hand back scalars as NumPy arrays
    return plain.init(key, jnp.zeros((1, 1), jnp.int32), loops=1)["params"]


@functools.lru_cache(maxsize=64)
def boxed_shapes(config: ModelConfig) -> PyTree:
    """The same as shapes, without making any. Kept: to trace the model takes longer than what is done with them."""
    return jax.eval_shape(lambda: boxed_params(LoopLM(config), jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    """Number of parameters, exact, without making any."""
    return sum(leaf.size for leaf in jax.tree.leaves(boxed_shapes(config)))


def _starts_as_add(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    del key
    identity = jnp.eye(shape[1], dtype=dtype)
    return jnp.concatenate([identity, identity])


def _check_call(config: ModelConfig, tokens: Int[Array, "B S"], loops: int) -> None:
    if loops < 1:
        raise UserError(f"loops must be at least 1, not {loops}")
    length = whole_length(tokens.shape[1])
    if length > config.max_positions:
        raise UserError(f"{length} tokens are beyond model.max_positions={config.max_positions}")
