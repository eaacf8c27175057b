"""LoopLM embeds tokens and applies one shared stack T times, with a head and an exit gate after every loop.

    h = E[tokens]
    for t in 1..T:  h = RMS(stack(h));  hidden[t] = h;  gate[t] = h . w + b

(Paper, section 3.1.) The final norm is inside the loop: its output feeds the head, the gate and the next loop. A
prelude runs once before the loops. A coda runs between the state of every loop and its head and gate; the next loop
does not see its output. With all options of `ModelConfig`, a loop is

    x = stack(inject(h, e) + signal[t]);  h = x or N(x);  hidden[t] = N(coda(N(x)))

where `e` is the embedded input after the prelude. `LoopLM.loop_step` is the only place where a loop is written.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from looplm_jax.config import (
    ComputeConfig,
    Dtype,
    GatePlacement,
    Initializer,
    InitialState,
    Injection,
    ModelConfig,
    Remat,
    StateNorm,
    TimeSignal,
)
from looplm_jax.errors import UserError
from looplm_jax.models._attention_kernels import choose_kernel
from looplm_jax.models._blocks import Context, KeyValues, Past, Queries, Stack, make_context
from looplm_jax.models._injection import DIAGONAL, DiagonalInjection, starts_as_add, truncated_noise
from looplm_jax.models._modulation import TIME_EMBEDDING, LoopTime, TimeEmbedding
from looplm_jax.models._parameters import GATHERED, RMSNorm, gather, matrix_initializer, parameter
from looplm_jax.models._signals import sinusoids
from looplm_jax.sharding import target_platform, whole_length

# Top-level groups of parameters.
_STACKS = ("prelude", "core", "coda")
# Groups that are never cast to the dtype of the matrix products: probabilities, decays close to 1, and times depend on
# them.
UNCAST = ("gate", DIAGONAL, TIME_EMBEDDING)
# Used only in matrix products, and therefore gathered in their dtype.
_IN_PRODUCTS = (*_STACKS, "injection")
# The gate logit of a model without a gate: the probability of an exit before the last loop is zero.
_NEVER = -1e4

Params = dict[str, Any]
"""The parameters of a model: nested dictionaries by the names of modules, with arrays as leaves."""


@flax.struct.dataclass
class LoopLMOutput:
    """The states and gate logits of every loop. Logits are `hidden[t] @ head_matrix(...)`.

    `state` has the states from which the next loops start, before coda and readout norm, if they were asked for.
    """

    hidden: Float[Array, "T B S D"]
    gate_logits: Float[Array, "T B S"]
    state: Float[Array, "T B S D"] | None = None


@flax.struct.dataclass
class ModelCache:
    """Keys and values of every layer: of the prelude once, of core and coda for each loop (leading axis T)."""

    core: KeyValues
    prelude: KeyValues | None = None
    coda: KeyValues | None = None


@flax.struct.dataclass
class LoopOutput:
    """The output of one loop.

    Attributes:
      state: the state from which the next loop starts.
      hidden: the state that the head reads.
      gate_logits: the exit gate before its sigmoid.
    """

    state: Float[Array, "B S D"]
    hidden: Float[Array, "B S D"]
    gate_logits: Float[Array, "B S"]


class LoopLM(nn.Module):
    """A looped language model.

    `init_params` initializes its parameters, and `head_matrix` returns its head.

    Attributes:
      config: the architecture.
      compute: how it is computed.
      unrolled: whether the parameters are those of `unroll_layers`, with separate arrays for each layer.
      call_loops: the number of loops of a call, of which `loop_step` runs one; 0 means `config.loops`. Only modulation
        depends on it (`for_calls`).
    """

    config: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    unrolled: bool = False
    call_loops: int = 0

    def setup(self) -> None:
        """Declares the parameters."""
        config, remat = self.config, self.compute.remat
        matrix = matrix_initializer(config)

        self.embedding = parameter(self, "embedding", matrix, ("vocab", "embed"), (config.vocab_size, config.width))
        if config.prelude_layers:
            self.prelude = Stack(config, config.prelude_layers, remat, self.unrolled)

        self.core = Stack(config, config.num_layers, remat, self.unrolled, looped=True)
        self.norm = RMSNorm(config.norm_eps)

        self._setup_input(matrix)

        if config.coda_layers:
            self.coda = Stack(config, config.coda_layers, remat, self.unrolled)
            if not config.shared_readout_norm:
                self.coda_norm = RMSNorm(config.norm_eps)

        # The gate and the head read the state after the coda, if there is one.
        if config.gate is not GatePlacement.NONE:
            self.gate = ExitGate(config.init_std, config.gate_bias)
        if not config.tied_head:
            self.head = parameter(self, "head", matrix, ("embed", "vocab"), (config.width, config.vocab_size))

    @nn.nowrap
    def _setup_input(self, matrix: nn.initializers.Initializer) -> None:
        """Declares the parameters between the state and the input of a loop."""
        config = self.config
        if config.injection is Injection.LINEAR:
            drawn = config.initializer is Initializer.SCALED_BY_DEPTH
            shape = (2 * config.width, config.width)
            initializer = matrix if drawn else starts_as_add
            self.injection = parameter(self, "injection", initializer, ("embed_in", "embed"), shape)
        if config.injection is Injection.DIAGONAL:
            self.diagonal_injection = DiagonalInjection()
        if config.injection_norm:
            self.injection_norm = RMSNorm(config.norm_eps)
        match config.time_signal:
            case TimeSignal.LEARNED:
                # Rows of the published size, D^-1/2, which `_signals` multiplies by D^1/2.
                rows = nn.initializers.normal(config.width**-0.5)
                shape = (config.time_rows, config.width)
                self.time_table = parameter(self, "time_table", rows, ("norm", "embed"), shape)
            case TimeSignal.MODULATION:
                self.time_embedding = TimeEmbedding(config.width, matrix)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        loops: int | None = None,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        noise_seeds: UInt32[Array, "B S"] | None = None,
        state_noise: float = 0.0,
        token_numbers: Int[Array, "B S"] | None = None,
        return_state: bool = False,
    ) -> LoopLMOutput:
        """Returns states and gate logits after each loop.

        Args:
          tokens: the token ids.
          loops: the number of loops, from 1 up and possibly larger than the trained depth; by default `config.loops`.
          positions: the position of each token in its document; by default its position in the sequence.
          segment_ids: the document of each token. Tokens see only their own document. By default a sequence is one
            document.
          noise_seeds: the seed of the noise from which the state of each token starts, if it starts from noise; by
            default it starts at zero.
          state_noise: the standard deviation of Gaussian noise that is added to the state after every loop. It needs
            the random key `noise`, in `rngs`.
          token_numbers: a number for each token, from which and the key its noise follows. By default tokens are
            counted, row by row. With those of a whole batch, its parts have the noise that they have in the batch.
          return_state: whether to return the states before coda and readout norm too.
        """
        output, _ = self.prefill(
            tokens,
            loops=loops,
            positions=positions,
            segment_ids=segment_ids,
            noise_seeds=noise_seeds,
            return_cache=False,
            state_noise=state_noise,
            token_numbers=token_numbers,
            return_state=return_state,
        )
        return output

    def prefill(
        self,
        tokens: Int[Array, "B S"],
        *,
        loops: int | None = None,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        noise_seeds: UInt32[Array, "B S"] | None = None,
        return_cache: bool = True,
        state_noise: float = 0.0,
        token_numbers: Int[Array, "B S"] | None = None,
        return_state: bool = False,
    ) -> tuple[LoopLMOutput, ModelCache | None]:
        """Returns the output of the forward pass, and the keys and values of all layers and loops if `return_cache`.

        Arguments as in `__call__`.
        """
        loops = self.config.loops if loops is None else loops
        _check_call(self.config, tokens, loops)
        numbers = token_numbers
        if numbers is None:
            numbers = jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)
        context, embedded, prelude_cache = self.begin(
            tokens, positions=positions, segment_ids=segment_ids, return_cache=return_cache
        )

        def loop(model: LoopLM, state: Array, done: Int[Array, ""]) -> tuple[Array, PyTree]:
            noise = None
            if state_noise:
                draws = _token_normals(model.make_rng("noise"), numbers, state.shape[-1])
                noise = (state_noise * draws).astype(state.dtype)
            output, core_cache, coda_cache = model.loop_step(
                state, embedded, context, done, return_cache=return_cache, noise=noise, time=LoopTime.even(done, loops)
            )
            kept = output.state if return_state else None
            return output.state, (output.hidden, output.gate_logits, kept, core_cache, coda_cache)

        # Inside a scan, XLA cannot merge the recomputation with the original, so it needs no barrier (`prevent_cse`).
        if self.compute.remat is Remat.LOOP:
            loop = nn.remat(loop, prevent_cse=False)

        # All loops use the same parameters and gathered copies.
        shared = ["params", GATHERED]
        scan = nn.scan(
            loop,
            variable_broadcast=shared,
            split_rngs={"params": False, "noise": True},  # every loop has noise of its own
            length=loops,
            # Flax traces the loop twice to check that its parameters are the same in all loops. Only parameters that
            # are created inside it can violate this, so the check is for initialization only.
            check_constancy_invariants=self.is_initializing(),
        )

        start = self.initial_state(embedded, noise_seeds)
        _, (hidden, gate_logits, states, core_cache, coda_cache) = scan(self, start, jnp.arange(loops, dtype=jnp.int32))

        cache = ModelCache(core=core_cache, prelude=prelude_cache, coda=coda_cache) if return_cache else None
        return LoopLMOutput(hidden=hidden, gate_logits=gate_logits, state=states), cache

    def begin(
        self,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        return_cache: bool = False,
    ) -> tuple[Context, Float[Array, "B S D"], KeyValues | None]:
        """Returns what all loops share: the context and the embedded input; and the prelude's cache if `return_cache`.

        Arguments as in `__call__`.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)

        # One kernel for all layers and loops: their shapes are the same.
        kernel = choose_kernel(
            self.compute,
            length=whole_length(tokens.shape[1]),
            head_width=self.config.head_width,
            dtype=compute_dtype(self.compute),
        )
        context = make_context(self.config, positions, segment_ids, kernel=kernel)

        embedded, prelude_cache = self.embed(tokens, context, return_cache=return_cache)
        return context, embedded, prelude_cache

    def embed(
        self,
        tokens: Int[Array, "B S"],
        context: Context,
        past: Past | None = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
        """Returns the token embeddings, after the prelude if there is one.

        Also returns keys and values of the prelude if `return_cache`.
        """
        # Rows of the table are not sharded for the lookup: with sharded rows the partitioner would gather parts of rows
        # that are not needed.
        table = nn.with_logical_constraint(self.embedding, ("vocab", "embed_activation"))

        x = jnp.take(table, tokens, axis=0).astype(compute_dtype(self.compute))
        if self.config.embedding_scale != 1:
            x = self.config.embedding_scale * x
        x = nn.with_logical_constraint(x, ("batch", "sequence", "embed_activation"))

        if not self.config.prelude_layers:
            return x, None
        return self.prelude(x, context, past, return_cache)

    def head_weights(self) -> Float[Array, "D V"]:
        """Returns the matrix from hidden states to logits, or the gathered copy that was passed with it."""
        return self.embedding.T if self.config.tied_head else self.head

    def initial_state(
        self, embedded: Float[Array, "B S D"], noise_seeds: UInt32[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """Returns the state before loop 1. Noise without seeds is zero, its mean."""
        config = self.config
        if config.initial_state is InitialState.NOISE and noise_seeds is not None:
            return truncated_noise(noise_seeds, config.width, config.state_std, embedded.dtype)

        # With injection, loop 1 already receives the input from it.
        return embedded if config.injection is Injection.NONE else jnp.zeros_like(embedded)

    def loop_step(
        self,
        state: Float[Array, "B S D"],
        embedded: Float[Array, "B S D"],
        context: Context,
        done: Int[ArrayLike, "*B"],
        core_past: Past | None = None,
        coda_past: Past | None = None,
        return_cache: bool = False,
        noise: Float[Array, "B S D"] | None = None,
        damping: float = 1.0,
        time: LoopTime | None = None,
    ) -> tuple[LoopOutput, KeyValues | None, KeyValues | None]:
        """Runs one loop of the shared stack.

        Returns its output, and keys and values of core and coda if `return_cache`.

        Args:
          state: the state after the previous loop.
          embedded: the embedded input, for injection.
          context: the values that all layers share.
          done: the loops that ran before this one, of all sequences or of each.
          core_past: earlier tokens in the layers of the core, or None.
          coda_past: earlier tokens in the layers of the coda, or None.
          return_cache: whether to return keys and values.
          noise: added to the state after the loop, or None.
          damping: the weight of the new state. That of the old one is `1 - damping`.
          time: the time of the loop, which modulates layers; by default that of equal steps in a call with `call_loops`
            loops.
        """
        config = self.config
        done = jnp.asarray(done, jnp.int32)

        entering = self._inject(state, embedded)
        for signal in self._signals(context, done, state):
            entering = entering + signal.astype(state.dtype)

        queries = None
        if config.injection is Injection.QUERY:
            queries = Queries(state=state, first=jnp.broadcast_to(done == 0, state.shape[:1])[:, None, None])
        embedded_time = None
        if config.time_signal is TimeSignal.MODULATION:
            embedded_time = self.time_embedding(time or LoopTime.even(done, self.call_loops or config.loops))

        old = state
        left, core_cache = self.core(entering, context, core_past, return_cache, queries, embedded_time)

        state = self.norm(left) if config.state_norm is StateNorm.EVERY_LOOP else left
        if damping != 1:
            state = damping * state + (1.0 - damping) * old
        # Before the gate, the head and the next loop, all of which read the noisy state.
        if noise is not None:
            state = state + noise
        hidden, coda_cache = self.read_out(state, context, coda_past, return_cache)

        match config.gate:
            case GatePlacement.AFTER:
                gate_logits = self.gate(hidden)
            case GatePlacement.BEFORE:
                gate_logits = self.gate(entering)
            case GatePlacement.NONE:
                gate_logits = jnp.full(hidden.shape[:-1], _NEVER, jnp.float32)

        return LoopOutput(state=state, hidden=hidden, gate_logits=gate_logits), core_cache, coda_cache

    def read_out(
        self,
        state: Float[Array, "B S D"],
        context: Context,
        coda_past: Past | None = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "B S D"], KeyValues | None]:
        """Returns what the head reads of the state after a loop, and the cache of the coda if `return_cache`.

        Arguments as in `loop_step`.
        """
        config = self.config
        normal = state if config.state_norm is StateNorm.EVERY_LOOP else self.norm(state)
        if not config.coda_layers:
            return normal, None

        # The next loop starts from the state before the coda.
        hidden, coda_cache = self.coda(normal, context, coda_past, return_cache)
        return self.norm(hidden) if config.shared_readout_norm else self.coda_norm(hidden), coda_cache

    def _inject(self, state: Float[Array, "B S D"], embedded: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the state, combined with the embedded input."""
        if self.config.injection_norm:
            embedded = self.injection_norm(embedded)

        match self.config.injection:
            case Injection.NONE:
                return state
            case Injection.ADD:
                return state + embedded
            case Injection.LINEAR:
                return jnp.concatenate([state, embedded], axis=-1) @ self.injection.astype(state.dtype)
            case Injection.DIAGONAL:
                return self.diagonal_injection(state, embedded)
            case Injection.QUERY:
                return embedded  # the state enters as the source of queries

    def _signals(
        self, context: Context, done: Int[Array, "*B"], state: Float[Array, "B S D"]
    ) -> Iterator[Float[Array, "B _ D"]]:
        """Yields what is added to the input of a loop: positions, and the number of the loop."""
        config = self.config
        if context.position_signal is not None:
            yield context.position_signal

        numbers = jnp.broadcast_to(done, state.shape[:1])[:, None]
        match config.time_signal:
            case TimeSignal.SINUSOID:
                yield sinusoids(numbers, config.width)
            case TimeSignal.LEARNED:
                yield config.width**0.5 * jnp.take(self.time_table, numbers, axis=0)


class ExitGate(nn.Module):
    """The exit gate `h @ w + b`: one scalar per token, in float32 because probabilities are computed from it."""

    init_std: float
    initial_bias: float = 0.0

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """Returns the gate logit of every token."""
        normal = nn.initializers.normal(self.init_std)
        weight = parameter(self, "kernel", normal, ("embed_in",), (hidden.shape[-1],))
        bias = parameter(self, "bias", nn.initializers.constant(self.initial_bias), ("norm",), (1,))
        return hidden.astype(jnp.float32) @ weight.astype(jnp.float32) + bias[0].astype(jnp.float32)


# Computation


def compute_dtype(compute: ComputeConfig) -> jnp.dtype:
    """Returns the dtype of the matrix products. `auto` depends on the platform that the program will run on."""
    if compute.dtype is Dtype.AUTO:
        return jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)
    return jnp.dtype(compute.dtype.value)


def _token_normals(key: PRNGKeyArray, token_numbers: Int[Array, "B S"], width: int) -> Float[Array, "B S D"]:
    """Returns normal draws in float32 that depend only on the key and the number of each token.

    They are therefore the same on any mesh and for any number of microbatches.
    """

    def of_token(number: Int[Array, ""]) -> Float[Array, "D"]:
        return jax.random.normal(jax.random.fold_in(key, number), (width,), jnp.float32)

    return jax.vmap(jax.vmap(of_token))(token_numbers)


def gather_stacks(model: LoopLM, params: Params) -> Params:
    """Returns copies of the parameters of all stacks in the dtype of the matrix products, sharded only along `tensor`.

    They are passed to `LoopLM.apply` as the collection `gathered`, in programs that run many loops with the same
    parameters.
    """
    stacks = {name: value for name, value in params.items() if name in _STACKS}
    axes = parameter_axes(model.config)
    return gather(stacks, {name: axes[name] for name in stacks}, compute_dtype(model.compute))


def parameter_axes(config: ModelConfig) -> PyTree:
    """Returns the logical names of the axes of every parameter."""
    return cast(PyTree, nn.get_partition_spec(boxed_shapes(config)))


def copy_dtypes(model: LoopLM) -> PyTree:
    """Returns the dtype in which the model uses each parameter, for parameters with stacked layers.

    Embedding and head are float32, because their gradients are sums over all tokens, computed in float32.
    """
    matrices = compute_dtype(model.compute)
    return {
        name: jax.tree.map(lambda _, own=matrices if name in _IN_PRODUCTS else jnp.float32: jnp.dtype(own), group)
        for name, group in nn.meta.unbox(boxed_shapes(model.config)).items()
    }


# Parameters


def head_matrix(params: Params, config: ModelConfig) -> Float[Array, "D V"]:
    """Returns the matrix from hidden states to logits: the head, or the transposed embedding if they are tied."""
    return params["embedding"].T if config.tied_head else params["head"]


def init_params(model: LoopLM, key: PRNGKeyArray) -> Params:
    """Returns initial float32 parameters: Normal(0, init_std), ones for norms, zero for the bias of the gate."""
    return _initializer(model.config)(key)


@functools.lru_cache(maxsize=8)
def _initializer(config: ModelConfig) -> Callable[[PRNGKeyArray], Params]:
    """Returns the compiled initializer of a configuration, from a cache."""
    return jax.jit(lambda key: nn.meta.unbox(boxed_params(LoopLM(config), key)))


def boxed_params(model: LoopLM, key: PRNGKeyArray) -> PyTree:
    """Returns initial parameters, each boxed with the logical names of its axes."""
    plain = LoopLM(model.config)  # a rematerialized loop would return scalars as NumPy arrays
    return plain.init(key, jnp.zeros((1, 1), jnp.int32), loops=1)["params"]


@functools.lru_cache(maxsize=64)
def boxed_shapes(config: ModelConfig) -> PyTree:
    """Returns the shapes and dtypes of `boxed_params` without allocating arrays.

    They are cached, because tracing the model takes longer than using them.
    """
    return jax.eval_shape(lambda: boxed_params(LoopLM(config), jax.random.key(0)))


def count_params(config: ModelConfig) -> int:
    """Returns the exact number of parameters without allocating them."""
    return sum(leaf.size for leaf in jax.tree.leaves(boxed_shapes(config)))


def _check_call(config: ModelConfig, tokens: Int[Array, "B S"], loops: int) -> None:
    """Raises UserError if the number of loops or the length is invalid."""
    check_loops(config, loops)
    # Inside a local region, an array has only the positions of one device.
    length = whole_length(tokens.shape[1])
    if length > config.max_positions:
        raise UserError(f"{length} tokens are beyond model.max_positions={config.max_positions}")


def for_calls(model: LoopLM, loops: int) -> LoopLM:
    """Returns the model for callers of `loop_step` that run this number of loops. Only modulation depends on it."""
    modulated = model.config.time_signal is TimeSignal.MODULATION
    return model.clone(call_loops=loops) if modulated else model


def check_loops(config: ModelConfig, loops: int) -> None:
    """Raises UserError for a number of loops that the model cannot run."""
    if loops < 1:
        raise UserError(f"loops must be at least 1, not {loops}")
    if config.time_signal is TimeSignal.LEARNED and loops > config.time_rows:
        raise UserError(
            f"loops={loops} is beyond the {config.time_rows} rows of the model's learned time signal; "
            f"run at most {config.time_rows} loops"
        )
