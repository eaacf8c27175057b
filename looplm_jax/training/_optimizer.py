"""The optimizers, and the learning-rate schedule of a stage.

AdamW updates all parameters, or Adafactor does, or Muon updates the matrices of the shared stack and AdamW the rest. A
stacked parameter is one matrix for each layer, whose axes are distinguished by their logical names.
"""

import math
from typing import NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from looplm_jax.config import ModelConfig, OptimizerConfig, OptimizerKind, Schedule, Stage
from looplm_jax.models._looplm import Params, parameter_axes

_NOT_DECAYED = (
    *("scale", "bias"),
    # Diagonal injection, as in Parcae, the table of a learned time signal, and the matrices of modulation.
    *("log_decay", "step_bias", "input_map", "time_table", "time_map"),
)
_MUON_GROUP = "core"  # the shared stack
# The root mean square of Muon's updates, which is about that of AdamW's: one learning rate serves both (arXiv
# 2502.16982).
_MUON_RMS = 0.2

# The constants of Adafactor (arXiv 1804.04235, Section 9).
_ADDED_TO_SQUARES = 1e-30
_SMALLEST_SCALE = 1e-3  # of a parameter, so that parameters that start at zero move
_LARGEST_RMS = 1.0  # of an update, before the scale of its parameter


def make_optimizer(config: OptimizerConfig, axes: PyTree) -> optax.GradientTransformation:
    """Returns the optimizer with clipping by global norm, without its learning rate.

    The train step multiplies the updates by `-learning_rate`.

    Args:
      config: the optimizer.
      axes: the logical names of the axes of each parameter that is trained, by top-level group.
    """
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    match config.kind:
        case OptimizerKind.ADAMW:
            scaled = adam
        case OptimizerKind.ADAFACTOR:
            scaled = scale_by_adafactor(config.decay_exponent, axes)
        case OptimizerKind.MUON:
            scaled = _muon_and(adam, config.momentum, axes)

    # Clipping comes first, so that the moments see clipped gradients; the decay is decoupled from them (AdamW).
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scaled,
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def direction(
    config: OptimizerConfig, axes: PyTree, gradients: PyTree, state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """Returns the optimizer's updates before multiplication by the learning rate, and its next state."""
    # Optax raises a float to an integer power, which strict promotion rejects.
    with jax.numpy_dtype_promotion("standard"):
        return make_optimizer(config, axes).update(gradients, state, params)


def decayed(params: PyTree) -> PyTree:
    """Returns a tree of booleans: True for each parameter with weight decay.

    Scales of norms, biases, diagonal injections and time signals, identified by their names, have none.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) not in _NOT_DECAYED, params)


# Matrices


def axes_of(config: ModelConfig, params: Params) -> PyTree:
    """Returns the logical names of the axes of the parameters in these top-level groups."""
    axes = parameter_axes(config)
    return {name: axes[name] for name in params}


class Matrix(NamedTuple):
    """The axes of a parameter that are the rows and the columns of its matrices. Other axes count matrices."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


def matrix_of(names: PartitionSpec) -> Matrix | None:
    """Returns the matrix axes of a parameter with these logical axes, or None for vectors and scalars.

    The width of a head belongs to the axis of the heads: a projection to heads is one matrix.
    """
    groups: list[tuple[int, ...]] = []
    for axis in _own_axes(names):
        if names[axis] == "head_dim" and groups:
            groups[-1] += (axis,)
        else:
            groups.append((axis,))
    return Matrix(*groups) if len(groups) == 2 else None


def _own_axes(names: PartitionSpec) -> tuple[int, ...]:
    """Returns the axes of the parameter of one layer."""
    return tuple(axis for axis, name in enumerate(names) if name != "layers")


# Adafactor


@flax.struct.dataclass
class FactoredMoment:
    """The mean of squared gradients of a matrix, by its means over columns and over rows.

    Attributes:
      rows: the mean of each row; the axes of the parameter except those of the columns.
      columns: the mean of each column; the axes of the parameter except those of the rows.
    """

    rows: Float[Array, "..."]
    columns: Float[Array, "..."]


@flax.struct.dataclass
class AdafactorState:
    """The state of Adafactor.

    Attributes:
      count: the number of updates.
      moments: a `FactoredMoment` for each matrix, and an array like the parameter for each other parameter.
    """

    count: Int[Array, ""]
    moments: PyTree


def scale_by_adafactor(decay_exponent: float, axes: PyTree) -> optax.GradientTransformation:
    """Returns Adafactor without momentum (arXiv 1804.04235, Algorithms 4 and 5).

    The mean of squared gradients decays by `1 - t^-decay_exponent` at update t. The update of each matrix or vector is
    clipped to a root mean square of 1, and multiplied by that of the parameter, so the learning rate is relative.
    Optax's Adafactor would take the layers of a stack for one parameter, with one clip and one scale.

    Args:
      decay_exponent: the exponent of the decay.
      axes: the logical names of the axes of each parameter.
    """

    def init(params: PyTree) -> AdafactorState:
        # Boxed parameters have boxed moments, from which the shardings follow.
        return AdafactorState(count=jnp.zeros((), jnp.int32), moments=jax.tree.map(_first_moment, axes, params))

    def update(gradients: PyTree, state: optax.OptState, params: PyTree | None = None) -> tuple[PyTree, AdafactorState]:
        state = cast(AdafactorState, state)
        count = optax.safe_increment(state.count)
        kept = 1.0 - count.astype(jnp.float32) ** -decay_exponent

        def next_moment(names: PartitionSpec, gradient: Array, moment: PyTree) -> PyTree:
            return jax.tree.map(lambda old, new: kept * old + (1.0 - kept) * new, moment, _squares(names, gradient))

        moments = jax.tree.map(next_moment, axes, gradients, state.moments)
        updates = jax.tree.map(_adafactor_update, axes, gradients, moments, params)
        return updates, AdafactorState(count=count, moments=moments)

    return optax.GradientTransformation(init, update)


def _first_moment(names: PartitionSpec, param: PyTree) -> PyTree:
    """Returns the zero moment of a parameter, boxed with axis names if the parameter is."""
    shape, matrix = jnp.shape(nn.meta.unbox(param)), matrix_of(names)

    def zeros(without: tuple[int, ...]) -> PyTree:
        kept = [axis for axis in range(len(shape)) if axis not in without]
        array = jnp.zeros([shape[axis] for axis in kept], jnp.float32)
        boxed = isinstance(param, nn.meta.AxisMetadata)
        return nn.LogicallyPartitioned(array, tuple(names[axis] for axis in kept)) if boxed else array

    return zeros(()) if matrix is None else FactoredMoment(rows=zeros(matrix.columns), columns=zeros(matrix.rows))


def _squares(names: PartitionSpec, gradient: Float[Array, "..."]) -> PyTree:
    """Returns the squares of a gradient as a moment holds them."""
    squares, matrix = jnp.square(gradient) + _ADDED_TO_SQUARES, matrix_of(names)
    if matrix is None:
        return squares
    return FactoredMoment(rows=jnp.mean(squares, matrix.columns), columns=jnp.mean(squares, matrix.rows))


def _adafactor_update(
    names: PartitionSpec, gradient: Float[Array, "*P"], moment: PyTree, param: Float[Array, "*P"]
) -> Float[Array, "*P"]:
    """Returns the update of a parameter, before multiplication by the learning rate."""
    matrix, own = matrix_of(names), _own_axes(names)
    if matrix is None:
        scaled = gradient * jax.lax.rsqrt(moment)
    else:
        # V = R C / mean(R). The two factors are applied one after the other: their product may underflow.
        rows = jnp.expand_dims(moment.rows, matrix.columns)
        columns = jnp.expand_dims(moment.columns, matrix.rows)
        relative = rows / jnp.mean(rows, matrix.rows, keepdims=True)
        scaled = gradient * jax.lax.rsqrt(relative) * jax.lax.rsqrt(columns)

    clipped = scaled / jnp.maximum(1.0, _rms(scaled, own) / _LARGEST_RMS)
    return clipped * jnp.maximum(_SMALLEST_SCALE, _rms(param, own))


def _rms(x: Float[Array, "*P"], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the root mean square over some axes, which are kept with size 1."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axes, keepdims=True))


# Muon


def _muon_and(rest: optax.GradientTransformation, momentum: float, axes: PyTree) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the shared stack, and the transformation `rest` for all other parameters."""

    def label(path: tuple, names: PartitionSpec) -> str:
        return "muon" if path[0].key == _MUON_GROUP and matrix_of(names) is not None else "rest"

    labels = jax.tree_util.tree_map_with_path(label, axes)

    # Optax gives each transformation the whole tree, with masks in the places of the parameters of the other.
    def dimensions(names: PartitionSpec, label: str) -> optax.MaskedNode | optax.contrib.MuonDimensionNumbers:
        matrix = matrix_of(names)
        if label == "rest" or matrix is None:
            return optax.MaskedNode()
        return optax.contrib.MuonDimensionNumbers(reduction_axis=matrix.rows, output_axis=matrix.columns)

    matrices = jax.tree.map(dimensions, axes, labels)
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=matrices),
        optax.stateless(lambda updates, _: jax.tree.map(_with_rms, axes, updates)),
    )
    return optax.partition({"muon": muon, "rest": rest}, labels)


def _with_rms(names: PartitionSpec, update: PyTree) -> PyTree:
    """Returns an orthogonal update scaled to the root mean square of AdamW's; a mask as it is."""
    matrix = matrix_of(names)
    if isinstance(update, optax.MaskedNode) or matrix is None:
        return update
    # With singular values of 1, the root mean square of the entries is one over the root of the longer side.
    longer = max(math.prod(update.shape[axis] for axis in side) for side in matrix)
    return update * (_MUON_RMS * math.sqrt(longer))


# Learning rate


def learning_rate(stage: Stage, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the learning rate of a step: a linear warm-up to the peak, followed by the schedule of the stage.

    The schedules of Optax differ from these in the last bits, so a run that was saved with these would not resume
    exactly, and their cosine does not end at exactly the final rate.

    The last step of the warm-up has the peak rate. The last step of a cosine or a decay has the final rate. A cosine
    begins at the last step of the warm-up, or at the first step if there is no warm-up. A decay over N steps lowers the
    rate by an N-th of the difference in each of the stage's last N steps.

    Args:
      stage: the stage.
      step: the step within the stage, counted from 0.
    """
    step, last = step.astype(jnp.float32), stage.steps - 1

    warmup = jnp.minimum(1.0, (step + 1.0) / max(stage.warmup_steps, 1))
    peak, final = stage.learning_rate, stage.final_learning_rate

    match stage.schedule:
        case Schedule.CONSTANT:
            rate = jnp.full_like(step, peak)
        case Schedule.COSINE:
            done = _fraction(step, max(stage.warmup_steps - 1, 0), last)
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            rate = peak * left + final * (1.0 - left)  # exact at both ends
        case Schedule.WARMUP_STABLE_DECAY:
            done = _fraction(step, last - stage.decay_steps, last)
            rate = peak * (1.0 - done) + final * done

    return warmup * rate


def _fraction(step: Float[Array, ""], first: int, last: int) -> Float[Array, ""]:
    """Returns the fraction of the distance from step `first` to `last` that is done at `step`, between 0 and 1.

    It is 0 before `first`, and if `last` is not after `first`.
    """
    return jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)


def _leaf_name(path: tuple) -> str:
    # Inside a box with axis names the last key is a field of the box. The parameter's name is the last dictionary key.
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return str(names[-1]) if names else ""
