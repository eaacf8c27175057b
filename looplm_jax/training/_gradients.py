"""Loss and gradients of a batch, accumulated over its microbatches and reduced over devices.

Either the compiler decides where gradients are summed over devices, which is in every loop of the model, or each device
accumulates its own gradients and they are reduced once per microbatch or step (`compute.reduce`).
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from looplm_jax.config import ComputeConfig, Gather, Reduce
from looplm_jax.data._packing import Batch
from looplm_jax.losses import Stage1Metrics
from looplm_jax.models._looplm import LoopLM, Params, copy_dtypes, gather_stacks, parameter_axes
from looplm_jax.sharding import all_gather, all_reduce, on_each_device, reduce_scatter, token_axes

Variables: TypeAlias = dict[str, Params]
# Sums over some tokens, divided by the number of unmasked tokens of the batch.
Sums: TypeAlias = tuple[Float[Array, ""], Stage1Metrics]

# A function of variables, a microbatch `[B, S]` and the number of unmasked tokens of the whole batch.
LossOf: TypeAlias = Callable[[Variables, Batch[Array], Float[Array, ""]], Sums]


def loss_and_gradients(
    loss_of: LossOf, model: LoopLM, moving: Params, frozen: Params, batch: Batch[Array]
) -> tuple[Sums, Params]:
    """Returns the loss, metrics and gradients of a batch.

    Args:
      loss_of: returns the loss and metrics of a microbatch.
      model: the model.
      moving: the parameters to differentiate, by top-level group.
      frozen: the other parameters.
      batch: the batch.

    Returns:
      Loss and metrics as means over unmasked tokens, and the gradients of `moving`.
    """
    count = jnp.sum(batch.loss_mask, dtype=jnp.float32)

    match when_reduced(model.compute):
        case Reduce.LOOP:
            return _reduced_by_the_compiler(loss_of, model, moving, frozen, batch, count)
        case when:
            return _reduced_once(loss_of, model, when, moving, frozen, batch, count)


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
    loss_of: LossOf, model: LoopLM, moving: Params, frozen: Params, batch: Batch[Array], count: Float[Array, ""]
) -> tuple[Sums, Params]:
    """Computes gradients with global arrays; the compiler inserts the reductions."""
    copies = gather_stacks(model, {**frozen, **moving}) if model.compute.gather is Gather.PER_STEP else {}

    def of_microbatch(microbatch: Batch[Array]) -> tuple[Sums, Params]:
        def loss(moving: Params) -> Sums:
            return loss_of({"params": {**frozen, **moving}, "gathered": copies}, microbatch, count)

        return jax.value_and_grad(loss, has_aux=True)(moving)

    return _sum_over_microbatches(of_microbatch, batch)


def _reduced_once(
    loss_of: LossOf,
    model: LoopLM,
    when: Reduce,
    moving: Params,
    frozen: Params,
    batch: Batch[Array],
    count: Float[Array, ""],
) -> tuple[Sums, Params]:
    """Computes gradients in a local region: each device accumulates its own, and one reduction sums them.

    The parameters that the model receives are zeros: their values are not read, because the model uses the all-gathered
    copies (`models._parameters`), and only their gradients matter.
    """
    axes, dtypes = parameter_axes(model.config), copy_dtypes(model)
    moving_axes = {name: axes[name] for name in moving}
    batch_axes = jax.tree.map(lambda _: (None, "batch", "sequence"), batch)

    # Gradients of a single microbatch have the dtype of the products; sums over microbatches need float32.
    sums_in = jax.tree.map(lambda own: own if when is Reduce.MICROBATCH else jnp.dtype(jnp.float32), dtypes)

    def on_device(params: Params, batch: Batch[Array], count: Array) -> tuple[Sums, Params]:
        copies = jax.tree.map(lambda shard, dtype, names: all_gather(shard.astype(dtype), names), params, dtypes, axes)

        def reduced(batch: Batch[Array]) -> tuple[Sums, Params]:
            # The barrier makes the zeros depend on the batch. Otherwise they would be one more array of the size of the
            # parameters that is shared by all microbatches and copied.
            zero, _ = jax.lax.optimization_barrier((jnp.zeros(()), batch.tokens))
            zeros = jax.tree.map(functools.partial(_filled, zero), copies, sums_in, axes)

            # The pullback adds to these references in place, so there is one array per parameter for all microbatches.
            accumulators = jax.tree.map(jax.new_ref, {name: zeros[name] for name in moving})

            def of_microbatch(microbatch: Batch[Array]) -> Sums:
                def loss(moving: Params) -> Sums:
                    return loss_of({"params": {**zeros, **moving}, "gathered": copies}, microbatch, count)

                value, pull_back, metrics = jax.vjp(loss, {name: zeros[name] for name in moving}, has_aux=True)
                cast(Any, pull_back).with_refs(accumulators)(jnp.ones_like(value))
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

    return on_each_device(on_device, (axes, batch_axes, ()), moving_axes)({**frozen, **moving}, batch, count)


def _filled(value: Float[Array, ""], like: Array, dtype: jnp.dtype, axes: PyTree) -> Array:
    """Returns an array like `like` that is filled with a traced value, in another dtype."""
    return nn.with_logical_constraint(jnp.broadcast_to(value.astype(dtype), like.shape), axes)


def _sum_over_microbatches(function: Callable[[Batch[Array]], PyTree], batch: Batch[Array]) -> PyTree:
    """Returns the sum of `function` over the microbatches of a batch."""
    first = jax.tree.map(lambda x: x[0], batch)
    # A single microbatch needs neither sums nor a scan.
    if batch.tokens.shape[0] == 1:
        return function(first)

    def add(total: PyTree, microbatch: Batch[Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first))
    return jax.lax.scan(add, zeros, batch)[0]
