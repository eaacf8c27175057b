"""The AdamW optimizer, and the learning-rate schedule of a stage."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from looplm_jax.config import OptimizerConfig, Schedule, Stage

_NOT_DECAYED = (
    *("scale", "bias"),
    # Diagonal injection, as in Parcae, and the table of a learned time signal.
    *("log_decay", "step_bias", "input_map", "time_table"),
)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns AdamW with clipping by global norm, without its learning rate.

    The train step multiplies the updates by `-learning_rate`.
    """
    # Clipping comes first, so that the moments see clipped gradients; the decay is decoupled from them (AdamW).
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def direction(
    config: OptimizerConfig, gradients: PyTree, state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """Returns AdamW's updates before multiplication by the learning rate, and its next state."""
    # Optax raises a float to an integer power, which strict promotion rejects.
    with jax.numpy_dtype_promotion("standard"):
        return adamw(config).update(gradients, state, params)


def decayed(params: PyTree) -> PyTree:
    """Returns a tree of booleans: True for each parameter with weight decay.

    Scales of norms, biases, diagonal injections and time signals, identified by their names, have none.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) not in _NOT_DECAYED, params)


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
