"""Loss and gradients of a batch, accumulated over its microbatches and reduced over devices.

Either the compiler decides where gradients are summed over devices, which is in every loop of the model, or each device
accumulates its own gradients and they are reduced once per microbatch or step (`compute.reduce`).
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt32

from looplm_jax.config import ComputeConfig, Gather, Injection, ModelConfig, Reduce, TimeSignal
from looplm_jax.losses import LoopRPTMetrics, Stage1Metrics
from looplm_jax.models._looplm import LoopLM, Params, copy_dtypes, gather_stacks, parameter_axes
from looplm_jax.sharding import all_gather, all_reduce, on_each_device, reduce_scatter, token_axes


@flax.struct.dataclass
class ObjectiveMetrics:
    """The metrics of an objective: losses per loop and statistics of exits, and those of reinforcement learning.

    `means` has the others, by their names in `metrics.jsonl`.
    """

    exits: Stage1Metrics | None
    looprpt: LoopRPTMetrics | None = None
    policy: "PolicyMetrics | None" = None
    means: dict[str, Float[Array, ""]] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class PolicyMetrics:
    """The metrics of a policy gradient.

    Attributes:
      loss: the aggregated term of the rewards.
      kl: that of the divergence.
      clipped: the fraction of clipped tokens.
      gaps: the largest difference between log-probabilities of rollout and replay in each of R rows, nats.
    """

    loss: Float[Array, ""]
    kl: Float[Array, ""]
    clipped: Float[Array, ""]
    gaps: Float[Array, "R"]


@flax.struct.dataclass
class Totals:
    """Values of a whole batch that the loss of each of its microbatches needs.

    Attributes:
      count: the number of tokens that are learned, by which the sum of their losses is divided.
      tokens: the number of unmasked tokens. LoopRPT learns only some of them.
      key: the raw random key of the step, or None if nothing is drawn.
    """

    count: Float[Array, ""]
    tokens: Float[Array, ""]
    key: UInt32[Array, "2"] | None = None


Variables: TypeAlias = dict[str, Params]
# A batch, or a tree of such arrays of tokens: `[A, ..., B, S]`, or without A for a microbatch.
Examples: TypeAlias = PyTree
# Sums over some tokens, divided by the counts of the batch.
Sums: TypeAlias = tuple[Float[Array, ""], ObjectiveMetrics]

# A function of variables, a microbatch and the totals of the batch.
LossOf: TypeAlias = Callable[[Variables, Examples, Totals], Sums]


def loss_and_gradients(
    loss_of: LossOf,
    model: LoopLM,
    moving: Params,
    frozen: Params,
    batch: Examples,
    totals: Totals,
    *,
    second_order: bool = False,
) -> tuple[Sums, Params]:
    """Returns the loss, metrics and gradients of a batch.

    Args:
      loss_of: returns the loss and metrics of a microbatch.
      model: the model.
      moving: the parameters to differentiate, by top-level group.
      frozen: the other parameters.
      batch: the batch.
      totals: the totals of the batch.
      second_order: whether the loss depends on derivatives of the model.

    Returns:
      Loss and metrics as means, and the gradients of `moving`.
    """
    match when_reduced(model.compute):
        case Reduce.LOOP:
            return _reduced_by_the_compiler(loss_of, model, moving, frozen, batch, totals)
        case when:
            return _reduced_once(loss_of, model, when, moving, frozen, batch, totals, second_order)


def when_reduced(compute: ComputeConfig) -> Reduce:
    """Returns when gradients are summed over the devices of the current mesh; never `auto`."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape[axis] == 1 for axis in token_axes()):
        return Reduce.LOOP  # all devices have the same tokens: nothing to reduce

    if compute.reduce is not Reduce.AUTO:
        return compute.reduce

    # A device then accumulates whole gradients, which take more memory than the shards where parameters are sharded.
    return Reduce.STEP if mesh.shape["fsdp"] * mesh.shape["context"] == 1 else Reduce.LOOP


def _reduced_by_the_compiler(
    loss_of: LossOf, model: LoopLM, moving: Params, frozen: Params, batch: Examples, totals: Totals
) -> tuple[Sums, Params]:
    """Computes gradients with global arrays; the compiler inserts the reductions."""
    copies = gather_stacks(model, {**frozen, **moving}) if model.compute.gather is Gather.PER_STEP else {}

    def of_microbatch(microbatch: Examples) -> tuple[Sums, Params]:
        def loss(moving: Params) -> Sums:
            return loss_of({"params": {**frozen, **moving}, "gathered": copies}, microbatch, totals)

        return jax.value_and_grad(loss, has_aux=True)(moving)

    return _sum_over_microbatches(of_microbatch, batch)


def _scans_a_differentiated_value(config: ModelConfig) -> bool:
    """Whether loops or layers read the injected input, or the embedded time, beside their parameters."""
    return config.injection is not Injection.NONE or config.time_signal is TimeSignal.MODULATION


def _reduced_once(
    loss_of: LossOf,
    model: LoopLM,
    when: Reduce,
    moving: Params,
    frozen: Params,
    batch: Examples,
    totals: Totals,
    second_order: bool,
) -> tuple[Sums, Params]:
    """Computes gradients in a local region: each device accumulates its own, and one reduction sums them.

    The parameters that the model receives are zeros: their values are not read, because the model uses the all-gathered
    copies (`models._parameters`), and only their gradients matter.
    """
    axes, dtypes = parameter_axes(model.config), copy_dtypes(model)
    moving_axes = {name: axes[name] for name in moving}
    batch_axes = jax.tree.map(lambda leaf: (*[None] * (leaf.ndim - 2), "batch", "sequence"), batch)

    # Gradients of a single microbatch have the dtype of the products; sums over microbatches need float32.
    sums_in = jax.tree.map(lambda own: own if when is Reduce.MICROBATCH else jnp.dtype(jnp.float32), dtypes)

    def on_device(params: Params, batch: Examples, totals: Totals) -> tuple[Sums, Params]:
        copies = jax.tree.map(lambda shard, dtype, names: all_gather(shard.astype(dtype), names), params, dtypes, axes)

        def reduced(batch: Examples) -> tuple[Sums, Params]:
            # The barrier makes the zeros depend on the batch. Otherwise they would be one more array of the size of the
            # parameters that is shared by all microbatches and copied.
            zero, _ = jax.lax.optimization_barrier((jnp.zeros(()), jax.tree.leaves(batch)[0]))
            zeros = jax.tree.map(functools.partial(_filled, zero), copies, sums_in, axes)

            # The pullback adds to these references in place, so there is one array per parameter for all microbatches.
            accumulators = jax.tree.map(jax.new_ref, {name: zeros[name] for name in moving})

            def of_microbatch(microbatch: Examples) -> Sums:
                def loss(moving: Params) -> Sums:
                    return loss_of({"params": {**zeros, **moving}, "gathered": copies}, microbatch, totals)

                value, pull_back, metrics = jax.vjp(loss, {name: zeros[name] for name in moving}, has_aux=True)
                if not (second_order or _scans_a_differentiated_value(model.config)):
                    cast(Any, pull_back).with_refs(accumulators)(jnp.ones_like(value))
                else:
                    # JAX (0.10) confuses the references of a scan that reads a differentiated value beside its
                    # parameters, here also derivatives. A second copy of the gradients is the price.
                    (own,) = pull_back(jnp.ones_like(value))
                    jax.tree.map(_add_in_place, accumulators, own)
                return value, metrics

            sums = _sum_over_microbatches(of_microbatch, batch)
            gradients = jax.tree.map(
                lambda ref, names: reduce_scatter(jax.freeze(ref), names), accumulators, moving_axes
            )
            return sums, jax.tree.map(lambda x: x.astype(jnp.float32), gradients)

        if when is Reduce.STEP:
            sums, gradients = reduced(batch)
        else:
            sums, gradients = _sum_over_microbatches(lambda one: reduced(jax.tree.map(lambda x: x[None], one)), batch)

        return all_reduce(sums), gradients

    return on_each_device(on_device, (axes, batch_axes, ()), moving_axes)({**frozen, **moving}, batch, totals)


def _filled(value: Float[Array, ""], like: Array, dtype: jnp.dtype, axes: PyTree) -> Array:
    """Returns an array like `like` that is filled with a traced value, in another dtype."""
    return nn.with_logical_constraint(jnp.broadcast_to(value.astype(dtype), like.shape), axes)


def _add_in_place(reference: Any, gradient: Array) -> None:
    reference[...] += gradient


def _sum_over_microbatches(function: Callable[[Examples], PyTree], batch: Examples) -> PyTree:
    """Returns the sum of `function` over the microbatches of a batch."""
    first = jax.tree.map(lambda x: x[0], batch)
    # A single microbatch needs neither sums nor a scan.
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return function(first)

    def add(total: PyTree, microbatch: Examples) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first))
    return jax.lax.scan(add, zeros, batch)[0]


def for_each_microbatch(function: Callable[[Examples], PyTree], batch: Examples) -> PyTree:
    """Returns the results of `function` for the microbatches of a batch, along a new leading axis."""
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], batch)))
    return jax.lax.map(function, batch)
